"""A small builder for ONNX graphs whose weights stream to a file beside the model.

Each constant is written once, at a cache line's boundary; two names may share one place. onnxruntime maps the pages
around a constant, wherever it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekit.bundle import MODEL, WEIGHTS

OPSET = 21
IR_VERSION = 10
ALIGNMENT = 64  # of constants in the file: a cache line, and the widest register
INLINE_BYTES = 1024  # smaller constants stay in the model file, where shape inference can see them


class Graph:
    """Nodes and constants of one model. Use as a context manager: the weights file is open inside the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._data = (folder / WEIGHTS).open("wb")

    def __enter__(self) -> Graph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Store `values` under `name` and return the name; a name that is there already is not stored again."""
        if name in self._constants:
            return name
        values = np.ascontiguousarray(values)
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        if values.nbytes <= INLINE_BYTES:
            self._constants[name] = onnx.numpy_helper.from_array(values, name)
            return name
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        offset = self._data.tell()
        self._data.write(values.data)
        self._constants[name] = _external(name, kind, values.shape, offset, values.nbytes)
        return name

    def flush(self) -> None:
        """Bring what was written so far to the disk, so that a saved graph can be run while others are still built."""
        self._data.flush()

    def __contains__(self, name: str) -> bool:
        """Whether there is a constant of this name."""
        return name in self._constants

    def same_bytes(self, name: str, other: str, shape: Sequence[int]) -> str:
        """A constant whose bytes are those of `other` in another shape: stored once, read twice."""
        source = self._constants[other]
        where = {entry.key: entry.value for entry in source.external_data}
        if where:
            self._constants[name] = _external(name, source.data_type, shape, int(where["offset"]), int(where["length"]))
        else:
            self._constants[name] = helper.make_tensor(name, source.data_type, shape, source.raw_data, raw=True)
        return name

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node called `name`; returns its first output, called `name` unless `outputs` names them.

        `attributes` are the operator's own. Trailing absent inputs are cut, inner ones stay as empty names.
        """
        kept = list(inputs)
        while kept and not kept[-1]:
            kept.pop()
        names = list(outputs) or [name]
        self._nodes.append(helper.make_node(op, kept, names, name=name, domain=domain, **attributes))
        return names[0]

    @property
    def size(self) -> int:
        """How many nodes there are."""
        return len(self._nodes)

    def since(self, size: int) -> list[onnx.NodeProto]:
        """The nodes that were added after there were `size`."""
        return self._nodes[size:]

    def cut(self, size: int) -> None:
        """Take away all nodes but the first `size`."""
        del self._nodes[size:]

    def contrib(
        self, op: str, inputs: Sequence[str], name: str, *, outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        """A node of onnxruntime's own operators, domain com.microsoft."""
        return self.node(op, inputs, name, outputs=outputs, domain="com.microsoft", **attributes)

    def save(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        title: str,
        functions: Sequence[onnx.FunctionProto] = (),
        file: str = MODEL,
    ) -> None:
        """Write the model file. `functions` define operators of domains beyond the stock ones.

        Another graph may follow, whose `file` shares the constants: nodes begin anew.
        """
        self._data.flush()
        read = {name for node in self._nodes for name in node.input}
        kept = [constant for name, constant in self._constants.items() if name in read]
        graph = helper.make_graph(self._nodes, title, inputs, outputs, initializer=kept)
        domains = {"": OPSET, "com.microsoft": 1, **{function.domain: 1 for function in functions}}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        model = helper.make_model(
            graph, opset_imports=opsets, functions=functions, ir_version=IR_VERSION, producer_name="edgekit"
        )
        (self._folder / file).write_bytes(model.SerializeToString(deterministic=True))
        self._nodes = []


def _external(name: str, kind: int, shape: Sequence[int], offset: int, length: int) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
