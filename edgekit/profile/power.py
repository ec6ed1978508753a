"""Energy: one protocol for what measures power, a log of readings, and joules over exactly the spans that were timed.

A source gives one number a rail: watts (a gauge), or joules since some moment (a counter, which may wrap). Gross energy
is what the source saw during the spans; net is gross less the idle power times their length, and is never given alone.
A gauge that changed fewer than ten times within the spans says nothing about a token, and then there are no joules per
token. Without a sensor there is no number, and a reason: never 0, and no estimate unless one was asked for.
Sources: Linux, power/powercap/powercap.rst; MLPerf Power (A. Tschand et al., 2024) for counting the timed phase only.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from edgekit.errors import DeviceError
from edgekit.report import How

LEAST_UPDATES = 10
_MOST_INVALID = 0.1  # share of readings

Span = tuple[float, float]


class SensorError(DeviceError):
    """A source cannot be read; the message is the reason that a report gives."""


class PowerSource(Protocol):
    """What measures power.

    rails: the names of what `read` returns, in order; they overlap with none of the others
    coverage: what the rails contain, and what they leave out
    kind: measured, or estimated by a model of some sort
    wraps: None for gauges (watts); for counters (joules), the joules at which each starts again at 0, or infinity
    """

    @property
    def name(self) -> str: ...
    @property
    def rails(self) -> tuple[str, ...]: ...
    @property
    def coverage(self) -> str: ...
    @property
    def kind(self) -> How: ...
    @property
    def wraps(self) -> tuple[float, ...] | None: ...

    def read(self) -> tuple[float, ...]:
        """One number a rail; NaN where a rail gave nothing that can be used. Raises SensorError: the source is gone."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Source:
    """A power source made of a function."""

    name: str
    rails: tuple[str, ...]
    coverage: str
    reader: Callable[[], tuple[float, ...]]
    kind: How = "measured"
    wraps: tuple[float, ...] | None = None
    closer: Callable[[], None] = lambda: None

    def read(self) -> tuple[float, ...]:
        return self.reader()

    def close(self) -> None:
        self.closer()


@dataclass(frozen=True)
class Energy:
    """Over some spans: `joules` and mean `watts` are None where `reason` says why.

    `updates` counts how often the source changed its mind within the spans, `hz` how often a second it did.
    """

    joules: float | None
    watts: float | None
    seconds: float
    updates: int
    hz: float
    reason: str = ""


def estimated(load_w: float, idle_w: float) -> Source:
    """What the user says the machine draws under load (gross) and at rest: a number, not a sensor."""
    return Source(
        "estimate", ("machine",), f"{load_w:g} W under load and {idle_w:g} W at rest, as given by the user",
        lambda: (load_w,), kind="estimated",
    )  # fmt: skip


@dataclass
class PowerLog:
    """Reads a source `hz` times a second in a thread, between entering and leaving. `mark` adds a reading now.

    Ten readings a second cost less than a thousandth of one core for files of /sys, and come well inside the wrap of
    any counter. A source that vanishes ends the log: spans after that have no energy, and the reason.
    """

    source: PowerSource
    hz: float = 10.0
    clock: Callable[[], float] = time.perf_counter
    times: list[float] = field(default_factory=list)
    values: list[tuple[float, ...]] = field(default_factory=list)
    error: str = ""

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="power", daemon=True)
        self.mark()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mark()
        self._done.set()
        self._thread.join()
        self.source.close()

    def mark(self) -> None:
        """Read now."""
        with self._lock:
            if self.error:
                return
            try:
                values = self.source.read()
            except SensorError as problem:
                self.error = str(problem)
                return
            self.times.append(self.clock())
            self.values.append(values)

    def _watch(self) -> None:
        while not self._done.wait(1 / self.hz):
            self.mark()

    def energy(self, spans: Sequence[Span]) -> Energy:
        """Gross energy over the spans: seconds of the log's clock, not overlapping."""
        return integrate(self.source, self.times, self.values, spans, error=self.error)

    def watts(self) -> tuple[list[float], list[float]]:
        """Times and total watts: the gauge's own, or the counters' steps over the time between two readings."""
        times, levels, _ = _clean(self.source, self.times, self.values)
        if self.source.wraps is None:
            return times, levels
        steps = [
            (late, (after - before) / (late - early))
            for early, late, before, after in zip(times, times[1:], levels, levels[1:], strict=False)
            if late - early > 0.01
        ]
        return [at for at, _ in steps], [watt for _, watt in steps]


def integrate(
    source: PowerSource,
    times: Sequence[float],
    values: Sequence[tuple[float, ...]],
    spans: Sequence[Span],
    *,
    error: str = "",
) -> Energy:
    """The energy of the spans from readings: counters are interpolated at their ends, gauges by the trapezoid rule."""
    seconds = sum(end - begin for begin, end in spans)
    clean, levels, invalid = _clean(source, times, values)
    updates = sum(_updates(clean, levels, span) for span in spans)
    hz = updates / seconds if seconds > 0 else 0.0

    def nothing(reason: str) -> Energy:
        return Energy(None, None, seconds, updates, hz, reason)

    if not spans or seconds <= 0:
        return nothing("nothing was timed")
    if error and (not clean or max(end for _, end in spans) > clean[-1]):
        return nothing(f"{source.name}: {error}")
    if invalid > _MOST_INVALID * max(1, len(times)):
        return nothing(f"{source.name}: {invalid} of {len(times)} readings were no power: not a number, or below zero")
    if not clean or min(begin for begin, _ in spans) < clean[0] or max(end for _, end in spans) > clean[-1]:
        return nothing(f"{source.name}: no readings around the run")
    if source.kind == "measured" and updates < LEAST_UPDATES:
        return nothing(
            f"{source.name}: too slow a sensor: {updates} updates in {seconds:.2f} s, {LEAST_UPDATES} are the least;"
            f" measure longer (--repeat, --generate)"
        )
    joules = sum(_over(clean, levels, span, counter=source.wraps is not None) for span in spans)
    return Energy(joules, joules / seconds, seconds, updates, hz)


def _clean(
    source: PowerSource, times: Sequence[float], values: Sequence[tuple[float, ...]]
) -> tuple[list[float], list[float], int]:
    """Times, total watts or unwrapped joules, and how many readings could not be used."""
    if source.wraps is None:
        totals = [math.fsum(rails) for rails in values]
        good = [math.isfinite(total) and total >= 0 for total in totals]
        kept = [(at, total) for at, total, fine in zip(times, totals, good, strict=True) if fine]
        return [at for at, _ in kept], [total for _, total in kept], len(totals) - len(kept)
    clean: list[float] = []
    joules: list[float] = []
    before: tuple[float, ...] | None = None
    for at, rails in zip(times, values, strict=True):
        if not all(math.isfinite(rail) and rail >= 0 for rail in rails):
            continue
        steps = [0.0] * len(rails) if before is None else [
            now - was if now >= was else now - was + wrap
            for now, was, wrap in zip(rails, before, source.wraps, strict=True)
        ]  # fmt: skip
        if not all(map(math.isfinite, steps)):
            before = rails  # a counter without a range went back: what it counted since is lost
            continue
        clean.append(at)
        joules.append((joules[-1] if joules else 0.0) + sum(steps))
        before = rails
    return clean, joules, len(times) - len(clean)


def _updates(times: Sequence[float], levels: Sequence[float], span: Span) -> int:
    inside = [level for at, level in zip(times, levels, strict=True) if span[0] <= at <= span[1]]
    return sum(1 for before, after in pairwise(inside) if after != before)


def _over(times: Sequence[float], levels: Sequence[float], span: Span, *, counter: bool) -> float:
    begin, end = (float(np.interp(at, times, levels)) for at in span)
    if counter:
        return end - begin
    inside = [(at, level) for at, level in zip(times, levels, strict=True) if span[0] < at < span[1]]
    at = np.array([span[0], *(time for time, _ in inside), span[1]])
    watts = np.array([begin, *(level for _, level in inside), end])
    return float(np.trapezoid(watts, at))
