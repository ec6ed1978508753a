"""Round a float matrix to the nearest points of an integer grid, block by block.

Each row is cut into blocks of `block` columns. A block with smallest weight lo and largest weight hi gets, for b bits,
a stored scale s and an offset (see `edgekit.weight` for the storage, `edgekit.quant.lattice` for the codes):

    zero        s = up((max(hi, 0) - min(lo, 0)) / (2**b - 1))     z = round(-min(lo, 0) / s)
    minimum     m = down(lo)     s = up((hi - m) / (2**b - 1))
    symmetric   s = up(e / -2**(b-1)), e the largest in magnitude
                s = up(|e| / (2**(b-1) - 1))     at 8 bits, and with 8-bit scales

up() rounds to what can be stored, away from zero, and down() towards minus infinity, so a block's points always span it
and no weight is cut off for the scale's own rounding. A symmetric scale is negative where e is positive: e gets code 0,
so all codes are in use. At 8 bits one code more or less hardly matters, but what lies on the grid of GGUF's Q8_0, as
token tables often do, is kept exactly; scales of 8 bits have no sign. An all-zero block gets scale 0.

Scales of 8 bits: the float16 step of a row is up(its largest scale / 255), that of minima up(the largest |m| / 127).

What then holds, with a = 1/2 + 2**-14 (the second term covers rounding in float32):

    |w - restored| <= a * |s|     for every weight, except that in a symmetric block with a signed scale
    |w - restored| <= |s|         for weights beyond (2**(b-1) - 1/2) * |s| whose sign is not that of e; and
    |w - restored| <= a * |s| + 2**-21 * max(|lo|, |hi|)    with minima.

With `search` the scales are those of least squared error instead (`edgekit.quant.search`), and the bound is given up.

Rounding what was rounded gives the same codes on the symmetric float16 grid, where |s| >= 2**-14 (float16's normal
numbers). Usual libraries round the scale to nearest, or take codes with the unrounded one; both cut weights off or
shift them. Not supported: blocks along columns, blocks of a whole row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError, UserError
from edgekit.quant.lattice import Bits, BlockSize, Grid, Lattice, Offset, Scales
from edgekit.quant.search import search_scales
from edgekit.weight import Bytes, Floats, Halves, Quantized, SignedBytes, Weight, concatenate, restored

__all__ = [
    "CHUNK_WEIGHTS",
    "Bits",
    "BlockSize",
    "Grid",
    "Lattice",
    "Offset",
    "Scales",
    "fit",
    "in_blocks",
    "round_to_grid",
    "squared_error",
]

CHUNK_WEIGHTS = 1 << 18  # weights treated at a time: the temporaries stay in the cache, and small beside any matrix


def round_to_grid(
    W: Floats, grid: Grid, *, where: str, importance: Floats | None = None, search: bool = False
) -> Quantized:
    """The nearest codes for `W`: (out, in) float32, within the bounds that the module states.

    `where` names the matrix for messages. `search` and `importance` (in,): see `fit`. Raises ModelError: a NaN or
    infinite weight, or one so large that its scale passes float16's range (65504).
    """
    rows, columns = W.shape
    parts = list(_row_chunks(rows, columns)) or [slice(0, 0)]
    if importance is None and columns % grid.block:
        importance = np.ones(columns, np.float32)  # padding must not count
    weights = None if importance is None else _column_weights(importance, columns, grid, where)
    rounded: list[Weight] = []
    for part in parts:
        x = in_blocks(W[part], grid)
        lattice = fit(x, grid, where=where, importance=weights, search=search)
        rounded.append(lattice.store(lattice.codes(x), columns))
    whole = concatenate(rounded)
    assert isinstance(whole, Quantized)
    return whole


def fit(
    x: Floats,
    grid: Grid,
    *,
    where: str,
    importance: Floats | None = None,
    search: bool = False,
    steps: Halves | None = None,
) -> Lattice:
    """The scale and offset of each block of x: (rows, blocks, block) float32, finite.

    With `search` those of least squared error sum(importance * (x - restored)**2), of all that were tried; importance
    is (blocks, block), not negative, all alike when absent. `steps` (rows, 1 or 2) are those of a lattice of other
    blocks of the same rows, for 8-bit scales; else they are chosen by the largest scales of these blocks.
    Raises ModelError as `round_to_grid` does; UserError: importance of another shape, negative or not finite.
    """
    lo, hi = _ends(x, grid, where)
    if grid.offset == "minimum":
        lattice = _with_minima(lo, hi, grid, where, steps)
    elif grid.offset == "zero":
        lattice = _with_zeros(lo, hi, grid, where, steps)
    else:
        lattice = _symmetric(lo, hi, grid, where, steps)
    if importance is not None and (importance.shape != x.shape[1:] or not (importance >= 0).all()):
        raise UserError(f"importance must be {x.shape[1:]} numbers, none negative or NaN: got {importance.shape}")
    return search_scales(x, lattice, lo, hi, importance, steps=steps) if search else lattice


def in_blocks(rows: Floats, grid: Grid) -> Floats:
    """(rows, columns) as (rows, blocks, block). A ragged end is filled with zeros, or its last weight beside minima:
    neither widens the block.
    """
    count, columns = rows.shape
    blocks = -(-columns // grid.block)
    if columns == blocks * grid.block:
        return np.ascontiguousarray(rows).reshape(count, blocks, grid.block)
    padded = np.zeros((count, blocks * grid.block), np.float32)
    padded[:, :columns] = rows
    if grid.offset == "minimum":
        padded[:, columns:] = rows[:, -1:]
    return padded.reshape(count, blocks, grid.block)


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


# --- scales that span their blocks ------------------------------------------------------------------------------------


def _ends(x: Floats, grid: Grid, where: str) -> tuple[Floats, Floats]:
    """Smallest and largest weight of each block of x: (rows, blocks, block); both (rows, blocks)."""
    columns = np.ascontiguousarray(x.reshape(-1, grid.block).T)  # reducing the first axis is 4 times as fast
    lo, hi = columns.min(axis=0).reshape(x.shape[:2]), columns.max(axis=0).reshape(x.shape[:2])
    if not (np.isfinite(lo).all() and np.isfinite(hi).all()):  # a NaN anywhere in a block is its minimum too
        raise ModelError(f"weights must be finite: {where} has NaN or infinity; the source is damaged, fetch it again")
    return lo, hi


def _symmetric(lo: Floats, hi: Floats, grid: Grid, where: str, steps: Halves | None) -> Lattice:
    half = 1 << (grid.bits - 1)
    if grid.scales == "int8":
        codes, step = _small_scales(np.maximum(-lo, hi), half - 1, where, steps)
        return Lattice(grid, codes, steps=step)
    if grid.bits == 8:
        return Lattice(grid, _divided_up(np.maximum(-lo, hi), half - 1, where))
    return Lattice(grid, _divided_up(np.where(-lo >= hi, lo, hi), -half, where))


def _with_zeros(lo: Floats, hi: Floats, grid: Grid, where: str, steps: Halves | None) -> Lattice:
    lo = np.minimum(lo, 0)
    with np.errstate(over="ignore"):
        span = np.maximum(hi, 0) - lo
    if grid.scales == "int8":
        codes, steps = _small_scales(span, grid.top, where, steps)
        lattice = Lattice(grid, codes, steps=steps)
    else:
        lattice = Lattice(grid, _divided_up(span, grid.top, where))
    scale = np.where(lattice.scale == 0, np.float32(1), lattice.scale)
    return replace(lattice, zeros=np.clip(np.rint(-lo / scale), 0, grid.top).astype(np.uint8))


def _with_minima(lo: Floats, hi: Floats, grid: Grid, where: str, steps: Halves | None) -> Lattice:
    minima: Halves | SignedBytes
    step = None
    if grid.scales == "int8":
        step = steps[:, 1:] if steps is not None else _divided_up(np.abs(lo).max(1, initial=0)[:, None], 127, where)
        minima = np.clip(np.floor(lo / _divisor(step.astype(np.float32))), -128, 127).astype(np.int8)
    else:
        with np.errstate(over="ignore"):
            minima = lo.astype(np.float16)
        minima = np.where(minima > lo, np.nextafter(minima, np.float16(-np.inf)), minima)
        if not np.isfinite(minima).all():
            raise ModelError(
                f"weights must be small enough for float16 minima: {where} has {lo.min():.3g}, the limit is 65504;"
                " leave the matrix out with skip"
            )
    with np.errstate(over="ignore"):
        span = np.maximum(hi - restored(minima, step), 0)
    # The weights may be sums that were rounded themselves: what such a rounding adds to the span asks for no more.
    span *= 1 - 2**-22 * np.minimum((np.abs(lo) + np.abs(hi)) / _divisor(span), np.float32(2**20))
    if step is None:
        return Lattice(grid, _divided_up(span, grid.top, where), minima=minima)
    codes, scale_step = _small_scales(span, grid.top, where, None if steps is None else steps[:, :1])
    return Lattice(grid, codes, minima=minima, steps=np.concatenate([scale_step, step], axis=1))


def _small_scales(span: Floats, points: int, where: str, steps: Halves | None) -> tuple[Bytes, Halves]:
    """Codes S and steps, (rows, 1), of scales S * step that are at least span / points, and not much more."""
    if steps is None:
        steps = _divided_up(span.max(1, initial=0)[:, None], 255 * points, where)
    exact = span / (np.float32(points) * _divisor(steps.astype(np.float32)))
    return np.clip(np.ceil(exact * np.float32(1 - 2**-22)), 0, 255).astype(np.uint8), steps


def _divided_up(span: Floats, points: int, where: str) -> NDArray[np.float16]:
    """The float16 scale s next to span / points, away from zero, so that |points * s| >= |span|."""
    exact = span / np.float32(points) + np.float32(0)  # + 0 turns the -0 of an all-zero block into 0
    with np.errstate(over="ignore"):  # what overflows is refused below
        scale = exact.astype(np.float16)
        short = np.abs(scale.astype(np.float32) * points) < np.abs(span)
        away = np.copysign(np.float32(np.inf), exact).astype(np.float16)
        scale = np.where(short, np.nextafter(scale, away), scale)
    if not np.isfinite(scale).all():
        raise ModelError(
            f"weights must be small enough for float16 scales: {where} has a block that spans {np.abs(span).max():.3g},"
            f" the limit is {65504 * abs(points):.3g}; leave the matrix out with skip"
        )
    return scale


def _divisor(s: Floats) -> Floats:
    """`s`, with 1 for the scale 0 of all-zero blocks, whose weights it divides."""
    return np.where(s == 0, np.float32(1), s)


# --- a few rows at a time ---------------------------------------------------------------------------------------------


def _row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, each of about CHUNK_WEIGHTS weights."""
    step = max(1, CHUNK_WEIGHTS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _column_weights(importance: Floats, columns: int, grid: Grid, where: str) -> Floats:
    """(columns,) as (blocks, block), 0 for the padding."""
    if importance.shape != (columns,):
        raise UserError(f"importance of {where} must be {columns} numbers, one a column: got {importance.shape}")
    blocks = -(-columns // grid.block)
    return np.pad(importance.astype(np.float32), (0, blocks * grid.block - columns)).reshape(blocks, grid.block)
