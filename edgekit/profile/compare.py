"""Say of two reports whether the second is faster, slower, smaller or larger than the first, or that one cannot tell.

A verdict other than "cannot tell" needs three things at once: the 95% bootstrap interval of the ratio of medians leaves
1 out, the Mann-Whitney p-value is at most 0.05, and the ratio is at least 2% away from 1. The p-value is exact for any
number of repetitions, so independent samples of one thing are told apart at most once in twenty rows, and never with
fewer than 4 repetitions on each side.

What no statistic of samples sees is what shifts a whole run: another process, heat, memory layout. Three things stand
against it. The 2% allow for a little of it. Each run also measured the machine itself (`edgekit.profile.pace`): on
speed the ratio must leave 1 by more than the machine's own pace varied, in both runs together and without each run's
highest and lowest. And what drifted within the runs counts as what may lie between them: the ratio must leave 1 by more
than the runs' halves differ. On a busy machine let two bundles take turns instead (`edgekit.profile.turns`), whose
samples are pairs.
Source: T. Mytkowicz et al., Producing Wrong Data Without Doing Anything Obviously Wrong, ASPLOS 2009; the rule is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edgekit.errors import UserError
from edgekit.profile.pace import COMPUTING, READING
from edgekit.profile.stats import Difference, difference, holm, paired
from edgekit.report import Measurement, Report

Word = Literal["faster", "slower", "smaller", "larger", "cannot tell"]

LEAST_CHANGE = 0.02
LEAST_REPETITIONS = 4
LEAST_PAIRS = 7  # the fewest that a signed rank test can tell apart at 5%, two figures together
_P_VALUE = 0.05
_TIMES = frozenset({"ns", "us", "µs", "ms", "s", "min", "h"})


@dataclass(frozen=True)
class Verdict:
    """How one measurement of report b stands against the same one of report a.

    `a` and `b` are the reports' values in `unit`, `ratio` is b over a with its 95% interval `low` to `high`, and
    `p_value` the test's (Mann-Whitney's, or Wilcoxon's of pairs); each is None where it could not be had. `verdict` is
    faster or slower for times and rates, smaller or larger for everything else; `note` says why it is "cannot tell".
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
    varied = machine_varied(a, b)
    verdicts = tuple(
        _judge(row, others[row.name], a.samples.get(row.name, ()), b.samples.get(row.name, ()), varied)
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


def machine_varied(a: Report, b: Report) -> float:
    """By how much the machine's own pace varied in two runs, as a logarithm: the larger of reading and computing, each
    from the highest to the lowest sample of both runs when each run's own highest and lowest are left out."""
    found = [0.0]
    for name in (READING, COMPUTING):
        runs = [sorted(report.samples.get(name, ())) for report in (a, b)]
        usual = [x for run in runs for x in (run[1:-1] if len(run) > 2 else run)]
        if all(runs) and min(usual) > 0:
            found.append(math.log(max(usual) / min(usual)))
    return max(found)


@dataclass(frozen=True)
class Pairs:
    """One figure of two bundles that took turns: medians `a` and `b` in `unit`, and b over a of each pair."""

    name: str
    unit: str
    a: float
    b: float
    ratios: tuple[float, ...]


def judge_pairs(figures: Sequence[Pairs]) -> tuple[Verdict, ...]:
    """Judge the figures of one comparison pair by pair, and together: of equal bundles, at most one comparison in
    twenty gives any verdict, however many figures it has (`p_value` is Holm's). Raises UserError: no pairs."""
    found = [paired(figure.ratios) for figure in figures]
    together = holm([one.p_value for one in found])
    verdicts = []
    for figure, one, p_value in zip(figures, found, together, strict=True):
        note = _doubt(replace(one, p_value=p_value), len(figure.ratios), least=LEAST_PAIRS)
        word: Word = "cannot tell" if note else _word(figure.unit, rose=(one.ratio or 1) > 1)
        values = figure.name, figure.unit, figure.a, figure.b
        verdicts.append(Verdict(*values, one.ratio, one.low, one.high, p_value, word, note))
    return tuple(verdicts)


def _judge(
    a: Measurement,
    b: Measurement,
    before: tuple[float, ...],
    after: tuple[float, ...],
    varied: float,
) -> Verdict:
    if a.unit != b.unit:
        return _cannot_tell(a, b, f"the units differ: {a.unit} and {b.unit}")
    if not before or not after:
        return _cannot_tell(a, b, "no raw samples to judge by")
    found = difference(before, after)
    note = _doubt(found, min(len(before), len(after))) or _shift(found, a, before, after, varied)
    word: Word = "cannot tell" if note else _word(a.unit, rose=(found.ratio or 1) > 1)
    return Verdict(a.name, a.unit, a.value, b.value, found.ratio, found.low, found.high, found.p_value, word, note)


def _cannot_tell(a: Measurement, b: Measurement, note: str) -> Verdict:
    return Verdict(a.name, a.unit, a.value, b.value, None, None, None, None, "cannot tell", note)


def _shift(found: Difference, row: Measurement, a: tuple[float, ...], b: tuple[float, ...], varied: float) -> str:
    """Why a difference may come from the machine, "" when it does not; only times and rates have such a doubt."""
    kind = _word(row.unit, rose=True)
    if kind not in ("faster", "slower") or found.ratio is None or row.name in (READING, COMPUTING):
        return ""
    change = abs(math.log(found.ratio))
    if varied and change < varied + LEAST_CHANGE:
        return f"the machine itself varied by {math.expm1(varied):.0%} in these runs; let the bundles take turns"
    wander = max(_wander(a), _wander(b))
    if change <= wander:
        return f"within the runs the figures drifted by {wander:.0%}; let the bundles take turns"
    return ""


def _wander(samples: tuple[float, ...]) -> float:
    """How far the halves of a run differ, as a logarithm, beyond what the spread of its samples explains."""
    if len(samples) < 4:
        return 0.0
    logs = np.log(samples)
    half = len(logs) // 2
    apart = abs(float(np.median(logs[:half]) - np.median(logs[-half:])))
    within = (float(np.std(logs[:half], ddof=1)) + float(np.std(logs[-half:], ddof=1))) / 2
    return max(0.0, apart - 1.25 * within * math.sqrt(2 / half))


def _doubt(found: Difference, repetitions: int, *, least: int = LEAST_REPETITIONS) -> str:
    """Why the difference is not to be trusted, "" when it is."""
    if repetitions < least:
        return f"{repetitions} repetitions are too few, {least} on each side are the least"
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
