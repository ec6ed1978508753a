"""The steps `quant.int8`, `quant.int4`, `quant.int3` and `quant.int2`: every matrix to the nearest points of a grid.

Linear layers of all decoder layers go to the step's own bits; the token table and the head (a third of a small model,
and its most sensitive matrices) have an option of their own. A tied table is stored once and rounded once. Norms and
biases stay float, and of a factored matrix each factor is rounded. No data is needed.
Without `search` a matrix that lies on the grid already is kept exactly.
The grid itself, and the error that it can make at most: `edgekit.quant.grid`.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, get_args

import numpy as np

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.quant.grid import (
    CHUNK_WEIGHTS,
    Bits,
    BlockSize,
    Grid,
    Offset,
    Scales,
    round_to_grid,
    squared_error,
)
from edgekit.step import Changes, Fact, MatrixOutline, Needs, Outline, Prediction, StepContext
from edgekit.weight import Dense, Floats, Quantized, Weight, of_parts, owner_of, stored_parts

Embedding = Literal["int2", "int3", "int4", "int5", "int6", "int8", "keep"]
TABLE_BITS: dict[Embedding, Bits] = {"int2": 2, "int3": 3, "int4": 4, "int5": 5, "int6": 6, "int8": 8}


@dataclass(frozen=True)
class Rounding:
    """What the steps share.

    block: columns that share a scale. offset: symmetric, an integer zero point a block, or a float minimum. scales:
    float16, or int8 with one float16 step a row, which saves a byte a scale. search: scales of least squared error
    instead of those that span their blocks. embedding: what becomes of the token table and the head; int8 is symmetric
    there, fewer bits follow `offset`, keep leaves them float. skip: patterns of module paths to leave alone, such as
    `*.down_proj` or `model.layers.0.*`.
    """

    name: ClassVar[str]
    bits: ClassVar[Bits]
    needs: ClassVar[Needs] = "weights"
    block: BlockSize = 32
    offset: Offset = "symmetric"
    scales: Scales = "float16"
    search: bool = False
    embedding: Embedding = "int8"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Grid(self.bits, self.block, self.offset, self.scales)
        if type(self.search) is not bool:
            raise UserError(f"search must be true or false: got {self.search!r}")
        if self.embedding not in get_args(Embedding):
            raise UserError(f"embedding must be one of {', '.join(get_args(Embedding))}: got {self.embedding!r}")
        if not isinstance(self.skip, tuple):
            raise UserError(f"skip must be a list of patterns: got {self.skip!r}")

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        return _check_patterns(self, checkpoint)

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        return _apply(self, block)

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        return _predict(self, outline)


@dataclass(frozen=True)
class Int8(Rounding):
    """Eight bits a weight. Options: `Rounding`."""

    name: ClassVar[str] = "quant.int8"
    bits: ClassVar[Bits] = 8


@dataclass(frozen=True)
class Int4(Rounding):
    """Four bits a weight, and eight for the token table and the head unless told otherwise. Options: `Rounding`."""

    name: ClassVar[str] = "quant.int4"
    bits: ClassVar[Bits] = 4
    offset: Offset = "zero"


@dataclass(frozen=True)
class Int3(Rounding):
    """Three bits a weight, with searched minima and scales of 8 bits. Options: `Rounding`."""

    name: ClassVar[str] = "quant.int3"
    bits: ClassVar[Bits] = 3
    offset: Offset = "minimum"
    scales: Scales = "int8"
    search: bool = True


@dataclass(frozen=True)
class Int2(Rounding):
    """Two bits a weight, as `Int3`. Small models collapse at 2 bits unless something makes up for it."""

    name: ClassVar[str] = "quant.int2"
    bits: ClassVar[Bits] = 2
    offset: Offset = "minimum"
    scales: Scales = "int8"
    search: bool = True


def _check_patterns(step: Rounding, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, when each pattern of `skip` matches something; one that does not is a slip of the pen."""
    modules = [module for matrices, _ in checkpoint.blocks.values() for module in matrices]
    for pattern in step.skip:
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise UserError(
                f"{step.name}: each pattern of skip must match a module: {pattern!r} matches none;"
                f" modules are named as {modules[len(modules) // 2]}"
            )
    return checkpoint


def grid_for(step: Rounding, module: str, shape: tuple[int, int], *, dense: bool) -> Grid | Skip:
    """The grid for one matrix, or why it stays as it is."""
    grid = Grid(step.bits, step.block, step.offset, step.scales)
    for pattern in step.skip:
        if fnmatchcase(owner_of(module), pattern):
            return Skip(module, f"matches the pattern {pattern} of skip")
    if not dense:
        return Skip(module, "is quantised already")
    if not module.startswith("model.layers."):
        if step.embedding == "keep":
            return Skip(module, "embedding is to be kept")
        bits = TABLE_BITS[step.embedding]
        grid = Grid(bits, step.block, "symmetric" if bits == 8 else step.offset, step.scales)
    if shape[1] < grid.block:
        return Skip(module, f"its width {shape[1]} is below the block of {grid.block}")
    return grid


def _apply(step: Rounding, block: Block) -> tuple[Block, Changes]:
    matrices: dict[str, Weight] = {}
    errors: list[tuple[float, float]] = []
    skipped: list[Skip] = []
    for module, weight in block.matrices.items():
        parts: list[Dense | Quantized] = []
        for name, part in stored_parts(module, weight):
            grid = grid_for(step, name, part.shape, dense=isinstance(part, Dense))
            if isinstance(grid, Skip):
                skipped.append(grid)
                parts.append(part)
                continue
            W = part.dense()
            rounded = round_to_grid(W, grid, where=name, search=step.search)
            errors.append(squared_error(W, rounded))
            parts.append(rounded)
        matrices[module] = of_parts(weight, parts)
    changes = Changes(len(errors), facts_of(errors) if errors else {}, tuple(skipped))
    return Block(block.name, matrices, block.vectors), changes


def facts_of(errors: list[tuple[float, float]]) -> dict[str, Fact]:
    """From (squared error, squared norm) of each matrix."""
    relative = [math.sqrt(error / power) if power else 0.0 for error, power in errors]
    error, power = (math.fsum(column) for column in zip(*errors, strict=True))
    return {
        "relative_error": Fact(math.sqrt(error / power) if power else 0.0, "rms", power),
        "worst_relative_error": Fact(max(relative), "max"),
    }


def _predict(step: Rounding, outline: Outline) -> Prediction:
    matrices: dict[str, MatrixOutline] = {}
    seconds = 0.0
    for module, matrix in outline.matrices.items():
        parts = []
        for index, part in enumerate(matrix.factors or (matrix,)):
            name = f"{module}.factors.{index}" if matrix.factors else module
            grid = grid_for(step, name, part.shape, dense=part.dense)
            if isinstance(grid, Grid):
                part = MatrixOutline(part.shape, grid.size_bytes(part.shape), dense=False)
                seconds += math.prod(part.shape) * _seconds_a_weight(grid, step.search)
            parts.append(part)
        matrices[module] = matrix.with_factors(tuple(parts)) if matrix.factors else parts[0]
    return Prediction(Outline(outline.name, matrices, outline.vector_bytes), seconds, 10 * 4 * CHUNK_WEIGHTS)


@functools.cache
def _seconds_a_weight(grid: Grid, search: bool) -> float:
    """What rounding one weight and taking its error costs here: the better of two timings of a small matrix."""
    W: Floats = np.random.default_rng(0).standard_normal((128 if search else 512, 2048), np.float32)

    def timed() -> float:
        started = time.perf_counter()
        squared_error(W, round_to_grid(W, grid, where="timing", search=search))
        return time.perf_counter() - started

    return min(timed(), timed()) / W.size
