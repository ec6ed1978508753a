"""The graph of our own operators: built, run natively, and run on stock onnxruntime by its functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from test_reference import rounded, tiny_checkpoint

from edgekit.bundle import Bundle
from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.errors import UserError
from edgekit.export import coarse, parity
from edgekit.export.export import export
from edgekit.export.native import runs_natively
from edgekit.export.targets import find_target, host_target
from edgekit.kernels.library import library_path
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.quant.grid import Grid
from edgekit.recipe import load_recipe
from edgekit.runtime.engine import Engine
from edgekit.runtime.session import Session

needs_kernels = pytest.mark.skipif(library_path() is None, reason="this install has no native kernels")
NATIVE = find_target(host_target())
IDS = list(np.random.default_rng(3).integers(0, 384, 100))
GRIDS = [
    Grid(4, 32, "symmetric"),
    Grid(4, 64, "zero"),
    Grid(8, 32, "symmetric"),
    Grid(8, 32, "zero"),
    Grid(3, 32, "minimum", "int8"),
    Grid(2, 64, "minimum", "int8"),
    Grid(6, 32, "zero", "int8"),
    Grid(5, 32, "minimum", "int8"),
]

PROMPTS = (
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "Write a short story about a dog.",
    "Name three fruits and their colours.",
    "How does a bicycle stay upright?",
    "Give me a recipe for pancakes.",
    "What is the difference between weather and climate?",
    "Write a haiku about the sea.",
    "Who wrote Hamlet, and when?",
    "List the planets of the solar system.",
)


def native_model(architecture: str, grid: Grid, *, tied: bool = True) -> Checkpoint:
    return rounded(tiny_checkpoint(architecture, head_dim=16, tied=tied), grid)


def run(bundle: Path, ids: list[int], *, by: int) -> np.ndarray:
    """Logits of every token, `by` at a time."""
    spec = Bundle.open(bundle).spec
    engine = Engine(bundle / "model.onnx", spec, context=128, threads=2)
    parts = [ids[i : i + by] for i in range(0, len(ids), by)]
    return np.concatenate([engine.forward(part, keep=len(part)).copy() for part in parts])


@needs_kernels
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_native_logits_are_those_of_the_reference(tmp_path: Path, architecture: str, grid: Grid) -> None:
    """One token or 50 at a time in 15 bits, 100 at once in 8."""
    checkpoint = native_model(architecture, grid, tied=grid.bits == 4)
    export(checkpoint, tmp_path / "bundle", target=NATIVE)
    assert Bundle.open(tmp_path / "bundle").spec.operators == "edgekit"
    (expected,) = forward(checkpoint, [IDS])
    scale = np.abs(expected).max()
    for by, tolerance in ((1, 2e-3), (50, 2e-3), (100, 6e-2)):
        got = run(tmp_path / "bundle", IDS, by=by)
        assert np.abs(got - expected).max() < tolerance * scale, f"{by} at a time"


@needs_kernels
@pytest.mark.parametrize(
    ("architecture", "grid"),
    [
        ("LlamaForCausalLM", Grid(4, 32, "zero")),
        ("Qwen2ForCausalLM", Grid(4, 32, "zero")),
        ("Qwen3ForCausalLM", Grid(5, 32, "minimum", "int8")),
        ("LlamaForCausalLM", Grid(3, 32, "minimum", "int8")),
        ("LlamaForCausalLM", Grid(6, 32, "zero", "int8")),
    ],
)
def test_the_same_file_runs_on_stock_onnxruntime(
    tmp_path: Path, architecture: str, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = native_model(architecture, grid)
    export(checkpoint, tmp_path / "bundle", target=NATIVE)
    monkeypatch.setenv("EDGEKIT_KERNELS", "off")
    spec = Bundle.open(tmp_path / "bundle").spec
    assert not Engine(tmp_path / "bundle" / "model.onnx", spec, context=128, threads=1).native
    (expected,) = forward(checkpoint, [IDS])
    got = run(tmp_path / "bundle", IDS, by=50)
    assert np.abs(got - expected).max() < 6e-2 * np.abs(expected).max()


@needs_kernels
def test_a_model_with_some_float_matrices_runs_natively(tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    skip = 'skip = ["*.v_proj", "*.up_proj", "*.0.mlp.down_proj"]'
    path.write_text(f'name = "mixed"\n[[step]]\nuse = "quant.int4"\nembedding = "keep"\n{skip}\n')
    source = tiny_checkpoint(head_dim=16)
    compress(source, load_recipe(str(path)), tmp_path / "small")
    checkpoint = open_checkpoint(tmp_path / "small")
    export(checkpoint, tmp_path / "bundle", target=NATIVE)
    (expected,) = forward(checkpoint, [IDS])
    assert np.abs(run(tmp_path / "bundle", IDS, by=50) - expected).max() < 2e-3 * np.abs(expected).max()


@needs_kernels
def test_a_bundle_may_decode_with_activations_of_8_bits(tmp_path: Path) -> None:
    checkpoint = native_model("LlamaForCausalLM", Grid(4, 32, "symmetric"))
    for bits in (8, 15):
        export(checkpoint, tmp_path / str(bits), target=NATIVE, activations=bits, accept_drift=True)
    assert Bundle.open(tmp_path / "8").spec.activations == 8
    assert "activations" not in (tmp_path / "15" / "runtime.json").read_text()
    (expected,) = forward(checkpoint, [IDS])
    errors = [np.abs(run(tmp_path / bits, IDS, by=1) - expected).max() / np.abs(expected).max() for bits in ("8", "15")]
    assert 2e-3 < errors[0] < 6e-2
    assert errors[1] < 2e-3


@needs_kernels
def test_some_layers_may_have_activations_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that they move least, and as many as the bound allows: here three bounds."""
    checkpoint = native_model("LlamaForCausalLM", Grid(4, 32, "symmetric"))
    sequences = [IDS]
    layers = checkpoint.decoder.layers
    found = {}
    for kl in (0.0, 1e-4, 1e9):
        monkeypatch.setattr(coarse, "COARSE_KL", kl)
        monkeypatch.setattr(parity, "TIE", 1e9 if kl == 1e9 else 0.05)
        found[kl] = coarse.coarse_layers(checkpoint, sequences)
    assert found[0.0] == frozenset()
    assert found[0.0] <= found[1e-4] <= found[1e9] == frozenset(range(layers + 1))

    monkeypatch.setattr(coarse, "COARSE_KL", 1e9)
    manifest = export(checkpoint, tmp_path / "mixed", target=NATIVE, activations="mixed", accept_drift=True)
    (row,) = [row for row in manifest.measurements if row.name == "layers with 8-bit activations"]
    assert row.value == row.n == layers + 1
    nodes = onnx.load(tmp_path / "mixed" / "model.onnx", load_external_data=False).graph.node
    bits = {node.op_type: [a.i for a in node.attribute if a.name == "activation_bits"] for node in nodes}
    assert bits["AttentionLayer"] == bits["NormQuantLinear"] == [8]
    (expected,) = forward(checkpoint, [IDS])
    assert 2e-3 < np.abs(run(tmp_path / "mixed", IDS, by=1) - expected).max() / np.abs(expected).max() < 6e-2


@pytest.mark.parametrize("target", ["portable", "x86"])
def test_activations_are_our_operators_matter(target: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--activations 8 is for our operators"):
        export(tiny_checkpoint(head_dim=16), tmp_path / "bundle", target=find_target(target), activations=8)
    assert not (tmp_path / "bundle").exists()


def test_float_models_and_odd_heads_use_stock_operators() -> None:
    assert not runs_natively(tiny_checkpoint(head_dim=16))
    assert runs_natively(native_model("LlamaForCausalLM", Grid(4, 32, "symmetric")))


def test_without_kernels_export_writes_a_stock_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_KERNELS", "off")
    export(native_model("LlamaForCausalLM", Grid(4, 32, "symmetric")), tmp_path / "bundle", target=NATIVE)
    assert Bundle.open(tmp_path / "bundle").spec.operators == "stock"


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("recipe", ["lossless", "int4"])
def test_greedy_tokens_are_those_of_the_float_reference(tmp_path: Path, recipe: str) -> None:
    """256 tokens on ten prompts, against the NumPy forward in float32 over the whole sequence.

    Where its two best logits lie within 0.002 of each other, either token is right.
    """
    compress(open_model("smollm2-135m"), load_recipe(recipe), tmp_path / "small")
    checkpoint = open_checkpoint(tmp_path / "small")
    export(checkpoint, tmp_path / "bundle", target=NATIVE)
    session = Session.open(tmp_path / "bundle", context=512)
    prompts = [session.encode([{"role": "user", "content": text}]) for text in PROMPTS]
    answers = []
    for ids in prompts:
        session.engine.rewind(0)
        logits, answer = session.engine.forward(ids), []
        for _ in range(256):
            answer.append(int(logits[-1].argmax()))
            logits = session.engine.forward(answer[-1:])
        answers.append(answer)
    sequences = [ids + answer[:-1] for ids, answer in zip(prompts, answers, strict=True)]
    for ids, answer, expected in zip(prompts, answers, forward(checkpoint, sequences), strict=True):
        rows = expected[len(ids) - 1 :]
        margin = rows.max(-1) - rows[np.arange(256), answer]
        assert margin.max() < 0.002
