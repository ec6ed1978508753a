"""The step `tn.lowrank`: matrices become products of two thin ones, in the metric of what they really read.

The matrices of a layer are taken in the order in which they run, each on the inputs that the truncated ones before it
make. One of these says how far to go:

    keep      the share of each matrix's numbers that its factors may have
    error     the relative error of each matrix's outputs
    budget    of the whole model, in `unit`: ranks are planned from measured sensitivity (`edgekit.tn.plan`)
    plan      `MODULE RANK` a line, what a budget becomes: a recipe that has one needs no survey

Ranks are whole multiples of `multiple`, so that rounding to blocks wastes nothing. A matrix whose factors would not be
smaller, or would be slower on `device`, stays as it is, and the record says why.

With `follow` above 0, what is truncated is the matrix corrected for the drift of the hidden states: `edgekit.quant.
methods` has the formula. Put a rounding step after it: factors are rounded as any matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

import numpy as np

from edgekit.checkpoint import Block, Checkpoint
from edgekit.device import Device, load_device
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.stages import in_order, stage_of
from edgekit.step import Changes, Fact, InputStatistics, MatrixOutline, Needs, Outline, Prediction, StepContext
from edgekit.tn.chosen import error_facts, is_named, refuse_strays
from edgekit.tn.cost import cost_of_rank
from edgekit.tn.lowrank import even_rank, rank_for_error, rank_for_share, truncated
from edgekit.tn.plan import Budget, Unit, candidates, measured, planned_ranks
from edgekit.tn.whitening import Whitening, relative_error, spectrum
from edgekit.weight import Dense, Floats, Weight

if TYPE_CHECKING:
    from edgekit.calibrate import Survey

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
DAMPING = 0.01  # of the mean diagonal, where the drift is solved for


@dataclass(frozen=True)
class LowRank:
    """See the module. modules: patterns of module paths. whiten: false truncates plainly, for comparison. method: how a
    matrix comes back from its metric. bits: what a number will be stored in, scales counted."""

    name: ClassVar[str] = "tn.lowrank"
    keep: float = 0.0
    error: float = 0.0
    budget: float = 0.0
    unit: Unit = "share"
    device: str = ""
    bits: float = 4.5
    whiten: bool = True
    method: Whitening = "swift"
    follow: float = 0.0
    multiple: int = 32
    modules: tuple[str, ...] = ("model.layers.*",)
    plan: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        chosen = [name for name in ("keep", "error", "budget") if getattr(self, name)]
        if len(chosen) + bool(self.plan and not self.budget) != 1:
            raise UserError(
                "tn.lowrank needs one of keep, error, budget and plan: got"
                f" {', '.join(chosen + ['plan'] * bool(self.plan)) or 'none'}"
            )
        for name, highest in (("keep", 1.0), ("error", 1.0), ("follow", 1.0), ("budget", math.inf)):
            if not 0 <= getattr(self, name) <= highest:
                raise UserError(f"{name} must be from 0 to {highest}: got {getattr(self, name)}")
        if self.unit not in get_args(Unit) or self.method not in get_args(Whitening):
            raise UserError(f"unit must be one of {get_args(Unit)}, method of {get_args(Whitening)}")
        if self.multiple < 1 or not 1 <= self.bits <= 32:
            raise UserError(f"multiple must be at least 1 and bits from 1 to 32: got {self.multiple}, {self.bits}")
        if self.follow and not self.whiten:
            raise UserError("follow needs the metric of the inputs: set whiten = true")
        if self.unit == "ms" and self.budget and not self.device:
            raise UserError("a budget in ms needs a device: name one, such as device = 'pi5'")
        if self.device:
            load_device(self.device)
        self.ranks  # noqa: B018  it checks the plan

    @property
    def needs(self) -> Needs:
        if self.follow:
            return "originals"
        return "activations" if self.whiten or (self.budget and not self.plan) else "weights"

    @property
    def ranks(self) -> Mapping[str, int]:
        """The plan by module; 0 keeps a matrix. Raises UserError for a line that cannot be read."""
        found: dict[str, int] = {}
        for line in self.plan:
            module, _, rank = line.partition(" ")
            if not rank.isdigit() or module in found:
                raise UserError(f"a line of plan must be MODULE RANK, each module once: got {line!r}")
            found[module] = int(rank)
        return found

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        refuse_strays(self.name, self.modules, checkpoint)
        modules = [module for matrices, _ in checkpoint.blocks.values() for module in matrices]
        for module, rank in self.ranks.items():
            if module not in modules:
                raise UserError(f"tn.lowrank: each line of plan must name a matrix of the model: it lacks {module}")
            if rank > min(checkpoint.shape(module)):
                raise UserError(f"tn.lowrank: a rank must be at most the smaller dimension: {module} is"
                                f" {checkpoint.shape(module)}, its rank {rank}")  # fmt: skip
        return checkpoint

    def survey(self, survey: Survey) -> LowRank:
        """The step with its plan. Raises BudgetError: not even the smallest ranks fit."""
        if not self.budget or self.plan:
            return self
        budget = Budget(self.budget, self.unit, self.bits, self._device)
        shapes: dict[str, tuple[int, int]] = {}
        wanted: dict[str, list[int]] = {}
        for name in survey.names:
            for module, weight in survey.block(name).matrices.items():
                if stage_of(module) is not None:
                    shapes[module] = weight.shape
                    if isinstance(weight, Dense) and self._is_asked(module):
                        wanted[module] = candidates(weight.shape, self.multiple, budget)
        ranks = planned_ranks(dict(measured(survey, wanted)), shapes, budget)
        return dataclasses.replace(self, plan=tuple(f"{module} {rank}" for module, rank in sorted(ranks.items())))

    @property
    def _device(self) -> Device | None:
        return load_device(self.device) if self.device else None

    def _is_asked(self, module: str) -> bool:
        return stage_of(module) is not None and is_named(module, self.modules)

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        now = Block(block.name, dict(block.matrices), block.vectors)
        errors: list[tuple[float, float]] = []
        facts: dict[str, Fact] = {}
        skipped: list[Skip] = []
        for module in in_order(block.matrices):
            weight = block.matrices[module]
            rank = self._known_rank(module, weight)
            if isinstance(rank, Skip):
                skipped.append(rank)
                continue
            found = context.inputs.statistics(now, module) if self.whiten and context.inputs else None
            gram = None if found is None else found.gram
            W = weight.dense()
            aim = W if found is None or not self.follow else followed(W, found, self.follow, module)
            seen = spectrum(aim, gram, where=module)
            rank = rank or rank_for_error(seen, self.error, multiple=self.multiple)
            if too_large := self._does_not_pay(module, weight.shape, rank):
                skipped.append(too_large)
                continue
            factored = truncated(aim, gram, rank, where=module, method=self.method, found=seen)
            errors.append(relative_error(aim, factored.dense(), gram))
            now.matrices[module] = factored
            if found is not None:
                few = facts["inputs_a_token"].value if "inputs_a_token" in facts else 0.0
                facts["inputs_a_token"] = Fact(max(few, W.shape[1] / max(1, found.tokens)), "max")
        facts |= error_facts(errors, of_outputs=self.whiten)
        return now, Changes(len(errors), facts, tuple(skipped))

    def _known_rank(self, module: str, weight: Weight | MatrixOutline) -> int | Skip:
        """The rank from the options; 0 where the error decides."""
        dense = weight.dense if isinstance(weight, MatrixOutline) else isinstance(weight, Dense)
        if not self._is_asked(module):
            return Skip(module, "no pattern of modules names it")
        if not dense:
            return Skip(module, "is quantised or factored already")
        if self.error:
            return 0
        if self.keep:
            rank = rank_for_share(weight.shape, self.keep, multiple=self.multiple)
            return rank or Skip(module, f"keep {self.keep} leaves it no rank in multiples of {self.multiple}")
        return self.ranks.get(module, 0) or Skip(module, "the plan keeps it")

    def _does_not_pay(self, module: str, shape: tuple[int, int], rank: int) -> Skip | None:
        if rank > even_rank(shape):
            return Skip(module, f"its factors of rank {rank} would not be smaller than the matrix")
        if self._device is not None:
            costs = [cost_of_rank(shape, r, bits=self.bits, device=self._device) for r in (rank, 0)]
            if not costs[0].pays_against(costs[1]):
                times = " and ".join(f"{cost.seconds * 1e6:.1f} us" for cost in costs)
                return Skip(module, f"its factors would be slower on {self.device}: {times} for the matrix")
        return None

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        """Exact but for `error`, whose ranks only the weights tell: there the matrices count as they are."""
        matrices, seconds, workspace = {}, 0.0, 0
        for module, matrix in outline.matrices.items():
            rank = self._known_rank(module, matrix)
            if not isinstance(rank, Skip):
                rows, columns = matrix.shape
                seconds += (10.0 * min(rows, columns) ** 3 + 4.0 * rows * columns * columns) / 1e10
                workspace = max(workspace, 8 * (4 * columns**2 + 4 * rows * columns + 2 * min(rows, columns) ** 2))
                if rank and self._does_not_pay(module, matrix.shape, rank) is None:
                    shapes = ((rows, rank), (rank, columns))
                    parts = tuple(MatrixOutline(shape, 4 * shape[0] * shape[1], dense=True) for shape in shapes)
                    matrix = matrix.with_factors(parts)
            matrices[module] = matrix
        return Prediction(Outline(outline.name, matrices, outline.vector_bytes), seconds, workspace)


def followed(W: Floats, found: InputStatistics, follow: float, module: str) -> Floats:
    """W: (out, in) corrected for the drift of its inputs, and of the stream that it writes to."""
    from edgekit.quant.gptq import damped

    if found.cross is None:
        return W
    moved = W.astype(np.float64) @ (found.cross - found.gram)
    if found.drift is not None and module.endswith(WRITERS):
        moved = moved + found.drift
    H = damped(found.gram, DAMPING, where=module)
    aim: Floats = (W + follow * np.linalg.solve(H, moved.T).T).astype(np.float32)
    return aim
