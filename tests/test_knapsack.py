"""The knapsack: exact, within its budget, and honest when nothing fits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekit.quant.knapsack as module
from edgekit.errors import BudgetError
from edgekit.quant.knapsack import choose

ITEM = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10)), min_size=1, max_size=4)


def cost(sizes: list[list[int]], costs: list[list[float]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    return (
        sum(item[at] for item, at in zip(sizes, chosen, strict=True)),
        sum(item[at] for item, at in zip(costs, chosen, strict=True)),
    )


@settings(deadline=None, max_examples=200)
@given(st.lists(ITEM, min_size=1, max_size=5), st.integers(0, 150), st.integers(1, 1000))
def test_it_finds_what_trying_everything_finds(items: list[list[tuple[int, float]]], budget: int, unit: int) -> None:
    sizes = [[size * unit for size, _ in item] for item in items]
    costs = [[value for _, value in item] for item in items]
    budget *= unit
    every = [cost(sizes, costs, chosen) for chosen in itertools.product(*(range(len(item)) for item in items))]
    fitting = [value for size, value in every if size <= budget]
    if not fitting:
        with pytest.raises(BudgetError, match="must hold the smallest plan"):
            choose(sizes, costs, budget)
        return
    size, value = cost(sizes, costs, choose(sizes, costs, budget))
    assert size <= budget
    assert value == pytest.approx(min(fitting))


def test_too_many_states_are_rounded_up_and_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATES", 100)
    sizes = [[1, 1009 * k, 2003 * k] for k in range(1, 30)]
    costs = [[9.0 * k, 3.0 * k, 0.0] for k in range(1, 30)]
    for budget in (29, 5_000, 100_000, 10_000_000):
        size, value = cost(sizes, costs, choose(sizes, costs, budget))
        assert size <= budget
    assert value == 0  # the last budget holds everything


def test_one_size_for_all_is_no_choice() -> None:
    assert choose([[5, 5, 5], [5]], [[2.0, 1.0, 3.0], [7.0]], 10) == [1, 0]
