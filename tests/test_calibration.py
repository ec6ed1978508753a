"""Calibration text, and what the stream says that matrices read."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_folder

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import ModelError, UserError
from edgekit.model.reference import _Layer, rms_norm
from edgekit.model.sources import open_model
from edgekit.step import CalibrationOptions
from edgekit.weight import Dense, Floats

pytest.importorskip("torch", reason="torch is no part of the base install")
pytestmark = pytest.mark.slow  # importing torch takes seconds

TEXT = "The quick brown fox jumps over the lazy dog. A small model runs on the device in your hand.\n"
SAMPLES, LENGTH = 5, 16


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"{line}. {TEXT}" for line in range(200)))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_model(str(tiny_folder(tmp_path_factory.mktemp("model") / "m", architecture="Qwen2ForCausalLM")))


def windows_of(checkpoint: Checkpoint, text: Path, *, seed: int = 0, samples: int = SAMPLES) -> Any:
    from edgekit.model.windows import token_windows

    return token_windows(checkpoint, CalibrationOptions((str(text),), samples, LENGTH), seed=seed)


def stream_of(checkpoint: Checkpoint, text: Path, folder: Path, *, limit: int = 1 << 30) -> Any:
    from edgekit.model.calibration import Room, Stream

    stream = Stream(windows_of(checkpoint, text), checkpoint.decoder, Room(folder, limit))
    stream.begin(checkpoint.weight("model.embed_tokens"))
    return stream


# --- text -------------------------------------------------------------------------------------------------------------


def test_windows_are_the_seed_s_and_on_record(checkpoint: Checkpoint, text: Path) -> None:
    first, again, other = (windows_of(checkpoint, text, seed=seed) for seed in (0, 0, 1))
    assert first.ids.shape == (SAMPLES, LENGTH)
    np.testing.assert_array_equal(first.ids, again.ids)
    assert first.record == again.record
    assert first.record.files == ("book.txt",)
    assert (first.record.samples, first.record.length) == (SAMPLES, LENGTH)
    assert first.record.sha256 != other.record.sha256


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "jsonl", "jsonl.gz"])
def test_all_kinds_of_files_hold_documents(tmp_path: Path, suffix: str) -> None:
    from edgekit.model.windows import read_documents

    lines = [{"text": "one\ntwo"}, {"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "b"}]}]
    content = "\n".join(map(json.dumps, lines)) + "\n\n" if "jsonl" in suffix else "one\n" * 5000
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    found = read_documents(path)
    if "jsonl" in suffix:
        assert found == ["one\ntwo", "a\n\nb"]
    else:
        assert len(found) == 3
        assert "".join(found) == content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\xfa", "must be UTF-8"),
        ("a.txt.gz", b"no gzip", r"must be readable|must be whole"),
        ("a.txt.gz", gzip.compress(b"x" * 1000)[:20], "must be whole"),
        ("a.jsonl", b'{"text": 5}', r"line 1 does not"),
        ("a.jsonl", b'{"text": "x"}\n[1]', r"line 2 does not"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r"line 1 does not"),
        ("a.jsonl", b"{", r"line 1 does not"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    from edgekit.model.windows import read_documents

    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_documents(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    from edgekit.model.windows import read_documents

    with pytest.raises(UserError, match=r"nowhere\.txt \(No such file"):
        read_documents(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("content", ["", "   \n", "too short"])
def test_too_little_text_is_refused_with_the_numbers(checkpoint: Checkpoint, tmp_path: Path, content: str) -> None:
    (tmp_path / "short.txt").write_text(content)
    with pytest.raises(UserError, match=rf"must fill {SAMPLES} windows of {LENGTH} tokens \(\d+\): it has \d+; name"):
        windows_of(checkpoint, tmp_path / "short.txt")


def test_what_is_asked_for_must_be_possible(checkpoint: Checkpoint, text: Path) -> None:
    from edgekit.model.windows import token_windows

    with pytest.raises(UserError, match="name files with --calibration"):
        token_windows(checkpoint, CalibrationOptions(), seed=0)
    with pytest.raises(UserError, match="at least one window: got 0"):
        CalibrationOptions((str(text),), 0)
    with pytest.raises(UserError, match=r"from 2 to 256 tokens, .* got 257"):
        token_windows(checkpoint, CalibrationOptions((str(text),), 1, 257), seed=0)
    bare = dataclasses.replace(checkpoint, assets={})
    with pytest.raises(ModelError, match=r"needs the model's tokenizer\.json"):
        token_windows(bare, CalibrationOptions((str(text),), 1, 8), seed=0)


# --- statistics -------------------------------------------------------------------------------------------------------


def expected_reads(checkpoint: Checkpoint, x: Floats) -> dict[str, Floats]:
    """What each stage of layer 0 reads, by the NumPy decoder: (samples, length, width)."""
    layer = _Layer(checkpoint, 0)
    eps = checkpoint.decoder.norm_eps
    normed = rms_norm(x, layer.norm["input_layernorm"], eps)
    parts = []
    for window in normed:
        q, k, v = (layer.linear(f"self_attn.{name}_proj", window) for name in "qkv")
        parts.append(layer.attend(q, k, v))
    mixed = np.stack(parts)
    residual = x + layer.linear("self_attn.o_proj", mixed)
    before_mlp = rms_norm(residual, layer.norm["post_attention_layernorm"], eps)
    gate = layer.linear("mlp.gate_proj", before_mlp)
    gated = gate / (1 + np.exp(-gate)) * layer.linear("mlp.up_proj", before_mlp)
    return {
        "self_attn.v_proj": normed,
        "self_attn.o_proj": mixed,
        "mlp.up_proj": before_mlp,
        "mlp.down_proj": gated,
        "output": residual + layer.linear("mlp.down_proj", gated),
    }


def test_statistics_are_those_of_the_reference(checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    stream = stream_of(checkpoint, text, tmp_path)
    reads = expected_reads(checkpoint, np.array(stream.states))
    block = checkpoint.read_block("layers.0")
    inputs = stream.inputs()
    output = reads.pop("output")
    for leaf, values in reads.items():
        rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
        found = inputs.statistics(block, f"model.layers.0.{leaf}")
        np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-4, atol=1e-4 * np.abs(rows.T @ rows).max())
        np.testing.assert_allclose(found.mean_abs, np.abs(rows).mean(0), rtol=1e-4)
        np.testing.assert_allclose(found.max_abs, np.abs(rows).max(0), rtol=1e-4)
        assert found.tokens == SAMPLES * LENGTH
        assert found.gram.dtype == np.float64
        assert found.cross is None
    stream.advance(inputs, block)
    np.testing.assert_allclose(stream.states, output, atol=1e-4)


def changed(block: Block, leaf: str) -> Block:
    module = f"model.layers.0.{leaf}"
    return dataclasses.replace(
        block, matrices={**block.matrices, module: Dense(block.matrices[module].dense() * np.float32(1.5))}
    )


def test_a_stage_sees_the_matrices_before_it(checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    inputs = stream_of(checkpoint, text, tmp_path).inputs()
    block = checkpoint.read_block("layers.0")
    modules = [f"model.layers.0.{leaf}" for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]
    modules.append("model.layers.0.mlp.down_proj")
    before = [inputs.statistics(block, module).gram for module in modules]
    for leaf, unmoved in (("self_attn.v_proj", 1), ("self_attn.o_proj", 2), ("mlp.gate_proj", 3), ("mlp.down_proj", 4)):
        after = [inputs.statistics(changed(block, leaf), module).gram for module in modules]
        same = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [True] * unmoved + [False] * (4 - unmoved)
    assert inputs.statistics(block, modules[0]) is inputs.statistics(changed(block, "mlp.up_proj"), modules[0])


def test_spilled_states_are_the_same(checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    block = checkpoint.read_block("layers.0")
    found = []
    for limit in (1 << 30, 0):
        stream = stream_of(checkpoint, text, tmp_path, limit=limit)
        inputs = stream.inputs()
        gram = inputs.statistics(block, "model.layers.0.mlp.down_proj").gram
        stream.advance(inputs, block)
        assert isinstance(stream.states, np.memmap) == (limit == 0)
        found.append((gram, np.array(stream.states)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert list(tmp_path.iterdir()) == []  # spilled files have no name


def test_room_is_given_back(checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    stream = stream_of(checkpoint, text, tmp_path)
    left = stream.room.left
    for name in ("layers.0", "layers.1"):
        block = checkpoint.read_block(name)
        inputs = stream.inputs()
        inputs.statistics(block, f"model.{name}.mlp.down_proj")
        stream.advance(inputs, block)
        assert stream.room.left == left


def test_the_original_runs_beside(checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    block = checkpoint.read_block("layers.0")
    one, other = stream_of(checkpoint, text, tmp_path), stream_of(checkpoint, text, tmp_path)
    beside = other.inputs()
    inputs = one.inputs((beside, block))
    module = "model.layers.0.mlp.down_proj"
    same = inputs.statistics(block, module)
    assert same.cross is not None
    assert same.drift is not None
    lengths = np.sqrt(np.diag(same.gram))  # a float32 product is off by so much of them, also where it cancels
    np.testing.assert_allclose(
        same.cross / lengths / lengths[:, None], same.gram / lengths / lengths[:, None], atol=1e-6
    )
    assert (same.drift == 0).all()
    moved = changed(block, "self_attn.o_proj")
    found = inputs.statistics(moved, module)
    here = expected_reads(dataclasses.replace(checkpoint, tensors=_Changed(checkpoint, moved)), np.array(one.states))
    there = expected_reads(checkpoint, np.array(one.states))
    x, x_there = (part["mlp.down_proj"].reshape(SAMPLES * LENGTH, -1) for part in (here, there))
    np.testing.assert_allclose(found.cross, x_there.T @ x, rtol=1e-3, atol=1e-3 * np.abs(x_there.T @ x).max())
    assert found.drift is not None
    assert np.abs(found.drift).max() > 0


class _Changed:
    """The tensors of a checkpoint, with the matrices of one block in place of its own."""

    def __init__(self, checkpoint: Checkpoint, block: Block) -> None:
        self.tensors, self.block = checkpoint.tensors, block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensors, name)

    def read(self, name: str) -> Any:
        weight = self.block.matrices.get(name.removesuffix(".weight"))
        return self.tensors.read(name) if weight is None else weight.dense()


def test_states_that_are_not_finite_and_strangers_are_refused(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    inputs = stream_of(checkpoint, text, tmp_path).inputs()
    block = checkpoint.read_block("layers.0")
    with pytest.raises(ModelError, match=r"does not know model\.layers\.0\.mlp\.router"):
        inputs.statistics(block, "model.layers.0.mlp.router")
    block.matrices["model.layers.0.mlp.up_proj"].dense()[0, 0] = np.nan
    with pytest.raises(ModelError, match=r"what model\.layers\.0\.mlp\.down_proj reads must be finite"):
        inputs.statistics(block, "model.layers.0.mlp.down_proj")


def test_the_head_reads_the_normed_states(checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    stream = stream_of(checkpoint, text, tmp_path)
    rows = rms_norm(
        np.array(stream.states).reshape(-1, 64), checkpoint.vector("model.norm.weight"), checkpoint.decoder.norm_eps
    )
    found = stream.final().statistics(checkpoint.read_block("final"), "lm_head")
    np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-3, atol=1e-2)
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        stream.final().statistics(Block("final", {}), "lm_head")
