"""HQQ: offsets that leave large errors to few weights, found without data.

For a block w and points s (q - z) + m, the offset is moved so that the errors are sparse:

    minimise  |e|_p^p + beta/2 |w - (s (q - z) + m) - e|^2     over e and the offset, p < 1

by turns: q the nearest codes; e = shrink(w - w'), |e| - |e|^(p-1) / beta where that is positive; the offset is the mean
of what is left, w - e - s q; and beta grows. The turn of least mean |w - w'|^p is kept, so the result is never worse
than where it began by that measure. The scale stays.
Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), with its p = 0.7,
beta = 10 and growth of 1.01. We store the offset as the grid has it (a whole zero point, or a minimum), at each turn.
"""

from __future__ import annotations

import numpy as np

from edgekit.errors import UserError
from edgekit.quant.lattice import Lattice, nearest
from edgekit.weight import Floats

POWER, BETA, GROWTH, TURNS = 0.7, 10.0, 1.01, 20


def hqq(x: Floats, lattice: Lattice) -> Lattice:
    """The lattice with better offsets for x: (rows, blocks, block). Raises UserError for a symmetric grid."""
    grid = lattice.grid
    if grid.offset == "symmetric":
        raise UserError("method hqq moves the offsets: offset must be zero or minimum, not symmetric")
    scale = lattice.scale[:, :, None]
    divisor = np.where(scale == 0, np.float32(1), scale)
    spread = np.sqrt(np.mean(np.square(x), axis=(1, 2), keepdims=True)) + np.float32(1e-12)
    best, best_loss = lattice, _loss(x, lattice)
    beta = BETA
    for _ in range(TURNS):
        codes = lattice.codes(x)
        error = (x - lattice.values(codes)) / spread  # beta has the unit of weights: take them of size one
        size = np.abs(error)
        kept = np.sign(error) * np.maximum(size - (size + np.float32(1e-8)) ** (POWER - 1) / beta, 0) * spread
        offset = np.mean(x - kept - scale * codes, axis=2)
        if grid.offset == "zero":
            lattice = nearest(grid, lattice.scale, zero=-offset / divisor[:, :, 0], steps=lattice.steps)
        else:
            lattice = nearest(grid, lattice.scale, minimum=offset, steps=lattice.steps)
        loss = _loss(x, lattice)
        if loss >= best_loss:
            break
        best, best_loss = lattice, loss
        beta *= GROWTH
    return best


def _loss(x: Floats, lattice: Lattice) -> float:
    return float(np.mean(np.abs(x - lattice.values(lattice.codes(x))) ** POWER))
