"""The reader of ONNX files against the onnx package, and on files that are broken."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_reference import tiny_checkpoint

from edgekit.errors import ModelError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.profile.graph import layer_of, read_graph


@pytest.fixture(scope="module", params=["portable", "x86"])
def bundle(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_checkpoint(), path, target=TARGETS[request.param])
    return path


def test_it_reads_what_onnx_reads(bundle: Path) -> None:
    theirs = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    ours = read_graph(bundle / "model.onnx")
    assert [(n.name, n.op, n.inputs, n.outputs) for n in ours.nodes] == [
        (n.name, n.op_type, tuple(n.input), tuple(n.output)) for n in theirs.node
    ]
    assert [c.shape for c in ours.constants.values()] == [tuple(i.dims) for i in theirs.initializer]
    whole = onnx.load(bundle / "model.onnx").graph
    sizes = {i.name: numpy_helper.to_array(i).nbytes for i in whole.initializer}
    assert {name: c.bytes for name, c in ours.constants.items()} == sizes


def test_weights_are_counted_once_and_read_by_group(bundle: Path) -> None:
    graph = read_graph(bundle / "model.onnx")
    layers = graph.layer_bytes()
    places = {constant.place: constant.bytes for constant in graph.constants.values()}
    used = {name for node in graph.nodes for name in node.inputs}
    unused = {c.place for name, c in graph.constants.items() if name not in used}
    assert sum(layers.values()) == sum(size for place, size in places.items() if place not in unused)
    assert {"layer 0", "layer 1", "embedding"} <= layers.keys()
    # 2 layers of 64 wide, 4 heads and 2 key-value heads of 16, MLP of 96, and a tied table of 384.
    assert graph.parameters() == 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96) + 384 * 64
    read = graph.read_bytes()
    assert read["head"] >= 384 * 64 * 4
    assert read["embedding"] <= 64 * 4 + 64, "one row"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.down_proj.QuantLinear", "layer 12"),
        ("/encoder/layer.3/attention/MatMul", "layer 3"),
        ("/blocks/0/conv", "layer 0"),
        ("model.embed_tokens.QuantEmbedding", "embedding"),
        ("model.embed_tokens.NormQuantLinear", "head"),
        ("lm_head", "head"),
        ("model.norm", "norm"),
        ("keep.count", "last tokens"),
        ("players.2x", "other"),
        ("", "other"),
    ],
)
def test_layers_by_the_names_of_nodes(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def small(path: Path) -> bytes:
    table = numpy_helper.from_array(np.ones((4, 8), np.float32), "w")
    floats = helper.make_tensor("f", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="layers.0.proj")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 4), ("y", 8))]
    graph = helper.make_graph([node], "g", value[:1], value[1:], initializer=[table, floats])
    data: bytes = helper.make_model(graph).SerializeToString()
    path.write_bytes(data)
    return data


def test_values_inside_the_file_have_a_size(tmp_path: Path) -> None:
    small(tmp_path / "m.onnx")
    graph = read_graph(tmp_path / "m.onnx")
    assert {name: c.bytes for name, c in graph.constants.items()} == {"w": 128, "f": 12}
    assert graph.layer_bytes() == {"layer 0": 128}


def test_every_cut_gives_an_error_or_less(tmp_path: Path) -> None:
    data = small(tmp_path / "m.onnx")
    for length in range(1, len(data)):
        (tmp_path / "cut.onnx").write_bytes(data[:length])
        try:
            read_graph(tmp_path / "cut.onnx")
        except ModelError as problem:
            assert "must be an ONNX model" in str(problem)  # noqa: PT017


@given(data=st.binary(min_size=1, max_size=300))
def test_foreign_bytes_never_break_it(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("foreign") / "m.onnx"
    path.write_bytes(data)
    with contextlib.suppress(ModelError):
        read_graph(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="readable file"):
        read_graph(tmp_path / "absent.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="must be an ONNX model"):
        read_graph(tmp_path / "empty.onnx")
