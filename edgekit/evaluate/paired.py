"""Two models on the same items: is the second one worse, and by how much at most?

Of n items, b are right under A alone and c under B alone; the other n - b - c say nothing of the difference

    d = (c - b) / n,    variance of d = (b + c - (c - b)^2 / n) / n^2

`p_value` is McNemar's exact one: the binomial of c among b + c. Its chance of a false alarm is below 5% for any number
of flips (the mid-p form, which counts the observed outcome half, goes up to 7.7% for few). The interval of d adds half
an item to each cell (Agresti and Min), so that it has a width also where no answer changed. Not worse within x: the
lower end of the one-sided 95% interval of d lies above -x.

A flip is an answer whose rightness changed, a change any other choice than before: both can be many where d is 0, and
many flips hide a small d. So there is a sharper test of whether B is worse. Instead of 1 or 0 an answer counts

    exp(l_right / T) / sum over the choices of exp(l / T),   T = root mean square change of l_right - (largest other l)

where l are the choices' log-likelihoods: T is how much the two models differ on one question, so that an answer near a
tie, which flips by chance, counts nearly the same under both. Exchanging the two models on one question turns the sign
of that question's change and nothing else, T included; so of models that are alike every change is as likely up as
down, and `t_test` of their mean has false alarms once in twenty, as McNemar's test would have at most.
Source: M. Fagerland, S. Lydersen, P. Laake, The McNemar test for binary matched-pairs data, 2013; A. Agresti, Y. Min,
Simple improved confidence intervals for comparing matched proportions, 2005; A. Dutta et al., Accuracy is Not All You
Need, 2024 (flips).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UserError

Verdict = Literal["no worse", "worse", "cannot tell"]

Z_TWO_SIDED = 1.959964
Z_ONE_SIDED = 1.644854
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class PairedShare:
    """B against A on `n` items, in points (percent of the items).

    `low` and `high` bound `difference` (B - A) at 95%, `worst` does so from one side. `lost` items were right under A
    alone, `gained` under B alone; `changed` counts other choices, right or wrong.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    worst: float
    p_value: float
    lost: int
    gained: int
    changed: int
    n: int

    @property
    def flips(self) -> int:
        """Answers whose rightness changed."""
        return self.lost + self.gained

    @property
    def significant(self) -> bool:
        return self.p_value < SIGNIFICANT

    def verdict(self, within: float) -> Verdict:
        """Whether B is no worse than A within so many points at 95%: "worse" when even the best end is lower."""
        if self.worst > -within:
            return "no worse"
        return "worse" if self.high < -within else "cannot tell"


@dataclass(frozen=True)
class PairedMean:
    """A mean over `n` pairs with its 95% interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    n: int


def compare_answers(right_a: Sequence[bool], right_b: Sequence[bool], *, changed: int | None = None) -> PairedShare:
    """Compare outcomes on the same items, in the same order. `changed` counts other choices; default: the flips.

    Raises UserError: no items, or not the same number.
    """
    if not right_a or len(right_a) != len(right_b):
        raise UserError(f"a paired comparison needs the same items twice: got {len(right_a)} and {len(right_b)}")
    a, b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    n, lost, gained = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    # Half an item to each of the four cells: two items more in all, one of them discordant.
    size, centre = n + 2, (gained - lost) / (n + 2)
    deviation = math.sqrt(max(0.0, (lost + gained + 1) / size - centre**2) / size)
    return PairedShare(
        a=100 * float(a.mean()),
        b=100 * float(b.mean()),
        difference=100 * (gained - lost) / n,
        low=100 * max(-1.0, centre - Z_TWO_SIDED * deviation),
        high=100 * min(1.0, centre + Z_TWO_SIDED * deviation),
        worst=100 * max(-1.0, centre - Z_ONE_SIDED * deviation),
        p_value=mcnemar(lost, gained),
        lost=lost,
        gained=gained,
        changed=lost + gained if changed is None else changed,
        n=n,
    )


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value that answers lost and gained differ in number by chance alone; 1 where none changed."""
    total, fewer = lost + gained, min(lost, gained)
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - total * math.log(2)) for log in logs))


def smooth_changes(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], right: Sequence[int]
) -> NDArray[np.float64]:
    """B - A of each item's smooth count, in points, (n,). `a` and `b` are log-likelihoods of each item's choices.

    Of a single choice the count is the probability of the text.
    """
    x, y, rows = _padded(a), _padded(b), np.arange(len(right))
    single = np.isneginf(x[:, 1:]).all(axis=1)
    others = np.zeros_like(x)
    others[rows, right] = -np.inf
    with np.errstate(invalid="ignore"):  # a single choice has no other
        moved = (y[rows, right] - (y + others).max(1)) - (x[rows, right] - (x + others).max(1))
    spread = float(np.sqrt(np.mean(moved[~single] ** 2))) if not single.all() else 0.0
    scale = np.where(single, 1.0, max(spread, 1e-9))[:, None]
    counts = []
    for values in (x, y):
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = np.exp((values - values.max(1, keepdims=True)) / scale)
        share = weights[rows, right] / weights.sum(1)
        counts.append(np.where(single, np.exp(values[:, 0]), share))
    found: NDArray[np.float64] = 100 * (counts[1] - counts[0])
    return np.where((x == y).all(axis=1), 0.0, found)


def _padded(sums: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """As one array; what an item has fewer choices is of probability 0."""
    found = np.full((len(sums), max(2, *map(len, sums))), -np.inf)
    for row, values in zip(found, sums, strict=True):
        row[: len(values)] = values
    return found


def t_test(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Two-sided p-value, by Student's t, that the mean of independent values is 0 but for chance; 1 where all are 0.

    Source: M. Abramowitz, I. Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    x = np.asarray(values, np.float64)
    free = len(x) - 1
    if free < 1 or not x.any():
        return 1.0
    deviation = float(x.std(ddof=1))
    if deviation == 0:
        return 0.0
    angle = math.atan(abs(float(x.mean())) / deviation * math.sqrt(len(x) / free))
    if free % 2:
        terms, within = [math.cos(angle)] if free > 1 else [], 2 / math.pi
    else:
        terms, within = [1.0], math.sin(angle)
    for k in range(2 + free % 2, free - 1, 2):
        terms.append(terms[-1] * (k - 1) / k * math.cos(angle) ** 2)
    inside = math.fsum(terms)
    if free % 2:
        inside = angle + math.sin(angle) * inside
    return max(0.0, 1 - within * inside)


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> PairedMean:
    """The mean of independent values and its 95% interval, by Student's t; of one value the interval is infinite.

    Source: the quantile by E. A. Cornish and R. A. Fisher's expansion, within 2% from 3 degrees of freedom on.
    """
    x = np.asarray(values, np.float64)
    if not len(x):
        raise UserError("a mean needs at least one value: got none")
    mean, free = float(x.mean()), len(x) - 1
    if free < 1:
        return PairedMean(mean, -math.inf, math.inf, len(x))
    half = _student(free) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return PairedMean(mean, mean - half, mean + half, len(x))


def _student(free: int) -> float:
    """The 97.5% quantile of Student's t with `free` degrees of freedom."""
    if free < 3:
        return (12.706205, 4.302653)[free - 1]
    z = Z_TWO_SIDED
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum((term / float(free) ** power for power, term in enumerate(terms)), 0.0)
