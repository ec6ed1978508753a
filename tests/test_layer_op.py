"""A layer as one operator computes what its five operators compute, natively and on stock onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from kernel_cases import every_path, needs_library
from onnx import helper
from test_native import IDS, NATIVE, native_model

from edgekit.bundle import Bundle
from edgekit.export.export import export
from edgekit.export.native import _NativeDecoder
from edgekit.export.sparse import SparseOptions
from edgekit.kernels.functions import function_bodies
from edgekit.kernels.library import register
from edgekit.kernels.opset import LAYER, OPS, layer_parts
from edgekit.profile.graph import read_graph
from edgekit.quant.grid import Grid
from edgekit.runtime.engine import Engine

pytestmark = needs_library
SPARSE = SparseOptions(budget=48, recent=8, sinks=2, dense_layers=1, wide_budget=56, dense_below=64)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Attention": ("LlamaForCausalLM", {}),
    "NormAttention": ("Qwen3ForCausalLM", {}),
    "AttentionInt8": ("Qwen2ForCausalLM", {"cache": "int8"}),
    "NormAttentionInt8": ("Qwen3ForCausalLM", {"cache": "int8"}),
    "HadamardSparseAttention": ("LlamaForCausalLM", {"sparse": SPARSE}),
    "NormHadamardSparseAttentionInt8": ("Qwen3ForCausalLM", {"sparse": SPARSE, "cache": "int8"}),
}


@pytest.fixture(scope="module", params=list(KINDS))
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The attention operator, a bundle with layers and one with their operators apart."""
    architecture, options = KINDS[request.param]
    checkpoint = native_model(architecture, Grid(4, 32, "minimum"))
    folder = tmp_path_factory.mktemp("layers")
    export(checkpoint, folder / "joined", target=NATIVE, accept_drift=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_NativeDecoder, "join", lambda *_: None)
        export(checkpoint, folder / "apart", target=NATIVE, accept_drift=True, **options)
    return request.param, folder / "joined", folder / "apart"


def logits(bundle: Path, ids: list[int], *, by: int, threads: int) -> np.ndarray:
    engine = Engine(bundle / "model.onnx", Bundle.open(bundle).spec, context=128, threads=threads)
    assert engine.native
    parts = [ids[i : i + by] for i in range(0, len(ids), by)]
    return np.concatenate([engine.forward(part, keep=len(part)).copy() for part in parts])


def kinds(bundle: Path) -> list[str]:
    return [node.op_type for node in onnx.load(bundle / "model.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize(("by", "threads"), [(1, 1), (1, 2), (1, 4), (7, 2), (100, 2)])
def test_a_layer_is_its_five_operators(bundles: tuple[str, Path, Path], by: int, threads: int) -> None:
    """To the bit, whatever the threads, one token at a time or several."""
    attention, joined, apart = bundles
    assert f"{attention}Layer" in kinds(joined)
    assert "GatedNormQuantLinear" in kinds(apart)
    ids = IDS[:30] if by == 1 else IDS
    for path in every_path():
        expected = logits(apart, ids, by=by, threads=1)
        assert np.array_equal(logits(joined, ids, by=by, threads=threads), expected), path


def test_stock_onnxruntime_runs_it_too(bundles: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, joined, apart = bundles
    monkeypatch.setenv("EDGEKIT_KERNELS", "off")
    found = []
    for bundle in (joined, apart):
        engine = Engine(bundle / "model.onnx", Bundle.open(bundle).spec, context=128, threads=1)
        assert not engine.native
        found.append(np.concatenate([engine.forward(IDS[:9], keep=9).copy(), engine.forward(IDS[9:10]).copy()]))
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(found[1]).max()


def test_profiles_see_the_operators_in_it(bundles: tuple[str, Path, Path]) -> None:
    _, joined, apart = bundles
    one, other = (read_graph(bundle / "model.onnx") for bundle in (joined, apart))
    assert one.parameters() == other.parameters()
    assert one.layer_bytes() == other.layer_bytes()
    assert one.read_bytes() == pytest.approx(other.read_bytes())


def test_every_attention_has_its_layer() -> None:
    for name in [name for name in OPS if "Attention" in name and not name.endswith("Layer")]:
        layer, parts = OPS[f"{name}Layer"], layer_parts(name)
        assert list(parts) == list(LAYER)
        assert len(set(layer.inputs)) == len(layer.inputs) == 1 + 7 + len(OPS[name].inputs) - 1 + 6 + 6 + 6
        assert layer.outputs == OPS[name].outputs


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("out_K", 32, "input codes must have|the layer's out_K must be 64: got 32"),
        ("num_heads", 2, "the layer's qkv_N must be 96: got 128"),
        ("qkv_bits", 7, "attribute bits must be 2, 3, 4, 5, 6 or 8: got 7"),
        ("activation_bits", 9, "attribute activation_bits must be 8 or 15: got 9"),
        ("down_N", 0, "attribute down_N must be from 1"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, attribute: str, value: int, message: str) -> None:
    export(native_model("LlamaForCausalLM", Grid(4, 32, "symmetric")), tmp_path / "b", target=NATIVE)
    model = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "AttentionLayer")
    kept = [given for given in node.attribute if given.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(attribute, value)])
    changed = tmp_path / "b" / "changed.onnx"
    changed.write_bytes(model.SerializeToString())
    options = ort.SessionOptions()
    options.log_severity_level = 4
    assert register(options, decode_threads=1, prefill_threads=1)
    with pytest.raises(Exception, match=message):
        ort.InferenceSession(str(changed), options, providers=["CPUExecutionProvider"])


def test_layers_call_the_functions_of_their_operators() -> None:
    for function in function_bodies():
        if function.name.endswith("Layer"):
            called = [node.op_type for node in function.node]
            assert called == [part.name for part in layer_parts(function.name.removesuffix("Layer")).values()]
