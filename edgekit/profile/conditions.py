"""Under which conditions a run was made, and whether the machine slowed itself down meanwhile.

Facts are written down before and after: clocks and their limits, temperature, evidence of throttling, and how much of
the processor others used. A Raspberry Pi's `get_throttled` has sticky bits: what was set before the run is not its
fault, so only bits that appear during it count, beside those that hold at its end.
Source: Linux, admin-guide/pm/cpufreq.rst, driver-api/thermal/sysfs-api.rst, filesystems/proc.rst; vcgencmd's manual.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.host import read

Command = Callable[[Sequence[str]], str]

_BITS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "temperature limit"}


def run_command(words: Sequence[str]) -> str:
    """The output of a command, "" where it is absent, fails or takes over two seconds."""
    path = shutil.which(words[0])
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *words[1:]], capture_output=True, text=True, timeout=2, errors="replace")  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


@dataclass(frozen=True)
class Health:
    """The machine at one moment: `mhz` is the mean clock, `throttle_count` of all cores, `throttled` a Pi's bits."""

    temperature_c: float | None
    mhz: float | None
    throttle_count: int | None
    throttled: int | None


@dataclass(frozen=True)
class Cpu:
    """Processor seconds since the machine, and this process, began: all CPUs together."""

    total_s: float
    busy_s: float
    steal_s: float
    own_s: float


def read_health(root: Path = Path("/"), *, command: Command = run_command) -> Health:
    """Temperature, clock and evidence of throttling; None for what this machine does not tell."""
    cpus = root / "sys/devices/system/cpu"
    clocks = _numbers(cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    heats = [
        heat / 1000 for heat in _numbers((root / "sys/class/thermal").glob("thermal_zone*/temp")) if 0 < heat < 2e5
    ]
    counts = _numbers(cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    answer = re.search(r"throttled=0x([0-9a-fA-F]+)", command(["vcgencmd", "get_throttled"]))
    return Health(
        temperature_c=max(heats, default=None),
        mhz=sum(clocks) / len(clocks) / 1000 if clocks else None,
        throttle_count=int(sum(counts)) if counts else None,
        throttled=int(answer[1], 16) if answer else None,
    )


def throttling(before: Health, after: Health) -> tuple[str, ...]:
    """What slowed the machine down between the two, in words; none where nothing is known of it."""
    found = []
    if before.throttle_count is not None and after.throttle_count is not None:
        rose = after.throttle_count - before.throttle_count
        found += [f"the processor throttled {rose} times for heat"] if rose > 0 else []
    if after.throttled is not None:
        new = after.throttled >> 16 & ~((before.throttled or 0) >> 16)
        found += [f"the board reports: {word}" for bit, word in _BITS.items() if (after.throttled | new) >> bit & 1]
    return tuple(found)


def read_cpu(root: Path = Path("/")) -> Cpu | None:
    """Processor time used by all and by this process; None where the system does not tell."""
    line = re.match(r"cpu +([\d ]+)", read(root / "proc/stat"))
    fields = [int(word) for word in line[1].split()] if line else []
    if len(fields) < 4:
        return None
    user, nice, system, idle, wait, irq, softirq, steal = (fields + [0] * 8)[:8]
    tick = os.sysconf("SC_CLK_TCK")
    busy = user + nice + system + irq + softirq
    own = os.times()
    return Cpu((busy + idle + wait + steal) / tick, busy / tick, steal / tick, own.user + own.system)


def other_load(before: Cpu | None, after: Cpu | None) -> tuple[float, float] | None:
    """Shares of all processor time that other programs used, and that a hypervisor gave to others (steal)."""
    if before is None or after is None or after.total_s <= before.total_s:
        return None
    total = after.total_s - before.total_s
    others = after.busy_s - before.busy_s - (after.own_s - before.own_s)
    return min(1.0, max(0.0, others / total)), min(1.0, max(0.0, (after.steal_s - before.steal_s) / total))


def conditions(root: Path = Path("/")) -> dict[str, str]:
    """What stays the same during a run: kernel, governor, limits of the clock."""
    cpus = root / "sys/devices/system/cpu"
    found = {"kernel": f"{platform.system()} {platform.release()}"}
    for name, pattern in (("governor", "scaling_governor"), ("energy preference", "energy_performance_preference")):
        values = sorted({read(path).strip() for path in cpus.glob(f"cpu[0-9]*/cpufreq/{pattern}")} - {""})
        if values:
            found[name] = ", ".join(values)
    lows, highs = (_numbers(cpus.glob(f"cpu[0-9]*/cpufreq/scaling_{end}_freq")) for end in ("min", "max"))
    if lows and highs:
        found["clock limits"] = f"{min(lows) / 1000:.0f} to {max(highs) / 1000:.0f} MHz"
    return found


def _numbers(paths: object) -> list[float]:
    texts = [read(path).strip() for path in paths]  # type: ignore[attr-defined]
    return [float(text) for text in texts if re.fullmatch(r"-?\d{1,15}", text)]
