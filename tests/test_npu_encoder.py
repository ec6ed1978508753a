"""Encoders for NPUs: graphs of fixed shapes against the NumPy forward, and what runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from command_line import ek, ok
from tiny_encoder import tiny_encoder

from edgekit.bundle import EncoderBundle
from edgekit.compress import compress
from edgekit.device import load_device
from edgekit.errors import DeviceError, ModelError, UserError
from edgekit.export.encoder import export_encoder
from edgekit.export.npu_encoder import export_npu_encoder
from edgekit.export.targets import TARGETS
from edgekit.model.encoder_config import encoder_config
from edgekit.model.encoder_reference import states
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime import providers
from edgekit.runtime.embeddings import Embedder, pooled

TEXTS = ["The quick brown fox.", "A small model runs on the device.", "Measure.", "fox " * 18]


def expected(folder: Path, embedder: Embedder) -> np.ndarray:
    checkpoint = open_model(str(folder))
    rows = [np.array([embedder.tokenizer.encode(text).ids]) for text in TEXTS]
    config = encoder_config(checkpoint.config)
    return np.concatenate([pooled(states(checkpoint, config, ids), embedder.spec) for ids in rows])


@pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel", "DistilBertModel"])
@pytest.mark.parametrize("target", ["npu-qnn", "npu-openvino"])
def test_padded_graphs_give_the_embeddings_of_the_forward(architecture: str, target: str, tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model", architecture=architecture)
    export_npu_encoder(open_model(str(folder)), tmp_path / "out", target=TARGETS[target])
    embedder = Embedder.open(tmp_path / "out", threads=1, processor="cpu")
    cosines = np.sum(expected(folder, embedder) * embedder.embed(TEXTS), axis=1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_quantised_weights_are_taken_as_they_are(recipe: str, tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model")
    compress(open_model(str(folder)), load_recipe(recipe), tmp_path / "small")
    export_npu_encoder(open_model(str(tmp_path / "small")), tmp_path / "out", target=TARGETS["npu-openvino"])
    embedder = Embedder.open(tmp_path / "out", threads=1, processor="cpu")
    assert np.sum(expected(tmp_path / "small", embedder) * embedder.embed(TEXTS), axis=1).min() > 0.999


def test_a_text_is_no_longer_than_the_graph(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model", longest=12)
    export_npu_encoder(open_model(str(folder)), tmp_path / "out", target=TARGETS["npu-openvino"])
    embedder = Embedder.open(tmp_path / "out", threads=1, processor="cpu")
    assert embedder.max_length == 12
    with pytest.raises(UserError, match="at most 12 tokens"):
        embedder.embed(TEXTS)
    assert embedder.encode(TEXTS, truncate=True).truncated == (3,)


def test_a_spec_whose_graph_takes_other_lengths_is_refused(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model")
    export_npu_encoder(open_model(str(folder)), tmp_path / "out", target=TARGETS["npu-openvino"])
    spec = EncoderBundle.open(tmp_path / "out").spec
    with pytest.raises(ModelError, match="must take texts of as many"):
        type(spec)(**{**vars(spec), "max_length": 7})


def test_embed_says_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> tuple[object, ...]:
        raise DeviceError(f"{name} needs its package")

    folder = tiny_encoder(tmp_path / "model")
    ok("export", folder, "-o", tmp_path / "out", "--target", "npu-openvino")
    monkeypatch.setattr(providers, "plugin_devices", missing)
    done = ok("embed", tmp_path / "out", "fox", "--threads", "1")
    assert "[runs on onnxruntime CPU: openvino needs its package]" in done.err
    assert ek("embed", tmp_path / "out", "fox", "--processor", "npu").status == 5


def test_a_processor_is_for_bundles_of_an_npu(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model")
    export_encoder(open_model(str(folder)), tmp_path / "out", target=TARGETS["portable"])
    with pytest.raises(UserError, match="--processor is for bundles of an NPU"):
        Embedder.open(tmp_path / "out", processor="npu")


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None, reason="needs onnxruntime-qnn")
def test_an_encoder_compiled_for_a_hexagon_gives_the_same_embeddings(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model")
    device = load_device("snapdragon-8-elite")
    manifest = export_npu_encoder(open_model(str(folder)), tmp_path / "out", target=TARGETS["npu-qnn"], device=device)
    (note,) = [row.note for row in manifest.measurements if row.name == "compiled for Hexagon"]
    assert "1 compiled part;" in note
    on_cpu = Embedder.open(tmp_path / "out", threads=1, processor="cpu").embed(TEXTS)
    compiled = Embedder.open(tmp_path / "out", threads=1, processor="npu")
    assert np.sum(on_cpu * compiled.embed(TEXTS), axis=1).min() > 0.999


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_ep_openvino") is None, reason="needs openvino")
def test_openvino_gives_the_same_embeddings_on_its_cpu(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model")
    export_npu_encoder(open_model(str(folder)), tmp_path / "out", target=TARGETS["npu-openvino"])
    embedder = Embedder.open(tmp_path / "out", threads=1, processor="cpu")
    if "OpenVINO offers no CPU device" in embedder.encoder.kernels:
        pytest.skip("OpenVINO offers no CPU device on this processor")
    assert embedder.encoder.kernels == "openvino CPU"
    assert np.sum(expected(folder, embedder) * embedder.embed(TEXTS), axis=1).min() > 0.999
