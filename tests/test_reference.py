"""The NumPy forward: transformers' logits, the meaning of its parts, and what it refuses.

`tiny_checkpoint` builds the models of the export and runtime tests: any architecture, any shape by layer, in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import CHAT_TEMPLATE, tiny_config, tiny_folder, tiny_tensors, tiny_tokenizer

from edgekit.checkpoint import Checkpoint, Entry, SafetensorsReader
from edgekit.errors import ModelError, UserError
from edgekit.manifest import SourceRecord
from edgekit.model.reference import forward, rms_norm
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.weight import Floats

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
IDS = [1, 5, 300, 7, 7, 42, 100, 2, 9, 77, 250, 31]


@dataclass(frozen=True)
class Arrays:
    """Tensors in memory, as a checkpoint reads them."""

    values: Mapping[str, NDArray[Any]]

    def files(self) -> set[Path]:
        return set()

    def names(self) -> list[str]:
        return sorted(self.values)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape

    def read(self, name: str) -> NDArray[Any]:
        return self.values[name]


def tiny_checkpoint(
    architecture: str = "LlamaForCausalLM",
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    tied: bool = True,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any]] | None = None,
) -> Checkpoint:
    """A random model in memory; `config` and `tensors` replace single entries."""
    written = tiny_config(
        architecture=architecture, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        mlp=96, vocabulary=384, tied=tied, dtype="float32",
    )  # fmt: skip
    return Checkpoint(
        config={**written, **(config or {})},
        tensors=Arrays({**tiny_tensors(written, seed=seed), **(tensors or {})}),
        source=SourceRecord("tiny", "folder", "0" * 64),
        assets={
            "tokenizer.json": tiny_tokenizer(384).to_str().encode(),
            "chat_template.jinja": CHAT_TEMPLATE.encode(),
        },
    )


def rounded(checkpoint: Checkpoint, grid: Grid, *, only: str = "") -> Checkpoint:
    """The checkpoint with its matrices (those whose path matches the pattern `only`) on a grid."""
    tensors = {name: checkpoint.tensors.read(name) for name in checkpoint.tensors.names()}
    structure = dict(checkpoint.structure)
    matrices = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and "norm" not in name]
    for module in [module for module in matrices if re.search(only, module)]:
        weight = round_to_grid(tensors.pop(f"{module}.weight"), grid, where=module)
        tensors |= {f"{module}.codes": weight.codes, f"{module}.scales": weight.scales}
        for leaf, part in (("zeros", weight.zeros), ("minima", weight.minima), ("steps", weight.steps)):
            if part is not None:
                tensors[f"{module}.{leaf}"] = part
        structure[module] = Entry("quantized", grid.bits, grid.block, weight.shape)
    return replace(checkpoint, tensors=Arrays(tensors), structure=structure)


def reshaped_layer(index: int, *, heads: int, kv_heads: int, mlp: int, seed: int = 9) -> dict[str, Floats]:
    """The matrices of a layer (hidden 64, head_dim 16) with head counts and an MLP width of its own."""
    config = tiny_config(
        architecture="LlamaForCausalLM", layers=index + 1, hidden=64, heads=heads, kv_heads=kv_heads, head_dim=16,
        mlp=mlp, vocabulary=384, tied=True, dtype="float32",
    )  # fmt: skip
    drawn = tiny_tensors(config, seed=seed)
    return {name: values for name, values in drawn.items() if name.startswith(f"model.layers.{index}.")}


def test_each_position_sees_only_what_is_before_it() -> None:
    checkpoint = tiny_checkpoint()
    (whole,), (part,) = forward(checkpoint, [IDS]), forward(checkpoint, [IDS[:5]])
    assert whole.shape == (len(IDS), 384)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole[:5], part, atol=1e-5)
    changed = forward(checkpoint, [[*IDS[:-1], 8]])[0]
    np.testing.assert_allclose(whole[:-1], changed[:-1], atol=1e-5)
    assert np.abs(whole[-1] - changed[-1]).max() > 1e-3


def test_a_window_hides_what_is_farther_back() -> None:
    """With a window of 3 and two layers, position t depends on t-4 to t: each layer reaches two tokens back."""
    checkpoint = tiny_checkpoint("MistralForCausalLM", config={"sliding_window": 3})
    changed = [IDS[0] + 1, *IDS[1:]]
    (one,), (other,) = forward(checkpoint, [IDS]), forward(checkpoint, [changed])
    moved = np.abs(one - other).max(axis=-1) > 1e-5
    assert moved.tolist() == [True] * 5 + [False] * (len(IDS) - 5)


def test_a_window_as_long_as_the_text_changes_nothing() -> None:
    plain, windowed = (
        tiny_checkpoint("MistralForCausalLM", config={"sliding_window": size}) for size in (None, len(IDS))
    )
    assert np.array_equal(forward(plain, [IDS])[0], forward(windowed, [IDS])[0])


def test_a_layer_that_adds_nothing_may_as_well_be_removed() -> None:
    three = tiny_checkpoint(layers=3)
    all_tensors = {name: three.vector(name) for name in three.tensors.names()}
    silent = ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight")
    skipped = tiny_checkpoint(layers=3, tensors={name: np.zeros_like(all_tensors[name]) for name in silent})
    moved = {n.replace("layers.2", "layers.1"): v for n, v in all_tensors.items() if "layers.1." not in n}
    np.testing.assert_allclose(forward(skipped, [IDS])[0], forward(tiny_checkpoint(tensors=moved), [IDS])[0], atol=1e-6)


def test_grouped_attention_is_attention_with_each_key_head_repeated() -> None:
    grouped = tiny_checkpoint(kv_heads=2)
    all_tensors = {name: grouped.vector(name) for name in grouped.tensors.names()}
    copies = {
        name: np.repeat(values.reshape(2, 16, 64), 2, axis=0).reshape(64, 64)
        for name, values in all_tensors.items()
        if "k_proj" in name or "v_proj" in name
    }
    full = tiny_checkpoint(kv_heads=4, tensors={**all_tensors, **copies})
    np.testing.assert_allclose(forward(grouped, [IDS])[0], forward(full, [IDS])[0], atol=1e-5)


def test_an_untied_copy_of_the_table_is_a_tied_head() -> None:
    tied = tiny_checkpoint()
    table = tied.vector("model.embed_tokens.weight")
    untied = tiny_checkpoint(
        tied=False, tensors={**{n: tied.vector(n) for n in tied.tensors.names()}, "lm_head.weight": table}
    )
    assert np.array_equal(forward(tied, [IDS])[0], forward(untied, [IDS])[0])


def test_layers_may_differ_in_every_width() -> None:
    checkpoint = tiny_checkpoint(tensors=reshaped_layer(1, heads=6, kv_heads=1, mlp=40))
    logits = forward(checkpoint, [IDS])[0]
    assert np.isfinite(logits).all()
    assert np.abs(logits - forward(tiny_checkpoint(), [IDS])[0]).max() > 1e-2


def test_quantised_weights_count_as_what_their_codes_stand_for() -> None:
    codes = rounded(tiny_checkpoint(), Grid(4, 32, "zero"))
    values = {f"{module}.weight": codes.weight(module).dense() for module in codes.structure}
    assert np.array_equal(forward(codes, [IDS])[0], forward(tiny_checkpoint(tensors=values), [IDS])[0])


def test_large_gates_neither_overflow_nor_warn() -> None:
    huge = {"model.layers.0.mlp.gate_proj.weight": np.full((96, 64), -1e4, np.float32)}
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(forward(tiny_checkpoint(tensors=huge), [IDS])[0]).all()


def test_rms_norm_scales_each_row_to_rms_one_and_then_by_the_weight() -> None:
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32) * 100
    normed = rms_norm(x, np.full(64, 2, np.float32), 1e-6)
    np.testing.assert_allclose(np.sqrt(np.mean(normed**2, axis=-1)), 2, rtol=1e-5)
    np.testing.assert_allclose(normed / x, np.repeat(normed[:, :1] / x[:, :1], 64, axis=1), rtol=1e-5)
    assert not rms_norm(np.zeros((1, 64), np.float32), np.ones(64, np.float32), 1e-6).any()


@pytest.mark.parametrize("ids", [[], [384], [3, -1]])
def test_refused_ids(ids: list[int]) -> None:
    with pytest.raises(UserError, match=r"token ids must be one or more, from 0 to 383"):
        forward(tiny_checkpoint(), [IDS, ids])


def test_missing_weights_are_named() -> None:
    checkpoint = tiny_checkpoint(tied=False)
    kept = {name: checkpoint.vector(name) for name in checkpoint.tensors.names() if name != "lm_head.weight"}
    with pytest.raises(ModelError, match=r"must have lm_head: its weights lack it"):
        forward(replace(checkpoint, tensors=Arrays(kept)), [IDS])


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
AGAINST_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {"tied": False},
    "llama multi-head": {"heads": 4, "kv_heads": 4},
    "llama one key head": {"heads": 4, "kv_heads": 1},
    "llama wide heads": {"head_dim": 32},
    "llama linear rope": {"config": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}},
    "llama3 rope": {"config": {"rope_parameters": LLAMA3_ROPE}},
    "llama with the rope keys of transformers 4": {"config": {"rope_parameters": None, "rope_theta": 5e5}},
    "mistral": {"architecture": "MistralForCausalLM", "tied": False},
    "mistral window": {"architecture": "MistralForCausalLM", "config": {"sliding_window": 5}},
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
    "qwen2 unused window": {
        "architecture": "Qwen2ForCausalLM",
        "config": {"sliding_window": 5, "use_sliding_window": False},
    },
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", AGAINST_TRANSFORMERS)
def test_logits_equal_transformers(tmp_path: Path, case: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny_folder(tmp_path, **AGAINST_TRANSFORMERS[case])
    config = json.loads((folder / "config.json").read_text())
    checkpoint = replace(tiny_checkpoint(), config=config, tensors=SafetensorsReader(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = np.random.default_rng(1).integers(0, 384, 100).tolist()
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(forward(checkpoint, [ids])[0], expected, atol=1e-4)
