"""Scales and offsets of least squared error, instead of those that span their blocks.

For weights x of a block with importances h, codes q from 0 to 2**b - 1, and c = q - z, least squares gives

    symmetric, zero   s = sum(h x c) / sum(h c c)            error = sum(h x x) - sum(h x c)**2 / sum(h c c)
    minimum           s = cov(x, q) / var(q), m = mean(x) - s mean(q), weighted by h;   error = var(x) - s cov(x, q)

Each of a few starting spans (the block's own, shrunk by factors at both ends) gives codes, and these give s, z, m. The
best start is then improved in turns, codes by scale and scale by codes, which never makes the error larger. What was
found is stored, with neighbouring stored numbers tried too, and the plain scales are kept where they are better: so

    error(searched) <= error(plain)

holds for every block with float16 scales, and for every row with 8-bit scales (whose step is shared), in exact
arithmetic. Source: alternating least squares over spans as in GGUF's K-quants (make_qx_quants, make_qkx2_quants of
llama.cpp's ggml-quants.c) and Lloyd, IEEE Trans. Inf. Theory 28(2), 1982. We weight by the importances alone, not by
the weights' own squares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgekit.quant.lattice import Grid, Lattice, nearest
from edgekit.weight import Floats, Halves

STARTS = 12  # factors of the span
TURNS = 3
LEAST = {2: 0.45, 3: 0.55, 4: 0.7, 5: 0.8, 6: 0.85, 8: 0.95}  # the smallest factor that helps, by bits
MOST = 1.05


def search_scales(
    x: Floats, plain: Lattice, lo: Floats, hi: Floats, importance: Floats | None, *, steps: Halves | None
) -> Lattice:
    """The lattice of least error that was found for x: (rows, blocks, block); lo, hi: (rows, blocks).

    `importance` (blocks, block) or None; `steps` as in `edgekit.quant.grid.fit`.
    """
    weights = _weights(importance, x.shape[1:])
    best = _best_start(x, plain.grid, lo, hi, weights)
    found = _settled(x, plain, best, weights, steps)
    error, plain_error = _error(x, found, weights), _error(x, plain, weights)
    if plain.steps is None:
        worse = error > plain_error
    else:
        worse = (error.sum(1) > plain_error.sum(1))[:, None]
    return Lattice(
        plain.grid,
        np.where(worse, plain.scales, found.scales),
        zeros=None if plain.zeros is None or found.zeros is None else np.where(worse, plain.zeros, found.zeros),
        minima=None if plain.minima is None or found.minima is None else np.where(worse, plain.minima, found.minima),
        steps=None if plain.steps is None or found.steps is None else np.where(worse, plain.steps, found.steps),
    )


@dataclass
class _Found:
    """Numbers that are not yet stored, each (rows, blocks) float32; `gain` is what the codes take off the error."""

    gain: Floats
    scale: Floats
    zero: Floats
    minimum: Floats

    def take(self, other: _Found) -> None:
        """Become the better of both, block by block."""
        better = other.gain > self.gain
        for name in ("gain", "scale", "zero", "minimum"):
            np.copyto(getattr(self, name), getattr(other, name), where=better)


def _weights(importance: Floats | None, shape: tuple[int, ...]) -> Floats:
    """(blocks, block), of mean 1 in each block; all alike where a block has none."""
    if importance is None:
        return np.ones(shape, np.float32)
    mean = importance.mean(-1, keepdims=True, dtype=np.float64)
    scaled = importance / np.where(mean == 0, 1, mean)
    return np.where(mean == 0, 1, scaled).astype(np.float32)


def _best_start(x: Floats, grid: Grid, lo: Floats, hi: Floats, weights: Floats) -> _Found:
    nothing = np.zeros(x.shape[:2], np.float32)
    centre: Floats = nothing
    if grid.offset == "minimum":  # least squares loses digits far from zero
        centre = np.float32(0.5) * (lo + hi)
        x, lo, hi = x - centre[..., None], lo - centre, hi - centre
    middle = np.full(x.shape[:2], 1 << (grid.bits - 1), np.float32)
    zero = middle if grid.offset == "symmetric" else nothing
    best = _Found(nothing - 1, nothing.copy(), zero.copy(), lo.copy())
    for factor in np.linspace(LEAST[grid.bits], MOST, STARTS, dtype=np.float32):
        if grid.offset == "symmetric":
            span = factor * np.where(-lo >= hi, -lo, -hi) / np.float32(1 << (grid.bits - 1))
            signs = (1, -1) if grid.scales == "float16" and grid.bits < 8 else (np.sign(span),)
            for sign in signs:
                best.take(_solved(x, grid, weights, span * sign, middle, nothing))
            continue
        low, high = (lo, hi) if grid.offset == "minimum" else (np.minimum(lo, 0), np.maximum(hi, 0))
        cut = (high - low) * (1 - factor) / 2
        scale = factor * (high - low) / np.float32(grid.top)
        if grid.offset == "minimum":
            best.take(_solved(x, grid, weights, scale, nothing, low + cut))
            continue
        nearest = np.rint(-(low + cut) / _divisor(scale))
        for shift in (-1, 0, 1) if grid.bits <= 3 else (0,):
            best.take(_solved(x, grid, weights, scale, np.clip(nearest + np.float32(shift), 0, grid.top), nothing))
    for _ in range(TURNS):
        best.take(_solved(x, grid, weights, best.scale, best.zero, best.minimum))
    best.minimum += centre
    return best


def _solved(x: Floats, grid: Grid, weights: Floats, scale: Floats, zero: Floats, minimum: Floats) -> _Found:
    """Codes for these numbers, and then the best scale (and minimum) for these codes."""
    q = x * (1 / _divisor(scale))[..., None] if grid.offset != "minimum" else _shifted(x, scale, minimum)
    np.rint(q, out=q)
    np.clip(q, -zero[..., None], grid.top - zero[..., None], out=q)
    weighted = q * weights
    xq, qq = np.einsum("rbi,rbi->rb", x, weighted), np.einsum("rbi,rbi->rb", q, weighted)
    if grid.offset != "minimum":
        solved = xq / _divisor(qq)
        return _Found(solved * xq, solved, zero, minimum)
    count = weights.sum(-1)
    mean_x, mean_q = np.einsum("rbi,bi->rb", x, weights) / count, weighted.sum(-1) / count
    cov, var = xq - mean_x * mean_q * count, qq - mean_q * mean_q * count
    solved = np.where(var > 0, cov / _divisor(var), 0)
    return _Found(solved * cov, solved, zero, mean_x - solved * mean_q)


def _settled(x: Floats, plain: Lattice, best: _Found, weights: Floats, steps: Halves | None) -> Lattice:
    """What was found, as it can be stored: minima follow the stored scales, and 8-bit scales try both neighbours."""
    stored = nearest(plain.grid, best.scale, zero=best.zero, minimum=best.minimum, steps=steps)
    if stored.steps is None:
        return _with_minima(x, stored, weights)
    step = stored.steps[:, :1].astype(np.float32)
    exact = np.maximum(best.scale, 0) / np.where(step == 0, 1, step)
    first, second = (
        _with_minima(x, replace(stored, scales=np.clip(whole, 0, 255).astype(np.uint8)), weights)
        for whole in (np.floor(exact), np.ceil(exact))
    )
    worse = _error(x, first, weights) > _error(x, second, weights)
    return replace(
        first,
        scales=np.where(worse, second.scales, first.scales),
        minima=None if first.minima is None or second.minima is None else np.where(worse, second.minima, first.minima),
    )


def _with_minima(x: Floats, lattice: Lattice, weights: Floats) -> Lattice:
    """The lattice with the best minima for its scales, codes and minima in turns, twice."""
    for _ in range(2 if lattice.minima is not None else 0):
        points = lattice.values(lattice.codes(x)) - lattice.minimum[..., None]
        minimum = np.einsum("rbi,bi->rb", x - points, weights) / weights.sum(-1)
        found = nearest(lattice.grid, lattice.scale, minimum=minimum, steps=lattice.steps)
        lattice = replace(lattice, minima=found.minima)
    return lattice


def _error(x: Floats, lattice: Lattice, weights: Floats) -> Floats:
    """sum(weights * (x - restored)**2) of each block, (rows, blocks)."""
    difference = lattice.values(lattice.codes(x))
    difference -= x
    np.square(difference, out=difference)
    error: Floats = np.einsum("rbi,bi->rb", difference, weights)
    return error


def _shifted(x: Floats, scale: Floats, minimum: Floats) -> Floats:
    """(x - minimum) / scale, 0 where the scale is."""
    q = x - minimum[..., None]
    q *= np.where(scale == 0, 0, 1 / _divisor(scale))[..., None]
    return q


def _divisor(s: Floats) -> Floats:
    return np.where(s == 0, np.float32(1), s)
