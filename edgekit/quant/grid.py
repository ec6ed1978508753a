"""Round a float matrix to the nearest points of an integer grid, block by block.

Each row is cut into blocks of `block` columns, and a block with smallest weight lo and largest weight hi gets, for
b bits, a float16 scale s and an integer zero point z (see `edgekit.weight` for the storage):

    asymmetric   s = up((max(hi, 0) - min(lo, 0)) / (2**b - 1))     z = round(-min(lo, 0) / s)
    symmetric    s = up(e / -8) at 4 bits, up(|e| / 127) at 8, e the largest in magnitude     z = 2**(b-1)
    code         q = clip(round(w / s) + z, 0, 2**b - 1)            w is restored as s * (q - z)

up() rounds to float16 away from zero, so a stored scale always spans its block and no weight is cut off for the
scale's own rounding; codes are taken with the stored scale. A symmetric scale of 4 bits is negative where e is
positive: e gets code 0, so all 16 codes are in use. At 8 bits one code more or less hardly matters, but what lies on
the grid of GGUF's Q8_0, as token tables often do, is kept exactly. An all-zero block gets scale 0. Padding gets the
code z, which restores to zero.

What then holds, with a = 1/2 + 2**-14 (the second term covers rounding in float32):

    |w - restored| <= a * |s|     for every weight, except that in a symmetric block of 4 bits
    |w - restored| <= |s|         for weights beyond 7.5 * |s| whose sign is not that of e

Rounding what was rounded gives the same codes on the symmetric grid, where |s| >= 2**-14 (float16's normal numbers).
Usual libraries round the scale to nearest, or take codes with the unrounded one; both cut weights off or shift them.
Not supported: 2 and 3 bits, blocks along columns, float zero points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError, UserError
from edgekit.weight import Bytes, Floats, Quantized, pack

Bits = Literal[4, 8]
BlockSize = Literal[32, 64, 128]
CHUNK_WEIGHTS = 1 << 18  # weights treated at a time: the temporaries stay in the cache, and small beside any matrix


@dataclass(frozen=True)
class Grid:
    """How finely to round: `bits` a code, `block` columns a scale, with a zero point unless `symmetric`."""

    bits: Bits
    block: BlockSize
    symmetric: bool

    def __post_init__(self) -> None:
        for name, value, allowed in (("bits", self.bits, get_args(Bits)), ("block", self.block, get_args(BlockSize))):
            if type(value) is not int or value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}: got {value!r}")
        if type(self.symmetric) is not bool:
            raise UserError(f"symmetric must be true or false: got {self.symmetric!r}")

    def size_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of codes, scales and zero points of a matrix of `shape` (out, in)."""
        rows, blocks = shape[0], -(-shape[1] // self.block)
        zeros = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (blocks * (self.block * self.bits // 8 + 2) + zeros)


def round_to_grid(W: Floats, grid: Grid, *, where: str) -> Quantized:
    """The nearest codes for `W`: (out, in) float32, within the bounds that the module states.

    `where` names the matrix for messages. Raises ModelError: a NaN or infinite weight, or one so large that its scale
    passes float16's range (65504).
    """
    rows, columns = W.shape
    blocks = -(-columns // grid.block)
    codes = np.empty((rows, blocks, grid.block * grid.bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float16)
    zeros = None if grid.symmetric else np.empty((rows, -(-blocks * grid.bits // 8)), np.uint8)
    for part in _row_chunks(rows, columns):
        x = _in_blocks(W[part], blocks, grid.block)
        scales[part], z = _scales(x, grid, where)
        s = scales[part].astype(np.float32)
        codes[part] = pack(_codes(x, s, z, grid.bits), grid.bits)
        if zeros is not None:
            zeros[part] = pack(z.astype(np.uint8), grid.bits)
    return Quantized(codes, scales, zeros, bits=grid.bits, block=grid.block, columns=columns)


def squared_error(W: Floats, rounded: Quantized) -> tuple[float, float]:
    """(sum of (W - rounded)**2, sum of W**2) over a matrix, a few rows at a time; their ratio is the noise power."""
    error = power = 0.0
    for part in _row_chunks(*rounded.shape):
        exact = W[part]
        difference = rounded.rows(part).dense()
        difference -= exact
        error += float(np.einsum("ij,ij->", difference, difference))
        power += float(np.einsum("ij,ij->", exact, exact))
    return error, power


def _in_blocks(rows: Floats, blocks: int, block: int) -> Floats:
    """(rows, columns) as (rows, blocks, block); a ragged end is filled with zeros, which get the zero point's code."""
    count, columns = rows.shape
    if columns == blocks * block:
        return rows.reshape(count, blocks, block)
    padded = np.zeros((count, blocks * block), np.float32)
    padded[:, :columns] = rows
    return padded.reshape(count, blocks, block)


def _scales(x: Floats, grid: Grid, where: str) -> tuple[NDArray[np.float16], Floats]:
    """The scale and zero point of each block of x: (rows, blocks, block); both (rows, blocks)."""
    columns = np.ascontiguousarray(x.reshape(-1, grid.block).T)  # reducing the first axis is 4 times as fast
    lo, hi = columns.min(axis=0).reshape(x.shape[:2]), columns.max(axis=0).reshape(x.shape[:2])
    if not (np.isfinite(lo).all() and np.isfinite(hi).all()):  # a NaN anywhere in a block is its minimum too
        raise ModelError(f"weights must be finite: {where} has NaN or infinity; the source is damaged, fetch it again")
    if grid.symmetric:
        if grid.bits == 4:
            scale = _divided_up(np.where(-lo >= hi, lo, hi), -8, where)
        else:
            scale = _divided_up(np.maximum(-lo, hi), 127, where)
        return scale, np.full(scale.shape, 1 << (grid.bits - 1), np.float32)
    top = (1 << grid.bits) - 1
    lo = np.minimum(lo, 0)
    with np.errstate(over="ignore"):
        scale = _divided_up(np.maximum(hi, 0) - lo, top, where)
    return scale, np.clip(np.rint(-lo / _divisor(scale.astype(np.float32))), 0, top)


def _divided_up(span: Floats, steps: int, where: str) -> NDArray[np.float16]:
    """The float16 scale s next to span / steps, away from zero, so that |steps * s| >= |span|."""
    exact = span / np.float32(steps) + np.float32(0)  # + 0 turns the -0 of an all-zero block into 0
    with np.errstate(over="ignore"):  # what overflows is refused below
        scale = exact.astype(np.float16)
        short = np.abs(scale.astype(np.float32) * steps) < np.abs(span)
        away = np.copysign(np.float32(np.inf), exact).astype(np.float16)
        scale = np.where(short, np.nextafter(scale, away), scale)
    if not np.isfinite(scale).all():
        raise ModelError(
            f"weights must be small enough for float16 scales: {where} has a block that spans {np.abs(span).max():.3g},"
            f" the limit is {65504 * abs(steps):.3g}; leave the matrix out with skip"
        )
    return scale


def _codes(x: Floats, s: Floats, z: Floats, bits: int) -> Bytes:
    """Codes of x: (rows, blocks, block) with scales s and zero points z: (rows, blocks)."""
    q = x / _divisor(s)[..., None]
    np.rint(q, out=q)
    q += z[..., None]
    np.clip(q, 0, (1 << bits) - 1, out=q)
    return q.astype(np.uint8)


def _divisor(s: Floats) -> Floats:
    """`s`, with 1 for the scale 0 of all-zero blocks, whose weights it divides."""
    return np.where(s == 0, np.float32(1), s)


def _row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, each of about CHUNK_WEIGHTS weights."""
    step = max(1, CHUNK_WEIGHTS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
