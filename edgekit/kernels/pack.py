"""Quantised matrices in tiles of sixteen rows, as the native kernels read them.

One SIMD register then feeds sixteen rows at once, and a block's codes lie together: see csrc/path.h for the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError
from edgekit.weight import Bytes, Quantized, pack, unpack

LANES = 16
GROUP = 32  # columns that are packed together
HALF_GROUP = 16  # a block that the kernels have for symmetric codes of 6 bits alone: GGUF's Q6_K
RUNS = 8  # of four columns each make a group

Halves = NDArray[np.float16]
Numbers = NDArray[Any]


def low_bits(bits: int) -> int:
    """Bits of the low plane of codes, the rest being the high plane's: 2, 2 + 1, 4, 4 + 1, 4 + 2, 8."""
    return 2 if bits < 4 else 4 if bits < 8 else 8


@dataclass(frozen=True)
class Tiles:
    """A matrix in tiles. `offsets` are zero points (uint8) or minima, or None where it is symmetric.

    codes: (tiles, blocks, 16 * block * bits / 8) uint8; scales, offsets: (tiles, blocks, 16). Scales and minima are
    float16, or uint8 and int8 with float16 `steps` (tiles, 1, 16), (tiles, 2, 16) with minima.
    """

    codes: Bytes
    scales: Numbers
    offsets: Numbers | None
    bits: int
    block: int
    rows: int
    columns: int
    steps: Halves | None = None

    @property
    def has_minima(self) -> bool:
        return self.offsets is not None and self.offsets.dtype != np.uint8

    def constants(self) -> tuple[Bytes, Numbers, Bytes, Numbers, Halves]:
        """`codes`, `scales`, `zeros`, `minima` and `steps` as the operators take them: see `edgekit.kernels.opset`."""
        zeros, minima = np.array([1 << (self.bits - 1)], np.uint8), np.zeros(1, np.float16)
        if self.offsets is not None and self.has_minima:
            zeros, minima = np.zeros(1, np.uint8), self.offsets
        elif self.offsets is not None:
            zeros = self.offsets
        steps = np.ones((1, 1, 1), np.float16) if self.steps is None else self.steps
        return self.codes, self.scales, zeros, minima, steps


def tile(weight: Quantized) -> Tiles:
    """Lay a matrix out in tiles; rows past the last are zero.

    Raises ModelError: a block not a multiple of 32 columns, but for 16 where codes have 6 bits, are symmetric and fill
    whole groups of 32.
    """
    rows, columns = weight.shape
    blocks = weight.scales.shape[1]
    halves = weight.block == HALF_GROUP and weight.bits == 6 and weight.zeros is None and weight.minima is None
    if weight.block % GROUP and not (halves and columns % GROUP == 0):
        raise ModelError(
            f"tiles need blocks of a multiple of {GROUP} columns, or symmetric ones of {HALF_GROUP} with 6 bits in a"
            f" multiple of {GROUP}: got blocks of {weight.block} with {weight.bits} bits in {columns} columns"
        )
    codes = _whole_tiles(unpack(weight.codes, weight.bits).reshape(rows, blocks, weight.block))
    # (tiles, 16, groups, 8 runs, 4 columns) -> (tiles, groups, 8 runs, 16 rows, 4 columns)
    runs = codes.reshape(-1, LANES, blocks * weight.block // GROUP, RUNS, 4).transpose(0, 2, 3, 1, 4)
    low = low_bits(weight.bits)
    planes = [_plane(runs & np.uint8((1 << low) - 1), low)]
    if weight.bits > low:
        planes.append(_plane(runs >> np.uint8(low), weight.bits - low))
    offsets: Numbers | None = None
    if weight.minima is not None:
        offsets = _lanes(weight.minima)
    elif weight.zeros is not None:
        offsets = _lanes(unpack(weight.zeros, weight.bits)[:, :blocks])
    return Tiles(
        codes=np.concatenate(planes, axis=2).reshape(len(codes) // LANES, blocks, -1),
        scales=_lanes(weight.scales),
        offsets=offsets,
        bits=weight.bits,
        block=weight.block,
        rows=rows,
        columns=columns,
        steps=None if weight.steps is None else _lanes(weight.steps),
    )


def untile(tiles: Tiles) -> Quantized:
    """Undo `tile`."""
    blocks = tiles.scales.shape[1]
    low = low_bits(tiles.bits)
    lines = tiles.codes.reshape(-1, blocks * tiles.block // GROUP, tiles.bits, LANES, 4)  # as many lines as bits
    runs = _runs(lines[:, :, :low], low)
    if tiles.bits > low:
        runs = runs | (_runs(lines[:, :, low:], tiles.bits - low) << np.uint8(low))
    codes = runs.transpose(0, 3, 1, 2, 4).reshape(-1, blocks, tiles.block)[: tiles.rows]
    offsets = None if tiles.offsets is None else _rows(tiles.offsets, tiles.rows)
    return Quantized(
        pack(codes, tiles.bits),
        _rows(tiles.scales, tiles.rows),
        None if offsets is None or tiles.has_minima else pack(offsets, tiles.bits),
        bits=tiles.bits,
        block=tiles.block,
        columns=tiles.columns,
        minima=offsets if tiles.has_minima else None,
        steps=None if tiles.steps is None else _rows(tiles.steps, tiles.rows),
    )


def _plane(runs: Bytes, width: int) -> Bytes:
    """(..., 8 runs, 16, 4) of `width` bits to (..., width lines, 16, 4): line i has the runs i, i + width ..."""
    lines = np.zeros((*runs.shape[:2], width, *runs.shape[3:]), np.uint8)
    for first in range(0, RUNS, width):
        lines |= runs[:, :, first : first + width] << np.uint8(first)  # the shift of field k is width * k
    return lines


def _runs(lines: Bytes, width: int) -> Bytes:
    """Undo `_plane`."""
    mask = np.uint8((1 << width) - 1)
    return np.concatenate([(lines >> np.uint8(first)) & mask for first in range(0, RUNS, width)], axis=2)


def interleave(gate: Tiles, up: Tiles) -> Tiles:
    """Tiles of two matrices in turn, gate first: what a gated product reads.

    Raises ModelError: the two differ in shape, bits, block, or kind of offset or scale.
    """
    if _kind(gate) != _kind(up):
        raise ModelError(
            "a gate and its partner must agree in (rows, columns, bits, block, offsets, scales): got"
            f" {_kind(gate)} and {_kind(up)}; store them alike or apart"
        )
    return replace(
        gate,
        codes=_in_turn(gate.codes, up.codes),
        scales=_in_turn(gate.scales, up.scales),
        offsets=None if gate.offsets is None or up.offsets is None else _in_turn(gate.offsets, up.offsets),
        steps=None if gate.steps is None or up.steps is None else _in_turn(gate.steps, up.steps),
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
            steps=None if tiles.steps is None else tiles.steps[first::2],
            rows=tiles.rows // 2,
        )

    return half(0), half(1)


def _kind(tiles: Tiles) -> tuple[int, int, int, int, str, str]:
    offsets = "none" if tiles.offsets is None else str(tiles.offsets.dtype)
    return tiles.rows, tiles.columns, tiles.bits, tiles.block, offsets, str(tiles.scales.dtype)


def _in_turn(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """a[0], b[0], a[1], b[1] ..."""
    return np.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def _lanes(values: Numbers) -> Numbers:
    """(rows, blocks) to (tiles, blocks, 16)."""
    return np.ascontiguousarray(_whole_tiles(values).reshape(-1, LANES, values.shape[1]).transpose(0, 2, 1))


def _rows(lanes: Numbers, rows: int) -> Numbers:
    """Undo `_lanes`."""
    return np.ascontiguousarray(lanes.transpose(0, 2, 1).reshape(-1, lanes.shape[1])[:rows])


def _whole_tiles(values: Numbers) -> Numbers:
    """Rows of zeros added up to a whole number of tiles."""
    missing = -len(values) % LANES
    return np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)]) if missing else values
