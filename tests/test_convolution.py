"""Convolutions of plain ONNX files as three: exact for kernels of low rank, within the error else, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from command_line import ok
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import MODEL
from edgekit.errors import ModelError, UserError
from edgekit.export.convolution import decompose_file
from edgekit.manifest import Manifest


def kernel(shape: tuple[int, ...], rank: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """A kernel whose first two modes have this rank."""
    random = np.random.default_rng(seed)
    core = random.standard_normal((rank, rank, *shape[2:]))
    U, V = random.standard_normal((shape[0], rank)), random.standard_normal((shape[1], rank))
    return (np.einsum("ab...,oa,ib->oi...", core, U, V) / rank).astype(np.float32)


def network(path: Path, *, rank: int = 4, group: int = 1, dims: int = 2, shared: bool = False) -> Path:
    """x (n, 16, 12, ...) -> conv 3x3, stride 2, padded, with bias -> relu -> conv 1x1 -> y."""
    first = kernel((24, 16 // group, *(3,) * dims), min(rank, 16 // group))
    tensors = {"K": first, "b": np.linspace(-1, 1, 24).astype(np.float32), "L": kernel((8, 24, *(1,) * dims), 8)}
    options = {"strides": [2] * dims, "pads": [1] * (2 * dims), "group": group}
    nodes = [
        helper.make_node("Conv", ["x", "K", "b"], ["h"], name="first", **options),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "L"], ["y"], name="second"),
    ]
    if shared:
        nodes.append(helper.make_node("Conv", ["x", "K"], ["z"], name="third"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *"abc"[: dims + 1]])
        for name in ("y", *("z" * shared))
    ]
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, *(12,) * dims])
    held = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = helper.make_graph(nodes, "net", [start], ends, initializer=held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def outputs(path: Path, dims: int = 2) -> list[Any]:
    x = np.random.default_rng(5).standard_normal((2, 16, *(12,) * dims)).astype(np.float32)
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})


@pytest.mark.parametrize("dims", [1, 2])
def test_a_kernel_of_low_rank_is_decomposed_exactly(tmp_path: Path, dims: int) -> None:
    source = network(tmp_path / "m.onnx", dims=dims)
    manifest = decompose_file(source, tmp_path / "small", error=1e-4)
    assert Manifest.load(tmp_path / "small") == manifest
    step = manifest.steps[0]
    assert (step.changed, step.after_bytes < step.before_bytes) == (1, True)
    assert [(skip.path, skip.reason[:17]) for skip in step.skipped] == [("second", "its kernel is 1 x")]
    ours, theirs = outputs(tmp_path / "small" / MODEL, dims)[0], outputs(source, dims)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    made = onnx.load(str(tmp_path / "small" / MODEL))
    onnx.checker.check_model(made)
    shapes = {tensor.name: tuple(tensor.dims[:2]) for tensor in made.graph.initializer}
    assert shapes == {"b": (24,), "L": (8, 24), "first_0_in": (4, 16), "first_0_core": (4, 4), "first_0_out": (24, 4)}


def test_the_error_that_is_allowed_is_kept(tmp_path: Path) -> None:
    source = network(tmp_path / "m.onnx", rank=12)
    facts = decompose_file(source, tmp_path / "small", error=0.4).steps[0].facts
    assert 0.1 < facts["worst_relative_error"] <= 0.4


def test_a_kernel_with_two_readers_stays_while_one_reads_it(tmp_path: Path) -> None:
    source = network(tmp_path / "m.onnx", shared=True)
    assert decompose_file(source, tmp_path / "small", error=1e-4).steps[0].changed == 2
    for ours, theirs in zip(outputs(tmp_path / "small" / MODEL), outputs(source), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [({"rank": 16}, 0.0, "would not be smaller"), ({"group": 4}, 0.1, "groups of channels")],
)
def test_what_does_not_get_smaller_is_said(tmp_path: Path, options: Any, error: float, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        decompose_file(network(tmp_path / "m.onnx", **options), tmp_path / "small", error=error)
    assert not (tmp_path / "small").exists()


def test_files_and_errors_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="error must be from 0"):
        decompose_file(network(tmp_path / "m.onnx"), tmp_path / "small", error=1.0)
    with pytest.raises(UserError, match="there is no"):
        decompose_file(tmp_path / "none.onnx", tmp_path / "small")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="must be a whole ONNX model"):
        decompose_file(tmp_path / "broken.onnx", tmp_path / "small")


def test_the_command(tmp_path: Path) -> None:
    source = network(tmp_path / "m.onnx")
    done = ok("compress", source, "-o", tmp_path / "small", "-r", "tucker", "--json")
    assert json.loads(done.out)["steps"][0]["step"] == "onnx.tucker"
