import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import UserError
from edgekit.profile import stats
from edgekit.profile.stats import difference, drift, holm, mann_whitney, measured, paired, signed_rank, summary

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@given(samples=numbers)
def test_summary_is_numpys_and_the_interval_holds_the_median(samples):
    found = summary(samples)
    assert (found.median, found.p50, found.n) == (np.median(samples), found.median, len(samples))
    assert (found.p90, found.p99) == tuple(np.percentile(samples, [90, 99]))
    assert found.mean == pytest.approx(np.mean(samples))
    if len(samples) > 1:
        assert found.sd == pytest.approx(np.std(samples, ddof=1))
    if len(samples) >= 3:
        assert min(samples) <= found.low <= found.median <= found.high <= max(samples)


@given(
    samples=st.lists(st.floats(0.5, 2), min_size=3, max_size=20), seed=st.randoms(), scale=st.sampled_from([2.0, 0.125])
)
def test_order_does_not_matter_and_units_scale(samples, seed, scale):
    shuffled = samples[:]
    seed.shuffle(shuffled)
    found = summary(samples)
    assert (summary(shuffled).low, summary(shuffled).high) == (found.low, found.high)
    scaled = summary([scale * sample for sample in samples])
    assert (scaled.low, scaled.median, scaled.high) == (scale * found.low, scale * found.median, scale * found.high)


@pytest.mark.parametrize(("samples", "sd"), [([7.0], None), ([7.0, 9.0], math.sqrt(2))])
def test_fewer_than_three_samples_have_no_interval(samples, sd):
    found = summary(samples)
    assert (found.low, found.high, found.spread) == (None, None, None)
    assert found.sd == (None if sd is None else pytest.approx(sd))


@pytest.mark.parametrize("function", [summary, drift, lambda samples: difference([1.0], samples)])
@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_no_or_infinite_samples_are_refused(function, samples):
    with pytest.raises(UserError, match=r"at least one sample|must be finite"):
        function(samples)


@pytest.mark.parametrize("n", [3, 4, 5, 6, 9, 10, 41])
def test_medians_drawn_by_order_statistics_are_those_of_plain_resampling(n):
    x = np.sort(np.random.default_rng(n).normal(size=n))
    plain = np.median(np.random.default_rng(0).choice(x, (40_000, n)), axis=1)
    ours = stats._resampled_medians(x, np.random.default_rng(0))
    points = np.union1d(plain, ours)
    cumulative = [np.searchsorted(np.sort(draws), points, "right") / len(draws) for draws in (plain, ours)]
    assert np.abs(cumulative[0] - cumulative[1]).max() < 0.03


@pytest.mark.parametrize(("n", "least"), [(5, 0.9), (10, 0.9), (30, 0.92)])
def test_the_interval_covers_the_true_median_about_as_often_as_it_says(n, least):
    generator = np.random.default_rng(n)
    found = [summary(generator.normal(size=n)) for _ in range(400)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert least <= covered <= 0.98


def test_measured_is_a_row_with_its_spread():
    row = measured("tg128", [10.0, 11.0, 12.0, 13.0, 14.0], unit="tok/s", note="warm")
    assert (row.name, row.value, row.unit, row.how, row.n, row.note) == ("tg128", 12.0, "tok/s", "measured", 5, "warm")
    assert 0 < row.spread <= 2.0


@pytest.mark.parametrize(
    ("samples", "ratio"),
    [
        ([1.0] * 8, 1.0),
        ([1.0, 1.0, 5.0, 5.0, 5.0, 5.0, 1.5, 1.5], 1.5),
        ([2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.5),
        ([1.0] * 7, None),
        ([0.0] * 8, None),
    ],
)
def test_drift(samples, ratio):
    assert drift(samples) == ratio


def brute_p(a, b):
    """The Mann-Whitney p-value by trying every split of the pooled samples."""
    pooled = np.array([*a, *b])
    ranks = np.array([np.mean(np.flatnonzero(np.sort(pooled) == one)) for one in pooled])
    sums = np.array([ranks[list(chosen)].sum() for chosen in itertools.combinations(range(len(pooled)), len(a))])
    distance = np.abs(sums - len(a) * ranks.mean())
    return np.mean(distance >= distance[0] - 1e-9)


@given(a=st.lists(st.integers(0, 5), min_size=1, max_size=5), b=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_mann_whitney_is_exact_also_with_ties(a, b):
    assert mann_whitney(a, b) == pytest.approx(brute_p(a, b))
    assert mann_whitney(b, a) == pytest.approx(mann_whitney(a, b))


@pytest.mark.parametrize(("n", "p_value"), [(3, 0.1), (4, 2 / 70), (5, 2 / 252), (10, 2 / 184756)])
def test_samples_wholly_apart_have_the_least_p_value(n, p_value):
    assert mann_whitney(range(n), range(n, 2 * n)) == pytest.approx(p_value)


@pytest.mark.parametrize("seed", range(5))
def test_the_normal_p_value_meets_the_exact_one(seed, monkeypatch):
    generator = np.random.default_rng(seed)
    a, b = np.round(generator.normal(size=24), 1), np.round(generator.normal(0.3, size=26), 1)
    exact = mann_whitney(a, b)
    monkeypatch.setattr(stats, "_EXACT_UP_TO", 0)
    assert mann_whitney(a, b) == pytest.approx(exact, abs=0.01)
    assert mann_whitney([1.0] * 40, [1.0] * 40) == 1.0


@given(a=st.lists(st.floats(0.5, 2), min_size=1, max_size=12), b=st.lists(st.floats(0.5, 2), min_size=1, max_size=12))
def test_the_ratio_lies_in_its_interval(a, b):
    found = difference(a, b)
    assert found.ratio == np.median(b) / np.median(a)
    assert found.low <= found.ratio * (1 + 1e-12)
    assert found.high >= found.ratio * (1 - 1e-12)
    assert 0 < found.p_value <= 1


def test_the_noise_of_either_side_widens_the_interval():
    noisy, still = [1.0, 2.0, 3.0, 4.0, 5.0], [3.0] * 5
    for found in (difference(noisy, still), difference(still, noisy)):
        assert found.low < 0.8
        assert found.high > 1.25


@pytest.mark.parametrize("zero", [0.0, -1.0])
def test_no_ratio_of_what_is_not_positive(zero):
    found = difference([1.0, 2.0], [zero, 3.0])
    assert (found.ratio, found.low, found.high) == (None, None, None)


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5, 6], 2 / 64),
        ([-1, 2, 3, 4, 5, 6], 4 / 64),
        ([1, 2, 3, 4, 5, 6, 7, 8], 2 / 256),
        ([1, -1], 1.0),
        ([0, 0, 0], 1.0),
        ([0, 1, 2, 3, 4, 5, 6], 2 / 64),
        ([2, 2, 2, 2, -1], 4 / 32),  # ranks 3.5 four times and 1: only the rank of 1 may turn
    ],
)
def test_signed_ranks_by_hand(differences, p):
    assert signed_rank(differences) == pytest.approx(p)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9))
def test_signed_ranks_count_every_change_of_signs(differences):
    x = np.array([d for d in differences if d], float)
    if not len(x):
        assert signed_rank(differences) == 1.0
        return
    ranks = np.array([(np.abs(x) < abs(d)).sum() + ((np.abs(x) == abs(d)).sum() + 1) / 2 for d in x])
    sums = [(ranks * signs).sum() for signs in itertools.product((0, 1), repeat=len(x))]
    distance = abs((ranks * (x > 0)).sum() - ranks.sum() / 2)
    far = sum(abs(total - ranks.sum() / 2) >= distance - 1e-9 for total in sums)
    assert signed_rank(differences) == pytest.approx(far / len(sums))


def test_many_signed_ranks_are_nearly_normal():
    x = np.random.default_rng(0).normal(0.3, 1, 51)
    exact = signed_rank(x[:50])
    assert signed_rank(x) == pytest.approx(exact, rel=0.5)


def test_the_interval_of_pairs_agrees_with_their_test():
    generator = np.random.default_rng(0)
    for _ in range(200):
        n = int(generator.integers(6, 15))
        b = np.exp(generator.normal(0.02, 0.05, n))
        found = paired(b)
        assert found.low <= found.ratio <= found.high
        outside = found.low > 1 or found.high < 1
        assert outside == (found.p_value <= 0.05)


@pytest.mark.parametrize("ratios", [[], [1.0, 0.0], [1.0, -2.0], [math.nan]])
def test_ratios_must_be_above_zero(ratios):
    with pytest.raises(UserError, match=r"at least one sample|must be (above 0|finite)"):
        paired(ratios)


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx((0.06, 0.03, 0.06))
    assert holm([0.9, 0.8]) == (1.0, 1.0)
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_raises_keeps_the_order_and_the_least_is_bonferronis(p_values):
    raised = holm(p_values)
    assert all(high >= low for high, low in zip(raised, p_values, strict=True))
    assert min(raised) == min(1.0, len(p_values) * min(p_values))
    pairs = sorted(zip(p_values, raised, strict=True))
    assert [high for _, high in pairs] == sorted(raised)
