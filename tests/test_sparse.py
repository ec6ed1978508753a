"""Hadamard sparse attention: the NumPy definition's own facts, and the native kernel against it on every path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, assert_close, every_path, needs_library, open_session, run_natively, whole_cache
from numpy.typing import NDArray

from edgekit.bundle import PAGE, LayerCache
from edgekit.cache_rows import hadamard
from edgekit.export.sparse import key_code, thresholds
from edgekit.kernels import sparse, sparse_adamas
from edgekit.kernels.attention import read_cache
from edgekit.kernels.functions import function_bodies
from edgekit.kernels.library import path_name


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
    int8: bool = False,
    per_query_head: bool = False,
    adamas: bool = False,
    prefill_budget: int = 0,
    seed: int = 0,
) -> Case:
    """A cache of `total` - `tokens` positions, and `tokens` new ones. Pages that are whole have codes and means."""
    rng = np.random.default_rng(seed)
    heads, context, first = kv_heads * group, context or total + 5, total - tokens
    keys = rng.standard_normal((kv_heads, context, head_dim)).astype(np.float16)
    keys += rng.standard_normal((kv_heads, 1, head_dim)).astype(np.float16) * np.float16(2)  # keys have a mean
    values = rng.standard_normal((kv_heads, context, head_dim)).astype(np.float16)
    keys[:, first:], values[:, first:] = np.nan, np.nan
    known = keys[:, :first].astype(np.float32) if first > 1 else rng.standard_normal((kv_heads, 9, head_dim))
    queries = rng.standard_normal((kv_heads, 64, head_dim)).astype(np.float32)
    make = thresholds if adamas else key_code
    found = [make(q, k.astype(np.float32)) for q, k in zip(queries, known, strict=True)]
    center, encoder, decoder = map(np.stack, zip(*found, strict=True))
    codes = np.random.default_rng(1).integers(0, 256, LayerCache(kv_heads, head_dim).code_shape(context), np.uint8)
    means = np.zeros(LayerCache(kv_heads, head_dim).mean_shape(context), np.uint8)
    kept = whole_cache(keys[None], values[None], 8) if int8 else {"past_key": keys[None], "past_value": values[None]}
    stored_keys, stored = (part.astype(np.float32) for part in read_cache(list(kept.values()), first))
    for head, old in enumerate(stored_keys):
        if adamas:
            sparse_adamas.store(codes[0, head], sparse_adamas.code(old, center[head, 1]), 0)
            continue
        whole = old[: first // PAGE * PAGE]
        sparse.store(codes[0, head], sparse.encode(whole, center[head], encoder[head].T), 0, head_dim=head_dim)
        sparse.average(means[0, head], stored[head], 0)
    angles = np.arange(context)[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    fed: dict[str, Any] = {
        "qkv": (2 * rng.standard_normal((1, tokens, (heads + 2 * kv_heads) * head_dim))).astype(np.float32),
        **kept,
        "past_codes": codes,
        "past_means": means,
        "last": np.array([total - 1], np.int32),
        "budget": np.array([budget], np.int32),
    }
    held = {
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "center": center,
        "encoder": encoder,
        "decoder": decoder,
    }
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": head_dim, "local_window_size": -1}
    attributes |= {"sinks": sinks, "recent": recent, "followers": followers, "dense_below": dense_below}
    attributes |= {"per_query_head": int(per_query_head), "adamas": int(adamas), "prefill_budget": prefill_budget}
    return Case("HadamardSparseAttention" + ("Int8" if int8 else ""), held, fed, attributes)


def assert_equal(case: Case, *, threads: int = 1) -> None:
    total = int(case.inputs["last"][0]) + 1
    y, *cache, codes, means = run_natively(case, threads=threads)
    expected, *kept, wanted_codes, wanted_means = case.reference()
    squares = path_name() == "amx" and case.inputs["qkv"].shape[1] > 1  # each number as two of bfloat16
    assert_close(y, expected, 4e-5 if squares else 2e-5, "y")
    for part, wanted in zip(read_cache(cache, total), read_cache(kept, total), strict=True):
        assert_close(part, wanted, 0.03 if len(cache) == 3 else 1e-3, "keys and values: a code may differ by rounding")
    assert (codes != wanted_codes).mean() < 1e-3, "codes may differ where a level lies on an edge, by rounding"
    assert (means != wanted_means).mean() < 2e-3, "so may means"


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
    {"total": 9, "tokens": 0},
    {"total": 300, "tokens": 7},
    {"total": 300, "tokens": 300},
    {"total": 300, "context": 1000},
    {"total": 5000, "budget": 64, "followers": 192, "per_query_head": True},
    {"total": 700, "budget": 64, "head_dim": 80, "group": 4, "per_query_head": True},
]
ADAMAS = [
    {"total": 100, "budget": 64},
    {"total": 5000, "budget": 64, "per_query_head": True, "recent": 1, "sinks": 0},
    {"total": 5000, "budget": 256, "group": 4},
    {"total": 700, "budget": 37, "head_dim": 128, "group": 2, "per_query_head": True},
    {"total": 600, "budget": 64, "head_dim": 256, "kv_heads": 1, "per_query_head": True},
    {"total": 600, "budget": 64, "head_dim": 16, "per_query_head": True},
    {"total": 300, "budget": 1, "recent": 1},
    {"total": 1, "budget": 1},
    {"total": 300, "tokens": 7},
    {"total": 300, "budget": 300},
]


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_equals_the_definition(shape: dict[str, Any]) -> None:
    assert_equal(sparse_case(**shape))


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_equals_the_definition_over_a_cache_in_8_bits(shape: dict[str, Any]) -> None:
    assert_equal(sparse_case(**shape, int8=True))


PREFILL = [
    {"total": 1500, "tokens": 200, "prefill_budget": 128},
    {"total": 1499, "tokens": 65, "prefill_budget": 64, "head_dim": 80, "group": 2},
    {"total": 900, "tokens": 7, "prefill_budget": 256, "head_dim": 32, "group": 1},
    {"total": 900, "tokens": 130, "prefill_budget": 4096},
    {"total": 700, "tokens": 700, "prefill_budget": 63},
]


@needs_library
@pytest.mark.parametrize("int8", [False, True], ids=["float16", "int8"])
@pytest.mark.parametrize("shape", PREFILL, ids=str)
def test_prompts_are_read_block_by_block(shape: dict[str, Any], int8: bool) -> None:
    for path in every_path():
        assert_equal(sparse_case(**shape, int8=int8))
        if path == "portable":
            assert_equal(sparse_case(**shape, int8=int8), threads=2)


@needs_library
def test_a_prefill_budget_of_all_is_exact() -> None:
    shape: dict[str, Any] = {"total": 1500, "tokens": 200}
    exact, all_of_it = run_natively(sparse_case(**shape)), run_natively(sparse_case(**shape, prefill_budget=1 << 20))
    some = run_natively(sparse_case(**shape, prefill_budget=64))
    assert np.array_equal(exact[0], all_of_it[0])
    assert not np.array_equal(exact[0], some[0])


@needs_library
@pytest.mark.parametrize("int8", [False, True], ids=["float16", "int8"])
@pytest.mark.parametrize("shape", ADAMAS, ids=str)
def test_adamas_selects_as_its_definition(shape: dict[str, Any], int8: bool) -> None:
    """The codes agree to the bit, and what is selected from them is the same: else y would be off by far more."""
    case = sparse_case(**shape, int8=int8, adamas=True)
    assert_equal(case)
    for _ in every_path():
        assert np.array_equal(run_natively(case)[-2], case.reference()[-2])


def test_adamas_takes_true_distances() -> None:
    every = np.arange(4, dtype=np.uint8)[:, None]
    assert sparse_adamas.distances(every, every).tolist() == [[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]]
    packed = np.zeros(2 * 16 * 4, np.uint8)
    codes = np.random.default_rng(0).integers(0, 4, (7, 16), dtype=np.uint8)
    sparse_adamas.store(packed, codes, 3)
    assert np.array_equal(sparse_adamas.load(packed, 10, 16)[3:], codes)


@needs_library
def test_every_path_equals_the_definition() -> None:
    for _ in every_path():
        for shape in ({"total": 1100, "budget": 64}, {"total": 600, "budget": 50, "head_dim": 80, "group": 4}):
            assert_equal(sparse_case(**shape), threads=2)
            assert_equal(sparse_case(**shape, int8=True), threads=2)


@needs_library
def test_threads_do_not_change_the_result() -> None:
    case = sparse_case(total=9000, budget=100)
    one, two = run_natively(case, threads=1), run_natively(case, threads=2)
    assert all(np.array_equal(a, b, equal_nan=a.dtype != np.uint8) for a, b in zip(one, two, strict=True))


@needs_library
@pytest.mark.parametrize("int8", [False, True], ids=["float16", "int8"])
@pytest.mark.parametrize(
    "shape", [{"dense_below": 300}, {"budget": 5, "recent": 3, "sinks": 1}, {"budget": 30}], ids=str
)
def test_token_by_token_pages_get_the_codes_and_means_of_a_prompt(shape: dict[str, Any], int8: bool) -> None:
    """Whether the tokens before a page is whole are exact or select, and whether the window holds all of it or not."""
    total, first = 70, 5
    prompt = sparse_case(total=total, tokens=total - first, int8=int8, **shape)
    _, *wanted = run_natively(prompt)
    made = {name: values for name, values in prompt.inputs.items() if name.startswith("past_")}
    session = open_session(prompt.model(), native=True)
    for place in range(first, total):
        step = {**prompt.inputs, **made, "qkv": prompt.inputs["qkv"][:, place - first : place - first + 1]}
        _, *found = session.run(None, {**step, "last": np.array([place], np.int32)})
        made = dict(zip(made, found, strict=True))
    for head in range(2):
        codes, expected = (
            sparse.load(part[-2][0, head], total // PAGE * PAGE, head_dim=64) for part in (found, wanted)
        )
        assert np.array_equal(codes, expected)
        means, expected_means = (sparse.load_means(part[-1][0, head], 64) for part in (found, wanted))
        for mean, expected_mean in zip(means, expected_means, strict=True):
            assert np.array_equal(mean[: total // PAGE], expected_mean[: total // PAGE])


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
        ({"past_means": np.zeros((1, 2, 64), np.uint8)}, r"past_means must have shape \(1, 2, 2112\)"),
        ({"encoder": np.zeros((2, 64, 47), np.float32)}, "encoder must have 6144 elements"),
        ({"decoder": np.zeros((2, 64, 64), np.float32)}, "decoder must have 6144 elements"),
        ({"center": np.zeros((2, 63), np.float32)}, "center must have 128 elements"),
        ({"recent": 0}, "recent must be from 1"),
        ({"adamas": 2}, "adamas must be from 0 to 1: got 2"),
        ({"per_query_head": -1}, "per_query_head must be from 0 to 1: got -1"),
        ({"local_window_size": 16}, "local_window_size must be -1"),
        ({"qkv": np.zeros((2, 1, 640), np.float32)}, "batches are not supported"),
    ],
)
def test_what_is_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    case = sparse_case(total=300, budget=64).changed(**changes)
    with pytest.raises(Exception, match=message):
        run_natively(case)


@needs_library
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"head_dim": 80}, "head_dim must be a power of two for adamas: got 80"),
        ({"followers": 5}, "followers must be 0 for adamas"),
    ],
)
def test_what_adamas_cannot_do_is_refused(shape: dict[str, Any], message: str) -> None:
    case = sparse_case(total=300, **shape).changed(adamas=1)
    with pytest.raises(Exception, match=message):
        run_natively(case)


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 600), count=st.integers(0, 300), head_dim=st.sampled_from([16, 32, 64, 80, 96, 128, 256]))
def test_codes_come_back_from_their_tiles(first: int, count: int, head_dim: int) -> None:
    rng = np.random.default_rng(first + count)
    packed = np.zeros(LayerCache(1, head_dim).code_shape(first + count), np.uint8)[0, 0]
    fine, coded = sparse.fine_channels(head_dim), sparse.coded_channels(head_dim)
    codes = rng.integers(0, np.repeat([16, 4], [fine, coded - fine]), (count, coded), dtype=np.uint8)
    sparse.store(packed, codes, first, head_dim=head_dim)
    assert np.array_equal(sparse.load(packed, first + count, head_dim=head_dim)[first:], codes)
    assert 4 * fine + 2 * (coded - fine) == 2 * head_dim


def test_the_transform_keeps_products() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 64)).astype(np.float32)
    np.testing.assert_allclose((hadamard(a) * hadamard(b)).sum(-1), (a * b).sum(-1), atol=1e-4)
    assert np.abs(hadamard(hadamard(a)) - a).max() < 1e-6


@pytest.mark.parametrize(
    ("head_dim", "most"),
    [(64, 0.7), (80, 0.7), (128, 0.7), (16, 0.9), (32, 0.9), (48, 0.9)],  # below 64 channels none has four bits
)
def test_calibrated_channels_estimate_better_than_the_keys_own(head_dim: int, most: float) -> None:
    """Keys and queries that vary unlike each other, and a few channels that matter most, as those of real heads do."""
    rng = np.random.default_rng(head_dim)
    axes = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))[0]
    of_keys, of_queries = 2.0 ** -np.arange(head_dim).clip(0, 8), 2.0 ** -np.arange(head_dim)[::-1].clip(0, 8)
    k, test = (rng.standard_normal((2, 2000, head_dim)) * of_keys @ axes + 3).astype(np.float32)
    q = (rng.standard_normal((500, head_dim)) * of_queries @ axes + 1).astype(np.float32)
    center, encoder, decoder = key_code(q, k)

    def error(encoder: NDArray[np.float32], decoder: NDArray[np.float32]) -> float:
        t = sparse.estimates(q, sparse.encode(test, center, encoder.T), center, decoder.T)
        return float(np.std(t * np.log(2) - q @ test.T / np.sqrt(head_dim)))

    plain = np.eye(head_dim, dtype=np.float32)[:, : sparse.coded_channels(head_dim)]
    step = (test - center).std(0)[:, None]
    assert error(encoder, decoder) < most * error(plain / step, plain * step)


def kept(estimated: NDArray[np.float64], **options: int) -> list[int]:
    return list(np.flatnonzero(sparse.select(np.exp(estimated.max(0)), followers=0, **options)[0]))


def test_what_is_selected() -> None:
    estimated = np.array([[-9.0, -8.0, 0.0, -9.0, -7.0, -9.0], [-6.0, -9.0, -9.0, -9.0, -0.1, -9.0]])
    assert kept(estimated, budget=3, sinks=1, recent=1) == [0, 2, 5]
    assert kept(estimated, budget=4, sinks=1, recent=1) == [0, 2, 4, 5]
    assert kept(estimated, budget=1, sinks=4, recent=32) == [5]
    assert kept(estimated, budget=3, sinks=0, recent=1) == [2, 4, 5]
    exact, following = sparse.select(np.exp(estimated.max(0)), budget=1, sinks=0, recent=1, followers=2)
    assert (list(np.flatnonzero(exact)), list(np.flatnonzero(following))) == ([5], [2, 4])


def test_an_exact_estimate_with_page_means_of_equal_values_is_exact_attention() -> None:
    """When pages hold one value each and keys lie on the levels of their codes, nothing is approximated but q."""
    rng = np.random.default_rng(1)
    total, d = 512, 64
    encoder = np.eye(d, dtype=np.float32)[: sparse.coded_channels(d)] * 4
    offset = sparse.offsets(d)
    levels = rng.integers(0, 2 * offset + 1, (total, len(offset))).astype(np.uint8)
    keys = ((levels - offset) @ encoder / 16).astype(np.float16)
    values = rng.standard_normal((total // 16, d)).repeat(16, axis=0).astype(np.float16)
    packed = np.zeros(LayerCache(1, d).mean_shape(total), np.uint8)[0, 0]
    sparse.average(packed, values.astype(np.float32), 0)
    means = sparse.load_means(packed, d)
    center = np.zeros(d, np.float32)
    assert np.array_equal(sparse.encode(keys.astype(np.float32), center, encoder), levels)
    q = rng.standard_normal((3, d)).astype(np.float32)
    y = sparse.attend(
        q,
        q.astype(np.float64),
        keys.astype(np.float32),
        values.astype(np.float32),
        levels,
        means,
        center,
        encoder / 16,
        budget=8,
        sinks=1,
        recent=4,
        followers=0,
    )
    scores = np.exp(q @ keys.astype(np.float32).T / 8)
    np.testing.assert_allclose(y, scores / scores.sum(-1, keepdims=True) @ values.astype(np.float32), atol=0.02)
