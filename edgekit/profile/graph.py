"""What an ONNX file holds, read without the onnx package: nodes, constants and their sizes. No values are loaded.

A protobuf message is a row of (key, value), key = field number * 8 + wire type: 0 varint, 1 eight bytes, 2 length and
bytes, 5 four bytes. Only the fields below are looked at. Not supported: graphs inside nodes (If, Loop) are not walked.
Source: Protocol Buffers, Encoding; ONNX, onnx.proto3.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import ModelError, UserError
from edgekit.kernels.opset import OPS, layer_attributes, layer_parts

# TensorProto.DataType -> bits of an element; strings have no size.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 25: 2, 26: 2,
}  # fmt: skip
# Operators that read a few rows of their table, and which input that table is.
_ROW_READERS = {"Gather", "GatherBlockQuantized", "QuantEmbedding"}
_ROTARY = {name for name in OPS if "Attention" in name and not name.endswith("Layer")} | {
    "GroupQueryAttention",
    "RotaryEmbedding",
}


@dataclass(frozen=True)
class Constant:
    """A stored tensor. `place` is equal for two names of the same bytes."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    place: tuple[str, int] | str


@dataclass(frozen=True)
class Node:
    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[str, int]  # its integer attributes


@dataclass(frozen=True)
class OnnxGraph:
    nodes: tuple[Node, ...]
    constants: dict[str, Constant]

    def layer_bytes(self) -> dict[str, int]:
        """Bytes of the constants by `layer_of`, each place counted once, for the first node that reads it."""
        seen: set[object] = set()
        sizes: dict[str, int] = {}
        for node in self.nodes:
            for name in node.inputs:
                constant = self.constants.get(name)
                if constant is not None and constant.place not in seen:
                    seen.add(constant.place)
                    layer = layer_of(node.name or name)
                    sizes[layer] = sizes.get(layer, 0) + constant.bytes
        return sizes

    def read_bytes(self) -> dict[str, float]:
        """Bytes of constants that one token reads, by `group_of`. A table of rows is read for one row only."""
        sizes: dict[str, float] = {}
        for node in self.nodes:
            group = group_of(node)
            for index, name in enumerate(node.inputs):
                constant = self.constants.get(name)
                if constant is None:
                    continue
                rows = 1
                if node.op in _ROW_READERS:
                    rows = node.numbers.get("N", constant.shape[0] if constant.shape else 1)
                elif node.op in _ROTARY and index > 0 and len(constant.shape) == 2:
                    rows = constant.shape[0]
                sizes[group] = sizes.get(group, 0.0) + constant.bytes / max(1, rows)
        return sizes

    def parameters(self) -> int:
        """Weights of the matrices and tables, a tied one once."""
        matrices = {constant.place: count for constant, count in self._matrices()}
        return sum(matrices.values())

    def _matrices(self) -> Iterator[tuple[Constant, int]]:
        """Each node's matrix, and its elements: N * K where the node says so, else by its shape."""
        for node in self.nodes:
            stored = [self.constants[name] for name in node.inputs if name in self.constants]
            large = max((c for c in stored if len(c.shape) > 1), key=lambda constant: constant.bytes, default=None)
            if large is not None and node.op not in _ROTARY:
                told = node.numbers.get("N", 0) * node.numbers.get("K", 0)
                yield large, told or math.prod(large.shape)


def read_graph(path: Path) -> OnnxGraph:
    """The nodes and constants of a model file. Raises UserError: not readable; ModelError: not ONNX, or cut off."""
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # goes with the last view of it
        return _graph(memoryview(pages), path)
    except OSError as problem:
        raise UserError(f"a model must be a readable file: {path} ({problem.strerror})") from problem
    except ValueError as problem:
        raise ModelError(f"{path} must be an ONNX model: {problem}") from problem


def layer_of(name: str) -> str:
    """`model.layers.3.mlp.gated` -> `layer 3`; what stands outside of layers keeps the name of its module."""
    found = re.search(r"(?:^|[./_])(?:layers?|blocks?|h|stages?)[./_](\d+)(?:[./_]|$)", name)
    if found:
        return f"layer {int(found[1])}"
    if "lm_head" in name:
        return "head"
    if "embed" in name:
        return "head" if re.search(r"NormQuantLinear|head", name) else "embedding"
    if re.search(r"(?:^|[./])keep[./_]|^keep$", name):
        return "last tokens"
    return "norm" if "norm" in name.lower() else "other"


def group_of(node: Node) -> str:
    """The group of tensors that a node's weights belong to: attention, mlp, embedding, head, norm or other."""
    name = node.name
    if "logits" in node.outputs or layer_of(name) == "head":
        return "head"
    if node.op in _ROW_READERS or layer_of(name) == "embedding":
        return "embedding"
    if re.search(r"self_attn|attention|attn", name):
        return "attention"
    if re.search(r"mlp|ffn|feed_forward", name):
        return "mlp"
    return "norm" if "norm" in name.lower() else "other"


def _graph(model: memoryview, path: Path) -> OnnxGraph:
    graphs = [value for field, value in _fields(model) if field == 7 and isinstance(value, memoryview)]
    if not graphs:
        raise ModelError(f"{path} must be an ONNX model: it holds no graph")
    nodes: list[Node] = []
    constants: dict[str, Constant] = {}
    for field, value in _fields(graphs[-1]):
        if field == 1 and isinstance(value, memoryview):
            nodes += _taken_apart(_node(value))
        elif field == 5 and isinstance(value, memoryview):
            constant = _constant(value)
            constants[constant.name] = constant
    return OnnxGraph(tuple(nodes), constants)


def _taken_apart(node: Node) -> list[Node]:
    """A layer as the operators that it is made of; any other node as it is. What passes between them has no name."""
    attention = node.op.removesuffix("Layer")
    if node.op not in OPS or attention == node.op or len(node.inputs) != len(OPS[node.op].inputs):
        return [node]
    given = dict(zip(OPS[node.op].inputs, node.inputs, strict=True))
    found = []
    for prefix, part in layer_parts(attention).items():
        inputs = tuple(given.get(f"{prefix}{name}", "") for name in part.inputs)
        numbers = {
            name: node.numbers[outer] for name, outer in layer_attributes(prefix, part).items() if outer in node.numbers
        }
        name = (
            f"{node.name}.{'mlp' if prefix in ('gate_', 'down_') else 'self_attn'}.{prefix or 'attention_'}{part.name}"
        )
        found.append(Node(name, part.name, inputs, (), numbers))
    return found


def _node(message: memoryview) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    numbers: dict[str, int] = {}
    for field, value in _fields(message):
        if field in texts and isinstance(value, memoryview):
            texts[field].append(_text(value))
        elif field == 5 and isinstance(value, memoryview):
            attribute = dict(_fields(value))
            name, number = attribute.get(1), attribute.get(3)
            if isinstance(name, memoryview) and isinstance(number, int):
                numbers[_text(name)] = number
    return Node("".join(texts[3][-1:]), "".join(texts[4][-1:]), tuple(texts[1]), tuple(texts[2]), numbers)


def _constant(message: memoryview) -> Constant:
    shape: list[int] = []
    name, kind, stored = "", 0, 0
    outside: dict[str, str] = {}
    for field, value in _fields(message):
        if field == 1:
            shape += list(_varints(value)) if isinstance(value, memoryview) else [value]
        elif field == 2 and isinstance(value, int):
            kind = value
        elif field == 8 and isinstance(value, memoryview):
            name = _text(value)
        elif field == 9 and isinstance(value, memoryview):
            stored = len(value)
        elif field == 13 and isinstance(value, memoryview):
            entry = {key: _text(text) for key, text in _fields(value) if isinstance(text, memoryview)}
            outside[entry.get(1, "")] = entry.get(2, "")
    size = math.prod(shape) * _BITS.get(kind, 0) // 8
    place: tuple[str, int] | str = name
    if "location" in outside:
        texts = [outside.get(key, "") for key in ("offset", "length")]
        offset, length = (int(text) if text.isdecimal() and len(text) < 19 else 0 for text in texts)
        stored, place = length, (outside["location"], offset)
    return Constant(name, tuple(shape), stored or size, place)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: (number, integer or bytes). Raises ValueError where it is cut off or none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at} begins no field")
        if at + size > len(message):
            raise ValueError(f"it is cut off at byte {len(message)}")
        yield key >> 3, message[at : at + size]
        at += size


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"a number does not end at byte {at}")


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "replace")
