"""The cache in 8 and 4 bits: its rounding, native kernels and function bodies against the definition, and bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    Array,
    Case,
    assert_close,
    attention_case,
    every_path,
    needs_library,
    open_session,
    run_in_place,
    run_natively,
)
from tiny import tiny_folder

from edgekit import cache_rows
from edgekit.bundle import Bundle, DecoderSpec, LayerCache
from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.errors import ModelError, UserError
from edgekit.export.export import export
from edgekit.export.parity import all_logits
from edgekit.export.sparse import SparseOptions
from edgekit.export.targets import find_target, host_target
from edgekit.kernels.attention import read_cache
from edgekit.kernels.functions import function_bodies
from edgekit.model.config import stretched
from edgekit.model.reference import Rounds, forward
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime.budget import plan_memory
from edgekit.runtime.prefix import Prefixes
from edgekit.runtime.session import Session

SHAPES = [  # tokens, first, kv_heads, group, head_dim, window
    (1, 0, 1, 1, 16, -1),
    (1, 1, 1, 3, 64, -1),
    (1, 15, 2, 4, 80, -1),
    (1, 16, 3, 3, 96, 7),
    (1, 200, 1, 9, 128, 64),
    (1, 700, 2, 2, 256, -1),
    (1, 2500, 3, 3, 64, -1),
    (1, 900, 1, 5, 48, 1),
    (2, 63, 1, 1, 64, -1),
    (17, 0, 2, 4, 16, 2),
    (65, 64, 3, 1, 80, 65),
    (130, 200, 1, 3, 64, -1),
]
CASES = [
    *((8, *shape) for shape in SHAPES),
    *((4, *shape) for shape in [*SHAPES, (1, 30, 2, 3, 32, -1), (19, 5, 1, 2, 160, -1)] if shape[4] % 32 == 0),
]
NAMES = ("bits", "tokens", "first", "kv_heads", "group", "head_dim", "window")
BITS = pytest.mark.parametrize("bits", [8, 4])


def assert_attends(case: Case, outputs: list[Array], what: str, *, tolerance: float) -> None:
    """The definition's y, and its cache, where a code may differ by one for the rounding of a scale or a rotation."""
    expected, used = case.reference(), int(case.inputs["last"][0]) + 1
    assert_close(outputs[0], expected[0], tolerance, f"y on {what}")
    for part, wanted in zip(outputs[1:3], expected[1:3], strict=True):
        apart = np.abs(whole(part[:, :, :used]) - whole(wanted[:, :, :used]))
        assert apart.max(initial=0) <= 1, what
        assert np.mean(apart) < 1e-3, what
    np.testing.assert_array_max_ulp(outputs[3][:, :, :used], expected[3][:, :, :used], 1)


def whole(codes: Array) -> Array:
    """The numbers of a cache, where there are two in a byte as well."""
    return (codes if codes.dtype == np.int8 else np.stack([codes & 15, codes >> 4])).astype(int)


@needs_library
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(NAMES, CASES)
def test_native_equals_the_definition(
    bits: Literal[8, 4], tokens: int, first: int, kv_heads: int, group: int, head_dim: int, window: int, normed: bool
) -> None:
    sizes = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    case = attention_case(tokens=tokens, first=first, window=window, normed=normed, bits=bits, **sizes)  # type: ignore[arg-type]
    session = open_session(case.model(), native=True)
    for path in every_path():
        assert_attends(case, session.run(None, case.inputs), path, tolerance=2e-4 if normed else 1e-4)


@pytest.mark.parametrize(NAMES, CASES[1::3])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_the_function_equals_the_definition(
    bits: Literal[8, 4], tokens: int, first: int, kv_heads: int, group: int, head_dim: int, window: int, normed: bool
) -> None:
    sizes = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    case = attention_case(tokens=tokens, first=first, window=window, normed=normed, bits=bits, **sizes)  # type: ignore[arg-type]
    session = open_session(case.model(function_bodies()), native=False)
    assert_attends(case, session.run(None, case.inputs), "stock", tolerance=3e-3)
    assert_attends(case, run_in_place(session, case), "stock, one buffer", tolerance=3e-3)


@needs_library
@BITS
@pytest.mark.parametrize("tokens", [1, 20])
def test_the_cache_grows_in_place_or_is_copied(bits: Literal[8, 4], tokens: int) -> None:
    case = attention_case(tokens=tokens, first=30, kv_heads=2, group=2, head_dim=32, bits=bits)
    session = open_session(case.model(), native=True)
    before = {name: values.copy() for name, values in case.inputs.items()}
    copied = session.run(None, case.inputs)
    assert all(np.array_equal(before[name], case.inputs[name], equal_nan=True) for name in before)
    for outputs in (copied, run_in_place(session, case)):
        assert_attends(case, outputs, "buffers", tolerance=1e-4)


@needs_library
@BITS
def test_threads_do_not_change_the_result(bits: Literal[8, 4]) -> None:
    case = attention_case(tokens=1, first=3000, kv_heads=3, group=3, head_dim=64, bits=bits)
    one, two = run_natively(case, threads=1), run_natively(case, threads=2)
    assert all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(one, two, strict=True))


@given(st.integers(0, 1 << 30), st.sampled_from([1e-30, 1e-7, 1e-3, 1.0, 1e4, 1e6]))
@settings(max_examples=40, deadline=None)
def test_rows_come_back_within_half_a_step(seed: int, size: float) -> None:
    x = (np.random.default_rng(seed).standard_normal((5, 48)) * size).astype(np.float32)
    codes, scales = cache_rows.round_rows(x)
    back = codes * scales[:, None].astype(np.float32)
    usual = scales > 2.0**-14  # below, a float16 has fewer bits, and what is above its peak is cut
    assert (np.abs(back - x)[usual] <= 0.5001 * scales[usual, None].astype(np.float32)).all()
    assert np.isfinite(back).all()
    assert (codes[scales == 0] == 0).all()


@given(st.integers(0, 1 << 30), st.sampled_from([32, 64, 96, 160, 256]))
@settings(max_examples=40, deadline=None)
def test_rows_in_4_bits_come_back_turned_back(seed: int, head_dim: int) -> None:
    """A Hadamard matrix changes no length; only what lies beyond seven steps is off by more than half a step."""
    x = np.random.default_rng(seed).standard_normal((2, 5, head_dim)).astype(np.float32)
    x[..., 3] *= 40  # a channel that stands out
    codes, scales = cache_rows.keep(x, 4)
    assert codes.shape == (2, 5, head_dim // 2)
    error = np.linalg.norm(cache_rows.restore(codes, scales) - x, axis=-1)
    assert (error <= 0.6 * np.abs(scales.astype(float)) * np.sqrt(head_dim)).all()
    steps = np.abs(x).max(-1, keepdims=True) / 8
    plain = np.clip(np.rint(x / steps), -8, 7) * steps
    assert error.sum() < 0.8 * np.linalg.norm(plain - x, axis=-1).sum()
    zeros = cache_rows.keep(np.zeros((1, head_dim), np.float32), 4)
    assert (cache_rows.restore(*zeros) == 0).all()


@needs_library
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("tokens", [1, 3])
@BITS
def test_a_key_that_is_no_number_is_contained_in_its_head(value: float, tokens: int, bits: Literal[8, 4]) -> None:
    case = attention_case(tokens=tokens, first=40, kv_heads=2, group=2, head_dim=32, bits=bits)
    qkv = case.inputs["qkv"].copy()
    good = run_natively(case)[0]
    qkv[0, 0, 4 * 32 + 5] = value  # the first head's key
    for _ in every_path():
        bad = run_natively(case.changed(qkv=qkv))[0]
        assert np.array_equal(bad[:, :, 64:], good[:, :, 64:]) or np.allclose(
            bad[:, :, 64:], good[:, :, 64:], atol=1e-5
        )


@needs_library
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"past_scales": np.zeros((1, 2, 48), np.float16)}, r"past_scales must have shape \(1, 4, 48\)"),
        ({"past_scales": np.zeros((1, 4, 7), np.float16)}, r"past_scales must have shape \(1, 4, 48\)"),
        ({"past_key": np.zeros((1, 2, 48, 16), np.int8)}, "past_key must have shape"),
        ({"qkv": np.zeros((2, 3, 256), np.float32)}, "batches are not supported"),
    ],
)
def test_what_is_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    case = attention_case(tokens=3, first=40, kv_heads=2, group=2, head_dim=32, bits=8).changed(**changes)
    with pytest.raises(Exception, match=message):
        run_natively(case)


def test_the_cache_takes_less_memory_and_the_plan_says_so() -> None:
    facts: dict[str, Any] = {
        "architecture": "a",
        "target": "x86",
        "vocabulary": 9,
        "context_length": 900,
        "eos_ids": (),
    }
    facts |= {"resident_bytes": 1, "activation_bytes": 1, "operators": "edgekit", "layers": (LayerCache(3, 64),) * 2}
    half, small, least = (DecoderSpec(**facts, cache=cache) for cache in ("float", "int8", "int4"))
    assert half.cache_bytes(100) == 2 * 100 * 3 * 2 * 64 * 2
    assert small.cache_bytes(100) == 2 * 100 * 3 * 2 * (64 + 2) == plan_memory(small, context=100).cache_bytes
    assert least.cache_bytes(100) == 2 * 100 * 3 * 2 * (32 + 2) == plan_memory(least, context=100).cache_bytes
    assert '"cache"' not in half.to_json()
    assert '"cache": "int8"' in small.to_json()
    with pytest.raises(ModelError, match="must come with our operators"):
        DecoderSpec(**{**facts, "operators": "stock"}, cache="int8")


@pytest.fixture(scope="module", params=["dense", "sparse"])
def bundle(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    compress(open_model(str(tiny_folder(folder / "source", layers=3))), load_recipe("int4"), folder / "small")
    for cache in ("float16", "int8"):
        export(
            open_checkpoint(folder / "small"),
            folder / cache,
            target=find_target(host_target()),
            context=1024,
            rope_scaling=("yarn", 8.0),
            sparse=SparseOptions(budget=48, recent=8, dense_below=64) if request.param == "sparse" else None,
            cache=cache,  # type: ignore[arg-type]
            accept_drift=True,
        )
    return folder


@needs_library
def test_a_bundle_drifts_as_the_rounding_of_its_cache_does(bundle: Path) -> None:
    """Codes flip where the two arithmetics differ in the last bits: a part of the rounding differs, too."""
    ids = np.random.default_rng(0).integers(3, 300, 60).tolist()  # as many tokens as have 15-bit activations
    checkpoint = open_checkpoint(bundle / "small")
    checkpoint = replace(checkpoint, config=stretched(checkpoint.config, "yarn", 8.0))
    exact = forward(checkpoint, [ids])[0]
    expected = forward(checkpoint, [ids], rounds=Rounds(16383, cache="int8"))[0]
    engine = Session.open(bundle / "int8", threads=1).engine
    for logits in (engine.forward(ids, keep=60).copy(), all_logits(engine, ids)):
        assert np.std(logits - expected) < 0.7 * np.std(logits - exact)
    spec = Bundle.open(bundle / "int8").spec
    assert spec.cache_type == np.int8
    assert spec.token_bytes < 0.6 * Bundle.open(bundle / "float16").spec.token_bytes


@needs_library
def test_kept_prefixes_hold_codes_and_scales(bundle: Path, tmp_path: Path) -> None:
    prefixes = Prefixes(tmp_path)
    first, second = (Session.open(bundle / "int8", threads=1) for _ in range(2))
    ids = first.encode("The quick brown fox jumps over the lazy dog. " * 14)
    assert (prefixes.read(first, ids), prefixes.read(second, ids)) == ("model", "disk")
    for token in ids[:20]:
        np.testing.assert_array_equal(first.engine.forward([token]), second.engine.forward([token]))


def test_a_cache_of_whole_numbers_needs_our_operators(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cache int8 needs our operators"):
        export(open_checkpoint(bundle / "small"), tmp_path / "out", target=find_target("portable"), cache="int8")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose heads have 32 channels, and its bundle with a cache in 4 bits."""
    folder = tmp_path_factory.mktemp("int4")
    source = tiny_folder(folder / "source", layers=3, hidden=128, heads=4, kv_heads=2)
    compress(open_model(str(source)), load_recipe("int4"), folder / "small")
    export(
        open_checkpoint(folder / "small"),
        folder / "int4",
        target=find_target(host_target()),
        cache="int4",
        accept_drift=True,
    )
    return folder


@needs_library
def test_a_bundle_in_4_bits_drifts_as_the_rounding_does(wide: Path, bundle: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 300, 60).tolist()
    checkpoint = open_checkpoint(wide / "small")
    exact = forward(checkpoint, [ids])[0]
    expected = forward(checkpoint, [ids], rounds=Rounds(16383, cache="int4"))[0]
    session = Session.open(wide / "int4", threads=1)
    for logits in (session.engine.forward(ids, keep=60).copy(), all_logits(session.engine, ids)):
        assert np.std(logits - expected) < 0.7 * np.std(logits - exact)
    spec = Bundle.open(wide / "int4").spec
    assert (spec.cache_type, spec.cache_name, spec.token_bytes) == (np.uint8, "int4", 3 * 2 * 2 * (16 + 2))
    assert Bundle.open(bundle / "float16").spec.cache_name == "float16"
    assert session.memory.cache_bytes == spec.cache_bytes(session.engine.context)


@needs_library
def test_what_a_cache_in_4_bits_cannot_do_is_refused(wide: Path, bundle: Path, tmp_path: Path) -> None:
    host = find_target(host_target())
    with pytest.raises(UserError, match="4 bits is for dense attention"):
        export(open_checkpoint(wide / "small"), tmp_path / "a", target=host, cache="int4", sparse=SparseOptions())
    with pytest.raises(UserError, match=r"multiple of 32 channels: the model's have 16; pass --cache int8"):
        export(open_checkpoint(bundle / "small"), tmp_path / "b", target=host, cache="int4")
    assert not list(tmp_path.iterdir())


@BITS
def test_what_the_cache_reads_back_is_what_was_kept(bits: Literal[8, 4]) -> None:
    case = attention_case(tokens=4, first=9, kv_heads=2, head_dim=32, bits=bits)
    _, *present = case.reference()
    before, after = (
        read_cache([case.inputs[f"past_{part}"] for part in ("key", "value", "scales")], 9),
        read_cache(present, 13),
    )
    for part, whole in zip(before, after, strict=True):
        assert np.array_equal(part, whole[:, :9])
