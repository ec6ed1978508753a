"""Graphs whose matrices have 8 bits and whose activations have 16, or are floats: what accelerators multiply.

A matrix becomes 8-bit codes with a scale for each output channel, symmetric. With ranges, each activation is rounded to
16 bits (uint16 over its range); tensors that hold the same values, as before and after a transposition, share a scale.
Without, activations are floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.checkpoint import Checkpoint
from edgekit.export.graph import Graph
from edgekit.weight import Floats

Range = tuple[float, float]
LEVELS = 65535  # of uint16, above the lowest
FLOAT_HIDDEN = 1e4  # what hides a position where nothing is rounded: float16 holds it


@dataclass
class Rounding:
    """What becomes of activations: floats where `ranges` is None, else 16 bits over each one's range.

    `hidden` is what the mask takes away from scores, `divisors` are d of the stream where channels need some. A graph
    that was built names in `observed` whose ranges it needs, in `stream` those of them that hold the stream's channels,
    and in `norms` which of the stream each norm reads.
    """

    ranges: Mapping[str, Range] | None = None
    hidden: float = FLOAT_HIDDEN
    divisors: Floats | None = None
    observed: list[str] = field(default_factory=list)
    stream: list[str] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph: `name` for those that read it, `codes` its 16 bits, `range` whose range it has."""

    name: str
    range: str
    codes: str = ""


@dataclass
class RoundedGraph:
    """Nodes over rounded tensors, which a flow is written with: `edgekit.export.static`, `static_encoder`."""

    checkpoint: Checkpoint
    graph: Graph
    rounding: Rounding

    def matrix(
        self, module: str, x: Tensor, *, scale: float = 1.0, divisors: Floats | None = None, name: str = ""
    ) -> Tensor:
        """(x W^T + b) * scale / divisors."""
        name, codes = name or module, f"{module}.int8"
        steps = f"{codes}.scales" if divisors is None else f"{codes}.divided_scales"
        if codes not in self.graph or steps not in self.graph:
            W = self.checkpoint.weight(module).dense() * np.float32(scale)
            widths = np.maximum(np.abs(W).max(1), 1e-12).astype(np.float32) / np.float32(127)
            if codes not in self.graph:
                self.graph.constant(codes, np.rint(W / widths[:, None]).astype(np.int8).T)
            self.graph.constant(steps, widths if divisors is None else widths / divisors)
        zeros = self.graph.constant(f"{codes}.zeros", np.zeros(self.checkpoint.shape(module)[0], np.int8))
        weight = self.graph.node("DequantizeLinear", [codes, steps, zeros], f"{name}.weight", axis=1)
        if not self.checkpoint.has(f"{module}.bias"):
            return self.op("MatMul", [x, Tensor(weight, "")], name)
        bias = self.checkpoint.vector(f"{module}.bias") * np.float32(scale)
        product = self.op("MatMul", [x, Tensor(weight, "")], f"{name}.product")
        return self.op(
            "Add", [product, self.vector(f"{module}.bias", bias if divisors is None else bias / divisors)], name
        )

    def vector(self, name: str, values: Floats) -> Tensor:
        """A constant, in 16 bits where activations are."""
        if self.rounding.ranges is None:
            return Tensor(self.graph.constant(f"{name}.float", values), name)
        scale, zero = _encoding(float(values.min()), float(values.max()))
        codes = np.clip(np.rint(values / scale) + zero, 0, LEVELS).astype(np.uint16)
        inputs = [(f"{name}.uint16", codes), (f"{name}.scale", np.array(scale)), (f"{name}.zero", np.array(zero))]
        names = [self.graph.constant(constant, value) for constant, value in inputs]
        return Tensor(self.graph.node("DequantizeLinear", names, f"{name}.rounded"), name)

    def op(self, kind: str, inputs: Sequence[Tensor], name: str, **attributes: Any) -> Tensor:
        """A node whose result has a range of its own."""
        return self.rounded(self.graph.node(kind, [x.name for x in inputs], name, **attributes))

    def move(
        self, kind: str, inputs: Sequence[Tensor], name: str, constants: Sequence[str] = (), **attributes: Any
    ) -> Tensor:
        """A node that moves values, whose range stays that of the first input."""
        moved = self.graph.node(kind, [*(x.name for x in inputs), *constants], name, **attributes)
        return self.rounded(moved, range_of=inputs[0].range)

    def reshape(self, x: Tensor, shape: Sequence[int], name: str) -> Tensor:
        return self.move("Reshape", [x], name, [self.integers(*shape)])

    def rounded(self, name: str, *, range_of: str = "") -> Tensor:
        if not range_of:
            self.rounding.observed.append(name)
        if self.rounding.ranges is None:
            return Tensor(name, range_of or name)
        encoding = self.encoding(range_of or name)
        codes = self.graph.node("QuantizeLinear", [name, *encoding], f"{name}.uint16")
        rounded = self.graph.node("DequantizeLinear", [codes, *encoding], f"{name}.rounded")
        return Tensor(rounded, range_of or name, codes)

    def encoding(self, name: str) -> tuple[str, str]:
        """The constants of scale and zero point of a range."""
        assert self.rounding.ranges is not None
        scale, zero = _encoding(*self.rounding.ranges[name])
        return (
            self.graph.constant(f"{name}.scale", np.array(scale)),
            self.graph.constant(f"{name}.zero", np.array(zero)),
        )

    def integers(self, *values: int) -> str:
        return self.graph.constant(f"integers.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def extremes(self, kind: str, output: str, names: Sequence[str]) -> None:
        """The least or the largest value of each tensor as one output; of each channel, where that is of the stream."""
        axes = [self.integers(0, 1)] if output.startswith("stream") else []
        found = []
        for name in names:
            extreme = self.graph.node(kind, [name, *axes], f"{name}.{output}", keepdims=0)
            found.append(self.graph.node("Reshape", [extreme, self.integers(1, -1)], f"{name}.{output}.row"))
        self.graph.node("Concat", found, output, axis=0)


def _encoding(low: float, high: float) -> tuple[np.float32, np.uint16]:
    """Scale and zero point of a range, which is widened to hold zero."""
    low, high = min(0.0, low), max(0.0, high)
    scale = np.float32(max(high - low, 1e-6) / LEVELS)
    return scale, np.uint16(np.clip(np.rint(-low / scale), 0, LEVELS))
