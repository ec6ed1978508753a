"""One choice for each item, least total cost within a budget: solved exactly, by dynamic programming over bytes.

    best_k(b) = min over choices c of item k:  cost_kc + best_{k-1}(b - size_kc)

Sizes are counted in their greatest common divisor, which for matrices of one model is large: 70 MB are some ten to a
hundred thousand states. Where that would be more than `STATES`, sizes are rounded up to coarser units; what is found
then still fits, and is the best for the rounded sizes. Source: Bellman 1957; multiple-choice knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgekit.errors import BudgetError

STATES = 1 << 20


def choose(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The index of each item's choice. Sizes in bytes, not negative; costs are finite.

    Raises BudgetError when even the smallest choices do not fit.
    """
    least = sum(min(item) for item in sizes)
    if least > budget:
        raise BudgetError(
            f"the target must hold the smallest plan: {budget / 1e6:.2f} MB for {least / 1e6:.2f} MB; ask for more, or"
            " allow fewer bits"
        )
    spare = [[size - min(item) for size in item] for item in sizes]  # what a choice takes beyond the smallest
    room = budget - least
    unit = math.gcd(*(size for item in spare for size in item)) or 1
    unit *= max(1, math.ceil((min(room, sum(map(max, spare))) // unit + 1) / STATES))
    states = min(room, sum(max(-(-size // unit) * unit for size in item) for item in spare)) // unit + 1
    best = np.zeros(states)
    taken: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
    for item_sizes, item_costs in zip(spare, costs, strict=True):
        new = np.full(states, np.inf)
        choice = np.zeros(states, np.uint8)
        for index, (size, cost) in enumerate(zip(item_sizes, item_costs, strict=True)):
            shift = -(-size // unit)
            if shift >= states:
                continue
            through = best[: states - shift] + cost
            better = through < new[shift:]
            new[shift:][better] = through[better]
            choice[shift:][better] = index
        best = new
        taken.append(choice)
    found, state = [], int(np.argmin(best))
    for item_sizes, choice in zip(reversed(spare), reversed(taken), strict=True):
        index = int(choice[state])
        found.append(index)
        state -= -(-item_sizes[index] // unit)
    return found[::-1]
