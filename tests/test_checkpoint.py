"""Checkpoints: what is written is what is read, bit for bit, and a broken folder is named instead of half used."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny import tiny_folder

from edgekit.checkpoint import (
    INDEX,
    STRUCTURE,
    Block,
    Checkpoint,
    Entry,
    SafetensorsReader,
    block_of,
    open_checkpoint,
    read_assets,
    write_block,
    write_frame,
)
from edgekit.errors import ModelError
from edgekit.manifest import Manifest, record_files
from edgekit.model.sources import open_model
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.weight import Dense, Quantized, pack, unpack

# --- packed codes -----------------------------------------------------------------------------------------------------


@given(
    codes=arrays.arrays(np.uint8, arrays.array_shapes(max_dims=3, max_side=9), elements=st.integers(0, 15)),
    bits=st.sampled_from([4, 8]),
)
def test_unpack_undoes_pack(codes: np.ndarray, bits: int) -> None:
    packed = pack(codes, bits)
    assert packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits)[..., : codes.shape[-1]], codes)
    assert not unpack(packed, bits)[..., codes.shape[-1] :].any()


def test_packing_puts_the_low_bits_first() -> None:
    np.testing.assert_array_equal(pack(np.array([[1, 2, 15]], np.uint8), 4), [[0x21, 0x0F]])
    np.testing.assert_array_equal(pack(np.array([[1, 200]], np.uint8), 8), [[1, 200]])


def quantized(*, rows: int, columns: int, block: int, bits: int, symmetric: bool, seed: int = 0) -> Quantized:
    """A random quantised matrix."""
    rng = np.random.default_rng(seed)
    blocks = -(-columns // block)
    return Quantized(
        codes=pack(rng.integers(0, 1 << bits, (rows, blocks, block), np.uint8), bits),
        scales=rng.standard_normal((rows, blocks)).astype(np.float16),
        zeros=None if symmetric else pack(rng.integers(0, 1 << bits, (rows, blocks), np.uint8), bits),
        bits=bits,
        block=block,
        columns=columns,
    )


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 70),
    block=st.sampled_from([2, 16, 32]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
)
def test_dense_is_scale_times_code_minus_zero(rows: int, columns: int, block: int, bits: int, symmetric: bool) -> None:
    weight = quantized(rows=rows, columns=columns, block=block, bits=bits, symmetric=symmetric)
    values = weight.dense()
    assert values.shape == weight.shape == (rows, columns)
    for row in range(rows):
        for column in range(columns):
            b, i = divmod(column, block)
            byte = int(weight.codes[row, b, i * bits // 8])
            code = byte if bits == 8 else byte >> 4 * (i % 2) & 15
            zero = 1 << (bits - 1)
            if weight.zeros is not None:
                packed = int(weight.zeros[row, b * bits // 8])
                zero = packed if bits == 8 else packed >> 4 * (b % 2) & 15
            assert values[row, column] == np.float32(weight.scales[row, b]) * np.float32(code - zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_a_stream_of_bits_the_low_ones_first(bits: int) -> None:
    codes = np.array([0, 1, 2, 3, 4, 5, 6, 7, 9], np.uint8) & np.uint8((1 << bits) - 1)
    stream = sum(int(code) << (bits * index) for index, code in enumerate(codes))
    assert pack(codes, bits).tobytes() == stream.to_bytes(-(-9 * bits // 8), "little")
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits)[:9], codes)


def test_three_bits_to_the_byte() -> None:
    """Codes 0, 1 ... 7 are 000 100 010 110 ... when the low bits are written first."""
    assert pack(np.arange(8, dtype=np.uint8), 3).tolist() == [0b10001000, 0b11000110, 0b11111010]


@pytest.mark.parametrize("scales", ["float16", "int8"])
@pytest.mark.parametrize("offset", ["symmetric", "zero", "minimum"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_storage_is_read_as_it_was_written(tmp_path: Path, bits: Any, offset: Any, scales: Any) -> None:
    plain = open_model(str(tiny_folder(tmp_path / "tiny", tied=False)))
    path = "model.layers.0.mlp.up_proj"
    weight = round_to_grid(plain.weight(path).dense(), Grid(bits, 64, offset, scales), where=path)
    entries = write_block(tmp_path / "model.safetensors", Block("layers.0", {path: weight}))
    ours = dataclasses.replace(plain, tensors=SafetensorsReader(tmp_path), structure=entries)
    read = ours.weight(path)
    assert isinstance(read, Quantized)
    assert ours.blocks == {"layers.0": ((path,), ())}
    for name, value in vars(weight).items():
        np.testing.assert_array_equal(getattr(read, name), value)


CODES, SCALES = np.zeros((2, 3, 16), np.uint8), np.ones((2, 3), np.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "2, 3, 4, 5, 6 or 8 bits in whole bytes: got 7 bits"),
        ({"bits": 3, "block": 33}, "got 3 bits, block 33"),
        ({"bits": 3}, "must have shape"),
        ({"block": 0}, "got 4 bits, block 0"),
        ({"bits": 8}, "must have shape"),
        ({"columns": 97}, "with 4 blocks"),
        ({"scales": np.ones((2, 4), np.float16)}, "must have shape"),
        ({"scales": np.ones(2, np.float16)}, "scales .out, blocks."),
        ({"codes": CODES.astype(np.float32)}, "must be uint8"),
        ({"codes": CODES[0]}, "must be uint8"),
        ({"zeros": np.zeros((2, 3), np.uint8)}, "packed by row"),
        ({"zeros": np.zeros((2, 2), np.int8)}, "packed by row: got int8"),
        ({"scales": SCALES.astype(np.float32)}, "got float32 without steps"),
        ({"scales": SCALES.astype(np.uint8)}, "got uint8 without steps"),
        ({"steps": SCALES[:, :1]}, "got float16 with steps"),
        ({"minima": SCALES.astype(np.int8)}, "got float16 and int8 without steps"),
        ({"scales": SCALES.astype(np.uint8), "steps": SCALES[:, :2]}, r"must be float16 .2, 1.: got float16 .2, 2."),
        ({"scales": SCALES.astype(np.uint8), "steps": np.ones((2, 1), np.float32)}, "got float32 .2, 1."),
        ({"minima": SCALES[:1]}, "minima must stand alone, one a scale"),
    ],
)
def test_a_quantised_matrix_that_contradicts_itself(changes: dict[str, Any], message: str) -> None:
    good = Quantized(CODES, SCALES, None, 4, 32, 96)
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(good, **changes)


# --- round trips ------------------------------------------------------------------------------------------------------


def compress(source: Checkpoint, folder: Path) -> Path:
    """Write `source` as a checkpoint: a block a shard, the MLPs of the last layer quantised."""
    folder.mkdir()
    shards, structure = {}, {}
    for number, name in enumerate(source.blocks):
        block = source.read_block(name)
        if name == "layers.1":
            replaced = {
                path: quantized(rows=w.shape[0], columns=w.shape[1], block=32, bits=4, symmetric="up" in path)
                for path, w in block.matrices.items()
                if ".mlp." in path
            }
            block = Block(name, {**block.matrices, **replaced}, block.vectors)
        shard = f"model-{number + 1:05d}-of-{len(source.blocks):05d}.safetensors"
        structure.update(write_block(folder / shard, block))
        shards[shard] = sorted(safetensors.numpy.load_file(folder / shard))
    files = write_frame(folder, source, shards=shards, structure=structure)
    Manifest(kind="checkpoint", source=source.source, files=record_files(folder, files)).save(folder)
    return folder


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return compress(open_model(str(tiny_folder(tmp_path / "tiny", tied=False))), tmp_path / "small")


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, written: Path) -> None:
    source, ours = open_model(str(tmp_path / "tiny")), open_checkpoint(written)
    assert ours.config == source.config
    assert ours.decoder == source.decoder
    assert dict(ours.assets) == dict(source.assets)
    assert ours.source == source.source
    assert ours.blocks == source.blocks
    for name in source.blocks:
        before, after = source.read_block(name), ours.read_block(name)
        for path, weight in before.matrices.items():
            assert ours.shape(path) == weight.shape
            if name == "layers.1" and ".mlp." in path:
                again = quantized(
                    rows=weight.shape[0], columns=weight.shape[1], block=32, bits=4, symmetric="up" in path
                )
                read = after.matrices[path]
                assert isinstance(read, Quantized)
                assert read.size_bytes < weight.size_bytes / 4
                np.testing.assert_array_equal(read.dense(), again.dense())
            else:
                np.testing.assert_array_equal(after.matrices[path].dense(), weight.dense())
        for path, values in before.vectors.items():
            np.testing.assert_array_equal(after.vectors[path], values)


def test_the_same_block_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "tiny")))
    block = checkpoint.read_block("layers.0")
    backwards = Block(block.name, dict(reversed(block.matrices.items())), dict(reversed(block.vectors.items())))
    write_block(tmp_path / "a", block)
    write_block(tmp_path / "b", backwards)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_blocks_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "tiny", layers=12, tied=False)))
    assert list(checkpoint.blocks) == ["embedding", *(f"layers.{i}" for i in range(12)), "final"]
    assert checkpoint.blocks["final"] == (("lm_head",), ("model.norm.weight",))
    assert checkpoint.blocks["layers.3"][1] == (
        "model.layers.3.input_layernorm.weight",
        "model.layers.3.post_attention_layernorm.weight",
    )


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.10.mlp.up_proj.weight", "layers.10"),
        ("model.layers.0.mlp.up_proj", "layers.0"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.norm.weight", "final"),
        ("lm_head", "final"),
    ],
)
def test_block_of(name: str, block: str) -> None:
    assert block_of(name) == block


def test_what_is_there_and_what_is_not(tmp_path: Path, written: Path) -> None:
    checkpoint = open_checkpoint(written)
    for name in ("model.norm.weight", "model.norm", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        assert checkpoint.has(name)
    assert not checkpoint.has("model.layers.0.mlp.up_proj.bias")
    for read in (checkpoint.weight, checkpoint.shape, checkpoint.vector):
        with pytest.raises(ModelError, match=r"must have model.layers.9.mlp.up_proj"):
            read("model.layers.9.mlp.up_proj")
    for read in (checkpoint.weight, checkpoint.shape):
        with pytest.raises(ModelError, match=r"two dimensions: model.norm.weight has shape \(64,\)"):
            read("model.norm")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_floats_become_float32(tmp_path: Path, dtype: str) -> None:
    exact = open_model(str(tiny_folder(tmp_path / "exact")))
    rounded = open_model(str(tiny_folder(tmp_path / "rounded", dtype=dtype)))
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for name in exact.tensors.names():
        expected = exact.vector(name).astype(kind).astype(np.float32)
        np.testing.assert_array_equal(rounded.vector(name), expected)
        assert rounded.vector(name).dtype == np.float32
    stored = rounded.tensors.read("model.norm.weight").dtype
    assert stored == (np.float16 if dtype == "float16" else np.float32)  # scales are float16 and stay so


# --- folders that are not whole ---------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def sign(folder: Path) -> None:
    """Write a manifest that agrees with the folder as it is, so that what is behind the digests gets tested."""
    manifest = Manifest.load(folder, verify=False)
    names = [name for name in manifest.files if (folder / name).exists()]
    dataclasses.replace(manifest, files=record_files(folder, names)).save(folder)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lowrank"}, "kind must be one of quantized, factored: got 'lowrank'"),
        ({"bits": 3}, "must have shape"),
        ({"bits": "4"}, "bits must be an integer"),
        ({"block": 64}, "must have shape"),
        ({"block": 0}, "all positive"),
        ({"block": -32}, "all positive"),
        ({"shape": [96]}, r"must have \(out, in\)"),
        ({"shape": [96, 64, 1]}, r"must have \(out, in\)"),
        ({"shape": [96, -64]}, "all positive"),
        ({"shape": [48, 64]}, r"must agree with the weights: model.layers.1.mlp.up_proj is \(96, 64\), not \(48, 64\)"),
        ({"shape": [96, 2**62]}, "blocks"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_a_structure_that_lies(written: Path, change: dict[str, Any], message: str) -> None:
    rewrite(written / STRUCTURE, lambda data: {**data, UP: {**data[UP], **change}})
    sign(written)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(written).weight(UP)


def test_a_structure_of_what_is_not_there(written: Path) -> None:
    rewrite(written / STRUCTURE, lambda data: {**data, "model.layers.9.mlp.up_proj": data[UP]})
    sign(written)
    with pytest.raises(ModelError, match=r"must have model.layers.9.mlp.up_proj.codes: its weights lack it"):
        open_checkpoint(written).weight("model.layers.9.mlp.up_proj")


@pytest.mark.parametrize(
    "name", ["config.json", STRUCTURE, INDEX, "tokenizer.json", "model-00001-of-00004.safetensors"]
)
def test_every_file_is_checked(written: Path, name: str) -> None:
    content = bytearray((written / name).read_bytes())
    content[len(content) // 2] ^= 1
    (written / name).write_bytes(content)
    with pytest.raises(ModelError, match="differs from its digest"):
        open_checkpoint(written)
    (written / name).unlink()
    with pytest.raises(ModelError, match=f"lacks {name}"):
        open_checkpoint(written)


def test_a_bundle_is_no_checkpoint(written: Path) -> None:
    dataclasses.replace(Manifest.load(written), kind="bundle").save(written)
    with pytest.raises(ModelError, match="is a bundle, not a checkpoint"):
        open_checkpoint(written)


@pytest.mark.parametrize("name", ["config.json", STRUCTURE])
@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "[" * 100_000, "\0"])
def test_json_that_is_none(written: Path, name: str, content: str) -> None:
    (written / name).write_text(content)
    sign(written)
    with pytest.raises(ModelError, match=rf"{name} must (be readable JSON|hold a JSON object)"):
        open_checkpoint(written)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A transformers folder in two shards."""
    folder = tiny_folder(tmp_path / "sharded")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in halves.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / shard)
    index = {"weight_map": {name: shard for shard, part in halves.items() for name in part}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_shards_are_one_model(tmp_path: Path, sharded: Path) -> None:
    whole = open_model(str(tiny_folder(tmp_path / "whole")))
    checkpoint = open_model(str(sharded))
    assert checkpoint.tensors.names() == whole.tensors.names()
    for name in whole.tensors.names():
        np.testing.assert_array_equal(checkpoint.vector(name), whole.vector(name))


def test_a_shard_may_be_a_link_as_in_the_hubs_cache(tmp_path: Path, sharded: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    (tmp_path / "blobs").mkdir()
    shard.rename(tmp_path / "blobs" / "abc")
    shard.symlink_to(tmp_path / "blobs" / "abc")
    assert open_model(str(sharded)).shape("model.embed_tokens") == (384, 64)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b", "", ".", "..", "a\0b", 7, None, ["x"]])
def test_a_shard_outside_the_folder(sharded: Path, shard: object) -> None:
    rewrite(sharded / INDEX, lambda data: {"weight_map": {**data["weight_map"], "model.norm.weight": shard}})
    with pytest.raises(ModelError, match="must name files of its own folder"):
        SafetensorsReader(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "model-00001-of-00002.safetensors"}}, "must hold the tensor x"),
        ({"weight_map": {"x": "absent.safetensors"}}, "must be a whole safetensors file"),
        ({"weight_map": []}, "it has no weight_map"),
        ({}, "it has no weight_map"),
        ([], "must hold a JSON object"),
    ],
)
def test_an_index_that_lies(sharded: Path, index: object, message: str) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        SafetensorsReader(sharded)


@pytest.mark.parametrize("keep", [0, 1, 8, 100, 0.5, -1])
def test_weights_that_were_cut(tmp_path: Path, keep: float) -> None:
    path = tiny_folder(tmp_path / "tiny") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    with pytest.raises(ModelError, match="must be a whole safetensors file"):
        SafetensorsReader(path.parent)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1000000]}}',
        b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}',
        b"not json",
    ],
)
@pytest.mark.parametrize("length", [None, 2**63])
def test_weights_that_lie(tmp_path: Path, header: bytes, length: int | None) -> None:
    size = (len(header) if length is None else length).to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(size + header + bytes(16))
    with pytest.raises(ModelError, match="must be a whole safetensors file"):
        SafetensorsReader(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold model.safetensors or model.safetensors.index.json"):
        SafetensorsReader(tmp_path)


def test_assets_are_the_files_that_are_there(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    (folder / "vocab.json").mkdir()  # a folder of that name is no file
    assert sorted(read_assets(folder)) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    shutil.rmtree(folder)
    assert read_assets(folder) == {}


def test_an_entry_is_what_structure_json_says() -> None:
    assert Entry("quantized", 4, 32, (96, 64)).to_json() == {
        "kind": "quantized",
        "bits": 4,
        "block": 32,
        "shape": (96, 64),
    }


def test_dense_counts_its_bytes() -> None:
    assert Dense(np.zeros((3, 5), np.float32)).size_bytes == 60
    assert Quantized(CODES, SCALES, None, 4, 32, 96).size_bytes == 2 * 3 * 16 + 2 * 3 * 2
