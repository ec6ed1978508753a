"""This machine as a `Device`: what Linux says of its cores, memory and limits."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from pathlib import Path, PurePosixPath

from edgekit.device import FEATURES, Arch, Cluster, Device
from edgekit.errors import DeviceError

# Arm's part numbers (implementer 0x41). Source: Linux, arch/arm64/include/asm/cputype.h.
_LITTLE_PARTS = {
    "0xd03": "cortex-a53", "0xd04": "cortex-a35", "0xd05": "cortex-a55", "0xd46": "cortex-a510", "0xd80": "cortex-a520",
}  # fmt: skip
_BIG_PARTS = {
    "0xd07": "cortex-a57", "0xd08": "cortex-a72", "0xd09": "cortex-a73", "0xd0a": "cortex-a75", "0xd0b": "cortex-a76",
    "0xd0d": "cortex-a77", "0xd41": "cortex-a78", "0xd42": "cortex-a78ae", "0xd44": "cortex-x1", "0xd47": "cortex-a710",
    "0xd48": "cortex-x2", "0xd4d": "cortex-a715", "0xd4e": "cortex-x3", "0xd81": "cortex-a720", "0xd82": "cortex-x4",
    "0xd0c": "neoverse-n1", "0xd40": "neoverse-v1", "0xd49": "neoverse-n2", "0xd4f": "neoverse-v2",
}  # fmt: skip


def host_device(root: Path = Path("/")) -> Device:
    """This machine as Linux describes it under `root`, within the limits that hold for this process.

    CPUs outside the process's affinity are not counted; memory and CPU are bounded by the cgroups above it. Without
    /proc the core is "unknown", and only the number of CPUs is given.

    Raises DeviceError: a machine that is neither x86_64 nor aarch64.
    """
    cpus = _cpus(root)
    model = read(root / "proc/device-tree/model").strip("\0\n ")
    title = model or next((cpu["model name"] for cpu in cpus if "model name" in cpu), "this machine")
    total = re.search(r"MemTotal:\s+(\d+) kB", read(root / "proc/meminfo"))
    limits = [memory_limit(folder) for folder in cgroups(root, "memory")]
    rams = [*([int(total[1]) * 1024] if total else []), *(limit for limit in limits if limit is not None)]
    shares = [share for folder in cgroups(root, "cpu") if (share := _cpu_share(folder)) is not None]
    return Device(
        name="host",
        title=title,
        arch=_arch(cpus),
        clusters=_clusters(cpus, root),
        ram_bytes=min(rams, default=None),
        page_kb=os.sysconf("SC_PAGE_SIZE") // 1024,
        logical_cores=len(cpus) or os.cpu_count(),
        cpu_limit=min(shares, default=None),
        sources={
            "clusters": "/proc/cpuinfo, /sys/devices/system/cpu",
            "logical_cores": "/proc/cpuinfo, /proc/self/status",
            "ram_bytes": "/proc/meminfo, cgroup memory limit",
            "page_kb": "sysconf",
            "cpu_limit": "cgroup cpu quota",
        },
    )


def read(path: Path) -> str:
    """The text of a file of /proc or /sys, "" where it is absent or may not be read."""
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):
        return ""


def cgroups(root: Path, controller: str) -> list[Path]:
    """The cgroup folders that may bound this process's `controller` ("memory", "cpu"): its own, then those above it.

    Versions 2 and 1 are both followed. In a container some of the folders may not exist; the mounted root always does.
    """
    folders: list[Path] = []
    for names, path in re.findall(r"^\d+:([^:\n]*):/*(.*)$", read(root / "proc/self/cgroup"), re.MULTILINE):
        if names and controller not in names.split(","):
            continue
        own = PurePosixPath("" if ".." in path else path)
        folders += [root / "sys/fs/cgroup" / names / level for level in (own, *own.parents)]
    return folders


def memory_limit(cgroup: Path) -> int | None:
    """The tightest memory limit of one cgroup in bytes (v2 `max` and `high`, v1 `limit_in_bytes`); None for none."""
    texts = [read(cgroup / f"memory.{name}").strip() for name in ("max", "high", "limit_in_bytes")]
    limits = [int(text) for text in texts if text.isdecimal()]
    return min((limit for limit in limits if 0 < limit < 2**60), default=None)  # v1 says "none" as almost 2^63


def _cpu_share(cgroup: Path) -> float | None:
    """The CPUs that one cgroup may use, 1.5 for a quota of 150 ms in periods of 100 ms; None for no quota."""
    quota, _, period = read(cgroup / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (read(cgroup / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(quota) and int(period) else None


def _cpus(root: Path) -> list[dict[str, str]]:
    """What /proc/cpuinfo says of each CPU that this process may run on."""
    affinity = re.search(r"Cpus_allowed_list:\s*(\S+)", read(root / "proc/self/status"))
    blocks = [
        dict(re.findall(r"^([^:\n]+?)[ \t]*:[ \t]*(.*)$", block, re.MULTILINE))
        for block in read(root / "proc/cpuinfo").split("\n\n")
    ]
    cpus = [block for block in blocks if block.get("processor", "").isdecimal()]
    return [cpu for cpu in cpus if not affinity or int(cpu["processor"]) in _cpu_list(affinity[1])]


def _cpu_list(text: str) -> set[int]:
    """The numbers in the kernel's list format: `0-3,8` is 0, 1, 2, 3 and 8."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return {cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def _arch(cpus: list[dict[str, str]]) -> Arch:
    """The architecture by the words of /proc/cpuinfo, else by what the operating system calls it."""
    if any("CPU implementer" in cpu for cpu in cpus):
        return "aarch64"
    if any("vendor_id" in cpu for cpu in cpus):
        return "x86_64"
    known: dict[str, Arch] = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
    machine = platform.machine().lower()
    if machine not in known:
        raise DeviceError(f"edgekit runs on x86_64 and aarch64: this machine is {machine!r}; use a 64-bit system")
    return known[machine]


def _clusters(cpus: list[dict[str, str]], root: Path) -> tuple[Cluster, ...]:
    """Group CPUs by core, clock and features, and count each group's physical cores."""
    little = _little_cpus(cpus, root)
    cores: dict[Cluster, set[tuple[str, str]]] = {}
    for cpu in cpus:
        khz = read(root / f"sys/devices/system/cpu/cpu{cpu['processor']}/cpufreq/cpuinfo_max_freq").strip()
        flags = (cpu.get("flags") or cpu.get("Features", "")).split()
        isa = tuple(feature for flag, feature in FEATURES[_arch([cpu])].items() if flag in flags)
        kind = Cluster(
            core=_core_name(cpu),
            mhz=int(khz) / 1000 if khz.isdecimal() and int(khz) else None,
            isa=isa,
            little=cpu["processor"] in little,
        )
        # Without core numbers every CPU counts as a core: so it is on Arm, and in many virtual machines.
        core = (cpu.get("physical id", ""), cpu["core id"]) if "core id" in cpu else ("", cpu["processor"])
        cores.setdefault(kind, set()).add(core)
    found = [dataclasses.replace(kind, count=len(numbers)) for kind, numbers in cores.items()]
    return tuple(found) or (Cluster("unknown", os.cpu_count()),)


def _little_cpus(cpus: list[dict[str, str]], root: Path) -> set[str]:
    """Efficiency cores: known as such, listed as Intel's E-cores, or of under half the best core's capacity.

    When all of them are, none is: little means slower than others beside it.
    """
    e_cores = _cpu_list(read(root / "sys/devices/cpu_atom/cpus"))
    names = [cpu["processor"] for cpu in cpus]
    texts = [read(root / f"sys/devices/system/cpu/cpu{name}/cpu_capacity").strip() for name in names]
    capacity = {name: int(text) for name, text in zip(names, texts, strict=True) if text.isdecimal()}
    best = max(capacity.values(), default=0)
    little = {name for name in names if int(name) in e_cores or 2 * capacity.get(name, best) < best}
    little |= {cpu["processor"] for cpu in cpus if _core_name(cpu) in _LITTLE_PARTS.values()}
    return little if len(little) < len(cpus) else set()


def _core_name(cpu: dict[str, str]) -> str:
    implementer, part = cpu.get("CPU implementer"), cpu.get("CPU part", "")
    if implementer is None:
        return cpu.get("model name", "unknown")
    name = (_LITTLE_PARTS | _BIG_PARTS).get(part) if implementer == "0x41" else None
    return name or f"{implementer}:{part}"
