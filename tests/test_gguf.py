"""GGUF files: the same model as the transformers folder, exactly; and no file that hurts."""

from __future__ import annotations

import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, gguf_name, interleave, tiny_config, tiny_folder, tiny_gguf, tiny_tensors

from edgekit.errors import ModelError
from edgekit.model.gguf import TYPES, halves, open_gguf
from edgekit.model.gguf_file import read_gguf
from edgekit.model.sources import open_model

DEFAULTS: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": None,
    "mlp": 96,
    "vocabulary": 384,
    "tied": True,
    "dtype": "float32",
}


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_is_the_transformers_folder_of_the_same_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    ours = open_gguf(tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture, tied=tied, head_dim=32))
    folder = open_model(str(tiny_folder(tmp_path / "tiny", architecture=architecture, tied=tied, head_dim=32)))
    assert ours.tensors.names() == folder.tensors.names()
    for name in folder.tensors.names():
        assert ours.tensors.shape(name) == folder.tensors.shape(name)
        np.testing.assert_array_equal(ours.tensors.read(name), folder.tensors.read(name), err_msg=name)
        assert ours.tensors.read(name).dtype == np.float32
    if architecture != "MistralForCausalLM":  # which GGUF calls llama
        assert ours.decoder == folder.decoder
    assert (ours.config["intermediate_size"], ours.config["num_attention_heads"]) == (96, 4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_matrices_are_read_as_they_were_rounded(tmp_path: Path, kind: str) -> None:
    checkpoint = open_gguf(tiny_gguf(tmp_path / "tiny.gguf", quantization=kind))
    heads = {"q_proj": 4, "k_proj": 2}
    for name, values in tiny_tensors(tiny_config(**DEFAULTS)).items():
        if values.ndim == 2:
            head_count = next((heads[key] for key in heads if key in name), 0)
            stored = interleave(values, head_count) if head_count else values
            rounded = gguf.quants.dequantize(
                gguf.quants.quantize(stored, gguf.GGMLQuantizationType[kind]), gguf.GGMLQuantizationType[kind]
            )
            values = halves(rounded, head_count) if head_count else rounded
        np.testing.assert_array_equal(checkpoint.tensors.read(name), values, err_msg=name)


def test_q4_1_is_a_scale_and_a_minimum_for_32_values(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", quantization="Q4_1")
    stored = read_gguf(path).data("blk.0.ffn_up.weight")[0, :20].tobytes()
    scale, minimum = struct.unpack("<2e", stored[:4])
    codes = [byte & 15 for byte in stored[4:]] + [byte >> 4 for byte in stored[4:]]
    expected = np.array([np.float32(scale) * code + np.float32(minimum) for code in codes], np.float32)
    np.testing.assert_array_equal(open_gguf(path).weight("model.layers.0.mlp.up_proj").dense()[0, :32], expected)


@given(heads=st.integers(1, 5), pairs=st.integers(1, 6), columns=st.integers(1, 3), bias=st.booleans())
def test_halves_undoes_the_interleaving(heads: int, pairs: int, columns: int, bias: bool) -> None:
    shape = (heads * pairs * 2,) if bias else (heads * pairs * 2, columns)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(halves(interleave(values, heads), heads), values)
    read = halves(values, heads)
    for head in range(heads):
        for i in range(pairs):
            for j in range(2):
                row, stored = head * 2 * pairs + i + j * pairs, head * 2 * pairs + 2 * i + j
                np.testing.assert_array_equal(read[row], values[stored])


def test_what_is_read_may_be_written_to(tmp_path: Path) -> None:
    checkpoint = open_gguf(tiny_gguf(tmp_path / "tiny.gguf"))
    checkpoint.tensors.read("model.norm.weight")[:] = 0.0
    assert np.all(checkpoint.tensors.read("model.norm.weight") != 0.0)


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    path = tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("edgekit.model.gguf.dequantize", refuse)
    checkpoint = open_gguf(path)
    assert checkpoint.shape("model.layers.1.self_attn.k_proj") == (32, 64)
    with pytest.raises(AssertionError, match="was read"):
        checkpoint.tensors.read("model.norm.weight")


def test_source_names_the_file_but_not_where_it_lies(tmp_path: Path) -> None:
    source = open_gguf(tiny_gguf(tmp_path / "tiny.gguf")).source
    assert (source.name, source.kind, source.license, len(source.digest)) == ("tiny.gguf", "gguf", "apache-2.0", 64)


# --- the config -------------------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(head_dim: int, theta: float, factor: float, context: float = 8192.0) -> np.ndarray:
    """What llama.cpp's converter writes, frequency by frequency."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < context / 4.0:
            found.append(1.0)
        elif wavelength > context / 1.0:
            found.append(factor)
        else:
            smooth = (context / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("metadata", "tensors", "expected"),
    [
        ({}, {}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"llama.rope.freq_base": None}, {}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"llama.rope.scaling.type": "none"}, {}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {},
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 2.5}, {}, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}),
        ({"llama.rope.freq_base": 500000.0}, {"rope_freqs.weight": llama3_factors(16, 500000.0, 32.0)}, LLAMA3),
        ({}, {"rope_freqs.weight": np.ones(8, np.float32)}, {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_rope(tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], expected: dict[str, Any]) -> None:
    checkpoint = open_gguf(tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata, tensors=tensors))
    assert checkpoint.config["rope_parameters"] == expected
    assert checkpoint.decoder.rope.kind == expected["rope_type"]
    assert not checkpoint.has("rope_freqs")


def test_numbers_are_those_before_float32() -> None:
    from edgekit.model.gguf import _shortest

    assert _shortest(float(np.float32(1e-5))) == 1e-5
    assert _shortest(float(np.float32(1e6))) == 1e6


def test_sliding_window_makes_a_mistral(tmp_path: Path) -> None:
    checkpoint = open_gguf(tiny_gguf(tmp_path / "tiny.gguf", metadata={"llama.attention.sliding_window": 128}))
    assert checkpoint.decoder.architecture == "MistralForCausalLM"
    assert checkpoint.decoder.sliding_window == 128


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, 2),
        ({"tokenizer.ggml.eot_token_id": 2}, 2),
        ({"tokenizer.ggml.eot_token_id": 0}, [2, 0]),
        ({"tokenizer.ggml.eos_token_id": 0}, [0, 2]),  # the chat template has <|im_end|>
        ({"tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": None}, 0),
        ({"tokenizer.ggml.eos_token_id": None, "tokenizer.chat_template": None}, None),
    ],
)
def test_every_token_that_ends_a_turn_counts(tmp_path: Path, metadata: dict[str, Any], expected: object) -> None:
    checkpoint = open_gguf(tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata))
    assert checkpoint.config["eos_token_id"] == expected
    assert checkpoint.decoder.bos_id == 1


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma3"}, "must be one of llama, qwen2, qwen3: got 'gemma3'"),
        ({"general.architecture": "qwen2"}, "qwen2.embedding_length is missing"),
        ({"llama.embedding_length": 128}, r"token_embd.weight must have the shape \(384, 128\).*got \(384, 64\)"),
        ({"llama.feed_forward_length": 128}, r"ffn_gate.weight must have the shape \(128, 64\)"),
        ({"llama.attention.head_count_kv": 4}, r"attn_k.weight must have the shape \(64, 64\)"),
        ({"llama.attention.head_count_kv": 3}, "multiple of key heads.*4 and 3 heads"),
        ({"llama.attention.head_count": 0}, "attention.head_count must be positive: got 0"),
        ({"llama.attention.head_count": [4, 4]}, "attention.head_count must be an integer"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 2**32 - 1}, "blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 1}, "has no tensor 'blk.1"),
        ({"llama.block_count": "two"}, "block_count must be an integer: got 'two'"),
        ({"llama.block_count": True}, "block_count must be an integer: got True"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token must be true or false: got 1"),
        ({"general.license": 2.0}, "general.license must be a string: got 2.0"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.attention.value_length": 32}, "value_length must equal the head size 16: got 32"),
        ({"llama.rope.dimension_count": 8}, "dimension_count must equal the head size 16: got 8"),
        ({"llama.expert_count": 8}, "mixtures of experts are not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling must be none or linear: got 'yarn'"),
        ({"tokenizer.ggml.eos_token_id": 384}, "eos_token_id must be a token of the vocabulary of 384: got 384"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"general.alignment": 24}, "general.alignment must be a power of two"),
        ({"split.count": 3}, "one of 3 parts; join them"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=message) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.ffn_gate_inp.weight": np.ones((8, 64), np.float32)}, "llama model has no tensor 'blk.0.ffn_gate_inp"),
        ({"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}, "llama model has no tensor 'blk.0.attn_q_norm"),
        ({"rope_freqs.weight": np.full(8, 3.0, np.float32)}, "must be the rope scaling of Llama 3"),
        ({"rope_freqs.weight": llama3_factors(16, 10000.0, 8.0, 4096.0)}, "must be the rope scaling of Llama 3"),
        ({"rope_freqs.weight": np.full(5, 2.0, np.float32)}, "must be the rope scaling of Llama 3"),
        ({"rope_freqs.weight": np.full(8, np.nan, np.float32)}, "must be the rope scaling of Llama 3"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors)
    with pytest.raises(ModelError, match=message):
        open_gguf(path)


def test_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", hidden=256, mlp=256, quantization="TQ2_0")
    with pytest.raises(ModelError, match=r"token_embd.weight has the type TQ2_0, readable are F32, F16, BF16, Q8_0"):
        open_gguf(path)


def test_qwen2_needs_its_biases(tmp_path: Path) -> None:
    metadata = {f"qwen2.{key}": value for key, value in QWEN2_SIZES.items()}
    path = tiny_gguf(tmp_path / "tiny.gguf", metadata={"general.architecture": "qwen2", **metadata})
    with pytest.raises(ModelError, match=r"blk.0.attn_q.bias is missing"):
        open_gguf(path)


QWEN2_SIZES = {
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "context_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


# --- files that lie ---------------------------------------------------------------------------------------------------

HUGE = 2**62


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def key(name: bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(*keys: bytes, tensors: tuple[bytes, ...] = (), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join([*keys, *tensors])


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "must be a readable GGUF file"),
    "three bytes": (b"GGU", "it begins with b'GGU'"),
    "wrong magic": (b"GGML" + bytes(64), "it begins with b'GGML'"),
    "version 1": (file(version=1), "it says 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it says 50331648"),
    "no counts": (b"GGUF\x03\0\0\0", "is cut short or damaged"),
    "huge key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "is cut short or damaged"),
    "huge tensor count": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "is cut short or damaged"),
    "huge key length": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"a", HUGE) + bytes(64),
        "is cut short or damaged",
    ),
    "huge string": (file(key(b"a", 8, text(b"b", 2**64 - 1))), "is cut short or damaged"),
    "huge array of bytes": (file(key(b"a", 9, array(0, HUGE))), "is cut short or damaged"),
    "huge array of doubles": (file(key(b"a", 9, array(12, 2**64 - 1, bytes(64)))), "is cut short or damaged"),
    "huge array of strings": (file(key(b"a", 9, array(8, HUGE, bytes(64)))), "is cut short or damaged"),
    "nested arrays": (file(key(b"a", 9, array(9, 1, array(9, 1, array(9, 1))))), "has type 9, which is not supported"),
    "unknown value type": (file(key(b"a", 13, bytes(8))), "has type 13, which is not supported"),
    "key is not text": (file(key(b"\xff\xfe", 0, b"\0")), "is not UTF-8"),
    "value is not text": (file(key(b"a", 8, text(b"\xc3"))), "is not UTF-8"),
    "a key twice": (file(key(b"a", 0, b"\0"), key(b"a", 0, b"\0")), "the name 'a' occurs twice"),
    "alignment zero": (file(key(b"general.alignment", 4, bytes(4))), "must be a power of two: got 0"),
    "alignment is text": (file(key(b"general.alignment", 8, text(b"32"))), "must be a power of two: got '32'"),
    "no dimensions": (file(tensors=(tensor(b"a", (), 0, 0),)), "has 0 dimensions"),
    "five dimensions": (file(tensors=(tensor(b"a", (1,) * 5, 0, 0),)), "has 5 dimensions"),
    "huge dimension count": (
        file(tensors=(text(b"a") + struct.pack("<I", 2**32 - 1) + bytes(64),)),
        "has 4294967295 dimensions",
    ),
    "huge shape": (file(tensors=(tensor(b"a", (HUGE, HUGE, HUGE, HUGE), 0, 0),)), "is cut short or damaged"),
    "shape that wraps around": (file(tensors=(tensor(b"a", (2**32, 2**32), 0, 0),)), "is cut short or damaged"),
    "empty shape": (file(tensors=(tensor(b"a", (32, 0), 0, 0),)), "cannot have the shape"),
    "half a block": (file(tensors=(tensor(b"a", (48,), 8, 0),)) + bytes(256), "cannot have the shape"),
    "unknown tensor type": (file(tensors=(tensor(b"a", (32,), 99, 0),)) + bytes(256), "unknown type 99"),
    "huge offset": (file(tensors=(tensor(b"a", (32,), 0, 2**64 - 32),)) + bytes(256), "is cut short or damaged"),
    "data past the end": (file(tensors=(tensor(b"a", (64,), 0, 0),)) + bytes(128), "is cut short or damaged"),
    "a tensor twice": (
        file(tensors=(tensor(b"a", (1,), 0, 0), tensor(b"a", (1,), 0, 0))) + bytes(64),
        "the name 'a' occurs twice",
    ),
    "no metadata": (file(), "general.architecture is missing"),
    "architecture is a number": (
        file(key(b"general.architecture", 4, bytes(4))),
        "general.architecture must be a string: got 0",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_gives_one_line_and_costs_nothing(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=re.escape(message)) as caught:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must be a readable GGUF file"):
        open_gguf(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int, int]:
    """A file, where its data begin, and where its last tensor ends."""
    path = tiny_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", layers=1, quantization="Q4_0")
    tensors = read_gguf(path).tensors.values()
    ends = max(tensor.offset + tensor.size_bytes for tensor in tensors)
    return path.read_bytes(), min(tensor.offset for tensor in tensors), ends


@given(where=st.floats(0, 1, exclude_max=True), in_header=st.booleans())
@settings(max_examples=60, deadline=None)
def test_cut_anywhere(whole: tuple[bytes, int, int], tmp_path_factory: Any, where: float, in_header: bool) -> None:
    content, begin, end = whole
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(content[: int(where * (begin if in_header else end))])
    with pytest.raises(ModelError):
        open_gguf(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_changed_anywhere_in_the_header(whole: tuple[bytes, int, int], tmp_path_factory: Any, data: Any) -> None:
    """A changed file opens, or gives our error: nothing else comes through."""
    content, begin, _ = whole
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, begin - 1) | st.integers(0, 1500))
        changed[at] = data.draw(st.sampled_from([0, 1, 0x20, 0x7F, 0x80, 0xFF]))
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(changed)
    try:
        checkpoint = open_gguf(path)
    except ModelError:
        return
    for name in checkpoint.tensors.names():
        assert checkpoint.tensors.read(name).shape == checkpoint.tensors.shape(name)


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_tensor_of_smollm2_is_what_transformers_reads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ours = open_model("smollm2-135m")
    assert set(ours.assets) >= {"tokenizer.json", "chat_template.jinja"}
    path = Path(ours.tensors.file.path)  # type: ignore[attr-defined]
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert set(ours.tensors.names()) == set(state) - {"lm_head.weight"}
    for name in ours.tensors.names():
        np.testing.assert_array_equal(ours.tensors.read(name), state[name].numpy(), err_msg=name)
    config = theirs.config
    assert ours.decoder.rope.theta == config.rope_parameters["rope_theta"]
    assert ours.decoder.norm_eps == pytest.approx(config.rms_norm_eps, rel=1e-7)
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    ):
        assert ours.config[key] == getattr(config, key), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"])
def test_types_are_what_transformers_reads_from_any_bytes(kind: str) -> None:
    """Against the other implementation in Python, written in torch, on random blocks with finite scales."""
    import torch
    from transformers.integrations.gguf.dequant import dequantize

    assert kind in TYPES
    number = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[number]
    blocks = np.random.default_rng(0).integers(0, 256, (64, size), np.uint8)
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2)}.get(kind, (0,))
    for offset in scales:
        blocks[:, offset : offset + 2] = np.linspace(-2, 2, 64, dtype=np.float16)[:, None].view(np.uint8)
    expected = dequantize(torch.from_numpy(blocks.copy()).reshape(-1), int(number)).numpy()
    np.testing.assert_allclose(gguf.quants.dequantize(blocks, number).reshape(-1), expected, rtol=1e-6, atol=1e-6)


def test_names_are_those_of_the_converter() -> None:
    assert gguf_name("model.layers.7.self_attn.q_proj.bias") == "blk.7.attn_q.bias"
