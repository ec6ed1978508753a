"""Rounding to a grid: the stated error bound, idempotence, exact bytes of small blocks, and what is refused."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.errors import ModelError, UserError
from edgekit.quant import grid as grid_module
from edgekit.quant.grid import Bits, Grid, Offset, Scales, fit, in_blocks, round_to_grid, squared_error
from edgekit.quant.lattice import join, nearest
from edgekit.weight import Quantized, unpack

ALL = [Grid(*kind) for kind in itertools.product(get_args(Bits), (32, 64), get_args(Offset), get_args(Scales))]
grids = st.builds(
    Grid,
    bits=st.sampled_from(get_args(Bits)),
    block=st.sampled_from([32, 64, 128]),
    offset=st.sampled_from(get_args(Offset)),
    scales=st.sampled_from(get_args(Scales)),
)
symmetric_grids = st.builds(
    Grid, bits=st.sampled_from(get_args(Bits)), block=st.sampled_from([32, 64]), offset=st.just("symmetric")
)


def signed(grid: Grid) -> bool:
    return grid.offset == "symmetric" and grid.bits < 8 and grid.scales == "float16"


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
    return np.repeat(rounded.block_scales().astype(np.float64), rounded.block, axis=1)[:, : rounded.columns]


@settings(max_examples=200, deadline=None)
@given(matrices(), grids)
def test_error_stays_within_the_stated_bound(W: NDArray[np.float32], grid: Grid) -> None:
    rounded = round_to_grid(W, grid, where="w")
    s = scale_of_each_weight(rounded)
    error = np.abs(W.astype(np.float64) - rounded.dense().astype(np.float64))
    bound = (0.5 + 2**-14) * np.abs(s)
    if signed(grid):
        short_end = W / np.where(s == 0, 1, s) > (1 << (grid.bits - 1)) - 0.5
        bound = np.where(short_end, np.abs(s), bound)
    if grid.offset == "minimum":
        blocks = in_blocks(np.abs(W), grid).max(-1)
        bound += 2**-21 * np.repeat(blocks, grid.block, axis=1)[:, : W.shape[1]]
    assert (error <= bound).all()


@settings(max_examples=200, deadline=None)
@given(matrices(), grids)
def test_scales_span_their_blocks_and_are_no_larger_than_needed(W: NDArray[np.float32], grid: Grid) -> None:
    grid = replace(grid, scales="float16")
    rounded = round_to_grid(W, grid, where="w")
    minima = rounded.block_minima()
    for index, (row, scales) in enumerate(zip(in_blocks(W, grid).astype(np.float64), rounded.scales, strict=True)):
        for at, (block, scale) in enumerate(zip(row, scales, strict=True)):
            low, high = min(block.min(), 0), max(block.max(), 0)
            span, points = high - low, float(grid.top)
            if minima is not None:
                low, high = float(minima[index, at]), block.max()
                assert low <= block.min() < float(np.nextafter(np.float16(low), np.float16(np.inf)))
                span = high - low
            elif grid.offset == "symmetric":
                span, points = max(-low, high), float((1 << (grid.bits - 1)) - (not signed(grid)))
            below = np.nextafter(np.abs(scale), np.float16(0))
            slack = 2**-21 * (abs(low) + abs(high))
            assert points * abs(float(scale)) >= span - slack
            assert points * float(below) < span + slack or span == 0


@pytest.mark.parametrize("grid", [grid for grid in ALL if grid.scales == "int8"], ids=str)
def test_small_scales_have_a_step_a_row(grid: Grid) -> None:
    """The largest scale of a row uses the codes to their end, and what a code stands for is code times step."""
    W = np.random.default_rng(2).standard_normal((5, 200)).astype(np.float32) * np.float32(0.1)
    W[2] = 0
    rounded = round_to_grid(W, grid, where="w")
    assert rounded.scales.dtype == np.uint8
    assert rounded.steps is not None
    assert rounded.steps.shape == (5, 2 if grid.offset == "minimum" else 1)
    used = np.delete(rounded.scales.max(axis=1), 2)
    assert (used >= 253).all()
    assert not rounded.dense()[2].any()
    np.testing.assert_array_equal(rounded.block_scales(), rounded.scales * rounded.steps[:, :1].astype(np.float32))


@pytest.mark.parametrize("grid", ALL, ids=str)
def test_a_lattice_says_what_will_be_read_again(grid: Grid) -> None:
    W = np.random.default_rng(3).standard_normal((7, 75)).astype(np.float32)
    x = in_blocks(W, grid)
    for search in (False, True):
        lattice = fit(x, grid, where="w", search=search)
        codes = lattice.codes(x)
        stored = lattice.store(codes, 75)
        np.testing.assert_array_equal(lattice.values(codes).reshape(7, -1)[:, :75], stored.dense())
        assert stored.size_bytes == grid.size_bytes((7, 75))
        for column in (0, 31, 74):
            block = column // grid.block
            one = lattice.codes(W[:, column : column + 1], block)
            np.testing.assert_array_equal(one[:, 0], codes.reshape(7, -1)[:, column])
            np.testing.assert_array_equal(lattice.values(one, block)[:, 0], stored.dense()[:, column])


@settings(max_examples=100, deadline=None)
@given(matrices(smallest=-6.0), grids, st.booleans())
def test_searched_scales_are_never_worse(W: NDArray[np.float32], grid: Grid, weighted: bool) -> None:
    random = np.random.default_rng(W.size)
    importance = random.exponential(1, W.shape[1]).astype(np.float32) ** 2 if weighted else None
    plain, found = (
        (W - round_to_grid(W, grid, where="w", importance=importance, search=search).dense()).astype(np.float64)
        for search in (False, True)
    )
    weights = np.ones(W.shape[1]) if importance is None else importance.astype(np.float64)
    blocks = -(-W.shape[1] // grid.block)
    at = np.arange(W.shape[1]) // grid.block
    for before, after in zip(plain, found, strict=True):
        errors = [np.bincount(at, weights * row**2, blocks) for row in (before, after)]
        if importance is not None:  # the weights of a block are taken relative to its own
            errors = [e / np.maximum(np.bincount(at, weights, blocks), 1e-30) for e in errors]
        if grid.scales == "int8":
            continue
        assert (errors[1] <= errors[0] * (1 + 1e-4) + 1e-30 + 1e-9 * np.square(W).max()).all()


@pytest.mark.parametrize("scales", ["float16", "int8"])
@pytest.mark.parametrize("offset", ["symmetric", "zero", "minimum"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searching_pays(bits: Any, offset: Any, scales: Any) -> None:
    """On Gaussian weights the error falls by what a finer choice of scales is worth, and more where columns differ."""
    random = np.random.default_rng(0)
    W = random.standard_normal((24, 256)).astype(np.float32)
    importance = random.exponential(1, 256).astype(np.float32) ** 4

    def error(weights: NDArray[np.float32], **options: Any) -> float:
        rounded = round_to_grid(W, Grid(bits, 32, offset, scales), where="w", **options)
        return float((weights * np.square(W - rounded.dense())).sum())

    ones = np.ones(256, np.float32)
    assert error(ones, search=True) < 0.97 * error(ones)
    assert error(importance, search=True, importance=importance) < 0.9 * error(importance, search=True)


def test_lattices_of_single_blocks_join_to_that_of_all() -> None:
    x = np.random.default_rng(4).standard_normal((6, 3, 32)).astype(np.float32)
    for grid in ALL[::2]:
        whole = fit(x, replace(grid, block=32), where="w")
        parts = [fit(x[:, i : i + 1], replace(grid, block=32), where="w", steps=whole.steps) for i in range(3)]
        joined = join(parts)
        for name, value in vars(whole).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(joined, name), value)
    small = Grid(4, 32, "minimum", "int8")
    with pytest.raises(UserError, match="share their grid and their steps"):
        join([fit(x[:, i : i + 1], small, where="w") for i in range(2)])


@pytest.mark.parametrize("grid", ALL, ids=str)
def test_nearest_gives_back_what_was_stored(grid: Grid) -> None:
    x = np.random.default_rng(5).standard_normal((6, 3, grid.block)).astype(np.float32)
    lattice = fit(x, grid, where="w")
    again = nearest(grid, lattice.scale, zero=lattice.zero, minimum=lattice.minimum, steps=lattice.steps)
    np.testing.assert_array_equal(again.scale, lattice.scale)
    np.testing.assert_array_equal(again.zero, lattice.zero)
    np.testing.assert_array_equal(again.minimum, lattice.minimum)
    huge = nearest(grid, lattice.scale * np.float32(1e9), zero=lattice.zero, minimum=lattice.minimum * np.float32(1e9))
    assert np.isfinite(huge.values(huge.codes(x))).all()


def test_what_lies_on_a_grid_with_minima_is_kept() -> None:
    random = np.random.default_rng(0)
    d = random.uniform(0.001, 0.1, (50, 3, 1)).astype(np.float16).astype(np.float32)
    m = (d * random.uniform(-20, 3, d.shape)).astype(np.float16).astype(np.float32)
    codes = random.integers(0, 16, (50, 3, 32))
    codes[..., :2] = 0, 15
    W = (d * codes.astype(np.float32) + m).reshape(50, 96)
    np.testing.assert_array_equal(round_to_grid(W, Grid(4, 32, "minimum"), where="w").dense(), W)


@pytest.mark.parametrize("importance", [np.ones(31), -np.ones(32), np.full(32, np.nan)])
def test_importance_that_is_none_is_refused(importance: NDArray[np.float64]) -> None:
    with pytest.raises(UserError, match="importance"):
        round_to_grid(np.ones((2, 32), np.float32), Grid(4, 32), where="w", importance=importance.astype(np.float32))


@settings(max_examples=200, deadline=None)
@given(matrices(smallest=3.0), symmetric_grids)
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
    np.testing.assert_array_equal(round_to_grid(W, Grid(8, 32, "symmetric"), where="w").dense(), W)


def test_a_symmetric_block_of_4_bits_maps_its_extreme_to_the_lowest_code() -> None:
    W = np.zeros((2, 32), np.float32)
    W[0, :4] = [-4.0, 3.5, 0.5, -0.2]  # scale 0.5: -8, 7, 1, 0
    W[1, :4] = [4.0, -3.5, 4.0, -3.9]  # scale -0.5: -8, 7, -8, and -3.9 lies beyond the short end
    rounded = round_to_grid(W, Grid(4, 32, "symmetric"), where="w")
    assert rounded.zeros is None
    np.testing.assert_array_equal(rounded.scales[:, 0], np.array([0.5, -0.5], np.float16))
    assert rounded.codes[0, 0].tobytes() == bytes([0xF0, 0x89] + [0x88] * 14)
    assert rounded.codes[1, 0].tobytes() == bytes([0xF0, 0xF0] + [0x88] * 14)
    np.testing.assert_array_equal(rounded.dense()[1, :4], [4.0, -3.5, 4.0, -3.5])


def test_an_asymmetric_block_gets_an_integer_zero_point() -> None:
    W = np.zeros((1, 64), np.float32)
    W[0, :3] = [-1.0, 2.75, 0.3]  # scale 0.25, zero point 4: codes 0, 15, 5
    W[0, 32:34] = [3.0, 15.0]  # all positive: scale 1, zero point 0
    rounded = round_to_grid(W, Grid(4, 32, "zero"), where="w")
    assert rounded.zeros is not None
    np.testing.assert_array_equal(rounded.scales, np.array([[0.25, 1.0]], np.float16))
    assert rounded.zeros.tobytes() == bytes([0x04])
    assert rounded.codes[0, 0].tobytes() == bytes([0xF0, 0x45] + [0x44] * 14)
    assert rounded.codes[0, 1].tobytes() == bytes([0xF3] + [0x00] * 15)


@pytest.mark.parametrize("offset", ["symmetric", "zero"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_padding_and_zero_blocks_decode_to_exact_zero(bits: Any, offset: Any) -> None:
    W = np.zeros((3, 70), np.float32)
    W[:, :32] = np.linspace(-1, 3, 32)
    W[:, 64:] = -2.0
    rounded = round_to_grid(W, Grid(bits, 32, offset), where="w")
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
    for offset in get_args(Offset):
        rounded = round_to_grid(W, Grid(4, 32, offset), where="w")
        assert (rounded.dense() == 0).all()
        assert (np.abs(rounded.scales) <= 2.0**-24).all()


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0)])
def test_an_empty_matrix_has_no_codes(shape: tuple[int, int]) -> None:
    for offset in get_args(Offset):
        rounded = round_to_grid(np.zeros(shape, np.float32), Grid(4, 32, offset), where="w")
        assert rounded.shape == shape
        assert rounded.codes.size == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("offset", ["symmetric", "zero", "minimum"])
def test_weights_that_are_no_numbers_are_refused(bad: float, offset: Any) -> None:
    W = np.ones((300, 1000), np.float32)
    W[299, 998] = bad
    with pytest.raises(ModelError, match=r"finite: model\.layers\.3\.mlp\.up_proj"):
        round_to_grid(W, Grid(4, 32, offset), where="model.layers.3.mlp.up_proj")


@pytest.mark.parametrize(
    ("grid", "fits", "too_large"),
    [
        (Grid(4, 32, "symmetric"), 65504.0 * 8, 65520.0 * 8),
        (Grid(8, 32, "symmetric"), -65504.0 * 127, -65520.0 * 127),
        (Grid(4, 32, "zero"), 65504.0 * 15, 65520.0 * 15),
        (Grid(8, 32, "zero"), 65504.0 * 255, 3e38),
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
    for name in ("codes", "scales", "zeros", "minima", "steps"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    exact = W.astype(np.float64)
    assert error == pytest.approx(((exact - whole.dense()) ** 2).sum(), rel=1e-4)
    assert power == pytest.approx((exact**2).sum(), rel=1e-4)
    assert grid.size_bytes((W.shape[0], W.shape[1])) == whole.size_bytes


def test_a_matrix_that_is_no_contiguous_array_is_rounded_by_its_values() -> None:
    W = np.random.default_rng(1).standard_normal((70, 66)).astype(np.float32)
    for view in (W.T, W[::2, ::2], np.asfortranarray(W)):
        rounded = round_to_grid(view, Grid(4, 32, "zero"), where="w")
        np.testing.assert_array_equal(rounded.codes, round_to_grid(view.copy(), Grid(4, 32, "zero"), where="w").codes)


def test_temporaries_stay_small_beside_the_matrix() -> None:
    W = np.ones((4096, 4096), np.float32)  # 64 MiB
    grid = Grid(4, 32, "zero")
    tracemalloc.start()
    squared_error(W, round_to_grid(W, grid, where="w"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - grid.size_bytes((4096, 4096)) < 16 * 2**20


@pytest.mark.parametrize(
    ("bits", "block", "offset", "message"),
    [
        (7, 32, "zero", "bits must be one of 2, 3, 4, 5, 6, 8: got 7"),
        (4.0, 32, "zero", "bits must be one of 2, 3, 4, 5, 6, 8: got 4.0"),
        (4, 48, "zero", "block must be one of 32, 64, 128: got 48"),
        (4, 0, "zero", "got 0"),
        (4, "32", "zero", "got '32'"),
        (4, 32, True, "offset must be one of symmetric, zero, minimum: got True"),
    ],
)
def test_a_grid_that_we_do_not_have_is_refused(bits: Any, block: Any, offset: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Grid(bits, block, offset)
