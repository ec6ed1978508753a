"""Tiles: the bytes that csrc/path.h documents, and that nothing is lost on the way there and back."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Offsets, Scales, random_matrix

from edgekit.errors import ModelError
from edgekit.kernels.pack import LANES, Tiles, interleave, separate, tile, untile
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.weight import Quantized, pack

KINDS = st.sampled_from(["symmetric", "zeros", "minima"])
STORED = st.sampled_from(["float16", "int8"])


def matrix(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    block: int = 32,
    offsets: Offsets = "symmetric",
    scales: Scales = "float16",
    seed: int = 0,
) -> Quantized:
    rng = np.random.default_rng(seed)
    return random_matrix(rng, rows, columns, bits=bits, block=block, offsets=offsets, scales=scales)


def assert_same(ours: Quantized | Tiles, theirs: Quantized | Tiles) -> None:
    for name, value in vars(theirs).items():
        found = getattr(ours, name)
        if isinstance(value, np.ndarray):
            assert found.dtype == value.dtype, name
            assert np.array_equal(found, value), name
        else:
            assert found == value, name


# --- exact bytes ------------------------------------------------------------------------------------------------------


def two_groups(bits: int) -> Quantized:
    """18 rows of 64 columns in one block; the code of (row, column) is row + 3 * column, cut to its bits."""
    codes = ((np.arange(18)[:, None] + 3 * np.arange(64)) % (1 << bits)).astype(np.uint8)
    scales = np.arange(1, 19, dtype=np.float16)[:, None]
    return Quantized(pack(codes[:, None], bits), scales, None, bits=bits, block=64, columns=64)


def code(row: int, column: int, bits: int) -> int:
    return (row + 3 * column) % (1 << bits)


def test_bytes_at_4_bits() -> None:
    """A run has columns 4g to 4g + 3 of each row in its low halves, and 16 columns on in its high halves."""
    tiles = tile(two_groups(4))
    assert tiles.codes.shape == (2, 1, 16 * 64 // 2)
    first = [0x00, 0x33, 0x66, 0x99, 0x11, 0x44, 0x77, 0xAA, 0x22]  # columns 0-3 of row 0, of row 1, of row 2 ...
    assert tiles.codes[0, 0, :9].tolist() == first
    for group, run, row, column in ((0, 0, 0, 0), (0, 3, 15, 3), (1, 0, 7, 2), (1, 2, 1, 1)):
        at = 256 * group + 64 * run + 4 * row + column
        low = 32 * group + 4 * run + column
        assert tiles.codes[0, 0, at] == code(row, low, 4) | code(row, low + 16, 4) << 4
    assert tiles.codes[1, 0, 4] == code(17, 0, 4) | code(17, 16, 4) << 4
    assert not tiles.codes[1, 0].reshape(8, 16, 4)[:, 2:].any()


def test_bytes_at_8_bits() -> None:
    tiles = tile(two_groups(8))
    assert tiles.codes.shape == (2, 1, 16 * 64)
    assert tiles.codes[0, 0, :9].tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2]
    for group, run, row, column in ((0, 0, 0, 0), (0, 7, 15, 3), (1, 0, 7, 2), (1, 5, 1, 1)):
        at = 512 * group + 64 * run + 4 * row + column
        assert tiles.codes[0, 0, at] == code(row, 32 * group + 4 * run + column, 8)
    assert not tiles.codes[1, 0].reshape(16, 16, 4)[:, 2:].any()


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_bytes_in_planes(bits: int) -> None:
    """Each group has the lines of its low plane and then of its high plane; line i of F holds the runs i, i + F ..."""
    tiles = tile(two_groups(bits))
    low = {2: 2, 3: 2, 5: 4, 6: 4}[bits]
    group = tiles.codes[0, 0].reshape(2, bits, 16, 4)
    for row, column in ((0, 0), (15, 3), (7, 14), (1, 31), (4, 60), (9, 37)):
        run, at = column % 32 // 4, column % 4
        lines = group[column // 32, :, row, at]
        found = (lines[run % low] >> (low * (run // low))) & ((1 << low) - 1)
        if high := bits - low:
            found |= ((lines[low + run % high] >> (high * (run // high))) & ((1 << high) - 1)) << low
        assert found == code(row, column, bits)


def test_steps_have_a_lane_for_each_row() -> None:
    tiles = tile(matrix(18, 64, offsets="minima", scales="int8"))
    assert tiles.steps is not None
    assert tiles.steps.shape == (2, 2, 16)
    assert tiles.constants()[4] is tiles.steps
    assert tile(matrix(18, 64)).constants()[4].tolist() == [[[1.0]]]


def test_scales_and_offsets_have_a_lane_for_each_row() -> None:
    weight = two_groups(4)
    tiles = tile(replace(weight, zeros=(np.arange(18)[:, None] % 16).astype(np.uint8)))
    assert tiles.scales.tolist() == [[[*range(1, 17)]], [[17, 18, *[0] * 14]]]
    assert tiles.offsets is not None
    assert tiles.offsets.tolist() == [[[*range(16)]], [[0, 1, *[0] * 14]]]
    minima = tile(replace(weight, minima=-weight.scales)).offsets
    assert minima is not None
    assert minima.dtype == np.float16
    assert minima[1, 0].tolist() == [-17, -18, *[0] * 14]


def test_zero_points_are_a_byte_each() -> None:
    """Three blocks, packed in two bytes of the row."""
    zeros = np.array([[0x21, 0x03]], np.uint8)
    offsets = tile(replace(matrix(1, 96), zeros=zeros)).offsets
    assert offsets is not None
    assert offsets[0, :, 0].tolist() == [1, 2, 3]


# --- there and back ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 300),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    block=st.sampled_from([32, 64, 128]),
    offsets=KINDS,
    scales=STORED,
    seed=st.integers(0, 99),
)
def test_untile_undoes_tile(
    rows: int, columns: int, bits: int, block: int, offsets: Offsets, scales: Scales, seed: int
) -> None:
    weight = matrix(rows, columns, bits=bits, block=block, offsets=offsets, scales=scales, seed=seed)
    tiles = tile(weight)
    assert len(tiles.codes) == -(-rows // LANES)
    assert_same(untile(tiles), weight)
    assert_same(tile(untile(tiles)), tiles)


@given(rows=st.integers(1, 50), groups=st.integers(1, 9), scales=STORED, seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_blocks_of_half_a_group(rows: int, groups: int, scales: Scales, seed: int) -> None:
    """Symmetric codes of 6 bits: they lie as those of blocks of 32 do."""
    weight = matrix(rows, 32 * groups, bits=6, block=16, offsets="symmetric", scales=scales, seed=seed)
    tiles = tile(weight)
    assert tiles.scales.shape == (-(-rows // LANES), 2 * groups, LANES)
    assert_same(untile(tiles), weight)
    whole = replace(weight, block=32, codes=weight.codes.reshape(rows, groups, 24), scales=weight.scales[:, ::2])
    assert tile(whole).codes.tobytes() == tiles.codes.tobytes()


@pytest.mark.parametrize(
    ("bits", "columns", "offsets"), [(4, 64, "symmetric"), (6, 48, "symmetric"), (6, 64, "zeros"), (6, 64, "minima")]
)
def test_other_blocks_of_16_are_refused(bits: int, columns: int, offsets: Offsets) -> None:
    with pytest.raises(ModelError, match=f"got blocks of 16 with {bits} bits in {columns} columns"):
        tile(matrix(2, columns, bits=bits, block=16, offsets=offsets))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    offsets=KINDS,
    scales=STORED,
)
def test_separate_undoes_interleave(rows: int, columns: int, bits: int, offsets: Offsets, scales: Scales) -> None:
    """Each half is padded to whole tiles apart, so the second never begins inside a tile."""
    halves = [tile(matrix(rows, columns, bits=bits, offsets=offsets, scales=scales, seed=seed)) for seed in (1, 2)]
    both = interleave(*halves)
    assert both.rows == 2 * rows
    assert np.array_equal(both.codes[0], halves[0].codes[0])
    assert np.array_equal(both.codes[1], halves[1].codes[0])
    for half, expected in zip(separate(both), halves, strict=True):
        assert_same(half, expected)


def test_values_survive() -> None:
    weight = round_to_grid(
        np.random.default_rng(0).standard_normal((33, 577), np.float32), Grid(4, 32, "zero"), where="W"
    )
    assert np.array_equal(untile(tile(weight)).dense(), weight.dense())


# --- what operators get -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_constants_follow_the_table(bits: int) -> None:
    """A single zero point where all rows share it, a single zero where nothing is added."""
    plain, zeros, minima = (tile(matrix(17, 33, bits=bits, offsets=k)) for k in ("symmetric", "zeros", "minima"))
    assert [part.tolist() for part in plain.constants()[2:4]] == [[1 << (bits - 1)], [0]]
    assert zeros.constants()[2] is zeros.offsets
    assert zeros.constants()[3].tolist() == [0]
    assert minima.constants()[2].tolist() == [0]
    assert minima.constants()[3] is minima.offsets
    for tiles in (plain, zeros, minima):
        assert tiles.constants()[0] is tiles.codes
        assert tiles.constants()[1] is tiles.scales
        assert [part.dtype for part in tiles.constants()] == [np.uint8, np.float16, np.uint8, np.float16, np.float16]


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (matrix(18, 64), "(17, 64, 4, 32, 'none', 'float16') and (18, 64, 4, 32, 'none', 'float16')"),
        (matrix(17, 65), "(17, 65, 4, 32, 'none', 'float16')"),
        (matrix(17, 64, bits=8), "(17, 64, 8, 32, 'none', 'float16')"),
        (matrix(17, 64, block=64), "(17, 64, 4, 64, 'none', 'float16')"),
        (matrix(17, 64, offsets="zeros"), "'uint8'"),
        (matrix(17, 64, offsets="minima"), "'float16', 'float16'"),
        (matrix(17, 64, scales="int8"), "'none', 'uint8'"),
    ],
)
def test_a_gate_and_a_partner_that_differ(other: Quantized, named: str) -> None:
    with pytest.raises(ModelError, match=re.escape(named)):
        interleave(tile(matrix(17, 64)), tile(other))
