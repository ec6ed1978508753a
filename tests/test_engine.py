"""The engine: the cache in place, chunks, what is kept, rewinding, overflow, and what onnxruntime refuses."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import LONG, engine_of
from test_reference import IDS, tiny_checkpoint

from edgekit.bundle import DecoderSpec, LayerCache
from edgekit.errors import ContextOverflow, DeviceError, UserError
from edgekit.model.reference import forward
from edgekit.runtime import engine as module
from edgekit.runtime.engine import Engine
from edgekit.runtime.pages import LazyPages
from edgekit.weight import Floats

CONTEXT = 64
SOME = LONG[:40]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_of(tiny_checkpoint(), tmp_path_factory.mktemp("engine"), context=CONTEXT)


@pytest.fixture(scope="module")
def expected() -> Floats:
    """The reference's logits of the first CONTEXT tokens of LONG."""
    return forward(tiny_checkpoint(), [LONG[:CONTEXT]])[0]


def test_the_cache_is_written_in_place(engine: Engine) -> None:
    """onnxruntime's outputs are our buffers: a token writes its own row of each and touches nothing else."""
    engine.rewind(0)
    for buffer, _ in engine._cache.values():
        buffer[:] = -7.0
    engine.forward(IDS)
    before = [buffer.copy() for buffer, _ in engine._cache.values()]
    engine.forward([9])
    outputs = engine._binding.get_outputs()
    assert [output.data_ptr() for output in outputs if output.data_ptr() != engine._logits.ctypes.data] == [
        buffer.ctypes.data for buffer, _ in engine._cache.values()
    ]
    for (buffer, _), old in zip(engine._cache.values(), before, strict=True):
        row = len(IDS)
        assert np.array_equal(buffer[:, :, :row], old[:, :, :row])
        assert (buffer[:, :, row] != -7.0).all()
        assert (buffer[:, :, row + 1 :] == -7.0).all()


def test_what_lies_behind_the_sequence_has_no_effect(engine: Engine, expected: Floats) -> None:
    engine.rewind(0)
    for buffer, _ in engine._cache.values():
        buffer[:] = np.nan
    for size in (10, 1, 5):
        start = len(engine.tokens)
        logits = engine.forward(LONG[start : start + size], keep=size)
        np.testing.assert_allclose(logits, expected[start : start + size], atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, CONTEXT), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8))
def test_any_walk_of_rewinds_and_parts_gives_the_same_logits(
    engine: Engine, expected: Floats, walk: list[tuple[int, int, int]]
) -> None:
    engine.rewind(0)
    for back_to, size, keep in walk:
        engine.rewind(back_to)
        start = len(engine.tokens)
        part = LONG[start : min(start + size, CONTEXT)]
        if part:
            kept = min(keep, len(part))
            end = start + len(part)
            np.testing.assert_allclose(engine.forward(part, keep=kept), expected[end - kept : end], atol=2e-5)
        assert engine.tokens == LONG[: start + len(part)]


@pytest.mark.parametrize("chunk", [1, 3, 7, 24, 25])
@pytest.mark.parametrize("keep", [1, 2, 3, 4, 24, 25])
def test_kept_logits_across_chunks(
    engine: Engine, expected: Floats, monkeypatch: pytest.MonkeyPatch, chunk: int, keep: int
) -> None:
    monkeypatch.setattr("edgekit.runtime.engine.PREFILL_CHUNK", chunk)
    engine.rewind(0)
    logits = engine.forward(LONG[:25], keep=keep)
    assert logits.shape == (keep, 384)
    np.testing.assert_allclose(logits, expected[25 - keep : 25], atol=2e-5)


def test_the_context_can_be_filled_to_its_end(engine: Engine, expected: Floats) -> None:
    engine.rewind(0)
    engine.forward(LONG[: CONTEXT - 1])
    np.testing.assert_allclose(engine.forward([LONG[CONTEXT - 1]])[0], expected[-1], atol=2e-5)


def test_overflow_says_both_numbers_and_changes_nothing(engine: Engine) -> None:
    engine.rewind(0)
    engine.forward(LONG[:60])
    before = [buffer.copy() for buffer, _ in engine._cache.values()]
    with pytest.raises(ContextOverflow, match="65 tokens, limit 64") as caught:
        engine.forward(LONG[60:65])
    assert (caught.value.prompt_tokens, caught.value.limit) == (65, CONTEXT)
    assert caught.value.would_need_bytes == 65 * 2 * 2 * 4 * 2 * 16  # layers, key and value, float32, heads, channels
    assert engine.tokens == LONG[:60]
    for (buffer, _), old in zip(engine._cache.values(), before, strict=True):
        assert np.array_equal(buffer[:, :, :60], old[:, :, :60])
    assert engine.forward(LONG[60:64], keep=4).shape == (4, 384)


@pytest.mark.parametrize("ids", [[1, 2, 384], [-1]])
def test_ids_outside_the_vocabulary_are_refused(engine: Engine, ids: list[int]) -> None:
    engine.rewind(0)
    with pytest.raises(UserError, match="token ids must be from 0 to 383"):
        engine.forward(ids)
    assert engine.tokens == []


def test_a_failed_run_leaves_the_tokens_as_they_were(
    engine: Engine, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run is right again, and only the error speaks of it."""
    engine.rewind(0)
    monkeypatch.setattr(engine, "spec", replace(engine.spec, vocabulary=385))  # the graph's table has 384 rows
    with pytest.raises(DeviceError, match=r"onnxruntime stopped at token 3: .*(indices|index)"):
        engine.forward([1, 2, 384])
    monkeypatch.undo()
    engine._bound = (0, 0)
    assert engine.tokens == []
    assert capfd.readouterr().err == ""
    np.testing.assert_allclose(engine.forward(IDS)[0], forward(tiny_checkpoint(), [IDS])[0][-1], atol=2e-5)


def test_an_interrupt_while_binding_is_not_remembered_as_bound(
    engine: Engine, expected: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.rewind(0)
    engine.forward(LONG[:9])
    engine.forward(LONG[9:10])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgekit.runtime.engine.np.empty", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.forward(LONG[10:15])  # input_ids are bound for five tokens, the logits still for one
    np.testing.assert_allclose(engine.forward(LONG[10:11])[0], expected[10], atol=2e-5)


SPEC = DecoderSpec("x", "portable", 384, 64, (LayerCache(2, 16), LayerCache(2, 16)), (2,), 0, 0)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "exist"), (b"", "onnxruntime"), (b"not a model", "onnxruntime")]
)
def test_what_is_no_model(
    tmp_path: Path, content: bytes | None, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DeviceError, match=f"cannot run.*{reason}|{reason}.*cannot run") as caught:
        Engine(path, SPEC, context=64, threads=1)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # onnxruntime's own log would show the same again


def test_a_spec_that_is_not_the_graphs(tmp_path: Path) -> None:
    engine_of(tiny_checkpoint(), tmp_path)
    more = replace(SPEC, layers=(LayerCache(2, 16),) * 3)
    with pytest.raises(DeviceError, match=r"past_key_values\.2\.key"):
        Engine(tmp_path / "model.onnx", more, context=64, threads=1)
    wider = Engine(tmp_path / "model.onnx", replace(SPEC, layers=(LayerCache(2, 32),) * 2), context=64, threads=1)
    with pytest.raises(DeviceError, match="onnxruntime stopped at token 1"):
        wider.forward([1])


def test_a_cache_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_of(tiny_checkpoint(), tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(DeviceError, match="cache of 64 tokens could not be had; use a smaller --context"):
        Engine(tmp_path / "model.onnx", SPEC, context=64, threads=1)


def small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose cache has room for four tokens and grows as far as it must."""
    monkeypatch.setattr(module, "FIRST_CAPACITY", 4)
    monkeypatch.setattr(module, "BLOCK", 1)
    engine_of(tiny_checkpoint(), tmp_path)
    return Engine(tmp_path / "model.onnx", SPEC, context=64, threads=1)


def test_a_cache_that_grows_holds_what_it_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine, expected: Floats
) -> None:
    small = small_steps(tmp_path, monkeypatch)
    assert small.capacity == 4
    engine.rewind(0)
    for at, token in enumerate(SOME):
        whole, grown = engine.forward([token])[-1], small.forward([token])[-1]
        assert np.array_equal(whole, grown)
        assert at < small.capacity <= 64
    assert len(SOME) <= small.capacity < 2 * len(SOME)
    for name, part in engine.kept(len(SOME)).items():
        assert np.array_equal(part, small.kept(len(SOME))[name])
    small.rewind(0)
    assert np.allclose(small.forward(SOME, keep=len(SOME)), expected[: len(SOME)], atol=1e-4)


def test_a_kept_cache_makes_room_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    small = small_steps(tmp_path, monkeypatch)
    engine.rewind(0)
    engine.forward(SOME[:-1])
    small.restore(engine.tokens, engine.kept(len(engine.tokens)))
    assert np.array_equal(engine.forward(SOME[-1:]), small.forward(SOME[-1:]))


def test_an_interrupt_while_the_cache_grows_forgets_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Floats
) -> None:
    small = small_steps(tmp_path, monkeypatch)
    small.forward(SOME[:4])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LazyPages, "release", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small.forward(SOME[4:])
    assert small.tokens == []
    assert np.allclose(small.forward(SOME, keep=len(SOME)), expected[: len(SOME)], atol=1e-4)


def test_a_cache_that_cannot_grow_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_steps(tmp_path, monkeypatch)
    small.forward(SOME[:4])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        with pytest.raises(DeviceError, match="cache of 6 tokens could not be had; use a smaller --context"):
            small.forward(SOME[4:5])
    assert small.tokens == SOME[:4]
    small.forward(SOME[4:])


def test_a_long_context_takes_no_memory_before_it_is_used(tmp_path: Path) -> None:
    """Half a gigabyte of cache, of which a few tokens commit a few pages for each head."""
    engine_of(tiny_checkpoint(), tmp_path)
    before = resident_bytes()
    engine = Engine(tmp_path / "model.onnx", SPEC, context=1 << 20, threads=1)
    engine.forward(IDS)
    assert SPEC.cache_bytes(engine.context) == 1 << 29
    assert resident_bytes() - before < 1 << 26


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
