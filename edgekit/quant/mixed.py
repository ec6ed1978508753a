"""The step `quant.mixed`: bits for each matrix, so that the whole fits a size and the model suffers least.

Every matrix has a few formats to choose from: `bits` with blocks, offsets and scales as the options say, and, from a
GGUF whose codes are kept, its own codes with scales as they are or with scales of 8 bits. For each the error of plain
rounding is made and its cost in KL estimated (`edgekit.quant.sensitivity`); a dynamic program then takes the least sum
of costs within `target_mb` (`edgekit.quant.knapsack`). The token table takes part as one more matrix. The plan becomes
the option `plan`, `MODULE FORMAT` a line, so a recipe that has one needs no survey and gives the same again:

    model.layers.0.mlp.down_proj 3/32/minimum/int8         bits / block / offset / scales
    model.layers.0.self_attn.q_proj keep                   as it is

The size is that of codes, scales, offsets and vectors; a graph file and alignment come on top. Costs are added up as
if matrices did not interact, and the method that is used then (gptq) does better than rounding, about alike everywhere:
the plan ranks choices, its sum predicts nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast, get_args

import numpy as np

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import BudgetError, UserError
from edgekit.manifest import Skip
from edgekit.model.gguf import GgufReader
from edgekit.quant.gptq import Order
from edgekit.quant.grid import Bits, BlockSize, Grid, Offset, Scales, round_to_grid
from edgekit.quant.keep import Keep
from edgekit.quant.knapsack import choose
from edgekit.quant.lattice import nearest
from edgekit.quant.methods import Compensation, Method, needs_of, quantise_block
from edgekit.step import Changes, MatrixOutline, Needs, Outline, Prediction, StepContext
from edgekit.weight import Factored, Quantized, Weight, of_parts, owner_of, stored_parts

if TYPE_CHECKING:
    from edgekit.calibrate import Survey
    from edgekit.quant.sensitivity import Curvature

KEEP = "keep"
SAMPLED = 128  # rows of a matrix whose rounding is tried in each format


@dataclass(frozen=True)
class Table:
    """Module -> (format, bytes, cost in nats a token) of each way to store it; and what vectors take."""

    choices: Mapping[str, list[tuple[str, int, float]]]
    vector_bytes: int


@dataclass(frozen=True)
class Mixed:
    """See the module. bits, blocks: what may be chosen. keep: take a GGUF's codes where it has some that we can hold.

    The rest as in `edgekit.quant.methods` and `rounding`.
    """

    name: ClassVar[str] = "quant.mixed"
    target_mb: float = 0.0
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    blocks: tuple[int, ...] = (32, 64)
    offset: Offset = "minimum"
    scales: Scales = "int8"
    search: bool = True
    keep: bool = True
    method: Method = "gptq"
    order: Order = "given"
    damping: float = 0.01
    refine: int = 1
    follow: float = 0.0
    plan: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (("bits", self.bits), ("blocks", self.blocks)):
            if not values or len(set(values)) != len(values):
                raise UserError(f"{name} must name one or more sizes, each once: got {list(values)}")
        self.grids  # noqa: B018  it checks them
        if self.method not in get_args(Method):
            raise UserError(f"method must be one of {', '.join(get_args(Method))}: got {self.method!r}")
        if self.method == "awq":
            raise UserError("method awq scales for one grid, quant.mixed has many: put the step quant.awq before it")
        self._compensation  # noqa: B018  it checks the options
        self.formats  # noqa: B018  and the plan

    @property
    def needs(self) -> Needs:
        found = needs_of(self.method, self.follow)
        return found if self.plan or found != "weights" else "activations"

    @property
    def _compensation(self) -> Compensation:
        return Compensation(self.order, self.damping, self.refine, self.follow)

    @property
    def grids(self) -> list[Grid]:
        """What may be chosen for a float matrix."""
        pairs = itertools.product(self.bits, self.blocks)
        return [Grid(cast(Bits, bits), cast(BlockSize, block), self.offset, self.scales) for bits, block in pairs]

    @property
    def formats(self) -> Mapping[str, Grid | None]:
        """The plan by module; None keeps a matrix. Raises UserError for a line that cannot be read."""
        return _parsed(self.plan)

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        if not self.target_mb > 0 and not self.plan:
            raise UserError(
                f"quant.mixed needs a size: set target_mb above 0 or pass --target-size, got {self.target_mb}"
            )
        if self.keep and isinstance(checkpoint.tensors, GgufReader):
            checkpoint = Keep().prepare(checkpoint)
        modules = {module for matrices, _ in checkpoint.blocks.values() for module in matrices}
        stray = sorted(set(self.formats) - modules)
        if stray:
            raise UserError(f"quant.mixed: each line of plan must name a matrix of the model: it lacks {stray[0]}")
        return checkpoint

    def survey(self, survey: Survey) -> Mixed:
        """The step with its plan. Raises BudgetError: not even the smallest formats fit."""
        return self if self.plan else self.planned(self.table(survey))

    def table(self, survey: Survey) -> Table:
        """What every format of every matrix takes and costs; it does not depend on the target."""
        from edgekit.quant.sensitivity import curvatures

        choices: dict[str, list[tuple[str, int, float]]] = {}
        vectors = 0
        for block, found, squares in curvatures(survey, seed=0):
            vectors += sum(values.nbytes for values in block.vectors.values())
            for module, curvature in found.items():
                choices[module] = self.options_for(block.matrices[module], module, curvature, squares[module])
        return Table(choices, vectors)

    def planned(self, table: Table) -> Mixed:
        """The step with the best plan for its target. Raises BudgetError: not even the smallest formats fit."""
        budget = int(self.target_mb * 1e6) - table.vector_bytes
        if budget < 0:
            raise BudgetError(
                f"the target must hold the model's vectors: {self.target_mb} MB for {table.vector_bytes / 1e6:.2f} MB"
            )
        options = list(table.choices.values())
        sizes, costs = ([[row[at] for row in rows] for rows in options] for at in (1, 2))
        chosen = choose(sizes, costs, budget)  # type: ignore[arg-type]
        lines = [f"{m} {rows[at][0]}" for (m, rows), at in zip(table.choices.items(), chosen, strict=True)]
        return dataclasses.replace(self, plan=tuple(sorted(lines)))

    def options_for(
        self, weight: Weight, module: str, curvature: Curvature, squares: object
    ) -> list[tuple[str, int, float]]:
        """(format, bytes, cost) of each way to store one matrix; costs are estimated on a few of its rows."""
        sample = None if isinstance(weight, Factored) else curvature.sample(SAMPLED)
        shapes = [part.shape for _, part in stored_parts(module, weight)]
        whole_bytes = weight.size_bytes
        if sample is not None:
            assert not isinstance(weight, Factored)
            weight = weight.rows(sample.rows)
        W = weight.dense()
        found: list[tuple[str, int, float]] = []
        grids = self.grids
        if isinstance(weight, Quantized):
            found.append((KEEP, whole_bytes, 0.0))
            smaller = small_scales(weight)
            if smaller is not None:
                grids = [grid for grid in grids if grid.bits < weight.bits]
                error, grid = smaller.dense() - W, grid_of(smaller)
                found.append((_line(grid), grid.size_bytes(shapes[0]), curvature.loss(error, sample)))
        importance = np.asarray(squares, np.float32)
        parts = [part.dense() for _, part in stored_parts(module, weight)]
        for grid in grids:
            if any(part.shape[1] < grid.block for part in parts):
                continue
            known = importance if len(parts) == 1 else None  # of a factored matrix it is no weight of its columns
            rounded = [round_to_grid(part, grid, where=module, importance=known, search=self.search) for part in parts]
            error = of_parts(weight, rounded).dense() - W
            size_bytes = sum(map(grid.size_bytes, shapes))
            found.append((_line(grid), size_bytes, curvature.loss(error, sample)))
        return found or [(KEEP, whole_bytes, 0.0)]

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        matrices = {module: self._smaller(module, weight) for module, weight in block.matrices.items()}
        thinned = sum(matrices[module] is not block.matrices[module] for module in matrices)
        start = Block(block.name, matrices, block.vectors)
        after, changes = quantise_block(
            start,
            context,
            lambda part, weight: self._grid_for(part, weight, dict(_parts(block))[part]),
            self.method,
            self._compensation,
            search=self.search,
        )
        return after, dataclasses.replace(changes, changed=changes.changed + thinned)

    def _smaller(self, module: str, weight: Weight) -> Weight:
        """A matrix whose codes stay and whose scales become smaller, where the plan says so; else as it is."""
        grid = self.formats.get(module)
        if isinstance(weight, Quantized) and grid is not None and grid.bits == weight.bits:
            smaller = small_scales(weight)
            if smaller is not None and grid_of(smaller) == grid:
                return smaller
        return weight

    def _grid_for(self, module: str, weight: Weight, before: Weight) -> Grid | Skip:
        if weight is not before:
            return Skip(module, "its codes stay, its scales have 8 bits now")
        if owner_of(module) not in self.formats:
            return Skip(module, "the plan does not name it")
        grid = self.formats[owner_of(module)]
        return Skip(module, "the plan keeps it") if grid is None else grid

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        matrices, seconds = {}, 0.0
        for module, matrix in outline.matrices.items():
            grid = self.formats.get(module)
            if grid is None:
                matrices[module] = matrix
                continue
            parts = [
                MatrixOutline(part.shape, grid.size_bytes(part.shape), dense=False)
                for part in matrix.factors or (matrix,)
            ]
            matrices[module] = matrix.with_factors(tuple(parts)) if matrix.factors else parts[0]
            seconds += sum((rows * columns**2 + 4.0 * columns**3) / 2e10 for rows, columns in (p.shape for p in parts))
        workspace = max((28 * shape[0] * shape[1] for shape in (m.shape for m in outline.matrices.values())), default=0)
        return Prediction(Outline(outline.name, matrices, outline.vector_bytes), seconds, workspace)


def _parts(block: Block) -> Iterator[tuple[str, Weight]]:
    for module, weight in block.matrices.items():
        yield from stored_parts(module, weight)


def grid_of(weight: Quantized) -> Grid:
    """The grid that a quantised matrix is stored on."""
    offset: Offset = "minimum" if weight.minima is not None else "symmetric" if weight.zeros is None else "zero"
    scales: Scales = "float16" if weight.steps is None else "int8"
    return Grid(cast(Bits, weight.bits), cast(BlockSize, weight.block), offset, scales)


def small_scales(weight: Quantized) -> Quantized | None:
    """The same codes with scales, and minima, of 8 bits; None where scales are negative or have 8 bits already, and
    for a block that no grid has (a GGUF's 16 columns)."""
    scale = weight.block_scales()
    known = weight.block in get_args(BlockSize)
    if not known or weight.steps is not None or weight.zeros is not None or (scale < 0).any():
        return None
    grid = dataclasses.replace(grid_of(weight), scales="int8")
    lattice = nearest(grid, scale, minimum=weight.block_minima())
    return dataclasses.replace(weight, scales=lattice.scales, minima=lattice.minima, steps=lattice.steps)


def _line(grid: Grid) -> str:
    return f"{grid.bits}/{grid.block}/{grid.offset}/{grid.scales}"


@functools.lru_cache(maxsize=8)
def _parsed(plan: tuple[str, ...]) -> Mapping[str, Grid | None]:
    found: dict[str, Grid | None] = {}
    for line in plan:
        module, _, text = line.partition(" ")
        bits, block, offset, scales = text.split("/") if text.count("/") == 3 else ("", "", "", "")
        if module in found or not (text == KEEP or (bits.isdigit() and block.isdigit())):
            raise UserError(
                "a line of plan must be MODULE keep, or MODULE bits/block/offset/scales, each module once:"
                f" got {line!r}"
            )
        found[module] = (
            None
            if text == KEEP
            else Grid(cast(Bits, int(bits)), cast(BlockSize, int(block)), cast(Offset, offset), cast(Scales, scales))
        )
    return found
