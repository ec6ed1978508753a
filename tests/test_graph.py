"""The graph builder: where constants lie in the weights file, and that onnxruntime reads them back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekit.bundle import MODEL, WEIGHTS
from edgekit.export.graph import ALIGNMENT, INLINE_BYTES, Graph

LARGE = np.arange(3 * 1000, dtype=np.float32).reshape(3, 1000)


def places(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (offset, length) of the constants that lie in the weights file."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            assert where["location"] == WEIGHTS
            found[tensor.name] = (int(where["offset"]), int(where["length"]))
    return found


def build(folder: Path, constants: dict[str, NDArray[np.float32]], *, shared: bool = False) -> None:
    """A graph whose output is x plus every constant, and plus the first one's bytes in another shape if `shared`."""
    folder.mkdir(exist_ok=True)
    with Graph(folder) as graph:
        state = "x"
        for name, values in constants.items():
            state = graph.node("Add", [state, graph.constant(name, values)], f"add.{name}")
        if shared:
            first = next(iter(constants))
            flat = graph.same_bytes("flat", first, [constants[first].size])
            total = graph.node("ReduceSum", [flat], "total", keepdims=0)
            state = graph.node("Add", [state, total], "add.total")
        graph.node("Identity", [state], "last", outputs=["y"])
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 1000]) for name in "xy"]
        graph.save(value[:1], value[1:], title="test")


def run(folder: Path) -> NDArray[np.float32]:
    session = ort.InferenceSession(str(folder / MODEL))
    result: NDArray[np.float32] = session.run(None, {"x": np.zeros((3, 1000), np.float32)})[0]
    return result


def test_constants_are_aligned_and_read_back(tmp_path: Path) -> None:
    row = np.linspace(0, 1, 1000, dtype=np.float32)
    build(tmp_path, {"a": LARGE, "b": row, "c": LARGE * 2})
    found = places(tmp_path)
    assert all(offset % ALIGNMENT == 0 for offset, _ in found.values())
    assert [offset for offset, _ in found.values()] == [0, 12032, 16064]
    assert [length for _, length in found.values()] == [12000, 4000, 12000]
    assert (tmp_path / WEIGHTS).stat().st_size == 16064 + 12000
    assert np.array_equal(run(tmp_path), LARGE + row + LARGE * 2)


def test_transposed_constants_are_stored_as_they_look(tmp_path: Path) -> None:
    build(tmp_path, {"a": np.ascontiguousarray(LARGE.T).T})
    assert np.array_equal(run(tmp_path), LARGE)


@pytest.mark.parametrize("size", [INLINE_BYTES // 4, INLINE_BYTES // 4 + 1])
def test_small_constants_stay_in_the_model_file(tmp_path: Path, size: int) -> None:
    with Graph(tmp_path) as graph:
        graph.node("Identity", [graph.constant("a", np.ones(size, np.float32))], "read")
        graph.save([], [], title="test")
    assert ("a" in places(tmp_path)) is (size * 4 > INLINE_BYTES)


def test_a_name_is_stored_once(tmp_path: Path) -> None:
    with Graph(tmp_path) as graph:
        assert graph.constant("a", LARGE) == graph.constant("a", LARGE) == "a"
        graph.save([], [], title="test")
    assert (tmp_path / WEIGHTS).stat().st_size == LARGE.nbytes


@pytest.mark.parametrize("values", [LARGE, np.array([[1.0], [2.0], [3.0]], np.float32)], ids=["in the file", "inline"])
def test_two_names_for_the_same_bytes(tmp_path: Path, values: NDArray[np.float32]) -> None:
    build(tmp_path, {"a": values}, shared=True)
    found = places(tmp_path)
    assert found.get("flat") == found.get("a")
    np.testing.assert_allclose(run(tmp_path), np.broadcast_to(values + values.sum(), (3, 1000)), rtol=1e-6)


def test_absent_inputs_are_cut_at_the_end_and_kept_inside(tmp_path: Path) -> None:
    with Graph(tmp_path) as graph:
        graph.contrib("Op", ["a", "", "b", "", ""], "n", outputs=["y", "", "z"], bits=4)
        graph.save([], [], title="test")
    (node,) = onnx.load(tmp_path / MODEL).graph.node
    assert (list(node.input), list(node.output), node.domain) == (["a", "", "b"], ["y", "", "z"], "com.microsoft")


def test_the_same_graph_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(tmp_path / name, {"a": LARGE, "b": LARGE + 1})
    for file in (MODEL, WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_weights_file_is_closed_when_building_fails(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    with pytest.raises(KeyError, match="absent"), graph:
        graph.same_bytes("b", "absent", [1])
    with pytest.raises(ValueError, match="closed"):
        graph.constant("a", LARGE)
