"""Quantised matrices in tiles of sixteen rows, as the native kernels read them.

One SIMD register then feeds sixteen rows at once, and a block's codes lie together: see csrc/path.h for the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgekit.weight import Bytes, Quantized, unpack

LANES = 16
GROUP = 32  # columns that are packed together


@dataclass(frozen=True)
class Tiles:
    """A matrix in tiles. `offsets` are zero points (uint8) or minima (float16), or None where it is symmetric.

    codes: (tiles, blocks, 16 * block * bits / 8) uint8; scales, offsets: (tiles, blocks, 16).
    """

    codes: Bytes
    scales: NDArray[np.float16]
    offsets: NDArray[np.uint8] | NDArray[np.float16] | None
    bits: int
    block: int
    rows: int
    columns: int


def tile(weight: Quantized) -> Tiles:
    """Lay a matrix out in tiles; rows past the last are zero."""
    rows, columns = weight.shape
    blocks = weight.scales.shape[1]
    codes = _whole_tiles(unpack(weight.codes, weight.bits).reshape(rows, blocks, weight.block))
    # (tiles, 16, blocks, groups, 8 runs, 4 columns) -> (tiles, blocks, groups, 8 runs, 16 rows, 4 columns)
    shape = (-1, LANES, blocks, weight.block // GROUP, 8, 4)
    runs = codes.reshape(shape).transpose(0, 2, 3, 4, 1, 5)
    if weight.bits == 4:
        runs = runs[:, :, :, :4] | (runs[:, :, :, 4:] << np.uint8(4))
    return Tiles(
        codes=np.ascontiguousarray(runs).reshape(len(codes) // LANES, blocks, -1),
        scales=_lanes(weight.scales),
        offsets=None if weight.zeros is None else _lanes(unpack(weight.zeros, weight.bits)[:, :blocks]),
        bits=weight.bits,
        block=weight.block,
        rows=rows,
        columns=columns,
    )


def _lanes(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """(rows, blocks) to (tiles, blocks, 16)."""
    return np.ascontiguousarray(_whole_tiles(values).reshape(-1, LANES, values.shape[1]).transpose(0, 2, 1))


def _whole_tiles(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Rows of zeros added up to a whole number of tiles."""
    missing = -len(values) % LANES
    return np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)]) if missing else values


def interleave(gate: Tiles, up: Tiles) -> Tiles:
    """Tiles of two matrices in turn, gate first: what a gated product reads."""

    def turns(a: NDArray[np.generic], b: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    offsets = None
    if gate.offsets is not None and up.offsets is not None:
        offsets = turns(gate.offsets, up.offsets)
    return replace(
        gate,
        codes=turns(gate.codes, up.codes),
        scales=turns(gate.scales, up.scales),
        offsets=offsets,
        rows=gate.rows + up.rows,
    )
