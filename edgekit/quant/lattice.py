"""The grid that was asked for, and the points that the weights of one matrix may then take.

A `Grid` says how codes, scales and offsets are stored: see `edgekit.weight` for their meaning. A `Lattice` holds the
stored scale and offset of each block of one matrix, with the values that they will have when they are read again, so
whoever rounds to it (all at once, or column by column as GPTQ does) sees the error that will really be made:

    code    q = clip(rint((w - m) / s) + z, 0, 2**b - 1)
    value   s * (q - z) + m                                  z = 0 beside minima, m = 0 without
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UserError
from edgekit.weight import Bytes, Floats, Halves, Quantized, SignedBytes, pack, restored

Bits = Literal[2, 3, 4, 5, 6, 8]
BlockSize = Literal[32, 64, 128]
Offset = Literal["symmetric", "zero", "minimum"]
Scales = Literal["float16", "int8"]


@dataclass(frozen=True)
class Grid:
    """How finely to round: `bits` a code, `block` columns a scale.

    offset: "symmetric", an integer "zero" point a block, or a "minimum". scales: "float16", or "int8" for codes with
    one float16 step a row, of the minima too. Every combination is allowed. Raises UserError for other values.
    """

    bits: Bits
    block: BlockSize
    offset: Offset = "symmetric"
    scales: Scales = "float16"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("bits", self.bits, get_args(Bits)),
            ("block", self.block, get_args(BlockSize)),
            ("offset", self.offset, get_args(Offset)),
            ("scales", self.scales, get_args(Scales)),
        ):
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}: got {value!r}")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def size_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that a matrix of `shape` (out, in) takes."""
        rows, blocks = shape[0], -(-shape[1] // self.block)
        numbers = 2 if self.offset == "minimum" else 1
        each, once = (2 * numbers, 0) if self.scales == "float16" else (numbers, 2 * numbers)
        zeros = -(-blocks * self.bits // 8) if self.offset == "zero" else 0
        return rows * (blocks * (self.block * self.bits // 8 + each) + once + zeros)


@dataclass(frozen=True)
class Lattice:
    """Scales and offsets of `rows` x `blocks` blocks, as they are stored.

    scales: (rows, blocks) float16, or uint8 with `steps` (rows, 1 or 2) float16. zeros: (rows, blocks) uint8, one a
    byte. minima: (rows, blocks) float16, or int8 with steps. See `edgekit.weight`.
    """

    grid: Grid
    scales: Halves | Bytes
    zeros: Bytes | None = None
    minima: Halves | SignedBytes | None = None
    steps: Halves | None = None

    @cached_property
    def scale(self) -> Floats:
        """s of each block, (rows, blocks) float32; 0 where all weights become z."""
        return restored(self.scales, None if self.steps is None else self.steps[:, :1])

    @cached_property
    def zero(self) -> Floats:
        """z of each block, (rows, blocks) float32: whole numbers."""
        if self.zeros is not None:
            return self.zeros.astype(np.float32)
        middle = 0 if self.minima is not None else 1 << (self.grid.bits - 1)
        return np.full(self.scales.shape, middle, np.float32)

    @cached_property
    def minimum(self) -> Floats:
        """m of each block, (rows, blocks) float32."""
        if self.minima is None:
            return np.zeros(self.scales.shape, np.float32)
        return restored(self.minima, None if self.steps is None else self.steps[:, 1:])

    def codes(self, x: Floats, block: int | None = None) -> Bytes:
        """The nearest codes of x: (rows, blocks, n), or (rows, n) of any columns of block number `block`."""
        s, z, m = self._of(block)
        q = x / np.where(s == 0, np.float32(1), s) if self.minima is None else (x - m) / np.where(s == 0, np.inf, s)
        np.rint(q, out=q)
        q += z
        np.clip(q, 0, self.grid.top, out=q)
        return q.astype(np.uint8)

    def values(self, codes: Bytes, block: int | None = None) -> Floats:
        """What codes stand for, in the shapes of `codes`; the very numbers that `Quantized.dense` gives."""
        s, z, m = self._of(block)
        values = codes.astype(np.float32)
        if self.minima is None:
            values -= z
        values *= s
        if self.minima is not None:
            values += m
        return values

    def store(self, codes: Bytes, columns: int) -> Quantized:
        """The matrix of codes (rows, blocks, block), of which the first `columns` columns are meant."""
        return Quantized(
            pack(codes, self.grid.bits),
            self.scales,
            None if self.zeros is None else pack(self.zeros, self.grid.bits),
            bits=self.grid.bits,
            block=self.grid.block,
            columns=columns,
            minima=self.minima,
            steps=self.steps,
        )

    def _of(self, block: int | None) -> tuple[Floats, Floats, Floats]:
        index = np.s_[:, :, None] if block is None else np.s_[:, block, None]
        return self.scale[index], self.zero[index], self.minimum[index]


def nearest(
    grid: Grid,
    scale: Floats,
    *,
    zero: Floats | None = None,
    minimum: Floats | None = None,
    steps: Halves | None = None,
) -> Lattice:
    """The stored numbers nearest to `scale`, and to `zero` or `minimum` as the grid has it: (rows, blocks) float32.

    Scales of 8 bits have no sign: negative ones become 0. `steps` (rows, 1 or 2): those of other blocks of the same
    rows, else they reach the largest scale and minimum of these. Numbers past float16's range become its ends.
    """
    zeros = None
    if grid.offset == "zero":
        assert zero is not None
        zeros = np.clip(np.rint(zero), 0, grid.top).astype(np.uint8)
    if grid.offset != "minimum":
        minimum = None
    if grid.scales == "float16":
        return Lattice(grid, _half(scale), zeros, None if minimum is None else _half(minimum))
    if steps is None:
        parts = [_step(scale, 255), *([] if minimum is None else [_step(minimum, 127)])]
        steps = np.concatenate(parts, axis=1)
    codes = np.clip(np.rint(_over(scale, steps[:, :1])), 0, 255).astype(np.uint8)
    if minimum is None:
        return Lattice(grid, codes, zeros, steps=steps)
    signed = np.clip(np.rint(_over(minimum, steps[:, 1:])), -128, 127).astype(np.int8)
    return Lattice(grid, codes, zeros, signed, steps)


def join(lattices: Sequence[Lattice]) -> Lattice:
    """Lattices of neighbouring blocks of the same rows as one. They must share their grid and steps."""
    first = lattices[0]
    if any(part.grid != first.grid or not _same(part.steps, first.steps) for part in lattices):
        raise UserError("lattices must share their grid and their steps to be joined: fit each with steps of the first")
    zeros = [part.zeros for part in lattices if part.zeros is not None]
    minima: list[NDArray[Any]] = [part.minima for part in lattices if part.minima is not None]
    return replace(
        first,
        scales=np.concatenate([part.scales for part in lattices], axis=1),
        zeros=np.concatenate(zeros, axis=1) if zeros else None,
        minima=np.concatenate(minima, axis=1) if minima else None,
    )


def _same(a: Halves | None, b: Halves | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _half(values: Floats) -> Halves:
    return np.clip(values, -65504, 65504).astype(np.float16)


def _step(values: Floats, most: int) -> Halves:
    """The smallest float16 step, (rows, 1), `most` of which reach the largest of `values`."""
    exact = np.abs(values).max(1, initial=0)[:, None] / np.float32(most)
    step = _half(exact)
    return np.where(step.astype(np.float32) < exact, np.nextafter(step, np.float16(65504)), step)


def _over(values: Floats, step: Halves) -> Floats:
    divisor = step.astype(np.float32)
    divisor[step == 0] = 1
    return values / divisor
