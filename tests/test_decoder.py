"""The decoder graph against the NumPy forward: every architecture, storage and layer shape; what lies in its files.

`engine_of` exports a checkpoint's graph and opens it, for the other tests of the runtime as well.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from test_reference import AGAINST_TRANSFORMERS, IDS, Arrays, reshaped_layer, rounded, tiny_checkpoint

from edgekit.bundle import MODEL, WEIGHTS, DecoderSpec, LayerCache
from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError
from edgekit.export.decoder import build_decoder
from edgekit.export.fit import layer_caches
from edgekit.export.graph import ALIGNMENT, Graph
from edgekit.export.parity import divergence
from edgekit.export.parts import Parts
from edgekit.model.config import Rope
from edgekit.model.reference import forward
from edgekit.model.rope import tables
from edgekit.quant.grid import Grid
from edgekit.runtime.engine import Engine
from edgekit.weight import Floats

LONG = np.random.default_rng(7).integers(3, 384, 150).tolist()
GRIDS = [Grid(bits, block, offset) for bits in (4, 8) for block in (32, 64, 128) for offset in ("symmetric", "zero")]
GRIDS += [
    Grid(2, 32, "minimum", "int8"),
    Grid(2, 64, "symmetric"),
    Grid(3, 32, "zero", "int8"),
    Grid(3, 64, "symmetric", "int8"),
    Grid(4, 32, "minimum"),
    Grid(4, 64, "minimum", "int8"),
    Grid(5, 32, "minimum", "int8"),
    Grid(5, 32, "zero"),
    Grid(6, 32, "symmetric"),
    Grid(8, 32, "minimum", "int8"),
]


def engine_of(checkpoint: Checkpoint, folder: Path, *, context: int = 256, int8: bool = False) -> Engine:
    """The checkpoint's graph, built in `folder` and opened."""
    caches = build_decoder(checkpoint, folder, context=context, integer_bits=(4, 8) if int8 else ())
    spec = DecoderSpec(
        architecture=checkpoint.decoder.architecture,
        target="portable",
        vocabulary=checkpoint.decoder.vocabulary,
        context_length=context,
        layers=caches,
        eos_ids=(2,),
        resident_bytes=0,
        activation_bytes=0,
    )
    return Engine(folder / MODEL, spec, context=context, threads=1)


def read_in_parts(engine: Engine, ids: list[int], *sizes: int) -> Floats:
    """Logits of all of `ids`, read from the start in parts of the given sizes, the last one repeated."""
    engine.rewind(0)
    logits: list[Floats] = []
    start = 0
    while start < len(ids):
        part = ids[start : start + sizes[min(len(logits), len(sizes) - 1)]]
        logits.append(engine.forward(part, keep=len(part)).copy())
        start += len(part)
    return np.concatenate(logits)


def assert_same_logits(checkpoint: Checkpoint, folder: Path, ids: list[int], *, tolerance: float = 2e-5) -> None:
    """The graph gives the reference's logits read whole, in chunks, token by token, and again after a rewind."""
    (expected,) = forward(checkpoint, [ids])
    engine = engine_of(checkpoint, folder)
    for sizes in ((len(ids),), (7,), (1,), (5, 1), (1, 9)):
        np.testing.assert_allclose(read_in_parts(engine, ids, *sizes), expected, atol=tolerance, err_msg=str(sizes))
    engine.rewind(len(ids) // 3)
    again = engine.forward(ids[len(ids) // 3 :], keep=2)
    np.testing.assert_allclose(again, expected[-2:], atol=tolerance)


@pytest.mark.parametrize("case", AGAINST_TRANSFORMERS)
def test_float_graph_equals_the_reference(tmp_path: Path, case: str) -> None:
    assert_same_logits(tiny_checkpoint(**AGAINST_TRANSFORMERS[case]), tmp_path, LONG[:40])


@pytest.mark.parametrize("window", [1, 2, 31, 32, 100, 149, 150])
def test_sliding_windows_hide_exactly_what_the_reference_hides(tmp_path: Path, window: int) -> None:
    checkpoint = tiny_checkpoint("MistralForCausalLM", config={"sliding_window": window})
    (expected,) = forward(checkpoint, [LONG])
    engine = engine_of(checkpoint, tmp_path)
    for sizes in ((150,), (64, 1), (120, 30)):
        np.testing.assert_allclose(read_in_parts(engine, LONG, *sizes), expected, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("hidden", [64, 80], ids=["whole blocks", "padded blocks"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits} bits, {g.block}, {g.offset}, {g.scales}")
def test_quantised_graph_equals_the_reference_of_its_codes(tmp_path: Path, grid: Grid, hidden: int, tied: bool) -> None:
    """MatMulNBits and GatherBlockQuantized read codes, scales and zero points as `Quantized.dense` does.

    Hidden 80 in blocks of 32 leaves an odd number of blocks, whose packed zero points end in half a byte.
    """
    plain = tiny_checkpoint(hidden=hidden, heads=hidden // 16, kv_heads=1, tied=tied)
    (expected,) = forward(rounded(plain, grid), [IDS])
    engine = engine_of(rounded(plain, grid), tmp_path)
    for sizes in ((len(IDS),), (1,)):  # minima are sums of their own
        tolerance = 5e-5 if grid.offset == "minimum" else 2e-5
        np.testing.assert_allclose(read_in_parts(engine, IDS, *sizes), expected, atol=tolerance)
    assert np.abs(expected - forward(plain, [IDS])[0]).max() > 1e-4  # the rounding is there to be seen


@pytest.mark.parametrize("grid", GRIDS[:12:3], ids=str)
def test_integer_activations_drift_little(tmp_path: Path, grid: Grid) -> None:
    checkpoint = rounded(tiny_checkpoint(hidden=80, heads=5, kv_heads=1), grid)
    (expected,) = forward(checkpoint, [IDS])
    engine = engine_of(checkpoint, tmp_path, int8=True)
    for sizes in ((len(IDS),), (1,)):
        logits = read_in_parts(engine, IDS, *sizes)
        assert divergence(expected, logits).mean() < 1e-3
        assert np.abs(expected - logits).max() > 1e-4  # else int8 is not what ran


@pytest.mark.parametrize(
    "only", ["q_proj", "k_proj|v_proj", "embed_tokens", "lm_head", "down_proj|o_proj", r"layers\.1\.", "mlp"]
)
def test_some_matrices_quantised_others_not(tmp_path: Path, only: str) -> None:
    checkpoint = rounded(tiny_checkpoint("Qwen2ForCausalLM", tied=False), Grid(4, 32, "zero"), only=only)
    assert_same_logits(checkpoint, tmp_path, IDS)


def test_matrices_on_different_grids(tmp_path: Path) -> None:
    """q, k and v cannot be joined then, and the biases stay with their own."""
    checkpoint = tiny_checkpoint("Qwen2ForCausalLM")
    for grid, only in ((Grid(4, 32, "symmetric"), "k_proj"), (Grid(8, 64, "zero"), "[qv]_proj")):
        checkpoint = rounded(checkpoint, grid, only=only)
    assert_same_logits(checkpoint, tmp_path, IDS)


@pytest.mark.parametrize("quantised", [False, True])
def test_layers_of_different_widths(tmp_path: Path, quantised: bool) -> None:
    tensors = {
        **reshaped_layer(1, heads=6, kv_heads=1, mlp=40),
        **reshaped_layer(2, heads=2, kv_heads=2, mlp=200),
    }
    checkpoint = tiny_checkpoint(layers=3, tensors=tensors)
    if quantised:
        checkpoint = rounded(checkpoint, Grid(4, 32, "symmetric"))
    assert layer_caches(checkpoint) == (LayerCache(2, 16), LayerCache(1, 16), LayerCache(2, 16))
    assert_same_logits(checkpoint, tmp_path, IDS)


def test_biases_anywhere(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    sizes = {
        "self_attn.k_proj": 32,
        "self_attn.o_proj": 64,
        "mlp.gate_proj": 96,
        "mlp.up_proj": 96,
        "mlp.down_proj": 64,
    }
    biases = {f"model.layers.1.{m}.bias": rng.standard_normal(n).astype(np.float32) for m, n in sizes.items()}
    checkpoint = tiny_checkpoint(tensors=biases)
    assert_same_logits(checkpoint, tmp_path, IDS)
    (tmp_path / "4").mkdir()
    assert_same_logits(rounded(checkpoint, Grid(4, 32, "symmetric")), tmp_path / "4", IDS)


# --- what is in the files ---------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, tuple[int, int]]:
    """Constant -> (offset, length) in the weights file."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            found[tensor.name] = (int(where["offset"]), int(where["length"]))
    return found


@pytest.mark.parametrize("grid", [None, Grid(4, 32, "zero"), Grid(8, 32, "symmetric")], ids=str)
def test_a_tied_table_is_stored_once(tmp_path: Path, grid: Grid | None) -> None:
    checkpoint = tiny_checkpoint()
    if grid is not None:
        checkpoint = rounded(checkpoint, grid)
    build_decoder(checkpoint, tmp_path, context=64, integer_bits=())
    found = stored(tmp_path)
    table = 384 * 64 * (4 if grid is None else 0) + 384 * 64 * (grid.bits if grid else 0) // 8
    assert len({place for place in found.values() if place[1] == table}) == 1
    places = {offset: -(-length // ALIGNMENT) * ALIGNMENT for offset, length in found.values()}
    assert sum(places.values()) - ALIGNMENT < (tmp_path / WEIGHTS).stat().st_size <= sum(places.values())
    if grid is not None:
        assert found["model.embed_tokens.table"] == found["model.embed_tokens.codes"]


def test_nodes_are_named_by_module_path(tmp_path: Path) -> None:
    build_decoder(tiny_checkpoint("Qwen3ForCausalLM"), tmp_path, context=64, integer_bits=())
    names = {node.name for node in onnx.load(tmp_path / MODEL, load_external_data=False).graph.node}
    assert {"model.layers.1.mlp.down_proj", "model.layers.0.self_attn", "model.norm", "lm_head"} <= names


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        checkpoint = rounded(tiny_checkpoint(), Grid(4, 32, "zero"))
        build_decoder(checkpoint, tmp_path / name, context=64, integer_bits=(4, 8))
    for file in (MODEL, WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# --- weights that do not fit ------------------------------------------------------------------------------------------

LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        (f"{LAYER}self_attn.q_proj.weight", (72, 64), "72 query rows"),
        (f"{LAYER}self_attn.q_proj.weight", (48, 64), "48 query rows and 32 key rows"),
        (f"{LAYER}self_attn.k_proj.weight", (48, 64), "64 query rows and 48 key rows"),
        (f"{LAYER}self_attn.v_proj.weight", (16, 64), f"{LAYER}self_attn.v_proj has shape (16, 64)"),
        (f"{LAYER}self_attn.o_proj.weight", (64, 48), f"{LAYER}self_attn.o_proj has shape (64, 48)"),
        (f"{LAYER}mlp.up_proj.weight", (95, 64), f"{LAYER}mlp.up_proj has shape (95, 64)"),
        (f"{LAYER}mlp.down_proj.weight", (64, 95), f"{LAYER}mlp.down_proj has shape (64, 95)"),
        (f"{LAYER}mlp.down_proj.weight", (63, 96), f"{LAYER}mlp.down_proj has shape (63, 96)"),
        (f"{LAYER}mlp.down_proj.weight", (64,), f"{LAYER}mlp.down_proj.weight has shape (64,)"),
        (f"{LAYER}input_layernorm.weight", (63,), f"{LAYER}input_layernorm has shape (63,)"),
        (f"{LAYER}self_attn.q_norm.weight", (64,), f"{LAYER}self_attn.q_norm has shape (64,)"),
        (f"{LAYER}self_attn.q_proj.bias", (63,), f"{LAYER}self_attn.q_proj.bias has (63,)"),
        ("model.norm.weight", (1,), "model.norm has shape (1,), the model needs (64,)"),
        ("model.embed_tokens.weight", (384, 63), "model.embed_tokens has shape (384, 63)"),
        ("model.embed_tokens.weight", (383, 64), "model.embed_tokens has shape (383, 64)"),
        ("lm_head.weight", (384, 65), "lm_head has shape (384, 65)"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, name: str, shape: tuple[int, ...], named: str) -> None:
    wrong: dict[str, NDArray[Any]] = {name: np.ones(shape, np.float32)}
    checkpoint = tiny_checkpoint("Qwen2ForCausalLM", tied=False, tensors=wrong)
    with pytest.raises(ModelError, match=re.escape(named)):
        build_decoder(checkpoint, tmp_path, context=64, integer_bits=())


def test_missing_layers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.2\."):
        build_decoder(tiny_checkpoint(config={"num_hidden_layers": 3}), tmp_path, context=64, integer_bits=())


def test_heads_that_onnxruntime_cannot_turn(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"head_dim must be a multiple of 16.* is 8"):
        build_decoder(tiny_checkpoint(head_dim=8), tmp_path, context=64, integer_bits=())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.router.weight", "model.layers.7.mlp.up_proj.weight", "visual.proj"]
)
def test_a_weight_without_a_place_is_refused(name: str) -> None:
    checkpoint = tiny_checkpoint()
    assert isinstance(checkpoint.tensors, Arrays)
    values = {**checkpoint.tensors.values, name: np.zeros((64, 64), np.float32)}
    with pytest.raises(ModelError, match="every weight must have a place in the graph"):
        layer_caches(replace(checkpoint, tensors=Arrays(values)))


@pytest.mark.parametrize("positions", [256, 257, 300, 1024])
def test_long_rotary_tables_are_made_when_the_graph_loads(tmp_path: Path, positions: int) -> None:
    rope = Rope(theta=1e4, kind="yarn", factor=4.0, original_context=64)
    with Graph(tmp_path) as graph:
        parts = Parts(tiny_checkpoint(), graph, integer_bits=())
        parts.config = replace(parts.config, rope=rope)
        parts.rotary_tables(positions)
        names = [graph.node("Identity", [f"rotary.{name}"], name) for name in ("cos", "sin")]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        graph.save([], outputs, title="rotary")
    expected = tables(rope, parts.config.head_dim, positions)
    for found, table in zip(ort.InferenceSession(str(tmp_path / MODEL)).run(None, {}), expected, strict=True):
        np.testing.assert_allclose(found, table, rtol=0, atol=rope.attention_factor * 2**-22)
    assert (tmp_path / WEIGHTS).stat().st_size <= 4 * 256 * parts.config.head_dim
