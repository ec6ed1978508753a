"""Quantised matrices in tiles of sixteen rows, as the native kernels read them.

One SIMD register then feeds sixteen rows at once, and a block's codes lie together: see csrc/path.h for the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError
from edgekit.weight import Bytes, Quantized, pack, unpack

LANES = 16
GROUP = 32  # columns that are packed together

Halves = NDArray[np.float16]
Array = TypeVar("Array", Bytes, Halves)


@dataclass(frozen=True)
class Tiles:
    """A matrix in tiles. `offsets` are zero points (uint8) or minima (float16), or None where it is symmetric.

    codes: (tiles, blocks, 16 * block * bits / 8) uint8; scales, offsets: (tiles, blocks, 16).
    """

    codes: Bytes
    scales: Halves
    offsets: Bytes | Halves | None
    bits: int
    block: int
    rows: int
    columns: int

    def constants(self) -> tuple[Bytes, Halves, Bytes, Halves]:
        """`codes`, `scales`, `zeros` and `minima` as the operators take them: see `edgekit.kernels.opset`."""
        zeros, minima = np.array([1 << (self.bits - 1)], np.uint8), np.zeros(1, np.float16)
        if self.offsets is not None and self.offsets.dtype == np.uint8:
            zeros = self.offsets.astype(np.uint8, copy=False)
        elif self.offsets is not None:
            zeros, minima = np.zeros(1, np.uint8), self.offsets.astype(np.float16, copy=False)
        return self.codes, self.scales, zeros, minima


def tile(weight: Quantized) -> Tiles:
    """Lay a matrix out in tiles; rows past the last are zero. Raises ModelError: a block not a multiple of 32."""
    rows, columns = weight.shape
    blocks = weight.scales.shape[1]
    if weight.block % GROUP:
        raise ModelError(f"tiles need blocks of a multiple of {GROUP} columns: got {weight.block}")
    codes = _whole_tiles(unpack(weight.codes, weight.bits).reshape(rows, blocks, weight.block))
    # (tiles, 16, blocks, groups, 8 runs, 4 columns) -> (tiles, blocks, groups, 8 runs, 16 rows, 4 columns)
    runs = codes.reshape(-1, LANES, blocks, weight.block // GROUP, 8, 4).transpose(0, 2, 3, 4, 1, 5)
    if weight.bits == 4:
        runs = runs[:, :, :, :4] | (runs[:, :, :, 4:] << np.uint8(4))
    offsets: Bytes | Halves | None = None
    if weight.minima is not None:
        offsets = _lanes(weight.minima)
    elif weight.zeros is not None:
        offsets = _lanes(unpack(weight.zeros, weight.bits)[:, :blocks])
    return Tiles(
        codes=np.ascontiguousarray(runs).reshape(len(codes) // LANES, blocks, -1),
        scales=_lanes(weight.scales),
        offsets=offsets,
        bits=weight.bits,
        block=weight.block,
        rows=rows,
        columns=columns,
    )


def untile(tiles: Tiles) -> Quantized:
    """Undo `tile`."""
    blocks = tiles.scales.shape[1]
    runs = tiles.codes.reshape(-1, blocks, tiles.block // GROUP, tiles.bits, LANES, 4)  # as many runs as bits
    if tiles.bits == 4:
        runs = np.concatenate([runs & np.uint8(15), runs >> np.uint8(4)], axis=3)
    codes = runs.transpose(0, 4, 1, 2, 3, 5).reshape(-1, blocks, tiles.block)[: tiles.rows]
    zeros, minima = None, None
    if tiles.offsets is not None and tiles.offsets.dtype == np.uint8:
        zeros = pack(_rows(tiles.offsets.astype(np.uint8, copy=False), tiles.rows), tiles.bits)
    elif tiles.offsets is not None:
        minima = _rows(tiles.offsets.astype(np.float16, copy=False), tiles.rows)
    return Quantized(
        pack(codes, tiles.bits),
        _rows(tiles.scales, tiles.rows),
        zeros,
        bits=tiles.bits,
        block=tiles.block,
        columns=tiles.columns,
        minima=minima,
    )


def interleave(gate: Tiles, up: Tiles) -> Tiles:
    """Tiles of two matrices in turn, gate first: what a gated product reads.

    Raises ModelError: the two differ in shape, bits, block or kind of offset.
    """
    if _kind(gate) != _kind(up):
        raise ModelError(
            "a gate and its partner must agree in (rows, columns, bits, block, offsets): got"
            f" {_kind(gate)} and {_kind(up)}; store them alike or apart"
        )
    return replace(
        gate,
        codes=_in_turn(gate.codes, up.codes),
        scales=_in_turn(gate.scales, up.scales),
        offsets=None if gate.offsets is None or up.offsets is None else _in_turn(gate.offsets, up.offsets),
        rows=gate.rows + up.rows,
    )


def separate(tiles: Tiles) -> tuple[Tiles, Tiles]:
    """Undo `interleave`."""

    def half(first: int) -> Tiles:
        return replace(
            tiles,
            codes=tiles.codes[first::2],
            scales=tiles.scales[first::2],
            offsets=None if tiles.offsets is None else tiles.offsets[first::2],
            rows=tiles.rows // 2,
        )

    return half(0), half(1)


def _kind(tiles: Tiles) -> tuple[int, int, int, int, str]:
    offsets = "none" if tiles.offsets is None else str(tiles.offsets.dtype)
    return tiles.rows, tiles.columns, tiles.bits, tiles.block, offsets


def _in_turn(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """a[0], b[0], a[1], b[1] ..."""
    return np.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def _lanes(values: Array) -> Array:
    """(rows, blocks) to (tiles, blocks, 16)."""
    return np.ascontiguousarray(_whole_tiles(values).reshape(-1, LANES, values.shape[1]).transpose(0, 2, 1))


def _rows(lanes: Array, rows: int) -> Array:
    """Undo `_lanes`."""
    return np.ascontiguousarray(lanes.transpose(0, 2, 1).reshape(-1, lanes.shape[1])[:rows])


def _whole_tiles(values: Array) -> Array:
    """Rows of zeros added up to a whole number of tiles."""
    missing = -len(values) % LANES
    return np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)]) if missing else values
