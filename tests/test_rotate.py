"""The step quant.rotate: the model's function is kept, its stream is turned, its norms are folded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tiny import tiny_config, tiny_folder

from edgekit.checkpoint import Block, Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.errors import ModelError
from edgekit.model.config import decoder_config
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.quant.rotate import Rotate, hadamard, rotation, turn_inputs, turn_outputs
from edgekit.quant.rounding import Int8
from edgekit.recipe import Recipe
from edgekit.step import StepContext, outline_of
from edgekit.weight import Dense, Floats

IDS = [[1, 5, 300, 7, 7, 2], [9]]
ROTATE = Recipe("rotated", "", (Rotate(),), seed=3)
CONFIG = tiny_config(
    architecture="LlamaForCausalLM", layers=1, hidden=64, heads=4, kv_heads=2, head_dim=None, mlp=96, vocabulary=384,
    tied=True, dtype="float32",
)  # fmt: skip
CONTEXT = StepContext(decoder_config(CONFIG), seed=0)


def gaussian(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rotated(folder: Path, recipe: Recipe = ROTATE) -> Checkpoint:
    """The rotated model of `folder`, through the disk."""
    output = folder.with_name(f"{folder.name}.out")
    compress(open_model(str(folder)), recipe, output)
    return open_checkpoint(output)


def same_logits(folder: Path, turned: Checkpoint) -> None:
    for before, after in zip(forward(open_model(str(folder)), IDS), forward(turned, IDS), strict=True):
        assert np.abs(before).max() > 1
        np.testing.assert_allclose(after, before, atol=3e-5)


def edit(folder: Path, change: Any) -> Path:
    """Apply `change` to the folder's tensors."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    return folder


@pytest.mark.parametrize("size", [1, 2, 64, 48, 96, 135])
def test_a_rotation_is_orthogonal_and_depends_on_its_seed(size: int) -> None:
    Q = rotation(size, 7)
    np.testing.assert_allclose(Q.T.astype(np.float64) @ Q, np.eye(size), atol=1e-5)
    rotation.cache_clear()
    np.testing.assert_array_equal(rotation(size, 7), Q)
    assert size < 8 or not np.array_equal(rotation(size, 8), Q)  # two of few signs may agree
    with pytest.raises(ValueError):
        Q[0, 0] = 2


def test_a_power_of_two_is_turned_by_signed_hadamard_columns() -> None:
    np.testing.assert_array_equal(hadamard(4), [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    Q = rotation(64, 0) * 8
    np.testing.assert_array_equal(np.abs(Q), np.ones((64, 64)))
    np.testing.assert_array_equal(Q * Q[:, :1], hadamard(64))  # only rows have signs: the first column tells them


def test_the_array_functions_are_the_formulas() -> None:
    W, g, Q = gaussian(9000, 12), gaussian(12, seed=1), rotation(12, 0)
    np.testing.assert_allclose(turn_inputs(W, g, Q), W @ np.diag(g) @ Q, atol=1e-5)
    np.testing.assert_allclose(turn_inputs(W, None, Q), W @ Q, atol=1e-5)
    np.testing.assert_allclose(turn_outputs(W.T, Q), Q.T @ W.T, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("architecture", "hidden"), [("LlamaForCausalLM", 64), ("Qwen2ForCausalLM", 48), ("Qwen3ForCausalLM", 64)]
)
def test_the_model_computes_the_same(tmp_path: Path, architecture: str, hidden: int, tied: bool) -> None:
    folder = tiny_folder(tmp_path / "model", architecture=architecture, hidden=hidden, tied=tied)
    turned = rotated(folder)
    same_logits(folder, turned)
    before = open_model(str(folder))
    for module in ("model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        assert np.abs(turned.weight(module).dense() - before.weight(module).dense()).max() > 0.01
    for norm in ("model.layers.1.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"):
        assert (turned.vector(f"{norm}.weight") == 1).all()
    kept = {"Qwen2ForCausalLM": "q_proj.bias", "Qwen3ForCausalLM": "k_norm.weight"}.get(architecture)
    if kept:
        name = f"model.layers.1.self_attn.{kept}"
        np.testing.assert_array_equal(turned.vector(name), before.vector(name))


def test_a_tied_head_is_untied_for_the_final_gain(tmp_path: Path) -> None:
    turned = rotated(tiny_folder(tmp_path / "model", tied=True))
    assert turned.config["tie_word_embeddings"] is False
    assert not np.allclose(turned.weight("lm_head").dense(), turned.weight("model.embed_tokens").dense(), atol=0.01)


def test_a_tied_head_without_a_final_gain_stays_tied(tmp_path: Path) -> None:
    def no_gain(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = np.ones_like(tensors["model.norm.weight"])

    folder = edit(tiny_folder(tmp_path / "model", tied=True), no_gain)
    turned = rotated(folder)
    assert turned.config["tie_word_embeddings"] is True
    assert not turned.has("lm_head")
    same_logits(folder, turned)


def test_the_source_is_left_as_it_is(tmp_path: Path) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "model")))
    prepared = Rotate().prepare(checkpoint)
    assert checkpoint.config["tie_word_embeddings"] is True
    block = prepared.read_block("layers.0")
    copies = {name: weight.dense().copy() for name, weight in block.matrices.items()}
    Rotate().apply(block, StepContext(prepared.decoder, 0))
    for name, values in copies.items():
        np.testing.assert_array_equal(block.matrices[name].dense(), values)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_model_becomes_float_and_computes_the_same(tmp_path: Path, tied: bool) -> None:
    folder = tiny_folder(tmp_path / "model", tied=tied)
    small = rotated(folder, Recipe("int8", "", (Int8(),)))
    compress(small, ROTATE, tmp_path / "turned")
    turned = open_checkpoint(tmp_path / "turned")
    assert turned.structure == {}
    for before, after in zip(forward(small, IDS), forward(turned, IDS), strict=True):
        np.testing.assert_allclose(after, before, atol=3e-5)


def test_an_outlying_channel_is_spread_over_all() -> None:
    table = gaussian(256, 64)
    table[:, 5] *= 50
    _, changes = Rotate().apply(Block("embedding", {"model.embed_tokens": Dense(table)}), CONTEXT)
    assert changes.facts["peak_over_rms_before"].value > 20
    assert changes.facts["peak_over_rms_after"].value < 5


@pytest.mark.parametrize("tied", [True, False])
def test_predicted_sizes_are_the_real_ones(tmp_path: Path, tied: bool) -> None:
    step, checkpoint = Rotate(), open_model(str(tiny_folder(tmp_path / "model", tied=tied)))
    prepared = step.prepare(checkpoint)
    context = StepContext(prepared.decoder, 0)
    for name in prepared.blocks:
        predicted = step.predict(outline_of(prepared, name), context)
        block, changes = step.apply(prepared.read_block(name), context)
        assert predicted.outline.size_bytes == block.size_bytes
        assert {module: matrix.shape for module, matrix in predicted.outline.matrices.items()} == {
            module: weight.shape for module, weight in block.matrices.items()
        }
        assert changes.changed == len(block.matrices)


LAYER = "model.layers.0"
NORMS = {f"{LAYER}.input_layernorm.weight": np.ones(64, np.float32)}
SQUARE = Dense(np.eye(64, dtype=np.float32))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block("layers.0", {f"{LAYER}.mlp.router": SQUARE}, NORMS), "it does not know model.layers.0.mlp.router"),
        (Block("layers.0", {f"{LAYER}.self_attn.q_proj": SQUARE}), "lack model.layers.0.input_layernorm.weight"),
        (Block("final", {"lm_head": SQUARE}), "lack model.norm.weight"),
        (
            Block("layers.0", {f"{LAYER}.mlp.down_proj": SQUARE}, {f"{LAYER}.mlp.down_proj.bias": np.ones(64)}),
            "does not know model.layers.0.mlp.down_proj",
        ),
    ],
)
def test_a_layer_that_it_would_break_is_refused(block: Block, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Rotate().apply(block, CONTEXT)


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", tied=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ModelError, match="lm_head"):
        Rotate().prepare(open_model(str(folder)))


def test_quantised_input_is_read_by_its_values() -> None:
    W = gaussian(64, 64)
    rounded = round_to_grid(W, Grid(8, 32, "symmetric"), where="w")
    after, _ = Rotate().apply(Block("embedding", {"model.embed_tokens": rounded}), CONTEXT)
    np.testing.assert_allclose(after.matrices["model.embed_tokens"].dense(), rounded.dense() @ rotation(64, 0))
