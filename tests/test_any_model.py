"""Any ONNX model: made-up inputs, the rows, and models that do not run with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from command_line import ek, ok
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import DeviceError, ModelError, UserError
from edgekit.profile.any_model import make_inputs, profile_model
from edgekit.profile.options import Options

QUICK = Options(repetitions=2, threads=1, settle_s=0, idle_s=0)


def vision(path: Path) -> Path:
    """A picture of any size through one convolution and a mean."""
    weights = numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["pixels", "w"], ["c"], name="/stages.0/conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["y"], name="/head/pool"),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, "height", None])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 1, 1])
    return write(path, nodes, [pixels], y, [weights])


def write(path: Path, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], y: onnx.ValueInfoProto,
          constants: list[onnx.TensorProto]) -> Path:  # fmt: skip
    graph = helper.make_graph(nodes, "g", inputs, [y], initializer=constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_vision_model_is_measured(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = profile_model(vision(tmp_path / "m.onnx"), QUICK, dims={"height": 32}, on_step=lambda *s: told.append(s))
    found = {row.name: row for row in report.measurements}
    assert found["latency"].n == found["rate"].n == 2
    assert found["latency, p99"].n == 2 * 20
    assert found["parameters"].value == 8 * 27 / 1e6
    assert found["energy per run"].value is None or found["energy per run"].how == "measured"
    assert [row.label for row in report.tables["inputs"].rows] == ["pixels: 1x3x32x224 float32"]
    assert "Conv" in {row.label for row in report.tables["operators"].rows}
    assert sum(row.values[2] or 0 for row in report.tables["operators"].rows) == pytest.approx(100)
    assert told[0] == (0, 5)
    assert told[-1] == (5, 5)


def test_inputs_follow_types_and_names(tmp_path: Path) -> None:
    kinds = {"input_ids": TensorProto.INT64, "attention_mask": TensorProto.INT32, "flag": TensorProto.BOOL,
             "wave": TensorProto.FLOAT16}  # fmt: skip
    shapes = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "seq_len"], "flag": [], "wave": [2, "n"]}
    inputs = [helper.make_tensor_value_info(name, kind, shapes[name]) for name, kind in kinds.items()]
    nodes = [helper.make_node("Identity", ["flag"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, inputs, helper.make_tensor_value_info("y", TensorProto.BOOL, []), [])
    feed = make_inputs(session(path), {"n": 7}, seed=0)
    assert {name: (values.shape, str(values.dtype)) for name, values in feed.items()} == {
        "input_ids": ((1, 128), "int64"), "attention_mask": ((1, 128), "int32"), "flag": ((), "bool"),
        "wave": ((2, 7), "float16"),
    }  # fmt: skip
    assert set(feed["input_ids"].ravel().tolist()) == {0, 1}
    assert feed["attention_mask"].all()
    again, other = (make_inputs(session(path), {"n": 7}, seed=seed) for seed in (0, 1))
    assert (again["wave"] == feed["wave"]).all()
    assert (other["wave"] != feed["wave"]).any()
    with pytest.raises(UserError, match="got 'm', known are"):
        make_inputs(session(path), {"m": 7}, seed=0)
    with pytest.raises(UserError, match=r"up to \d+ elements: 'wave'"):
        make_inputs(session(path), {"n": 1 << 29}, seed=0)


def test_models_that_cannot_be_measured_say_why(tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("text", TensorProto.STRING, [1])
    path = write(tmp_path / "s.onnx", [helper.make_node("Identity", ["text"], ["y"])], [text],
                 helper.make_tensor_value_info("y", TensorProto.STRING, [1]), [])  # fmt: skip
    with pytest.raises(UserError, match=r"tensors of numbers to be made up: 'text' is tensor\(string\)"):
        profile_model(path, QUICK)
    a, b = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [size]) for name, size in (("a", "m"), ("b", "n")))
    path = write(tmp_path / "two.onnx", [helper.make_node("Add", ["a", "b"], ["y"])], [a, b],
                 helper.make_tensor_value_info("y", TensorProto.FLOAT, ["k"]), [])  # fmt: skip
    with pytest.raises(DeviceError, match=r"does not run with inputs of a \(2,\), b \(3,\).*--dim"):
        profile_model(path, QUICK, dims={"m": 2, "n": 3})
    (tmp_path / "broken.onnx").write_bytes(path.read_bytes()[:-9])
    with pytest.raises((ModelError, DeviceError), match=r"must be an ONNX model|cannot load"):
        profile_model(tmp_path / "broken.onnx", QUICK)


def test_the_command_takes_an_onnx_file(tmp_path: Path) -> None:
    path = vision(tmp_path / "m.onnx")
    quick = ("--settle", "0", "--idle", "0", "--repeat", "1", "--no-operators")
    done = ok("profile", path, "--dim", "height=16", *quick, "-o", tmp_path / "r.html", "-o", tmp_path / "r.csv")
    assert "pixels: 1x3x16x224 float32" in done.out
    assert "<svg" in (tmp_path / "r.html").read_text()
    assert (tmp_path / "r.csv").read_text().startswith("subject,measurement,value,unit")
    assert "must be NAME=SIZE" in ek("profile", path, "--dim", "height").err
    assert ek("profile", tmp_path / "absent.onnx", *quick).status == 2
