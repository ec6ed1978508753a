"""Say of two reports whether the second is faster, slower, smaller or larger than the first, or that one cannot tell.

A verdict other than "cannot tell" needs three things at once: the 95% bootstrap interval of the ratio of medians leaves
1 out, the Mann-Whitney p-value is at most 0.05, and the ratio is at least 2% away from 1. The p-value is exact for any
number of repetitions, so independent samples of one thing are told apart at most once in twenty rows, and never with
fewer than 4 repetitions on each side.

What no statistic sees is what shifts a whole run: another process, heat, memory layout. The 2% allow for a little of
that. On a busy machine interleave the two (a, b, a, b ...) and let each sample come from its own run.
Source: T. Mytkowicz et al., Producing Wrong Data Without Doing Anything Obviously Wrong, ASPLOS 2009; the rule is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekit.errors import UserError
from edgekit.profile.stats import Difference, difference
from edgekit.report import Measurement, Report

Word = Literal["faster", "slower", "smaller", "larger", "cannot tell"]

LEAST_CHANGE = 0.02
LEAST_REPETITIONS = 4
_P_VALUE = 0.05
_TIMES = frozenset({"ns", "us", "µs", "ms", "s", "min", "h"})


@dataclass(frozen=True)
class Verdict:
    """How one measurement of report b stands against the same one of report a.

    `a` and `b` are the reports' values in `unit`, `ratio` is b over a with its 95% interval `low` to `high`, and
    `p_value` the Mann-Whitney test's; each is None where it could not be had. `verdict` is faster or slower for times
    and rates, smaller or larger for everything else; `note` says why it is "cannot tell".
    """

    name: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    p_value: float | None
    verdict: Word
    note: str = ""


def compare(a: Report, b: Report, *, force: bool = False) -> tuple[Verdict, ...]:
    """Judge every measurement that both reports have, in the order of `a`.

    Versions and subjects may differ: they are what one compares. Each row is judged by itself, so of many rows without
    a true difference one in twenty may still get a verdict.

    Raises UserError: the reports come from different machines (without `force`), or share no measurement.
    """
    if not force:
        _refuse_other_machine(a, b)
    others = {measurement.name: measurement for measurement in b.measurements}
    verdicts = tuple(
        _judge(row, others[row.name], a.samples.get(row.name, ()), b.samples.get(row.name, ()))
        for row in a.measurements
        if row.name in others
    )
    if not verdicts:
        raise UserError(
            f"two reports must share a measurement to be compared: {a.title!r} has {_names(a)},"
            f" {b.title!r} has {_names(b)}; profile both in the same way"
        )
    return verdicts


def _refuse_other_machine(a: Report, b: Report) -> None:
    for key in [*a.machine, *b.machine]:
        here, there = a.machine.get(key, "nothing"), b.machine.get(key, "nothing")
        if here != there:
            raise UserError(
                f"compared reports must come from one machine: {key} is {here!r} in {a.title!r}"
                f" and {there!r} in {b.title!r}; profile both on one machine or pass --force"
            )


def _judge(a: Measurement, b: Measurement, before: tuple[float, ...], after: tuple[float, ...]) -> Verdict:
    if a.unit != b.unit:
        return _cannot_tell(a, b, f"the units differ: {a.unit} and {b.unit}")
    if not before or not after:
        return _cannot_tell(a, b, "no raw samples to judge by")
    found = difference(before, after)
    note = _doubt(found, min(len(before), len(after)))
    word: Word = "cannot tell" if note else _word(a.unit, rose=(found.ratio or 1) > 1)
    return Verdict(a.name, a.unit, a.value, b.value, found.ratio, found.low, found.high, found.p_value, word, note)


def _cannot_tell(a: Measurement, b: Measurement, note: str) -> Verdict:
    return Verdict(a.name, a.unit, a.value, b.value, None, None, None, None, "cannot tell", note)


def _doubt(found: Difference, repetitions: int) -> str:
    """Why the difference is not to be trusted, "" when it is."""
    if repetitions < LEAST_REPETITIONS:
        return f"{repetitions} repetitions are too few, {LEAST_REPETITIONS} on each side are the least"
    if found.ratio is None or found.low is None or found.high is None:
        return "a ratio needs samples above zero"
    if found.low <= 1 <= found.high or found.p_value > _P_VALUE:
        return "the difference is within the noise"
    if abs(found.ratio - 1) < LEAST_CHANGE:
        return f"under {LEAST_CHANGE:.0%}, less than two runs of one thing may differ"
    return ""


def _word(unit: str, *, rose: bool) -> Word:
    """What to call a rise or fall in this unit: `ms` and `ms/token` are times, `tok/s` and `GB/s` rates."""
    above, _, below = unit.partition("/")
    if below in _TIMES or unit == "Hz":
        return "faster" if rose else "slower"
    if above in _TIMES:
        return "slower" if rose else "faster"
    return "larger" if rose else "smaller"


def _names(report: Report) -> str:
    return ", ".join(measurement.name for measurement in report.measurements) or "none"
