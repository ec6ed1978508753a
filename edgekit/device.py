"""Devices: frozen facts about a machine, from `devices/*.toml`; `edgekit.host` detects this machine.

Code asks a device for a capability, `device.has("dotprod")`, and never compares its name. What is not known is None or
absent, never a guess; `sources` says where every number comes from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from edgekit.errors import UserError
from edgekit.schema import nearest, parse

Arch = Literal["x86_64", "aarch64"]
X86Feature = Literal["avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "amx_int8"]
ArmFeature = Literal["neon", "dotprod", "i8mm", "fp16", "bf16", "lse", "sve", "sve2"]
Feature = Literal[X86Feature, ArmFeature]

# What Linux calls a feature in /proc/cpuinfo -> what we call it.
FEATURES: dict[Arch, dict[str, Feature]] = {
    "x86_64": {name: name for name in get_args(X86Feature)},
    "aarch64": {
        "asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16", "atomics": "lse",
        "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Equal cores. `count` is of physical cores, `mhz` their highest clock.

    `little` marks efficiency cores (LITTLE, E-cores) beside faster ones: they would hold up a team of threads.
    """

    core: str
    count: int | None = None
    mhz: float | None = None
    isa: tuple[Feature, ...] = ()
    little: bool = False


@dataclass(frozen=True)
class Npu:
    """A neural accelerator: `tops` tera-operations a second at `dtype`, as the vendor states them.

    `provider` is whose graphs it runs, of `--target npu-...`. A Hexagon has `htp_arch`, its version, and `soc_model`,
    the number that Qualcomm's compiler knows the chip by.
    """

    name: str
    tops: float
    dtype: str
    provider: Literal["qnn", "openvino"] | None = None
    htp_arch: int | None = None
    soc_model: int | None = None


@dataclass(frozen=True)
class Device:
    """What is known of a machine.

    `ram_bytes` is what one machine has (or may use, in a container); `ram_options_gb` the sizes a board is sold with.
    `bandwidth_read_gbs` maps a thread count to the measured read bandwidth; `bandwidth_decode_gbs` is the bandwidth
    that explains published decode speeds. `power_source` names the sensor that edgekit can read, `power_coverage` what
    that sensor sees, or why there is none. `cpu_limit` is a container's share in CPUs. `sources` has an entry for each
    numeric fact under its key (`clusters.mhz`, `npu.tops`) or the key of the table around it (`clusters`).

    Raises UserError: a number that is not above zero, no cluster, or only little ones, a feature of another arch.
    """

    name: str
    title: str
    arch: Arch
    clusters: tuple[Cluster, ...]
    ram_bytes: int | None = None
    ram_options_gb: tuple[float, ...] = ()
    bandwidth_peak_gbs: float | None = None
    bandwidth_decode_gbs: float | None = None
    bandwidth_read_gbs: dict[str, float] = field(default_factory=dict)
    page_kb: int | None = None
    logical_cores: int | None = None
    cpu_limit: float | None = None
    power_source: str | None = None
    power_coverage: str | None = None
    npu: Npu | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, number in numbers(dataclasses.asdict(self)):
            if not 0 < number < math.inf:
                raise UserError(f"{key} must be above zero: got {number}; leave out what is not known")
        for key in self.bandwidth_read_gbs:
            if not re.fullmatch("[1-9][0-9]{0,3}", key):
                raise UserError(f"bandwidth_read_gbs is keyed by thread count: got {key!r}; use 1, 2, 4 ...")
        if all(cluster.little for cluster in self.clusters):
            raise UserError("a device needs a cluster that is not little, which means slower than another one")
        known = set(FEATURES[self.arch].values())
        for feature in {feature for cluster in self.clusters for feature in cluster.isa} - known:
            raise UserError(f"isa must be of {self.arch}: got {feature!r}{nearest(feature, known)}")

    @property
    def isa(self) -> frozenset[Feature]:
        """The features that every core has, so that code which needs them may run on any."""
        return frozenset.intersection(*(frozenset(cluster.isa) for cluster in self.clusters))

    def has(self, feature: Feature) -> bool:
        """Whether every core has the feature."""
        return feature in self.isa

    @property
    def threads(self) -> int | None:
        """How many threads to compute with: one a physical core, big cores only, within `cpu_limit`; at least 1.

        None when the number of cores is not known. A quota of 1.5 CPUs gives 1: a second thread would be stopped for
        half of every period, and the first would wait for it.
        """
        cores = 0
        for cluster in self.clusters:
            if cluster.count is None:
                return None
            cores += 0 if cluster.little else cluster.count
        return cores if self.cpu_limit is None else max(1, min(cores, int(self.cpu_limit)))

    def read_gbs(self, threads: int) -> float | None:
        """Measured read bandwidth at `threads`, or at the nearest smaller count that was measured; None if neither."""
        known = [int(key) for key in self.bandwidth_read_gbs if int(key) <= threads]
        return self.bandwidth_read_gbs[str(max(known))] if known else None

    @property
    def decode_threads(self) -> int | None:
        """How many threads to decode with: the most that still read memory at 90 % of the best rate that was measured.

        More would wait for each other at the memory. None where no rates are known.
        """
        rates = {int(threads): rate for threads, rate in self.bandwidth_read_gbs.items()}
        good = [threads for threads, rate in rates.items() if rate >= 0.9 * max(rates.values())]
        return max(good, default=None)

    def fingerprint(self) -> dict[str, str]:
        """The facts that must agree for two reports to be comparable, for `Report.machine`."""
        cores = " + ".join(f"{cluster.count or '?'} x {cluster.core}" for cluster in self.clusters)
        facts = {"device": self.title, "arch": self.arch, "cores": cores, "isa": " ".join(sorted(self.isa))}
        if self.ram_bytes:
            facts["ram"] = f"{self.ram_bytes / 1e9:.1f} GB"
        if self.cpu_limit:
            facts["cpu limit"] = f"{self.cpu_limit:g}"
        return facts

    def to_toml(self) -> str:
        """The device as a file that `load_device` reads back to an equal one."""
        return _toml(dataclasses.asdict(self))


def numbers(facts: object, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number in the nested tables of a device with its key: `clusters.mhz`, `bandwidth_read_gbs.2`."""
    if isinstance(facts, Mapping):
        for name, inner in facts.items():
            yield from numbers(inner, f"{key}.{name}" if key else name)
    elif isinstance(facts, tuple):
        for inner in facts:
            yield from numbers(inner, key)
    elif isinstance(facts, (int, float)) and not isinstance(facts, bool):
        yield key, facts


def _toml(facts: Mapping[str, object], table: str = "") -> str:
    """Plain values first, then tables, then arrays of tables; what is None, False or empty is left out."""
    lines, tables = [], []
    for key, value in facts.items():
        name = key if re.fullmatch("[A-Za-z0-9_-]+", key) else _quote(key)
        if value in (None, False, (), {}):
            continue
        if isinstance(value, Mapping):
            tables.append(f"\n[{name}]\n{_toml(value)}")
        elif isinstance(value, tuple) and isinstance(value[0], Mapping):
            tables += [f"\n[[{name}]]\n{_toml(item)}" for item in value]
        else:
            items = value if isinstance(value, tuple) else (value,)
            text = ", ".join(_quote(item) if isinstance(item, str) else json.dumps(item) for item in items)
            lines.append(f"{name} = [{text}]" if isinstance(value, tuple) else f"{name} = {text}")
    return "".join(line + "\n" for line in lines) + "".join(tables)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def known_devices() -> tuple[str, ...]:
    """The names that `load_device` knows, sorted."""
    return tuple(sorted(path.stem for path in devices_folder().glob("*.toml")))


def load_device(name_or_path: str | Path) -> Device:
    """A known device by its name, or one from a TOML file by its path (it ends in `.toml` or holds a separator).

    Raises UserError: no such device or file, or a file that breaks a rule of `Device`.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and len(path.parts) == 1:
        if path.name not in known_devices():
            raise UserError(f"no device is called {path.name!r}{nearest(path.name, known_devices())}")
        path = devices_folder() / f"{path.name}.toml"
    try:
        return parse(Device, tomllib.loads(path.read_text(encoding="utf-8")), where=str(path))
    except OSError as problem:
        raise UserError(f"a device file must be readable: {path} ({problem.strerror})") from problem
    except (ValueError, OverflowError, RecursionError) as problem:
        raise UserError(f"a device file must be TOML: {path}: {problem}") from problem


def devices_folder() -> Path:
    """`devices/` lies inside the installed package, and beside it in a source checkout."""
    here = Path(__file__).parent
    return here / "devices" if (here / "devices").is_dir() else here.parent / "devices"
