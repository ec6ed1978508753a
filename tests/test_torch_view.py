"""One layer in torch computes what the NumPy decoder computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_folder

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import ModelError
from edgekit.model.reference import _Layer, forward, rms_norm
from edgekit.model.sources import open_model
from edgekit.model.stages import LINEARS, in_order, stage_of
from edgekit.weight import Dense, Floats

torch = pytest.importorskip("torch", reason="torch is no part of the base install")
pytestmark = pytest.mark.slow  # importing torch takes seconds

IDS = [1, 5, 300, 7, 7, 2, 9, 250, 11, 30]
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("Qwen2ForCausalLM", {}),
    ("Qwen3ForCausalLM", {}),
    ("MistralForCausalLM", {"sliding_window": 4}),
]


def through_torch(checkpoint: Checkpoint) -> Floats:
    from edgekit.model.torch_view import Layer

    config = checkpoint.decoder
    with torch.no_grad():
        x = torch.from_numpy(checkpoint.weight("model.embed_tokens").dense()[[IDS, IDS[::-1]]])
        for index in range(config.layers):
            x = Layer.of(checkpoint.read_block(f"layers.{index}"), config)(x)
    head = checkpoint.weight("model.embed_tokens" if config.tied else "lm_head").dense()
    states: Floats = x.numpy()
    return rms_norm(states, checkpoint.vector("model.norm.weight"), config.norm_eps) @ head.T


@pytest.mark.parametrize(("architecture", "config"), FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_reference(tmp_path: Path, architecture: str, config: dict[str, Any], tied: bool) -> None:
    folder = tiny_folder(tmp_path / "model", architecture=architecture, config=config, tied=tied)
    checkpoint = open_model(str(folder))
    found = through_torch(checkpoint)
    for logits, expected in zip(found, forward(checkpoint, [IDS, IDS[::-1]]), strict=True):
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(logits, expected, atol=3e-5)


def test_the_stages_are_those_of_the_reference(tmp_path: Path) -> None:
    from edgekit.model.torch_view import Layer

    checkpoint = open_model(str(tiny_folder(tmp_path / "model", architecture="Qwen2ForCausalLM")))
    x = np.random.default_rng(0).standard_normal((1, 6, 64)).astype(np.float32)
    layer, other = Layer.of(checkpoint.read_block("layers.1"), checkpoint.decoder), _Layer(checkpoint, 1)
    normed = layer.attention_input(torch.from_numpy(x))
    np.testing.assert_allclose(
        normed.numpy()[0], rms_norm(x[0], other.norm["input_layernorm"], checkpoint.decoder.norm_eps), atol=1e-5
    )
    attended = layer.add(torch.from_numpy(x), "self_attn.o_proj", layer.mixed(normed))
    np.testing.assert_allclose(attended.numpy()[0], x[0] + other.attention(normed.numpy()[0], [slice(0, 6)]), atol=1e-5)


def test_a_layer_that_lacks_something_is_named() -> None:
    from edgekit.model.torch_view import Layer

    matrices = {f"model.layers.0.{leaf}": Dense(np.eye(4, dtype=np.float32)) for leaf in LINEARS}
    short = dict(list(matrices.items())[1:])
    with pytest.raises(ModelError, match=r"layers\.0 differs in self_attn\.q_proj"):
        Layer.of(Block("layers.0", dict(short)), None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"must have model\.layers\.0\.input_layernorm\.weight"):
        Layer.of(Block("layers.0", dict(matrices)), None)  # type: ignore[arg-type]


def test_stages_and_order() -> None:
    names = [f"model.layers.3.{leaf}" for leaf in LINEARS]
    assert in_order(sorted(names)) == names
    assert in_order(["lm_head", names[2], names[0]]) == [names[0], names[2], "lm_head"]
    assert [stage_of(name) for name in (names[0], names[3], names[5], names[6], "lm_head")] == [
        "attention_input",
        "mixed",
        "mlp_input",
        "gated",
        None,
    ]
