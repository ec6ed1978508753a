"""Rounding to a grid: the stated error bound, idempotence, exact bytes of small blocks, and what is refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.errors import ModelError, UserError
from edgekit.quant import grid as grid_module
from edgekit.quant.grid import Grid, round_to_grid, squared_error
from edgekit.weight import Quantized, unpack

grids = st.builds(Grid, bits=st.sampled_from([4, 8]), block=st.sampled_from([32, 64, 128]), symmetric=st.booleans())
symmetric_grids = st.builds(
    Grid, bits=st.sampled_from([4, 8]), block=st.sampled_from([32, 64]), symmetric=st.just(True)
)


@st.composite
def matrices(draw: st.DrawFn, *, smallest: float = -40.0) -> NDArray[np.float32]:
    """Matrices of odd sizes: Gaussian, of one sign, sparse, with one outlier, on a grid; scaled by 2**exponent."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    W = random.standard_normal((rows, columns))
    kind = draw(st.sampled_from(["gaussian", "positive", "negative", "sparse", "outlier", "integers", "two-sided"]))
    if kind == "positive":
        W = np.abs(W)
    elif kind == "negative":
        W = -np.abs(W)
    elif kind == "sparse":
        W *= random.random(W.shape) < 0.05
    elif kind == "outlier":
        W[0, columns // 2] = 1000.0
    elif kind == "integers":
        W = np.rint(4 * W)
    elif kind == "two-sided":
        W = np.sign(W)  # the worst for the symmetric grid: both ends at once
    return (W * 2.0 ** draw(st.floats(smallest, 6))).astype(np.float32)


def scale_of_each_weight(rounded: Quantized) -> NDArray[np.float64]:
    return np.repeat(rounded.scales.astype(np.float64), rounded.block, axis=1)[:, : rounded.columns]


@settings(max_examples=200, deadline=None)
@given(matrices(), grids)
def test_error_stays_within_the_stated_bound(W: NDArray[np.float32], grid: Grid) -> None:
    rounded = round_to_grid(W, grid, where="w")
    s = scale_of_each_weight(rounded)
    error = np.abs(W.astype(np.float64) - rounded.dense().astype(np.float64))
    bound = (0.5 + 2**-14) * np.abs(s)
    if grid.symmetric and grid.bits == 4:
        short_end = W / np.where(s == 0, 1, s) > 7.5
        bound = np.where(short_end, np.abs(s), bound)
    assert (error <= bound).all()


@settings(max_examples=200, deadline=None)
@given(matrices(), grids)
def test_scales_span_their_blocks_and_are_no_larger_than_needed(W: NDArray[np.float32], grid: Grid) -> None:
    rounded = round_to_grid(W, grid, where="w")
    for row, scales in zip(W.astype(np.float64), rounded.scales, strict=True):
        for index, scale in enumerate(scales):
            block = row[index * grid.block : (index + 1) * grid.block]
            low, high = min(block.min(), 0), max(block.max(), 0)
            span = max(-low, high) if grid.symmetric else high - low
            steps = 2**grid.bits - 1 if not grid.symmetric else 8 if grid.bits == 4 else 127
            below = np.nextafter(np.abs(scale), np.float16(0))
            assert steps * abs(float(scale)) >= span * (1 - 2**-22)
            assert steps * float(below) < span * (1 + 2**-22) or span == 0


@settings(max_examples=200, deadline=None)
@given(matrices(smallest=0.0), symmetric_grids)
def test_rounding_again_gives_the_same_codes_on_the_symmetric_grid(W: NDArray[np.float32], grid: Grid) -> None:
    once = round_to_grid(W, grid, where="w")
    again = round_to_grid(once.dense(), grid, where="w")
    normal = (np.abs(once.scales) >= 2**-14) | (once.scales == 0)
    np.testing.assert_array_equal(again.codes[normal], once.codes[normal])
    np.testing.assert_array_equal(again.scales[normal], once.scales[normal])


def test_what_lies_on_the_grid_of_q8_0_is_kept() -> None:
    random = np.random.default_rng(0)
    d = random.uniform(0.001, 0.1, (5, 3, 1)).astype(np.float16).astype(np.float32)
    codes = random.integers(-127, 128, (5, 3, 32))
    codes[..., 0] = 127 * random.choice([-1, 1], (5, 3))
    W = (d * codes).astype(np.float32).reshape(5, 96)
    np.testing.assert_array_equal(round_to_grid(W, Grid(8, 32, True), where="w").dense(), W)


def test_a_symmetric_block_of_4_bits_maps_its_extreme_to_the_lowest_code() -> None:
    W = np.zeros((2, 32), np.float32)
    W[0, :4] = [-4.0, 3.5, 0.5, -0.2]  # scale 0.5: -8, 7, 1, 0
    W[1, :4] = [4.0, -3.5, 4.0, -3.9]  # scale -0.5: -8, 7, -8, and -3.9 lies beyond the short end
    rounded = round_to_grid(W, Grid(4, 32, True), where="w")
    assert rounded.zeros is None
    np.testing.assert_array_equal(rounded.scales[:, 0], np.array([0.5, -0.5], np.float16))
    assert rounded.codes[0, 0].tobytes() == bytes([0xF0, 0x89] + [0x88] * 14)
    assert rounded.codes[1, 0].tobytes() == bytes([0xF0, 0xF0] + [0x88] * 14)
    np.testing.assert_array_equal(rounded.dense()[1, :4], [4.0, -3.5, 4.0, -3.5])


def test_an_asymmetric_block_gets_an_integer_zero_point() -> None:
    W = np.zeros((1, 64), np.float32)
    W[0, :3] = [-1.0, 2.75, 0.3]  # scale 0.25, zero point 4: codes 0, 15, 5
    W[0, 32:34] = [3.0, 15.0]  # all positive: scale 1, zero point 0
    rounded = round_to_grid(W, Grid(4, 32, False), where="w")
    assert rounded.zeros is not None
    np.testing.assert_array_equal(rounded.scales, np.array([[0.25, 1.0]], np.float16))
    assert rounded.zeros.tobytes() == bytes([0x04])
    assert rounded.codes[0, 0].tobytes() == bytes([0xF0, 0x45] + [0x44] * 14)
    assert rounded.codes[0, 1].tobytes() == bytes([0xF3] + [0x00] * 15)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_padding_and_zero_blocks_decode_to_exact_zero(bits: Any, symmetric: bool) -> None:
    W = np.zeros((3, 70), np.float32)
    W[:, :32] = np.linspace(-1, 3, 32)
    W[:, 64:] = -2.0
    rounded = round_to_grid(W, Grid(bits, 32, symmetric), where="w")
    codes = unpack(rounded.codes, bits)
    whole = Quantized(rounded.codes, rounded.scales, rounded.zeros, bits=bits, block=32, columns=96)
    assert rounded.dense().shape == (3, 70)
    assert (rounded.scales[:, 1] == 0).all()
    assert not np.signbit(rounded.scales[:, 1]).any()
    assert (whole.dense()[:, 32:64] == 0).all()
    assert (whole.dense()[:, 70:] == 0).all()
    zero = np.full((3, 3), 1 << (bits - 1)) if rounded.zeros is None else unpack(rounded.zeros, bits)[:, :3]
    assert (codes[:, 2, 6:] == zero[:, 2:3]).all()


def test_weights_below_float16_become_zero_and_do_not_divide_by_it() -> None:
    W = np.full((2, 32), 1e-30, np.float32)
    W[1] = 1e-42  # below float32's normal numbers too
    for symmetric in (True, False):
        rounded = round_to_grid(W, Grid(4, 32, symmetric), where="w")
        assert (rounded.dense() == 0).all()
        assert (np.abs(rounded.scales) <= 2.0**-24).all()


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0)])
def test_an_empty_matrix_has_no_codes(shape: tuple[int, int]) -> None:
    for symmetric in (True, False):
        rounded = round_to_grid(np.zeros(shape, np.float32), Grid(4, 32, symmetric), where="w")
        assert rounded.shape == shape
        assert rounded.codes.size == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_are_no_numbers_are_refused(bad: float, symmetric: bool) -> None:
    W = np.ones((300, 1000), np.float32)
    W[299, 998] = bad
    with pytest.raises(ModelError, match=r"finite: model\.layers\.3\.mlp\.up_proj"):
        round_to_grid(W, Grid(4, 32, symmetric), where="model.layers.3.mlp.up_proj")


@pytest.mark.parametrize(
    ("grid", "fits", "too_large"),
    [
        (Grid(4, 32, True), 65504.0 * 8, 65520.0 * 8),
        (Grid(8, 32, True), -65504.0 * 127, -65520.0 * 127),
        (Grid(4, 32, False), 65504.0 * 15, 65520.0 * 15),
        (Grid(8, 32, False), 65504.0 * 255, 3e38),
    ],
)
def test_weights_too_large_for_float16_scales_are_refused(grid: Grid, fits: float, too_large: float) -> None:
    W = np.zeros((2, 32), np.float32)
    W[1, 3] = fits
    assert np.isfinite(round_to_grid(W, grid, where="lm_head").dense()).all()
    W[1, 3] = too_large
    with pytest.raises(ModelError, match="lm_head has a block that spans"):
        round_to_grid(W, grid, where="lm_head")
    W[1, 3], W[1, 4] = 3e38, -3e38  # the span itself overflows float32
    with pytest.raises(ModelError, match="lm_head has a block that spans"):
        round_to_grid(W, grid, where="lm_head")


@settings(max_examples=60, deadline=None)
@given(matrices(smallest=-8.0), grids, st.sampled_from([1, 100, 700]))
def test_chunks_change_nothing(W: NDArray[np.float32], grid: Grid, chunk: int) -> None:
    whole = round_to_grid(W, grid, where="w")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_module, "CHUNK_WEIGHTS", chunk)
        parts = round_to_grid(W, grid, where="w")
        error, power = squared_error(W, parts)
    np.testing.assert_array_equal(parts.codes, whole.codes)
    np.testing.assert_array_equal(parts.scales, whole.scales)
    np.testing.assert_array_equal(parts.zeros, whole.zeros)
    exact = W.astype(np.float64)
    assert error == pytest.approx(((exact - whole.dense()) ** 2).sum(), rel=1e-4)
    assert power == pytest.approx((exact**2).sum(), rel=1e-4)
    size = whole.codes.nbytes + whole.scales.nbytes + (0 if whole.zeros is None else whole.zeros.nbytes)
    assert grid.size_bytes((W.shape[0], W.shape[1])) == size


def test_a_matrix_that_is_no_contiguous_array_is_rounded_by_its_values() -> None:
    W = np.random.default_rng(1).standard_normal((70, 66)).astype(np.float32)
    for view in (W.T, W[::2, ::2], np.asfortranarray(W)):
        rounded = round_to_grid(view, Grid(4, 32, False), where="w")
        np.testing.assert_array_equal(rounded.codes, round_to_grid(view.copy(), Grid(4, 32, False), where="w").codes)


def test_temporaries_stay_small_beside_the_matrix() -> None:
    W = np.ones((4096, 4096), np.float32)  # 64 MiB
    grid = Grid(4, 32, False)
    tracemalloc.start()
    squared_error(W, round_to_grid(W, grid, where="w"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - grid.size_bytes((4096, 4096)) < 16 * 2**20


@pytest.mark.parametrize(
    ("bits", "block", "symmetric", "message"),
    [
        (3, 32, True, "bits must be one of 4, 8: got 3"),
        (4.0, 32, True, "bits must be one of 4, 8: got 4.0"),
        (4, 48, True, "block must be one of 32, 64, 128: got 48"),
        (4, 0, True, "got 0"),
        (4, "32", True, "got '32'"),
        (4, 32, 1, "symmetric must be true or false: got 1"),
    ],
)
def test_a_grid_that_we_do_not_have_is_refused(bits: Any, block: Any, symmetric: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Grid(bits, block, symmetric)
