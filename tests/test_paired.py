"""Paired statistics: facts by hand, slow sums, and what they say of simulated models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import UserError
from edgekit.evaluate.against import compare_task
from edgekit.evaluate.choices import Answer, Item
from edgekit.evaluate.paired import compare_answers, mcnemar, mean_interval, smooth_changes, t_test

ITEM = Item("q", ("a", "b", "c", "d"), 0)


def slow_p(lost: int, gained: int) -> float:
    """Every outcome of `lost + gained` coins that is at most as likely as the observed."""
    total = lost + gained
    ways = [math.comb(total, k) for k in range(total + 1)]
    return sum(way for way in ways if way <= ways[lost]) / 2**total


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_counts_outcomes(lost: int, gained: int) -> None:
    assert mcnemar(lost, gained) == pytest.approx(slow_p(lost, gained))
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


@pytest.mark.parametrize("flips", [1, 5, 6, 9, 17, 40, 100, 333])
def test_mcnemar_gives_false_alarms_once_in_twenty_at_most(flips: int) -> None:
    """Not simulated: the chance of each outcome of so many coins."""
    alarms = [math.comb(flips, lost) for lost in range(flips + 1) if mcnemar(lost, flips - lost) < 0.05]
    assert sum(alarms) / 2**flips <= 0.05


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 13, 200, 201])
def test_t_test_is_scipy_s(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n)
    for shift in (0.0, 0.1, 1.0):
        values = rng.standard_normal(n) + shift
        assert t_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-9, abs=1e-13)


def test_t_test_at_its_ends() -> None:
    assert t_test([0.0] * 5) == 1
    assert t_test([3.0]) == 1
    assert t_test([2.0] * 5) == 0
    assert t_test([1.0, -1.0]) == pytest.approx(1)


def slow_changes(a: Any, b: Any, right: Any) -> list[float]:
    """One item after the other, as the module's formula stands."""

    def margin(sums: Any, at: int) -> float:
        return sums[at] - max(value for index, value in enumerate(sums) if index != at)

    moved = [margin(y, at) - margin(x, at) for x, y, at in zip(a, b, right, strict=True) if len(x) > 1]
    scale = math.sqrt(sum(value**2 for value in moved) / len(moved))

    def count(sums: Any, at: int) -> float:
        if len(sums) == 1:
            return math.exp(sums[0])
        weights = [math.exp((value - max(sums)) / scale) for value in sums]
        return weights[at] / sum(weights)

    return [100 * (count(y, at) - count(x, at)) for x, y, at in zip(a, b, right, strict=True)]


def test_smooth_changes_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    sizes = [1, 2, 3, 4, 5, 2, 1, 4]
    a, b = ([(-9 * rng.random(size)).tolist() for size in sizes] for _ in "ab")
    right = [int(rng.integers(size)) for size in sizes]
    assert smooth_changes(a, b, right) == pytest.approx(slow_changes(a, b, right))
    assert smooth_changes(b, a, right) == pytest.approx(-smooth_changes(a, b, right))


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_exchanging_the_models_on_one_question_turns_its_sign_and_nothing_else(seed: int, items: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (-9 * rng.random((items, 4)) for _ in "ab")
    right, turned = rng.integers(4, size=items).tolist(), rng.random(items) < 0.5
    c, d = np.where(turned[:, None], b, a), np.where(turned[:, None], a, b)
    found = smooth_changes(c.tolist(), d.tolist(), right)
    assert found == pytest.approx(np.where(turned, -1, 1) * smooth_changes(a.tolist(), b.tolist(), right))


@pytest.mark.filterwarnings("error")
def test_smooth_changes_at_their_ends() -> None:
    same = [[-1.0, -2.0], [-3.0], [-1.0, -1.0, -4.0]]
    assert smooth_changes(same, same, [0, 0, 2]).tolist() == [0, 0, 0]
    assert smooth_changes([[-1.0]], [[-2.0]], [0]) == pytest.approx([100 * (math.exp(-2) - math.exp(-1))])
    hard = smooth_changes([[0.0, -1e9]] * 3 + [[-1.0, -2.0]], [[0.0, -1e9]] * 3 + [[-2.0, -1.0]], [0] * 4)
    assert hard[:3].tolist() == [0, 0, 0]
    assert -100 <= hard[3] < 0


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


def answers_of(sums: Any) -> list[Answer]:
    return [Answer(int(row.argmax()), int(row.argmax()), 0, tuple(row)) for row in sums]


@pytest.mark.parametrize("plant", [False, True])
def test_a_planted_drop_of_two_points_is_found_and_none_where_there_is_none(plant: bool) -> None:
    """2,000 questions, a tenth of the answers flip by chance: the test of accuracy alone finds 7 of 10."""
    rng = np.random.default_rng(1)
    n, found, flips = 2000, [], []
    for _ in range(40):
        latent = rng.standard_normal((n, 4)) * 2
        latent[:, 0] += 2
        a, b = (latent + 0.45 * rng.standard_normal((n, 4)) for _ in "ab")
        flips.append(np.mean((a.argmax(1) == 0) != (b.argmax(1) == 0)))
        if plant:
            lost = rng.choice(np.flatnonzero(b.argmax(1) == 0), n // 50, replace=False)
            wrong = 1 + b[lost, 1:].argmax(1)
            b[lost, 0], b[lost, wrong] = b[lost, wrong], b[lost, 0]
        found.append(compare_task("t", [ITEM] * n, answers_of(a), answers_of(b)).changed)
    assert 0.09 < np.mean(flips) < 0.12
    assert np.mean(found) >= 0.9 if plant else np.mean(found) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(found))


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
