"""The native kernels against their definition, on every path that this processor has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import (
    NOTHING,
    Array,
    Case,
    Extra,
    Offsets,
    Scales,
    assert_close,
    assert_native,
    attention_case,
    embedding_case,
    every_path,
    linear_case,
    matrix_case,
    native_mode,
    needs_library,
    norm_case,
    open_session,
    random_matrix,
    run_in_place,
    run_natively,
    steady_activations,
)
from onnx import TensorProto

from edgekit.errors import UserError
from edgekit.kernels.library import choose_path, known_paths, path_name
from edgekit.kernels.pack import tile

pytestmark = needs_library


def test_the_paths_are_there_and_an_unknown_one_is_not() -> None:
    assert "portable" in known_paths()
    assert list(every_path()) == known_paths()
    with pytest.raises(UserError, match="abacus"):
        choose_path("abacus")


# --- products ---------------------------------------------------------------------------------------------------------

SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 575, 577, 1023)
ROWS = (0, 1, 2, 7, 8, 9, 17, 64, 65, 70)
KINDS = list(
    itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128), ("symmetric", "zeros", "minima"), ("float16", "int8"))
)
# Every kind, every size as N and as K, every number of rows: strides that are coprime to the lists' lengths.
TABLE = [
    (*KINDS[i % len(KINDS)], SIZES[3 * i % len(SIZES)], SIZES[(7 * i + 3) % len(SIZES)], ROWS[3 * i % len(ROWS)])
    for i in range(len(KINDS))
]


def test_the_table_covers_all_sizes() -> None:
    for column, values in ((4, SIZES), (5, SIZES), (6, ROWS)):
        assert {row[column] for row in TABLE} == set(values)
    assert {row[:4] for row in TABLE} == set(KINDS)


@pytest.mark.parametrize(("bits", "block", "offsets", "scales", "N", "K", "rows"), TABLE)
def test_products_are_as_defined(
    bits: int, block: int, offsets: Offsets, scales: Scales, N: int, K: int, rows: int
) -> None:
    kind: dict[str, Any] = {"bits": bits, "block": block, "offsets": offsets, "scales": scales, "rows": rows}
    extra: tuple[Extra, ...] = ("nothing", "bias", "residual", "both")
    assert_native(linear_case(N, K, **kind, extra=extra[(N + K) % 4]), rows=rows)
    assert_native(norm_case(N, K, **kind, biased=K % 2 == 0), rows=rows)
    assert_native(norm_case(2 * N, K, **kind, gated=True), rows=rows, tolerance=3e-6)


HALVES: list[tuple[Scales, int, int, int]] = [
    (scales, N, K, rows)
    for rows, N, K, scales in zip(
        ROWS,
        (1, 31, 33, 575, 17, 16, 3, 577, 33, 15),
        itertools.cycle((32, 96, 1024, 576)),
        itertools.cycle(("float16", "int8")),
    )
]


@pytest.mark.parametrize(("scales", "N", "K", "rows"), HALVES)
def test_blocks_of_16_are_as_defined(scales: Scales, N: int, K: int, rows: int) -> None:
    kind: dict[str, Any] = {"bits": 6, "block": 16, "offsets": "symmetric", "scales": scales}
    assert_native(linear_case(N, K, **kind, rows=rows, extra="both"), rows=rows)
    assert_native(norm_case(2 * N, K, **kind, rows=rows, gated=True), rows=rows, tolerance=3e-6)
    assert_native(embedding_case(N, K, **kind, tokens=rows), tolerance=0)


@pytest.mark.parametrize("extra", ["nothing", "bias", "residual", "both"])
@pytest.mark.parametrize(("N", "rows"), [(16, 1), (31, 1), (33, 9), (15, 70)])
def test_bias_and_residual_are_added(N: int, rows: int, extra: Extra) -> None:
    assert_native(linear_case(N, 40, rows=rows, extra=extra), rows=rows)


@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize(
    ("bits", "block", "offsets", "scales"), [*KINDS, (6, 16, "symmetric", "float16"), (6, 16, "symmetric", "int8")]
)
def test_the_largest_codes_do_not_overflow(bits: int, block: int, offsets: Offsets, scales: Scales, rows: int) -> None:
    """All codes at their ends and all activations at their peak: sums of 16 bits on the way would saturate."""
    rng = np.random.default_rng(0)
    weight = random_matrix(rng, 16, 256, bits=bits, block=block, offsets=offsets, scales=scales)
    codes = np.zeros_like(weight.codes)
    codes[::2] = 255
    weight = replace(weight, codes=codes, scales=np.ones_like(weight.scales))
    x = np.where(np.arange(rows)[:, None] % 2, -3, 3).astype(np.float32).repeat(256, axis=1)[None]
    case = matrix_case("QuantLinear", tile(weight), {"x": x}, {}, {"bias": NOTHING, "residual": NOTHING})
    assert_native(case, rows=rows)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("bits", "block", "offsets", "scales"), KINDS[::5])
def test_sessions_of_8_bits_stay_so(bits: int, block: int, offsets: Offsets, scales: Scales, rows: int) -> None:
    """A session keeps the activations that it was made with when others are made after it."""
    case = linear_case(33, 130, bits=bits, block=block, offsets=offsets, scales=scales, rows=rows)
    x = steady_activations(np.random.default_rng(1), rows, 130, block, "int8")
    coarse = open_session(case.model(), native=True, activations=8)
    open_session(case.model(), native=True)
    (expected,) = case.changed(x=x).reference(activations="int8")
    for path in every_path():
        assert_close(coarse.run(None, {"x": x})[0], expected, 1e-6, path)


@pytest.mark.parametrize("rows", [1, 3, 11])
@pytest.mark.parametrize(
    "case",
    [linear_case(33, 130, rows=11), norm_case(33, 130), norm_case(34, 130, gated=True)],
    ids=lambda case: case.op,
)
def test_a_node_may_say_8_bits(case: Case, rows: int) -> None:
    x = steady_activations(np.random.default_rng(1), rows, 130, 32, "int8")
    residual = {"residual": NOTHING} if case.op == "QuantLinear" else {}
    (expected,) = case.changed(x=x, **residual).reference(activations="int8")
    coarse = replace(case, attributes={**case.attributes, "activation_bits": 8}).changed(**residual)
    session = open_session(coarse.model(), native=True)
    for path in every_path():
        assert_close(session.run(None, {"x": x})[0], expected, 1e-5, path)
    wrong = replace(case, attributes={**case.attributes, "activation_bits": 4})
    with pytest.raises(Exception, match="activation_bits must be 8 or 15: got 4"):
        open_session(wrong.model(), native=True)


@pytest.mark.parametrize("rows", [2, 70])
def test_activations_at_the_ends_of_float32(rows: int) -> None:
    """Tiny, huge and zero rows; numbers that vanish beside their block's peak."""
    case = linear_case(17, 96, offsets="zeros", rows=rows)
    x = case.inputs["x"].copy()
    x[0, 0] *= 1e30
    x[0, 1] *= 1e-30
    x[0, -1, 32:64] = 0
    x[0, -1, 64] = 1e20
    case = case.changed(x=x)
    session = open_session(case.model(), native=True)
    for path in every_path():
        mode = native_mode(rows, path)
        expected = case.reference(activations=mode)[0][0]
        for row, wanted in zip(session.run(None, case.inputs)[0][0], expected, strict=True):
            assert_close(row, wanted, 2e-6 if mode == "bfloat16" else 1e-6, path)


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (1, 2, 1, 3, 1, 40)])
def test_any_leading_dimensions_are_rows(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for extra in ("nothing", "bias"):
        assert_native(linear_case(17, 40, extra=extra).changed(x=x), rows=1)


@pytest.mark.parametrize(("bits", "block", "offsets", "scales", "N", "K", "tokens"), TABLE)
def test_embeddings_are_exact(
    bits: int, block: int, offsets: Offsets, scales: Scales, N: int, K: int, tokens: int
) -> None:
    kind: dict[str, Any] = {"bits": bits, "block": block, "offsets": offsets, "scales": scales}
    assert_native(embedding_case(N, K, **kind, tokens=tokens), tolerance=0)


@pytest.mark.parametrize("case", [linear_case(33, 70), norm_case(34, 70, gated=True), embedding_case(33, 70)])
def test_models_of_before_there_were_steps_run(case: Case) -> None:
    old = case.model()
    del old.graph.node[0].input[-1]
    assert np.array_equal(open_session(old, native=True).run(None, case.inputs)[0], run_natively(case)[0])


def test_ids_may_have_any_shape() -> None:
    for shape in ((), (0,), (2, 3), (1, 2, 1, 3, 1)):
        assert_native(embedding_case(33, 40).changed(ids=np.full(shape, 32)), tolerance=0)


THREADED = {
    "one row": linear_case(577, 575, offsets="minima", rows=1, extra="both"),
    "seven rows": norm_case(577, 575, offsets="zeros", bits=8, rows=7),
    "many rows": norm_case(2 * 577, 575, rows=130, gated=True),
    "embedding": embedding_case(577, 575, tokens=300),
    "decode": attention_case(tokens=1, first=900, kv_heads=3, group=3, head_dim=64),
    "prefill": attention_case(tokens=130, first=33, kv_heads=2, group=3, head_dim=64, normed=True),
}


@pytest.mark.parametrize("name", THREADED)
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    case = THREADED[name]
    alone = run_natively(case)
    for threads in (2, 3):
        for ours, theirs in zip(alone, run_natively(case, threads=threads), strict=True):
            assert ours.tobytes() == theirs.tobytes()


# --- attention --------------------------------------------------------------------------------------------------------

FIRST = (0, 1, 63, 64, 200)
TOKENS = (1, 2, 17, 65, 130)
HEADS = ((1, 1), (1, 3), (2, 4), (3, 1), (1, 9))
WIDTHS = (16, 64, 80, 96, 128)
WINDOWS = (-1, -1, 1, 2, 16, 63, 64, 65, 100, 1000)
ATTENTION = [
    (TOKENS[i % 5], FIRST[i // 5], *HEADS[(i + i // 5) % 5], WIDTHS[(2 * i + i // 5) % 5], WINDOWS[3 * i % 10])
    for i in range(25)
]


def attention_tolerance(path: str | None) -> float:
    """The matrix unit multiplies numbers of 16 bits of fraction."""
    return 2e-5 if path == "amx" else 2e-6


def assert_attends(case: Case, outputs: Sequence[Array], what: str) -> None:
    """The definition's y; its keys and values in all places up to the last token, keys to a rounding of float16."""
    expected = case.reference()
    used = int(case.inputs["last"][0]) + 1
    assert_close(outputs[0], expected[0], attention_tolerance(what) if case.op == "Attention" else 1e-4, f"y on {what}")
    keys, values = (cache[:, :, :used] for cache in outputs[1:])
    assert np.array_equal(values, expected[2][:, :, :used]), what
    if case.op == "Attention":
        assert np.array_equal(keys, expected[1][:, :, :used]), what
    else:
        np.testing.assert_array_max_ulp(keys, expected[1][:, :, :used])


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("tokens", "first", "kv_heads", "group", "head_dim", "window"), ATTENTION)
def test_attention_is_as_defined(
    tokens: int, first: int, kv_heads: int, group: int, head_dim: int, window: int, normed: bool
) -> None:
    case = attention_case(
        tokens=tokens,
        first=first,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        window=window,
        normed=normed,
    )
    session = open_session(case.model(), native=True)
    for path in every_path():
        assert_attends(case, session.run(None, case.inputs), path)


@pytest.mark.parametrize("window", [-1, 1, 127, 128, 1000])
def test_a_long_cache_is_decoded(window: int) -> None:
    """Long enough to be cut into as many stretches as there can be."""
    case = attention_case(tokens=1, first=2500, kv_heads=2, group=5, head_dim=32, window=window)
    session = open_session(case.model(), native=True)
    for path in every_path():
        assert_attends(case, session.run(None, case.inputs), path)


@pytest.mark.parametrize("tokens", [1, 20])
def test_large_scores_do_not_overflow(tokens: int) -> None:
    """Softmax of scores in the thousands; all weight may be on one key."""
    case = attention_case(tokens=tokens, first=70, group=2, head_dim=32)
    case = case.changed(qkv=case.inputs["qkv"] * np.float32(40))
    session = open_session(case.model(), native=True)
    for path in every_path():
        y = session.run(None, case.inputs)[0]
        assert_close(y, case.reference()[0], 2e-3, path)  # a score of 5000 is exact to 5e-4


@pytest.mark.parametrize("tokens", [1, 20])
def test_the_cache_grows_in_place_or_is_copied(tokens: int) -> None:
    case = attention_case(tokens=tokens, first=30, kv_heads=2, group=2, head_dim=32)
    session = open_session(case.model(), native=True)
    before = {name: values.copy() for name, values in case.inputs.items()}
    copied = session.run(None, case.inputs)
    assert all(np.array_equal(before[name], case.inputs[name], equal_nan=True) for name in before)
    assert_attends(case, run_in_place(session, case), "one buffer")
    assert_attends(case, copied, "two buffers")


def test_no_tokens_leave_the_cache_as_it_is() -> None:
    case = attention_case(tokens=0, first=9, kv_heads=2, head_dim=16)
    y, keys, values = run_natively(case)
    assert y.shape == (1, 0, 32)
    assert np.array_equal(keys[:, :, :9], case.inputs["past_key"][:, :, :9])
    assert np.array_equal(values[:, :, :9], case.inputs["past_value"][:, :, :9])


def test_decoding_token_by_token_equals_reading_at_once() -> None:
    whole = attention_case(tokens=40, kv_heads=2, group=3, head_dim=48, window=17)
    expected = whole.reference()[0]
    session = open_session(whole.model(), native=True)
    feed, rows = dict(whole.inputs), []
    for index in range(40):
        step = {"qkv": whole.inputs["qkv"][:, index : index + 1], "last": np.array([index], np.int32)}
        y, feed["past_key"], feed["past_value"] = session.run(None, {**feed, **step})
        rows.append(y)
    assert_close(np.concatenate(rows, axis=1), expected, attention_tolerance(path_name()), "steps")


# --- weights mapped from a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 3, 63])
def test_weights_may_lie_at_any_offset_of_their_file(tmp_path: Path, shift: int) -> None:
    cases = [
        linear_case(33, 577, offsets="zeros", extra="bias"),
        norm_case(2 * 33, 577, bits=8, offsets="minima", gated=True),
        embedding_case(33, 577, offsets="minima"),
        attention_case(tokens=3, first=5, head_dim=32, normed=True),
    ]
    for case in cases:
        model = case.model()
        data = bytearray()
        for tensor in model.graph.initializer:
            data += b"\xff" * (shift if shift else -len(data) % 4096)
            for key, value in (("location", "weights"), ("offset", len(data)), ("length", len(tensor.raw_data))):
                tensor.external_data.add(key=key, value=str(value))
            data += tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
        (tmp_path / "weights").write_bytes(data)
        (tmp_path / "model").write_bytes(model.SerializeToString())
        outputs = open_session(tmp_path / "model", native=True).run(None, case.inputs)
        for value, wanted in zip(outputs, run_natively(case), strict=True):
            assert np.array_equal(value, wanted, equal_nan=True)


@pytest.mark.parametrize("rows", [3, 70])
def test_what_is_not_a_number_stays_in_its_row(rows: int) -> None:
    case = linear_case(17, 96, offsets="minima", rows=rows)
    x = case.inputs["x"].copy()
    x[0, 0, 5], x[0, 1, 40] = np.nan, np.inf
    session = open_session(case.model(), native=True)
    for path in every_path():
        good, bad = session.run(None, case.inputs)[0], session.run(None, {"x": x})[0]
        assert np.array_equal(good[:, 2:], bad[:, 2:]), path
