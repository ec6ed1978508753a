"""Paired statistics: facts by hand, slow sums, and what they say of simulated models."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import UserError
from edgekit.evaluate.paired import compare_answers, mcnemar, mean_interval


def slow_mid_p(lost: int, gained: int) -> float:
    """Every outcome of `lost + gained` coins that is less likely than the observed, and half of those as likely."""
    total, seen = lost + gained, math.comb(lost + gained, lost)
    ways = [math.comb(total, k) for k in range(total + 1)]
    return sum(way if way < seen else way / 2 for way in ways if way <= seen) / 2**total


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_counts_outcomes(lost: int, gained: int) -> None:
    assert mcnemar(lost, gained) == pytest.approx(slow_mid_p(lost, gained) if lost != gained else 1.0)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_a_difference_lies_in_its_interval_and_counts_add_up(pairs: list[tuple[bool, bool]]) -> None:
    found = compare_answers([a for a, _ in pairs], [b for _, b in pairs])
    assert found.low - 1e-9 <= found.worst <= found.high
    shrunk = found.difference * found.n / (found.n + 2)
    assert found.low - 1e-9 <= shrunk <= found.high + 1e-9
    assert found.b - found.a == pytest.approx(found.difference)
    assert found.flips == sum(a != b for a, b in pairs)


@pytest.mark.parametrize(
    ("lost", "gained", "within", "verdict"),
    [(0, 0, 1.0, "no worse"), (100, 0, 1.0, "worse"), (30, 20, 1.0, "cannot tell"), (30, 20, 3.0, "no worse")],
)
def test_verdicts(lost: int, gained: int, within: float, verdict: str) -> None:
    a = [True] * lost + [False] * gained + [True] * (1000 - lost - gained)
    b = [False] * lost + [True] * gained + [True] * (1000 - lost - gained)
    assert compare_answers(a, b).verdict(within) == verdict


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], []), ([True], [True, False])])
def test_sets_that_are_no_pairs_are_refused(a: list[bool], b: list[bool]) -> None:
    with pytest.raises(UserError, match="the same items twice"):
        compare_answers(a, b)


@pytest.mark.parametrize("changing", [0.02, 0.05, 0.1])
def test_equal_models_are_told_apart_once_in_twenty(changing: float) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        sides = rng.random(2000) < changing
        lost = int(rng.binomial(int(sides.sum()), 0.5))
        found.append(mcnemar(lost, int(sides.sum()) - lost) < 0.05)
    assert np.mean(found) <= 0.075  # 0.05 and three standard errors of 400 trials


def test_a_planted_drop_of_two_points_is_found() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        a = rng.random(2000) < 0.6
        flips = rng.random(2000) < 0.03  # noise both ways, then the drop
        b = np.where(flips, rng.random(2000) < 0.6, a) & ~(rng.random(2000) < 0.02 / 0.6)
        found.append(compare_answers(a.tolist(), b.tolist()).significant)
    assert np.mean(found) >= 0.8


@pytest.mark.parametrize(("free", "quantile"), [(1, 12.706), (2, 4.3027), (3, 3.1824), (9, 2.2622), (100, 1.9840)])
def test_students_quantile(free: int, quantile: float) -> None:
    values = np.zeros(free + 1)
    values[0] = 1
    found = mean_interval(values)
    half = quantile * values.std(ddof=1) / math.sqrt(len(values))
    assert found.high - found.mean == pytest.approx(half, rel=0.02)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([3.0]).high == math.inf
    with pytest.raises(UserError, match="at least one value"):
        mean_interval([])
