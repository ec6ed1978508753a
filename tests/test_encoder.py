"""Encoders: their facts and names, the exported graph against NumPy and transformers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoder import tiny_encoder

from edgekit.bundle import Bundle, EncoderBundle
from edgekit.compress import compress
from edgekit.errors import ModelError, UserError
from edgekit.export.encoder import export_encoder
from edgekit.export.targets import TARGETS
from edgekit.model.encoder_config import encoder_config
from edgekit.model.encoder_reference import states
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime.embeddings import Embedder

FAMILIES = ["BertModel", "RobertaModel", "DistilBertModel"]
TEXTS = ["The quick brown fox.", "A small model runs on the device.", "Measure."]


def bundle_of(folder: Path, tmp_path: Path, recipe: str | None = None) -> Path:
    checkpoint = open_model(str(folder))
    if recipe:
        compress(checkpoint, load_recipe(recipe), tmp_path / "small")
        checkpoint = open_model(str(tmp_path / "small"))
    export_encoder(checkpoint, tmp_path / "bundle", target=TARGETS["portable"])
    return tmp_path / "bundle"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_float_graph_is_the_numpy_forward(tmp_path: Path, architecture: str) -> None:
    folder = tiny_encoder(tmp_path / "model", architecture=architecture)
    embedder = Embedder.open(bundle_of(folder, tmp_path), threads=1)
    checkpoint = open_model(str(folder))
    ids = np.array([embedder.tokenizer.encode(TEXTS[0]).ids])
    expected = states(checkpoint, encoder_config(checkpoint.config), ids).mean(axis=1)[0]
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(embedder.embed(TEXTS)[0], expected, atol=1e-6)


@pytest.mark.parametrize("recipe", ["int8", "int4"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_quantised_graphs_keep_the_direction(tmp_path: Path, architecture: str, recipe: str) -> None:
    folder = tiny_encoder(tmp_path / "model", architecture=architecture)
    (tmp_path / "float").mkdir()
    exact = Embedder.open(bundle_of(folder, tmp_path / "float"), threads=1).embed(TEXTS)
    embedder = Embedder.open(bundle_of(folder, tmp_path, recipe), threads=1)
    assert embedder.spec.operators == "edgekit"
    cosines = np.sum(exact * embedder.embed(TEXTS), axis=1)
    assert cosines.min() > (0.999 if recipe == "int8" else 0.95)


def test_the_manifest_tells_the_steps(tmp_path: Path) -> None:
    bundle = EncoderBundle.open(bundle_of(tiny_encoder(tmp_path / "model"), tmp_path, "int8"))
    (step,) = bundle.manifest.steps
    assert (step.step, step.changed) == ("quant.int8", 13)  # six matrices a layer and the token table
    assert bundle.manifest.source.name == "model"
    assert bundle.spec.max_length == 24


def test_an_encoder_is_no_decoder_and_says_so(tmp_path: Path) -> None:
    path = bundle_of(tiny_encoder(tmp_path / "model"), tmp_path)
    with pytest.raises(UserError, match=r"is an encoder, .*use edgekit embed"):
        Bundle.open(path)
    spec = json.loads((path / "runtime.json").read_text())
    assert spec["kind"] == "encoder"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "activation of an encoder must be gelu"),
        ({"position_embedding_type": "relative_key"}, "positions of an encoder must be absolute"),
        ({"is_decoder": True}, "must see the whole text"),
        ({"num_attention_heads": 5}, "must divide by 5 heads"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a positive integer"),
        ({"layer_norm_eps": -1}, "layer_norm_eps must be"),
        ({"vocab_size": 1 << 40}, "vocab_size must be"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_model(str(tiny_encoder(tmp_path / "model", config=config)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"encoder.layer.0.output.dense.bias": None}, r"must have model.layers.0.mlp.down_proj.bias"),
        ({"encoder.layer.1.output.dense.weight": np.zeros((4, 4), np.float32)}, "fit each other: model.layers.1.mlp"),
        ({"encoder.layer.7.output.dense.bias": np.zeros(64, np.float32)}, "must have a place in the graph"),
        ({"encoder.relative.weight": np.zeros((4, 4), np.float32)}, "must have a place in the encoder"),
        ({"embeddings.LayerNorm.weight": np.full(64, np.nan, np.float32)}, "must be finite"),
    ],
)
def test_weights_that_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        bundle_of(tiny_encoder(tmp_path / "model", tensors=tensors), tmp_path)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", {"a": 1}, "must hold a list of modules"),
        ("modules.json", [{"path": "2_Dense", "type": "x.Dense"}], "must be Transformer, Pooling or Normalize"),
        ("modules.json", [{"path": "../outside", "type": "x.Pooling"}], "must stay inside its folder"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling must be mean or cls"),
        ("1_Pooling/config.json", {}, "pooling must be mean or cls: 1_Pooling/config.json says nothing"),
        ("sentence_bert_config.json", {"max_seq_length": -1}, "max_length"),
    ],
)
def test_sentence_files_that_are_refused(tmp_path: Path, name: str, content: object, message: str) -> None:
    folder = tiny_encoder(tmp_path / "model")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        open_model(str(folder))


def test_steps_for_decoders_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "rotate.toml"
    recipe.write_text('name = "r"\n[[step]]\nuse = "quant.rotate"\n')
    with pytest.raises(ModelError, match="architecture must be one of"):
        compress(open_model(str(tiny_encoder(tmp_path / "model"))), load_recipe(str(recipe)), tmp_path / "small")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_numpy_forward_is_transformers(tmp_path: Path, architecture: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tiny_encoder(tmp_path / "model", architecture=architecture)
    checkpoint = open_model(str(folder))
    ids = np.array([[2, 30, 40, 50, 3], [2, 60, 70, 80, 3]])
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(torch.tensor(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(states(checkpoint, encoder_config(checkpoint.config), ids), expected, atol=2e-5)
