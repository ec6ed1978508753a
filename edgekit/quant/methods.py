"""The quantising steps as recipes name them: `edgekit.quant.rounding` with a choice of method.

    rtn     nearest points. No data
    hqq     nearest points, offsets moved so that errors are sparse. No data (`edgekit.quant.hqq`)
    gptq    errors move into columns still to come (`edgekit.quant.gptq`). Needs calibration
    awq     channels scaled first, then nearest points (`edgekit.quant.scaling`). Needs calibration

Any of them can follow `quant.rotate`, `quant.smooth` or `quant.awq`, which leave the model's function as it is. The
matrices of a layer are taken in the order in which they run, and each is fitted to what it really reads: the inputs
made by the matrices before it as they are stored.

With `follow` above 0, gptq aims at the outputs of the original model instead of those that the same matrix would give
on the drifted inputs: with x' and r' what it reads, and the residual stream it joins, in the original,

    W* = W + follow * sum_t (W (x'_t - x_t) + (r'_t - r_t)) x_t^T H^-1        (r only where a matrix writes the stream)

is what is rounded: the least squares answer to the drift. Source: GPTAQ, Li et al., arXiv 2504.02692, which spreads the
same correction over the columns; the residual's part is ours.

A tied token table is read as the head and as the table. As the head its metric is the Gram matrix of the final states,
of the model before this step, on a few windows; as the table it is the identity: `TIED` of the mean diagonal is added.
At 8 bits, and where nothing is known of what a matrix reads (a table that is not tied), it is rounded to nearest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Block
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.stages import in_order, stage_of
from edgekit.quant import rounding
from edgekit.quant.gptq import Metric, Order, damped, descend, gptq, in_blocks_of, output_error, output_power, refit
from edgekit.quant.grid import Grid, fit, in_blocks, round_to_grid, squared_error
from edgekit.quant.hqq import hqq
from edgekit.quant.scaling import awq_scales, scaled
from edgekit.step import Changes, Fact, Inputs, InputStatistics, Needs, Outline, Prediction, StepContext
from edgekit.weight import Dense, Factored, Floats, Quantized, Weight, concatenate, of_parts, stored_parts

Method = Literal["rtn", "gptq", "awq", "hqq"]
TABLE = "model.embed_tokens"
TIED = 1.0
ROWS = 4096  # of a matrix at a time: rows are independent
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Compensation:
    """How gptq works: options of the same names of `Methods`."""

    order: Order = "given"
    damping: float = 0.01
    refine: int = 1
    follow: float = 0.0

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise UserError(f"order must be one of {', '.join(get_args(Order))}: got {self.order!r}")
        if not 0 < self.damping <= 10:
            raise UserError(f"damping must be above 0 and at most 10: got {self.damping}")
        if not 0 <= self.refine <= 20:
            raise UserError(f"refine must be from 0 to 20: got {self.refine}")
        if not 0 <= self.follow <= 1:
            raise UserError(f"follow must be from 0 to 1: got {self.follow}")


@dataclass(frozen=True)
class Methods:
    """What the steps have beside the options of `edgekit.quant.rounding`.

    order: of gptq's columns; "activation" takes those with large inputs first. damping: share of the mean diagonal that
    is added to the Gram matrix. refine: times that codes and scales are improved in turns after gptq. follow: see the
    module; it runs the original model beside.
    """

    method: Method = "rtn"
    order: Order = "given"
    damping: float = 0.01
    refine: int = 1
    follow: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UserError(f"method must be one of {', '.join(get_args(Method))}: got {self.method!r}")
        self._compensation  # noqa: B018  it checks the options
        super().__post_init__()  # type: ignore[misc]

    @property
    def needs(self) -> Needs:
        return needs_of(self.method, self.follow)

    @property
    def _compensation(self) -> Compensation:
        return Compensation(self.order, self.damping, self.refine, self.follow)

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        step: rounding.Rounding = self  # type: ignore[assignment]
        if self.method == "rtn":
            return super().apply(block, context)  # type: ignore[misc,no-any-return]
        if self.method == "awq" and block.name.startswith("layers."):
            grid = Grid(step.bits, step.block, step.offset, step.scales)
            block, _ = scaled(block, context, lambda matrices, found: awq_scales(matrices, found, grid))
        return quantise_block(
            block,
            context,
            lambda module, weight: rounding.grid_for(step, module, weight.shape, dense=isinstance(weight, Dense)),
            self.method,
            self._compensation,
            search=step.search,
        )

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        found: Prediction = super().predict(outline, context)  # type: ignore[misc]
        return _with_cost(found, outline, self.method)


@dataclass(frozen=True)
class Int8(Methods, rounding.Int8):  # type: ignore[override]  # a property where the other is a constant
    """Eight bits a weight. Options: `rounding.Int8`, `Methods`."""


@dataclass(frozen=True)
class Int4(Methods, rounding.Int4):  # type: ignore[override]  # a property where the other is a constant
    """Four bits a weight. Options: `rounding.Int4`, `Methods`."""


@dataclass(frozen=True)
class Int3(Methods, rounding.Int3):  # type: ignore[override]  # a property where the other is a constant
    """Three bits a weight. Options: `rounding.Int3`, `Methods`."""


@dataclass(frozen=True)
class Int2(Methods, rounding.Int2):  # type: ignore[override]  # a property where the other is a constant
    """Two bits a weight. Options: `rounding.Int2`, `Methods`."""


def needs_of(method: Method, follow: float) -> Needs:
    """What a step of this method must see."""
    if method == "gptq" and follow:
        return "originals"
    return "activations" if method in ("gptq", "awq") else "weights"


def quantise_block(
    block: Block,
    context: StepContext,
    grid_for: Callable[[str, Weight], Grid | Skip],
    method: Method,
    compensation: Compensation,
    *,
    search: bool,
) -> tuple[Block, Changes]:
    """The block with each matrix on the grid that `grid_for` names, in the order in which they run; of a factored one
    each factor, by the names of `stored_parts`."""
    now = Block(block.name, dict(block.matrices), block.vectors)
    plain, output = [], []
    skipped: list[Skip] = []
    shared: tuple[NDArray[np.float64], Metric] | None = None
    for module in in_order(block.matrices):
        whole = block.matrices[module]
        parts: dict[str, Dense | Quantized] = dict(stored_parts(module, whole))
        for name, weight in reversed(parts.items()):  # the last factor reads x
            grid = grid_for(name, weight)
            if isinstance(grid, Skip):
                skipped.append(grid)
                continue
            W = weight.dense()
            found = _statistics(now, context.inputs, module, grid) if method == "gptq" else None
            if found is not None and isinstance(whole, Factored):
                W, found = _factor(W, whole, list(parts.values()), found, first=name.endswith(".0"))
            if found is None:
                rounded = hqq_rounded(W, grid, name) if method == "hqq" and grid.bits < 8 else None
                rounded = rounded or round_to_grid(W, grid, where=name, search=search)
            else:
                damping = TIED if module == TABLE else compensation.damping
                options = dataclasses.replace(compensation, damping=damping)
                if shared is None or shared[0] is not found.gram:  # q, k and v read the same, and so do gate and up
                    shared = found.gram, metric_of(found, options, name)
                rounded, errors = compensated(W, found, grid, options, name, search=search, metric=shared[1])
                output.append(errors)
            plain.append(squared_error(W, rounded))
            parts[name] = rounded
        now.matrices[module] = of_parts(whole, list(parts.values()))
    facts = rounding.facts_of(plain) if plain else {}
    if output:
        error, power = (math.fsum(column) for column in zip(*output, strict=True))
        facts["relative_output_error"] = Fact(math.sqrt(error / power) if power else 0.0, "rms", power)
    return now, Changes(len(plain), facts, tuple(skipped))


def _factor(
    W: Floats, whole: Factored, now: Sequence[Dense | Quantized], found: InputStatistics, *, first: bool
) -> tuple[Floats, InputStatistics | None]:
    """What a factor is rounded to, and what it reads; None where that is not known, as within longer products.

    Of low rank W = A B, B reads x; A reads B x with B as rounded, and is first fitted anew to that: with G the Gram
    matrix of x, A' = A B G Bq^T (Bq G Bq^T)^-1.
    """
    if not whole.is_low_rank:
        return W, None
    alone = dataclasses.replace(found, cross=None, drift=None)
    if not first:
        return W, alone
    B, rounded = (part.dense().astype(np.float64) for part in (whole.factors[1], now[1]))
    gram = rounded @ found.gram @ rounded.T
    damping = 1e-6 * np.trace(gram) / len(gram) + 1e-30
    moved = np.linalg.solve(gram + damping * np.eye(len(gram)), rounded @ found.gram @ B.T)
    refitted = (W.astype(np.float64) @ moved.T).astype(np.float32)
    return refitted, dataclasses.replace(alone, gram=gram)


def _statistics(block: Block, inputs: Inputs | None, module: str, grid: Grid) -> InputStatistics | None:
    """What is known of a matrix's inputs; None for a table that is not tied and for 8 bits."""
    known = stage_of(module) is not None or module in (TABLE, "lm_head")
    return inputs.statistics(block, module) if inputs is not None and known and grid.bits < 8 else None


def compensated(
    W: Floats,
    found: InputStatistics,
    grid: Grid,
    options: Compensation,
    where: str,
    *,
    search: bool,
    metric: Metric | None = None,
) -> tuple[Quantized, tuple[float, float]]:
    """W: (out, in) rounded by gptq, and (output error, output power) in the metric of its inputs.

    `metric`: what `metric_of` gives for these inputs and options, where a matrix before has made it.
    """
    metric = metric or metric_of(found, options, where)
    aim = W
    if options.follow and found.cross is not None:
        moved = W.astype(np.float64) @ (found.cross - found.gram)
        if found.drift is not None and where.endswith(WRITERS):
            moved = moved + found.drift
        aim = (W + options.follow * np.linalg.solve(metric.H, moved.T).T).astype(np.float32)
    blocks = -(-W.shape[1] // grid.block)
    importance = np.zeros((blocks, grid.block), np.float32)
    importance.reshape(-1)[: W.shape[1]] = metric.H.diagonal() / metric.H.diagonal().mean()
    parts: list[Weight] = []
    error = power = 0.0
    for start in range(0, max(len(W), 1), ROWS):
        rows = aim[start : start + ROWS]
        lattice = fit(in_blocks(rows, grid), grid, where=where, importance=importance, search=search)
        codes = gptq(rows, metric, lattice)
        for _ in range(options.refine):
            codes = descend(rows, metric, lattice, codes, passes=1)
            lattice = refit(rows, metric, codes, lattice)
        if options.refine:
            codes = descend(rows, metric, lattice, codes, passes=1)
        part = lattice.store(in_blocks_of(codes, lattice), W.shape[1])
        parts.append(part)
        error += output_error(rows, part.dense(), found.gram)
        power += output_power(rows, found.gram)
    whole = concatenate(parts)
    assert isinstance(whole, Quantized)
    return whole, (error, power)


def metric_of(found: InputStatistics, options: Compensation, where: str) -> Metric:
    """The metric of inputs, damped. Raises ModelError: they are not finite."""
    return Metric(damped(found.gram, options.damping, where=where), options.order, where)


def hqq_rounded(W: Floats, grid: Grid, where: str) -> Quantized:
    """W: (out, in) on `grid` with the offsets of `edgekit.quant.hqq`."""
    parts: list[Weight] = []
    for start in range(0, max(len(W), 1), ROWS):
        x = in_blocks(W[start : start + ROWS], grid)
        lattice = hqq(x, fit(x, grid, where=where))
        parts.append(lattice.store(lattice.codes(x), W.shape[1]))
    whole = concatenate(parts)
    assert isinstance(whole, Quantized)
    return whole


def _with_cost(found: Prediction, outline: Outline, method: Method) -> Prediction:
    """The prediction with the method's own work: factoring and updates go with the cube of the width."""
    if method in ("rtn", "hqq"):
        return found
    widths = {matrix.shape for matrix in outline.matrices.values() if matrix.dense}
    work = sum(rows * columns**2 + 4.0 * columns**3 for rows, columns in widths)
    largest = max((rows * columns for rows, columns in widths), default=0)
    return dataclasses.replace(
        found, seconds=found.seconds + work / 2e10, workspace_bytes=found.workspace_bytes + 24 * largest
    )
