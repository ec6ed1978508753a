"""Plain ONNX files: dynamic and static quantisation, calibration that does not fit, and files that are not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from command_line import ek, ok
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import MODEL, Bundle
from edgekit.errors import EdgekitError, ModelError, UserError
from edgekit.export.onnx_model import Calibration, load_calibration, quantize_file
from edgekit.manifest import Manifest

WIDTH = 96


def make_model(path: Path, *, weights: bool = True, external: str = "") -> Path:
    """Two products with a relu between them: x (n, 96) -> y (n, 96)."""
    rng = np.random.default_rng(0)
    held = [
        numpy_helper.from_array((rng.standard_normal((WIDTH, WIDTH)) / 10).astype(np.float32), name) for name in "ab"
    ]
    if external:
        held[0].ClearField("raw_data")
        held[0].data_location = TensorProto.EXTERNAL
        held[0].external_data.add(key="location", value=external)
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    if weights:
        nodes = [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "b"], ["y"]),
        ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in "xy"]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], initializer=held if weights else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def samples(count: int = 16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((count, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("static", [False, True])
def test_a_file_gets_smaller_and_stays_close(tmp_path: Path, static: bool) -> None:
    source = make_model(tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=samples())
    calibration = load_calibration(tmp_path / "data.npz") if static else None
    manifest = quantize_file(source, tmp_path / "small", calibration=calibration)
    assert Manifest.load(tmp_path / "small") == manifest
    assert manifest.kind == "onnx"
    assert manifest.steps[0].step == ("onnx.static_int8" if static else "onnx.dynamic_int8")
    assert manifest.steps[0].before_bytes > 2 * manifest.steps[0].after_bytes
    outputs = [
        ort.InferenceSession(str(path)).run(None, {"x": samples()})[0] for path in (source, tmp_path / "small" / MODEL)
    ]
    assert np.linalg.norm(outputs[0] - outputs[1]) < 0.05 * np.linalg.norm(outputs[0])
    assert not np.array_equal(*outputs)
    assert {row.name: row for row in manifest.measurements}["outputs: lowest cosine"].value > 0.99
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["edgekit.json", MODEL]
    with pytest.raises(UserError, match="does not run yet"):
        Bundle.open(tmp_path / "small")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": samples()}, "an array for each input"),
        ({"x": samples().astype(np.float64)}, "must fit the model's inputs"),
        ({"x": samples()[:, :5]}, "must fit the model's inputs"),
        ({"x": samples()[0]}, "must fit the model's inputs"),
    ],
)
def test_calibration_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    source = make_model(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=message):
        quantize_file(source, tmp_path / "small", calibration=Calibration(arrays))
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("make", ["absent", "text", "empty", "uneven", "pickle", "scalar"])
def test_calibration_that_cannot_be_read(tmp_path: Path, make: str) -> None:
    path = tmp_path / "data.npz"
    if make == "text":
        path.write_text("hello")
    elif make == "empty":
        np.savez(path)
    elif make == "uneven":
        np.savez(path, x=samples(3), y=samples(4))
    elif make == "pickle":
        np.savez(path, x=np.array([{"a": 1}], dtype=object))
    elif make == "scalar":
        np.savez(path, x=np.float32(1))
    with pytest.raises(UserError, match="calibration must"):
        load_calibration(path)


def test_files_that_are_refused(tmp_path: Path) -> None:
    good = make_model(tmp_path / "model.onnx").read_bytes()
    cases: dict[str, tuple[Path, type[EdgekitError], str]] = {}
    for name, content in (("cut", good[:-200]), ("text", b"hello"), ("empty", b"")):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        cases[name] = (path, ModelError, "must be a whole ONNX model")
    cases["absent"] = (tmp_path / "absent.onnx", UserError, "there is no")
    cases["no weights"] = (make_model(tmp_path / "none.onnx", weights=False), ModelError, "something to quantise")
    cases["escape"] = (make_model(tmp_path / "out.onnx", external="../secret"), ModelError, "must stay inside")
    for name, (path, error, message) in cases.items():
        with pytest.raises(error, match=message):
            quantize_file(path, tmp_path / "small")
        assert not (tmp_path / "small").exists(), name


def test_what_is_quantised_already_is_refused(tmp_path: Path) -> None:
    quantize_file(make_model(tmp_path / "model.onnx"), tmp_path / "small")
    with pytest.raises(ModelError, match="is quantised already"):
        quantize_file(tmp_path / "small" / MODEL, tmp_path / "again")


def test_the_command(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=samples())
    done = ok("compress", source, "-o", tmp_path / "a", "-r", "int8")
    assert "x smaller), onnx.dynamic_int8" in done.out
    words = ("compress", source, "-o", tmp_path / "b", "-r", "int8", "--calibration", tmp_path / "data.npz", "--json")
    assert json.loads(ok(*words).out)["steps"][0]["facts"] == {"samples": 16.0}
    assert ek("compress", source, "-o", tmp_path / "a", "-r", "int8").status == 2  # it exists
    assert "takes the recipes int8 and tucker only" in ek("compress", source, "-o", tmp_path / "c").err
    assert ek("compress", source, "-r", "int8").status == 2


def test_the_source_is_left_alone(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model.onnx")
    before = source.read_bytes()
    quantize_file(source, tmp_path / "small")
    assert source.read_bytes() == before
    assert onnx.load(str(tmp_path / "small" / MODEL)).graph.node
