"""Which factored matrices a bundle keeps as factors, and which it multiplies out, decided for a device.

Factors are kept where they are predicted no slower than the matrices at the same bits, for a token and for a prompt
(`edgekit.tn.cost`). Matrices that read the same input are decided together: as matrices they are one node of our graph
(q, k and v; gate and up), as factors each is two, and norm, activation and joining are nodes of their own.

Else the product takes the factors' place: of float factors as floats, exactly, of quantised ones on the factors' own
grid, with searched scales, so that the model is no slower than one that was never factored. That rounds once more: how
far it takes the model is measured and recorded, and beyond a bound refused (`edgekit.export.export`). To avoid it, name
the device in the recipe (`device` of `tn.lowrank`), which then leaves such matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Checkpoint, Entry
from edgekit.device import Device
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.report import Measurement
from edgekit.tn.cost import NODE_SECONDS, Cost, bandwidth_gbs, cost_of, cost_of_dense
from edgekit.weight import Factored, Quantized

SLACK = 1.03  # what the model of costs and two runs of one model may be off by: it is no reason to round once more
# What our graph makes one node of, and the nodes that it takes beside the products where it cannot.
TOGETHER = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 2),  # norm, joining
    (("mlp.gate_proj", "mlp.up_proj"), 3),  # norm, activation, product
)


def contracted(
    checkpoint: Checkpoint, device: Device | None, *, native: bool = True
) -> tuple[Checkpoint, tuple[Measurement, ...]]:
    """A view of the checkpoint with products in place of factors that do not pay, and the decisions for the record.

    `native`: the graph is of our operators, which join matrices.
    """
    factored = [module for module, entry in checkpoint.structure.items() if entry.kind == "factored"]
    if not factored:
        return checkpoint, ()
    replaced: dict[str, Grid | None] = {}  # module -> the grid that its product is rounded to
    notes: list[str] = []
    for modules, beside in _groups(factored, native=native):
        pays, note = _decision(checkpoint, modules, beside, device)
        for module in modules:
            weight = checkpoint.weight(module)
            if isinstance(weight, Factored):
                notes.append(f"{module} {'kept' if pays else 'contracted'}: {note}")
                if not pays:
                    replaced[module] = _grid(weight)
    where = f"on {device.title}, " if device else ""
    count = len(factored)
    rows = (
        Measurement(
            "factored matrices kept", count - len(replaced), "", "predicted",
            note=f"{where}at {bandwidth_gbs(device):g} GB/s and {1e6 * NODE_SECONDS:g} us a node",
        ),
        Measurement("factored matrices contracted", len(replaced), "", "predicted", note="; ".join(notes)),
    )  # fmt: skip
    return (_view(checkpoint, replaced) if replaced else checkpoint), rows


def _groups(factored: Sequence[str], *, native: bool) -> list[tuple[tuple[str, ...], int]]:
    """Modules that are decided together, some of them factored, and the nodes that factors take beside themselves."""
    found: dict[tuple[str, ...], int] = {}
    for module in factored:
        together: tuple[str, ...] = (module,)
        nodes = 0
        for names, beside in TOGETHER if native else ():
            for name in names:
                if module.endswith(f".{name}"):
                    prefix = module.removesuffix(name)
                    together, nodes = tuple(f"{prefix}{other}" for other in names), beside
        found[together] = nodes
    return list(found.items())


def _decision(checkpoint: Checkpoint, modules: tuple[str, ...], beside: int, device: Device | None) -> tuple[bool, str]:
    """Whether factors pay, and the predicted times."""
    factors = dense = Cost(0, 0, 0, 0.0)
    for module in modules:
        weight = checkpoint.weight(module)
        own = cost_of(weight, device)
        factors += own
        bits = 8 * weight.size_bytes / own.numbers
        dense += cost_of_dense(weight.shape, bits=bits, device=device) if isinstance(weight, Factored) else own
    factors, dense = factors.with_nodes(beside), dense.with_nodes(1 - len(modules))
    return factors.pays_against(dense, slack=SLACK), f"{1e6 * factors.seconds:.1f} us for {1e6 * dense.seconds:.1f} us"


def _grid(weight: Factored) -> Grid | None:
    """The grid of quantised factors, None for floats."""
    found = [factor for factor in weight.factors if isinstance(factor, Quantized)]
    if not found:
        return None
    finest = max(found, key=lambda factor: factor.bits)
    offset = "zero" if finest.zeros is not None else "symmetric" if finest.minima is None else "minimum"
    return Grid(finest.bits, finest.block, offset, "float16" if finest.steps is None else "int8")  # type: ignore[arg-type]


def _view(checkpoint: Checkpoint, replaced: Mapping[str, Grid | None]) -> Checkpoint:
    gone = {part for module in replaced for part in (module, *checkpoint.parts(module))}
    structure = {name: entry for name, entry in checkpoint.structure.items() if name not in gone}
    for module, grid in replaced.items():
        if grid:
            structure[module] = Entry("quantized", grid.bits, grid.block, checkpoint.shape(module))
    reader = _Products(checkpoint, replaced, frozenset(gone))
    return dataclasses.replace(checkpoint, tensors=reader, structure=structure)


@dataclass
class _Products:
    """A TensorReader that multiplies factors out as they are asked for; it keeps the last product."""

    checkpoint: Checkpoint
    replaced: Mapping[str, Grid | None]
    gone: frozenset[str]
    _last: tuple[str, dict[str, NDArray[Any]]] = field(default=("", {}))

    def names(self) -> Sequence[str]:
        kept = [name for name in self.checkpoint.tensors.names() if name.rpartition(".")[0] not in self.gone]
        for module, grid in self.replaced.items():
            kept += [f"{module}.{leaf}" for leaf in (_leaves(grid) if grid else ("weight",))]
            if f"{module}.bias" in self.checkpoint.tensors.names():
                kept.append(f"{module}.bias")
        return sorted(kept)

    def files(self) -> set[Path]:
        return self.checkpoint.tensors.files()

    def shape(self, name: str) -> tuple[int, ...]:
        module, _, leaf = name.rpartition(".")
        if module in self.replaced and leaf == "weight":
            return self.checkpoint.shape(module)
        return self.read(name).shape if self._is_product(name) else self.checkpoint.tensors.shape(name)

    def read(self, name: str) -> NDArray[Any]:
        if not self._is_product(name):
            return self.checkpoint.tensors.read(name)
        module = name.rpartition(".")[0]
        if self._last[0] != module:
            self._last = module, self._product(module)
        return self._last[1][name]

    def _is_product(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return module in self.replaced and leaf != "bias"

    def _product(self, module: str) -> dict[str, NDArray[Any]]:
        W: NDArray[np.float32] = self.checkpoint.weight(module).dense()
        grid = self.replaced[module]
        if not grid:
            return {f"{module}.weight": W}
        found = round_to_grid(W, grid, where=module, search=True)
        return {f"{module}.{leaf}": getattr(found, leaf) for leaf in _leaves(grid)}


def _leaves(grid: Grid) -> list[str]:
    """The parts that a matrix on the grid is stored in."""
    offsets = {"symmetric": [], "zero": ["zeros"], "minimum": ["minima"]}[grid.offset]
    return ["codes", "scales", *offsets, *(["steps"] if grid.scales == "int8" else ())]
