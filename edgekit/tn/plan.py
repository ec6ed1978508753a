"""A rank for each matrix, so that the whole fits a budget and the model suffers least.

Every matrix may stay as it is or become A B of some ranks, in steps of `multiple`. For each rank the change of the
model's predictions is estimated from the error that truncation really makes there (`edgekit.quant.sensitivity`: KL in
nats a token, from one forward and one backward pass), and a dynamic program takes the least sum within the budget
(`edgekit.quant.knapsack`). A budget is one of

    share      of the numbers in all decoder layers          MB      of them at `bits` bits each, scales counted
    million    multiplications a token                       ms      a token on a device (`edgekit.tn.cost`)

Ranks whose factors would be slower than the matrix on the device are no choice. The estimate takes errors as small and
independent; truncation's are neither, so it ranks choices and its sum predicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgekit.device import Device
from edgekit.errors import UserError
from edgekit.quant.knapsack import choose
from edgekit.tn.cost import Cost, cost_of_rank
from edgekit.tn.lowrank import even_rank
from edgekit.tn.whitening import spectrum
from edgekit.weight import Dense, Floats

if TYPE_CHECKING:
    from edgekit.calibrate import Survey
    from edgekit.quant.sensitivity import Curvature

Unit = Literal["share", "MB", "million", "ms"]
RANKS = 12  # at most so many are tried of a matrix


@dataclass(frozen=True)
class Budget:
    """So much of a unit. `bits` and `device` are what the numbers will be stored in and read on."""

    amount: float
    unit: Unit
    bits: float
    device: Device | None

    def cost(self, shape: tuple[int, int], rank: int) -> Cost:
        """Of a matrix (out, in) at a rank; 0 stands for the matrix itself."""
        return cost_of_rank(shape, rank, bits=self.bits, device=self.device)

    def size(self, cost: Cost) -> int:
        """What a choice takes of the budget, in whole numbers, bytes, multiplications or nanoseconds."""
        if self.unit == "MB":
            return round(cost.numbers * self.bits / 8)
        if self.unit == "ms":
            return round(cost.seconds * 1e9)
        return cost.multiplications if self.unit == "million" else cost.numbers

    def limit(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """The whole budget in the units of `size`."""
        scale = {"MB": 1e6, "million": 1e6, "ms": 1e6}
        if self.unit == "share":
            return int(self.amount * sum(rows * columns for rows, columns in shapes.values()))
        return int(self.amount * scale[self.unit])


@dataclass(frozen=True)
class Choice:
    """A rank (0: as it is), and what it costs in nats a token."""

    rank: int
    loss: float


def candidates(shape: tuple[int, int], multiple: int, budget: Budget) -> list[int]:
    """Ranks worth trying for a matrix (out, in): smaller than it and no slower on the device."""
    steps = even_rank(shape) // multiple
    dense = budget.cost(shape, 0)
    spread = {round(steps * k / RANKS) * multiple for k in range(1, RANKS + 1)} - {0}
    slower_is_fine = budget.device is None
    return [rank for rank in sorted(spread) if slower_is_fine or budget.cost(shape, rank).pays_against(dense)]


def losses(W: Floats, curvature: Curvature, ranks: list[int], *, where: str) -> list[Choice]:
    """What each rank of W: (out, in) costs, truncated in the metric of the curvature's inputs."""
    found = [Choice(0, 0.0)]
    if ranks:
        basis = spectrum(W, curvature.inputs, where=where).left
        for rank in ranks:
            left = basis[:, :rank]
            found.append(Choice(rank, curvature.loss((left @ (left.T @ W) - W).astype("float32"))))
    return found


def measured(survey: Survey, wanted: Mapping[str, list[int]]) -> Iterator[tuple[str, list[Choice]]]:
    """The choices of each matrix of `wanted`, module -> ranks, from the last layer to the first."""
    from edgekit.quant.sensitivity import curvatures

    for block, found, _ in curvatures(survey, seed=0):
        for module, curvature in found.items():
            weight = block.matrices[module]
            if module in wanted and isinstance(weight, Dense):
                yield module, losses(weight.values, curvature, wanted[module], where=module)


def planned_ranks(
    choices: Mapping[str, list[Choice]], shapes: Mapping[str, tuple[int, int]], budget: Budget
) -> dict[str, int]:
    """The best rank for each module of `shapes`; those without choices stay as they are.

    Raises BudgetError: not even the smallest ranks fit; UserError: the budget is none.
    """
    if not budget.amount > 0:
        raise UserError(f"a budget must be above 0: got {budget.amount} {budget.unit}")
    rows = {module: choices.get(module, [Choice(0, 0.0)]) for module in shapes}
    sizes = [[budget.size(budget.cost(shapes[m], choice.rank)) for choice in row] for m, row in rows.items()]
    taken = choose(sizes, [[choice.loss for choice in row] for row in rows.values()], budget.limit(shapes))
    return {module: row[at].rank for (module, row), at in zip(rows.items(), taken, strict=True)}
