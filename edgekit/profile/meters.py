"""Meters outside of the machine, and macOS' own estimate: a serial line, a CSV file, powermetrics.

A meter that logs for itself has a clock of its own. The run's load edges (rest, then work) show in its power, so its
readings are shifted by the offset at which power and load agree best; how well they then agree is reported, and below
a correlation of 0.5 the file is refused: it may be of another run.
Source: MLPerf Power rules, for aligning on a load edge; Apple, powermetrics(1), which calls its figures estimates.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import plistlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UserError
from edgekit.profile.power import SensorError, Source, Span

STALE_S = 5.0
LEAST_AGREEMENT = 0.5
_TIMES = ("time", "time_s", "timestamp", "t", "seconds", "elapsed")
_WATTS = ("power", "power_w", "watts", "watt", "w")
_VOLTS, _AMPERES = ("voltage", "voltage_v", "volts", "v"), ("current", "current_a", "amps", "amperes", "a", "i")


@dataclass(frozen=True)
class MeterLog:
    """Readings of a meter: seconds on its own clock, in order, and watts."""

    times: tuple[float, ...]
    watts: tuple[float, ...]


def read_csv(path: Path) -> MeterLog:
    """A meter's CSV with a heading: a time in seconds, and power in W, or voltage in V and current in A.

    Lines that hold no finite numbers are skipped. Raises UserError: not readable, columns missing, under ten readings.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"a meter's log must be a readable CSV file: {path} ({problem})") from problem
    heads = [re.sub(r"\W+", "_", head.strip().lower()).strip("_") for head in (lines[0] if lines else [])]

    def column(names: Sequence[str]) -> int | None:
        return next((heads.index(name) for name in names if name in heads), None)

    at, watt, volt, ampere = (column(names) for names in (_TIMES, _WATTS, _VOLTS, _AMPERES))
    if at is None or (watt is None and (volt is None or ampere is None)):
        raise UserError(f"a meter's log needs columns time and power, or time, voltage and current: {path} has {heads}")
    wanted = [at] + ([watt] if watt is not None else [index for index in (volt, ampere) if index is not None])
    readings = []
    for line in lines[1:]:
        with contextlib.suppress(ValueError, IndexError):
            numbers = [float(line[index]) for index in wanted]
            if all(map(math.isfinite, numbers)):
                readings.append((numbers[0], math.prod(numbers[1:])))
    readings.sort()
    if len(readings) < 10:
        raise UserError(f"a meter's log needs ten readings or more: {path} has {len(readings)}")
    return MeterLog(tuple(at for at, _ in readings), tuple(watt for _, watt in readings))


def align(log: MeterLog, load: Sequence[Span], *, around: Span) -> tuple[MeterLog, float]:
    """The log on the run's clock, and how well it agrees with the load, as a correlation up to 1.

    `load` are the spans of work within `around`, all on the run's clock. Every offset at which the log covers the run
    is tried in steps of a 400th of the run, or of 20 ms.

    Raises UserError: the log is shorter than the run, or agrees with it nowhere.
    """
    begin, end = around
    step = max(0.02, (end - begin) / 400)
    grid = np.arange(begin, end, step)
    busy = np.zeros(len(grid))
    for start, stop in load:
        busy[(grid >= start) & (grid <= stop)] = 1
    first, last = log.times[0], log.times[-1]
    if last - first < end - begin - step:
        raise UserError(f"a meter's log must cover the run: it has {last - first:.1f} s of {end - begin:.1f} s")
    offsets = np.arange(first - begin, last - end + step, step)
    scores = [_correlation(np.interp(grid + offset, log.times, log.watts), busy) for offset in offsets]
    best = int(np.argmax(scores))
    if scores[best] < LEAST_AGREEMENT:
        raise UserError(
            f"a meter's log must show the run's load: the best agreement is {scores[best]:.2f}, {LEAST_AGREEMENT} is"
            f" the least; is it of this run, and was the machine at rest before and after (--idle)?"
        )
    shifted = tuple(at - float(offsets[best]) for at in log.times)
    return MeterLog(shifted, log.watts), float(scores[best])


def serial(device: Path, *, baud: int = 115200) -> Source:
    """A meter that writes lines of `watts` or `volts,amperes` to a serial line.

    Raises SensorError: no such device, or not for this user; UserError: an unknown baud rate.
    """
    import termios
    import tty

    speed = getattr(termios, f"B{baud}", None)
    if speed is None:
        raise UserError(f"--power serial needs a baud rate that the system knows, such as 9600 or 115200: got {baud}")
    try:
        handle = os.open(device, os.O_RDONLY | os.O_NOCTTY)
        tty.setraw(handle)
        settings = termios.tcgetattr(handle)
        settings[4] = settings[5] = speed
        termios.tcsetattr(handle, termios.TCSANOW, settings)
    except (OSError, termios.error) as problem:
        raise SensorError(f"the serial line {device} cannot be read: {problem}") from problem

    def chunk() -> bytes:
        return os.read(handle, 4096)

    latest = _Latest(_lines(chunk), _watts_of_line)
    return Source("serial", (str(device),), "what the meter is plugged into", latest.read, closer=latest.close)


def powermetrics(command: Sequence[str] = ("powermetrics", "-i", "200", "-s", "cpu_power", "--format", "plist"),
                 ) -> Source | str:  # fmt: skip
    """macOS' figures for processor, graphics and neural engine, a stream of property lists divided by NUL."""
    path = shutil.which(command[0])
    if path is None:
        return "there is no powermetrics: it is a part of macOS"
    process = subprocess.Popen([path, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # noqa: S603
    stream = process.stdout
    assert stream is not None
    handle = stream.fileno()
    latest = _Latest(_lines(lambda: os.read(handle, 65536), b"\0"), _watts_of_plist)

    def close() -> None:
        process.terminate()
        process.wait()
        latest.close()
        stream.close()

    if not latest.wait(10):
        close()
        return "powermetrics gave nothing in 10 s: it needs sudo"
    return Source(
        "powermetrics", ("CPU + GPU + ANE",), "Apple's model of the chip, not for comparing machines",
        latest.read, kind="estimated", closer=close,
    )  # fmt: skip


class _Latest:
    """The latest number of a stream, read in a thread until it ends."""

    def __init__(self, pieces: Callable[[], bytes | None], number: Callable[[bytes], float]) -> None:
        self._value, self._at, self._ended = math.nan, time.monotonic(), False
        self._first = threading.Event()
        self._pieces, self._number = pieces, number
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether a first number came in time."""
        return self._first.wait(seconds) and not math.isnan(self._value)

    def read(self) -> tuple[float, ...]:
        if self._ended:
            raise SensorError("the meter ended during the run")
        if time.monotonic() - self._at > STALE_S:
            raise SensorError(f"the meter was silent for {STALE_S:.0f} s")
        return (self._value,)

    def close(self) -> None:
        self._ended = True  # the thread is a daemon: a read of a silent line cannot be ended

    def _watch(self) -> None:
        while not self._ended:
            try:
                piece = self._pieces()
            except OSError:
                piece = None
            if piece is None:
                break
            self._value, self._at = self._number(piece), time.monotonic()
            self._first.set()
        self._ended = True
        self._first.set()


def _lines(chunk: Callable[[], bytes], end: bytes = b"\n") -> Callable[[], bytes | None]:
    """A reader of the pieces between `end`; None when the stream is over. What never ends is dropped at 1 MB."""
    rest = b""

    def following() -> bytes | None:
        nonlocal rest
        while end not in rest:
            more = chunk()
            if not more:
                return None
            rest = (rest + more)[-(1 << 20) :]
        piece, _, rest = rest.partition(end)
        return piece

    return following


def _watts_of_line(line: bytes) -> float:
    try:
        numbers = [float(word) for word in re.split(rb"[,;\s]+", line.strip())]
    except ValueError:
        return math.nan
    return numbers[0] if len(numbers) == 1 else numbers[0] * numbers[1]


def _watts_of_plist(piece: bytes) -> float:
    try:
        found = plistlib.loads(piece.strip(b"\0\n "))["processor"]
        return float(found.get("combined_power", found.get("package_mW", math.nan))) / 1000
    except Exception:  # plistlib raises what its parser raises
        return math.nan


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0
