"""What repeated measurements say: a median with its interval, drift within a run, and two runs against each other.

Samples are one number a repetition, independent of each other. Gaps between the tokens of one run are not: they
describe that run well (percentiles, drift) but their interval is too narrow to compare two runs by.

The interval is the percentile bootstrap of the median. A resample's k-th smallest value is x[floor(n U)], x sorted,
where U, the k-th smallest of n uniform draws, is Beta(k, n+1-k); so a resample costs one or two draws, not n.
Source: B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; H. A. David and
H. N. Nagaraja, Order Statistics, 2003, section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UserError
from edgekit.report import Measurement

Array = NDArray[np.float64]

LEAST_FOR_INTERVAL = 3
_RESAMPLES = 4000
_EXACT_UP_TO = 50


@dataclass(frozen=True)
class Summary:
    """Median, mean, standard deviation (n - 1 below), percentiles and the median's 95% interval, in the samples' unit.

    `sd` is None for one sample; `low` and `high` are None for fewer than 3. Percentiles interpolate between samples, so
    p99 of fewer than 100 samples says little more than the maximum. The interval cannot be wider than the samples: on
    simulated normal ones it covers the true median 75% of the time at n = 3, 88% at 4, and 92 to 95% from 5 on.
    """

    median: float
    mean: float
    sd: float | None
    p90: float
    p99: float
    low: float | None
    high: float | None
    n: int

    @property
    def p50(self) -> float:
        """The median under its other name."""
        return self.median

    @property
    def spread(self) -> float | None:
        """Half the width of the interval: what `Measurement.spread` holds."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference:
    """Two independent runs: median(b) / median(a) with its 95% interval, and how likely chance alone does as much.

    `p_value` is two-sided, of the Mann-Whitney test. `ratio` and its interval are None when a sample is not positive.
    """

    ratio: float | None
    low: float | None
    high: float | None
    p_value: float


def summary(samples: Sequence[float]) -> Summary:
    """Describe the samples. Equal samples in any order give equal figures: the bootstrap is seeded.

    Raises UserError: no sample, or one that is not finite.
    """
    x = np.sort(_checked(samples))
    p90, p99 = (float(value) for value in np.percentile(x, [90, 99]))
    low = high = None
    if len(x) >= LEAST_FOR_INTERVAL:
        low, high = _interval(_resampled_medians(x, np.random.default_rng(0)))
    sd = float(np.std(x, ddof=1)) if len(x) > 1 else None
    return Summary(float(np.median(x)), float(np.mean(x)), sd, p90, p99, low, high, len(x))


def measured(name: str, samples: Sequence[float], *, unit: str, note: str = "") -> Measurement:
    """The row of a report for these samples: their median, how many there are, and the spread of the median."""
    found = summary(samples)
    return Measurement(name, found.median, unit, "measured", found.n, found.spread, note)


def drift(samples: Sequence[float]) -> float | None:
    """Median of the last quarter over median of the first, in the order measured: 1.1 means it rose by 10%.

    None for fewer than 8 samples, or when the first quarter's median is zero.
    """
    x = _checked(samples)
    quarter = len(x) // 4
    first = float(np.median(x[:quarter])) if quarter >= 2 else 0.0
    return float(np.median(x[-quarter:])) / first if first else None


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two independent sets of samples; `b` is measured against `a`.

    Raises UserError: no sample, or one that is not finite.
    """
    x, y = np.sort(_checked(a)), np.sort(_checked(b))
    p_value = mann_whitney(x, y)
    if x[0] <= 0 or y[0] <= 0:
        return Difference(None, None, None, p_value)
    generator = np.random.default_rng(0)
    low, high = _interval(_resampled_medians(y, generator) / _resampled_medians(x, generator))
    return Difference(float(np.median(y) / np.median(x)), low, high, p_value)


def paired(ratios: Sequence[float]) -> Difference:
    """Ratios of samples that were taken in pairs, side by side: what moves both of a pair has cancelled.

    `ratio` is their median. Its interval holds every ratio by which all could be divided without the signed ranks of
    their logarithms telling them from 1 at 5%; `p_value` is Wilcoxon's, exact up to 50 pairs.

    Raises UserError: no ratio, or one that is not finite and above 0.
    Source: F. Wilcoxon, Biometrics Bull. 1, 1945; J. L. Hodges and E. L. Lehmann, Ann. Math. Stat. 34, 1963.
    """
    x = _checked(ratios)
    if x.min() <= 0:
        raise UserError(f"ratios must be above 0: got {x.min()}; repeat the measurement")
    logs = np.log(x)
    low, high = _walsh_interval(logs)
    return Difference(float(np.exp(np.median(logs))), math.exp(low), math.exp(high), signed_rank(logs))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P-values of one family, raised so that all of them together stay at the level that one alone would have.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6, 1979.
    """
    raised: dict[int, float] = {}
    highest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        raised[index] = highest
    return tuple(raised[index] for index in range(len(p_values)))


def signed_rank(differences: Sequence[float] | Array) -> float:
    """Two-sided p-value that differences as far from 0 in rank are symmetric about 0; those that are 0 are dropped."""
    x = _checked(differences)
    x = x[x != 0]
    if not len(x):
        return 1.0
    sizes = np.sort(np.abs(x))
    # Twice the mean rank of each, a whole number also for ties.
    ranks = np.searchsorted(sizes, np.abs(x), "left") + np.searchsorted(sizes, np.abs(x), "right") + 1
    total = int(ranks.sum())
    distance = abs(2 * int(ranks[x > 0].sum()) - total)
    if len(x) <= _EXACT_UP_TO:
        counts = np.zeros(total + 1)
        counts[0] = 1
        for rank in ranks.tolist():
            counts[rank:] += counts[:-rank].copy()
        far = np.abs(2 * np.arange(total + 1) - total) >= distance
        return float(counts[far].sum() / counts.sum())
    return math.erfc(max(distance - 2, 0) / math.sqrt(float((ranks.astype(np.float64) ** 2).sum())) / math.sqrt(2))


def _walsh_interval(x: Array) -> tuple[float, float]:
    """The 95% interval that belongs to the signed rank test: the inner ones of all means of two differences."""
    means = np.sort(np.add.outer(x, x)[np.triu_indices(len(x))] / 2)
    ranks = np.arange(1, len(x) + 1)
    counts = np.zeros(int(ranks.sum()) + 1)
    counts[0] = 1
    for rank in ranks.tolist():
        counts[rank:] += counts[:-rank].copy()
    below = np.cumsum(counts) / counts.sum()
    # The test says no as long as more than `cut` of the means lie on either side of 0.
    cut = max(0, int(np.searchsorted(below, 0.025, "right")) - 1)
    return float(means[cut]), float(means[len(means) - 1 - cut])


def mann_whitney(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float:
    """Two-sided p-value that samples as far apart in rank come from one distribution; ties count half.

    Exact (every split of the pooled samples, ties included) up to 50 samples in all, normal above.
    Source: H. B. Mann and D. R. Whitney, Ann. Math. Stat. 18, 1947; for exact ties B. Streitberg and J. Roehmel,
    Statistical Software Newsletter 12, 1986.
    """
    x, y = _checked(a), _checked(b)
    pooled = np.concatenate([x, y])
    order = np.sort(pooled)
    # Twice the mean rank of each sample: a whole number, also for ties.
    ranks = np.searchsorted(order, pooled, "left") + np.searchsorted(order, pooled, "right") + 1
    n, total = len(x), len(pooled)
    expected = n * (total + 1)
    distance = abs(int(ranks[:n].sum()) - expected)
    if distance == 0:
        return 1.0
    if total <= _EXACT_UP_TO:
        counts = _rank_sum_counts(ranks, n)
        far = np.abs(np.arange(len(counts)) - expected) >= distance
        return float(counts[far].sum() / counts.sum())
    spread = math.sqrt(n * (total - n) / (total * (total - 1)) * float(((ranks - (total + 1)) ** 2).sum()))
    # Rank sums here come in steps of 2, so 1 is the correction for continuity.
    return math.erfc(max(distance - 1, 0) / spread / math.sqrt(2))


def _checked(samples: Sequence[float] | Array) -> Array:
    x = np.asarray(samples, np.float64)
    if not len(x):
        raise UserError("statistics need at least one sample: got none; repeat the measurement")
    if not np.isfinite(x).all():
        raise UserError(f"samples must be finite: got {x[~np.isfinite(x)][0]}; repeat the measurement")
    return x


def _resampled_medians(x: Array, generator: np.random.Generator) -> Array:
    """The medians of 4000 resamples, with replacement, of the sorted samples `x`."""
    n = len(x)
    k = n // 2
    upper = generator.beta(k + 1, n - k, _RESAMPLES)  # the (k+1)-th smallest of n uniform draws
    if n % 2:
        return _pick(x, upper)
    # Below it lie k draws, uniform again, of which the largest is a k-th root.
    lower = upper * generator.random(_RESAMPLES) ** (1 / k)
    return (_pick(x, lower) + _pick(x, upper)) / 2


def _pick(x: Array, uniform: Array) -> Array:
    index = np.minimum((uniform * len(x)).astype(np.intp), len(x) - 1)
    picked: Array = x[index]
    return picked


def _interval(resampled: Array) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def _rank_sum_counts(ranks: NDArray[np.intp], size: int) -> Array:
    """For each sum s, in how many ways `size` of the whole-number `ranks` add up to s."""
    counts = np.zeros((size + 1, int(ranks.sum()) + 1))
    counts[0, 0] = 1
    for rank in ranks:
        counts[1:, rank:] += counts[:-1, :-rank].copy()
    ways: Array = counts[size]
    return ways
