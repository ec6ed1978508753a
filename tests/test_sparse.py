"""Hadamard sparse attention: the NumPy definition's own facts, and the native kernel against it on every path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, assert_close, every_path, needs_library, open_session, run_natively
from numpy.typing import NDArray

from edgekit.bundle import LayerCache, code_width
from edgekit.kernels import sparse
from edgekit.kernels.functions import function_bodies


def sparse_case(
    *,
    total: int,
    tokens: int = 1,
    budget: int = 64,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 64,
    sinks: int = 4,
    recent: int = 32,
    followers: int = 0,
    dense_below: int = 0,
    context: int = 0,
    seed: int = 0,
) -> Case:
    """A cache of `total` - `tokens` positions whose codes and means are whole, and `tokens` new ones."""
    rng = np.random.default_rng(seed)
    heads, context, first = kv_heads * group, context or total + 5, total - tokens
    keys = rng.standard_normal((kv_heads, context, head_dim)).astype(np.float16)
    keys += rng.standard_normal((kv_heads, 1, head_dim)).astype(np.float16) * np.float16(2)  # keys have a mean
    values = rng.standard_normal((kv_heads, context, head_dim)).astype(np.float16)
    keys[:, first:], values[:, first:] = np.nan, np.nan
    center = (
        keys[:, : max(first, 1)].astype(np.float32).mean(1) if first else np.zeros((kv_heads, head_dim), np.float32)
    )
    step = rng.uniform(0.8, 1.2, kv_heads).astype(np.float32)
    codes = np.zeros(LayerCache(kv_heads, head_dim).code_shape(context), np.uint8)
    means = np.zeros(LayerCache(kv_heads, head_dim).mean_shape(context), np.float16)
    for head in range(kv_heads):
        old = keys[head, :first].astype(np.float32)
        sparse.store(codes[0, head], sparse.encode(old, center[head], step[head]), 0)
        sparse.average(means[0, head], values[head, :first], 0)
    angles = np.arange(context)[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    fed: dict[str, Any] = {
        "qkv": (2 * rng.standard_normal((1, tokens, (heads + 2 * kv_heads) * head_dim))).astype(np.float32),
        "past_key": keys[None],
        "past_value": values[None],
        "past_codes": codes,
        "past_means": means,
        "last": np.array([total - 1], np.int32),
        "budget": np.array([budget], np.int32),
    }
    held = {
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "center": center,
        "step": step,
    }
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": head_dim, "local_window_size": -1}
    attributes |= {"sinks": sinks, "recent": recent, "followers": followers, "dense_below": dense_below}
    return Case("HadamardSparseAttention", held, fed, attributes)


def assert_equal(case: Case, *, threads: int = 1, tolerance: float = 2e-5) -> None:
    total = int(case.inputs["last"][0]) + 1
    y, keys, values, codes, means = run_natively(case, threads=threads)
    wanted = case.reference()
    assert_close(y, wanted[0], tolerance, "y")
    assert_close(keys[:, :, :total], wanted[1][:, :, :total], 1e-3, "keys")
    assert_close(values[:, :, :total], wanted[2][:, :, :total], 1e-3, "values")
    differing = codes != wanted[3]
    assert differing.mean() < 1e-3, "codes may differ where a level lies on an edge, by rounding"
    assert_close(means, wanted[4], 1e-3, "means")


SHAPES = [
    {"total": 100, "budget": 64},
    {"total": 257, "budget": 37},
    {"total": 256, "budget": 255},
    {"total": 1000, "budget": 64, "group": 1},
    {"total": 1000, "budget": 64, "group": 4, "head_dim": 128},
    {"total": 1000, "budget": 128, "group": 7, "head_dim": 32},
    {"total": 700, "budget": 64, "head_dim": 80},
    {"total": 700, "budget": 64, "head_dim": 96},
    {"total": 600, "budget": 64, "head_dim": 256, "kv_heads": 1},
    {"total": 600, "budget": 64, "head_dim": 16},
    {"total": 5000, "budget": 200, "kv_heads": 1},
    {"total": 5000, "budget": 1},
    {"total": 5000, "budget": 33},
    {"total": 5000, "budget": 36},
    {"total": 300, "budget": 64, "sinks": 0, "recent": 1},
    {"total": 300, "budget": 64, "dense_below": 300},
    {"total": 300, "budget": 300},
    {"total": 5000, "budget": 64, "followers": 192},
    {"total": 300, "budget": 64, "followers": 192},
    {"total": 700, "budget": 64, "followers": 5000, "head_dim": 80},
    {"total": 1, "budget": 1},
    {"total": 2, "budget": 1, "recent": 1},
    {"total": 300, "tokens": 7},
    {"total": 300, "tokens": 300},
    {"total": 300, "context": 1000},
]


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_equals_the_definition(shape: dict[str, Any]) -> None:
    assert_equal(sparse_case(**shape))


@needs_library
def test_every_path_equals_the_definition() -> None:
    for _ in every_path():
        for shape in ({"total": 1100, "budget": 64}, {"total": 600, "budget": 50, "head_dim": 80, "group": 4}):
            assert_equal(sparse_case(**shape), threads=2)


@needs_library
def test_threads_do_not_change_the_result() -> None:
    case = sparse_case(total=9000, budget=100)
    one, two = run_natively(case, threads=1), run_natively(case, threads=2)
    assert all(np.array_equal(a, b, equal_nan=a.dtype != np.uint8) for a, b in zip(one, two, strict=True))


@needs_library
@pytest.mark.parametrize("budget", [300, 301, 5000])
def test_a_budget_of_the_whole_context_is_dense_attention(budget: int) -> None:
    case = sparse_case(total=300, budget=budget)
    dense = sparse_case(total=300, budget=budget, dense_below=300)
    assert np.array_equal(run_natively(case)[0], run_natively(dense)[0])


@needs_library
def test_the_function_is_the_exact_attention() -> None:
    case = sparse_case(total=300, budget=300)
    session = open_session(case.model(function_bodies()), native=False)
    y = session.run(None, {**case.inputs, **{n: np.nan_to_num(case.inputs[n]) for n in ("past_key", "past_value")}})[0]
    assert_close(y, case.reference()[0], 2e-3, "y")


@needs_library
@pytest.mark.parametrize("where", [0, 5, 150, 298])
def test_a_key_that_is_no_number_is_contained(where: int) -> None:
    case = sparse_case(total=300, budget=64)
    keys = case.inputs["past_key"].copy()
    keys[:, :, where] = np.nan
    y, *_ = run_natively(case.changed(past_key=keys))
    assert y.shape == (1, 1, 6 * 64)


@needs_library
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": np.array([0], np.int32)}, "the budget must be at least 1: got 0"),
        ({"budget": np.array([1, 2], np.int32)}, "the budget must be one number"),
        ({"past_codes": np.zeros((1, 2, 7), np.uint8)}, r"past_codes must have shape \(1, 2, 8192\)"),
        ({"past_means": np.zeros((1, 2, 1, 64), np.float16)}, r"past_means must have shape \(1, 2, 32, 64\)"),
        ({"step": np.array([1.0, 0.0], np.float32)}, "step must be above 0"),
        ({"step": np.array([1.0, np.nan], np.float32)}, "step must be above 0"),
        ({"center": np.zeros((2, 63), np.float32)}, "center must have 128 elements"),
        ({"recent": 0}, "recent must be from 1"),
        ({"local_window_size": 16}, "local_window_size must be -1"),
        ({"qkv": np.zeros((2, 1, 640), np.float32)}, "batches are not supported"),
    ],
)
def test_what_is_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    case = sparse_case(total=300, budget=64).changed(**changes)
    with pytest.raises(Exception, match=message):
        run_natively(case)


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 600), count=st.integers(0, 300), head_dim=st.sampled_from([16, 32, 64, 80, 128]))
def test_codes_come_back_from_their_tiles(first: int, count: int, head_dim: int) -> None:
    rng = np.random.default_rng(first + count)
    packed = np.zeros(LayerCache(1, head_dim).code_shape(first + count), np.uint8)[0, 0]
    codes = rng.integers(0, 4, (count, code_width(head_dim)), dtype=np.uint8)
    sparse.store(packed, codes, first)
    assert np.array_equal(sparse.load(packed, first + count, head_dim)[first:], codes)


def test_the_transform_keeps_products() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 80)).astype(np.float32)
    np.testing.assert_allclose((sparse.hadamard(a) * sparse.hadamard(b)).sum(-1), (a * b).sum(-1), atol=1e-4)


def kept(estimated: NDArray[np.float64], **options: int) -> list[int]:
    return list(np.flatnonzero(sparse.select(estimated, followers=0, **options)[0]))


def test_what_is_selected() -> None:
    estimated = np.array([[-9.0, -8.0, 0.0, -9.0, -7.0, -9.0], [-6.0, -9.0, -9.0, -9.0, -0.1, -9.0]])
    assert kept(estimated, budget=3, sinks=1, recent=1) == [0, 2, 5]
    assert kept(estimated, budget=4, sinks=1, recent=1) == [0, 2, 4, 5]
    assert kept(estimated, budget=1, sinks=4, recent=32) == [5]
    assert kept(estimated, budget=3, sinks=0, recent=1) == [2, 4, 5]
    exact, following = sparse.select(estimated, budget=1, sinks=0, recent=1, followers=2)
    assert (list(np.flatnonzero(exact)), list(np.flatnonzero(following))) == ([5], [2, 4])


def test_an_exact_estimate_with_page_means_of_equal_values_is_exact_attention() -> None:
    """When pages hold one value each and keys lie on the levels of their codes, nothing is approximated but q."""
    rng = np.random.default_rng(1)
    total, d, step = 512, 64, np.float32(0.5)
    levels = rng.integers(0, 4, (total, d)).astype(np.uint8)
    keys = sparse.hadamard(((levels - 1.5) * step).astype(np.float32)).astype(np.float16)  # its own inverse
    values = rng.standard_normal((total // 16, d)).repeat(16, axis=0).astype(np.float16)
    means = np.zeros((32, d), np.float16)
    sparse.average(means, values, 0)
    center = np.zeros(d, np.float32)
    assert np.array_equal(sparse.encode(keys.astype(np.float32), center, step), levels)
    q = rng.standard_normal((3, d)).astype(np.float32)
    y = sparse.attend(q, keys, values, levels, means, center, step, budget=8, sinks=1, recent=4, followers=0)
    scores = np.exp(q @ keys.astype(np.float32).T / 8)
    np.testing.assert_allclose(y, scores / scores.sum(-1, keepdims=True) @ values.astype(np.float32), atol=0.02)
