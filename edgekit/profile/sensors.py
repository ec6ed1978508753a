"""Power sensors that a machine has built in: RAPL, the Raspberry Pi 5's PMIC, Jetson's INA3221, hwmon, batteries.

`find_power` takes the first that works, and says of each other why it does not. All of them read below a root, or
through a command, that tests replace. A reading that is no number is NaN; a file that vanishes is a SensorError.
Sources: Linux, power/powercap/powercap.rst, hwmon/sysfs-interface.rst, hwmon/ina3221.rst, ABI/testing/
sysfs-class-power; Intel CVE-2020-8694 for the permissions; Raspberry Pi, vcgencmd.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import UserError
from edgekit.profile.conditions import Command, run_command
from edgekit.profile.meters import powermetrics
from edgekit.profile.power import PowerSource, SensorError, Source
from edgekit.schema import nearest

# The rails whose voltage and current the PMIC both knows. EXT5V and BATT have no current.
_PMIC_LINE = re.compile(r"^\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=(-?[\d.]+|nan)[AV]\s*$", re.M | re.I)
# Inputs that the other rails are fed from.
_JETSON_INPUTS = ("VDD_IN", "POM_5V_IN", "5V_IN")


@dataclass(frozen=True)
class Found:
    """The source to use, or None; and why each other one is not it."""

    source: PowerSource | None
    reasons: tuple[str, ...]

    @property
    def reason(self) -> str:
        return "no sensor: " + "; ".join(self.reasons)


def rapl(root: Path, command: Command) -> Source | str:
    """Intel's and AMD's counters of the processor packages: only the outermost domains, for inner ones lie in them."""
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
    packages = [zone for zone in zones if re.fullmatch(r"intel-rapl:\d+", zone.name) and _word(zone / "name") != "psys"]
    if not packages:
        return "no intel-rapl domain in /sys/class/powercap: virtual machines and most boards have none"
    try:
        for package in packages:
            (package / "energy_uj").read_text()
    except PermissionError:
        return "energy_uj may be read by root only: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
    except OSError as problem:
        return f"energy_uj cannot be read: {problem.strerror}"
    inner = sorted({_word(zone / "name") for zone in zones if zone.name.count(":") == 2} - {""})
    wraps = tuple(_number(package / "max_energy_range_uj", 1e6) for package in packages)
    contains = f", which contain {', '.join(inner)}" if inner else ""
    return Source(
        name="rapl",
        rails=tuple(_word(package / "name") or package.name for package in packages),
        coverage=f"processor packages{contains}; no board, disk, fan or supply loss",
        reader=_files([package / "energy_uj" for package in packages], 1e6),
        wraps=tuple(wrap if math.isfinite(wrap) and wrap > 0 else math.inf for wrap in wraps),
    )


def pmic(root: Path, command: Command) -> Source | str:
    """The Raspberry Pi 5's power chip, rail by rail."""
    return _pmic(command, "pmic", "measured", lambda watts: watts)


def pmic_board(root: Path, command: Command) -> Source | str:
    """The whole board, by a regression that others published for one board: an estimate, only when asked for."""
    return _pmic(command, "pmic-board", "estimated", lambda watts: (1.1451 * math.fsum(watts) + 0.5879,))


def jetson(root: Path, command: Command) -> Source | str:
    """The INA3221 monitors of a Jetson: the input alone where it is measured, else all rails, which do not overlap."""
    rails: dict[str, tuple[Path, Path]] = {}
    for current in sorted((root / "sys/bus/i2c/drivers").glob("ina3221*/*/hwmon/hwmon*/curr*_input")):
        number = re.sub(r"\D", "", current.name)
        label = _word(current.with_name(f"in{number}_label")) or _word(current.with_name(f"curr{number}_label"))
        rails[label or f"{current.parent.name}/{number}"] = (current.with_name(f"in{number}_input"), current)
    if not rails:
        return "no INA3221 under /sys/bus/i2c/drivers: this is no Jetson"
    inputs = {label: files for label, files in rails.items() if label in _JETSON_INPUTS}
    used = inputs or rails
    volts, amperes = (_files([files[index] for files in used.values()], 1e3) for index in (0, 1))
    return _tried(
        Source(
            name="jetson",
            rails=tuple(used),
            coverage="the module's input, which contains the other rails" if inputs else "the module's measured rails",
            reader=lambda: tuple(volt * ampere for volt, ampere in zip(volts(), amperes(), strict=True)),
        )
    )


def hwmon(root: Path, command: Command) -> Source | str:
    """A power or energy input of any chip; of several the one that shows most, for they may contain each other."""
    found: list[tuple[float, Source]] = []
    denied = ""
    for file in sorted((root / "sys/class/hwmon").glob("hwmon*/*_input")):
        kind = re.fullmatch(r"(power|energy)(\d+)_input", file.name)
        if kind is None:
            continue
        chip = _word(file.with_name("name")) or file.parent.name
        label = _word(file.with_name(f"{kind[1]}{kind[2]}_label")) or f"{kind[1]}{kind[2]}"
        source = Source(
            name="hwmon",
            rails=(f"{chip} {label}",),
            coverage=f"what chip {chip} calls {label}",
            reader=_files([file], 1e6),
            wraps=(math.inf,) if kind[1] == "energy" else None,
        )
        try:
            (level,) = source.read()
        except SensorError as problem:
            denied = str(problem)
            continue
        if math.isfinite(level):
            found.append((level, source))
    gauges = [(level, source) for level, source in found if source.wraps is None]
    if not found:
        return denied or "no power or energy input in /sys/class/hwmon"
    return max(gauges or found, key=lambda pair: pair[0])[1]


def battery(root: Path, command: Command) -> Source | str:
    """A battery's gauge, while it discharges. The sign of the current differs between drivers and is dropped."""
    batteries = [
        folder
        for folder in sorted((root / "sys/class/power_supply").glob("*"))
        if _word(folder / "type") == "Battery" or folder.name.startswith("BAT")
    ]
    if not batteries:
        return "no battery in /sys/class/power_supply"
    folder = batteries[0]
    status = _word(folder / "status")
    if status != "Discharging":
        return f"{folder.name} is {status.lower() or 'of unknown status'}: unplug the machine to measure by its battery"

    def watts() -> tuple[float, ...]:
        if _word(folder / "status") != "Discharging":
            raise SensorError(f"{folder.name} stopped discharging during the run, or vanished")
        if (folder / "power_now").exists():
            return (abs(_files([folder / "power_now"], 1e6)()[0]),)
        volt, ampere = _files([folder / "voltage_now", folder / "current_now"], 1e6)()
        return (abs(volt * ampere),)

    return _tried(
        Source("battery", (folder.name,), "the whole machine with its screen, as the battery's gauge reports it", watts)
    )


SOURCES: dict[str, Callable[[Path, Command], Source | str]] = {
    "jetson": jetson, "pmic": pmic, "rapl": rapl, "hwmon": hwmon, "battery": battery,
}  # fmt: skip
ESTIMATES: dict[str, Callable[[Path, Command], Source | str]] = {
    "pmic-board": pmic_board,
    "powermetrics": lambda root, command: powermetrics(),
}


def find_power(wanted: str = "auto", *, root: Path = Path("/"), command: Command = run_command) -> Found:
    """The power source called `wanted`, or with "auto" the first that measures. Raises UserError: no such name."""
    if wanted == "none":
        return Found(None, ("none was wanted (--power none)",))
    if wanted not in ("auto", *SOURCES, *ESTIMATES):
        raise UserError(f"--power must be auto, none, csv:FILE, serial:DEVICE or a source: got {wanted!r}"
                        f"{nearest(wanted, [*SOURCES, *ESTIMATES])}")  # fmt: skip
    reasons: list[str] = []
    for name, find in (SOURCES if wanted == "auto" else {wanted: (SOURCES | ESTIMATES)[wanted]}).items():
        found = find(root, command)
        if isinstance(found, Source):
            return Found(found, tuple(reasons))
        reasons.append(f"{name} ({found})")
    return Found(None, tuple(reasons))


def _pmic(
    command: Command, name: str, kind: str, total: Callable[[tuple[float, ...]], tuple[float, ...]]
) -> Source | str:
    def rails() -> dict[str, float]:
        numbers: dict[tuple[str, str], float] = {}
        for rail, unit, number in _PMIC_LINE.findall(command(["vcgencmd", "pmic_read_adc"])):
            numbers[rail, unit.upper()] = _float(number)
        return {rail: amperes * numbers[rail, "V"] for (rail, unit), amperes in numbers.items()
                if unit == "A" and (rail, "V") in numbers}  # fmt: skip

    first = rails()
    if not first:
        return "vcgencmd pmic_read_adc gives no rails: only a Raspberry Pi 5 has them, to members of group video"

    def read() -> tuple[float, ...]:
        now = rails()
        if now.keys() != first.keys():
            raise SensorError(f"vcgencmd gave {len(now)} rails of {len(first)} during the run")
        return total(tuple(now.values()))

    measured = kind == "measured"
    return Source(
        name=name,
        rails=tuple(first) if measured else ("board",),
        coverage="the rails behind the power chip; no USB, NVMe, HAT, fan or regulator loss"
        if measured
        else "the whole board by 1.1451 x rails + 0.5879 W, a regression on one board",
        reader=read,
        kind="measured" if measured else "estimated",
    )


def _files(paths: list[Path], per_unit: float) -> Callable[[], tuple[float, ...]]:
    """A reader of files that hold one whole number each, divided by `per_unit`."""

    def read() -> tuple[float, ...]:
        numbers = []
        for path in paths:
            try:
                numbers.append(_float(path.read_text()) / per_unit)
            except PermissionError as problem:
                raise SensorError(f"{path.name} may not be read: sudo chmod a+r {path}") from problem
            except (OSError, UnicodeDecodeError) as problem:
                reason = problem.strerror if isinstance(problem, OSError) else "no text"
                raise SensorError(f"{path.name} vanished or cannot be read: {reason}") from problem
        return tuple(numbers)

    return read


def _tried(source: Source) -> Source | str:
    """The source when it can be read, else the reason."""
    try:
        source.read()
    except SensorError as problem:
        return str(problem)
    return source


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _number(path: Path, per_unit: float) -> float:
    return _float(_word(path)) / per_unit


def _word(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
