"""Which factored matrices a bundle keeps as factors, and which it multiplies out, decided one by one for a device.

Factors are kept where they are predicted no slower than the matrix at the same bits, for a token and for a prompt
(`edgekit.tn.cost`). Else the product takes their place: of float factors as floats, exactly. Of quantised factors the
product lies on no grid, so it is rounded to 8 bits, whose error is below the factors' own, where that is no slower
than the factors; where it would be slower they stay, since to round again at few bits would cost quality that nobody
asked for. To avoid that, name the device in the recipe (`device` of `tn.lowrank`), which then leaves such matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Checkpoint, Entry
from edgekit.device import Device
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.report import Measurement
from edgekit.tn.cost import bandwidth_gbs, cost_of, cost_of_dense
from edgekit.weight import Dense, Factored, Quantized

GRID = Grid(8, 32, "symmetric", "float16")


def contracted(checkpoint: Checkpoint, device: Device | None) -> tuple[Checkpoint, tuple[Measurement, ...]]:
    """A view of the checkpoint with products in place of factors that do not pay, and the decisions for the record."""
    modules = [module for module, entry in checkpoint.structure.items() if entry.kind == "factored"]
    if not modules:
        return checkpoint, ()
    replaced: dict[str, bool] = {}  # module -> whether its product is rounded to 8 bits
    notes: list[str] = []
    for module in modules:
        weight = checkpoint.weight(module)
        assert isinstance(weight, Factored)
        replaces, note = _decision(weight, device)
        notes.append(f"{module} {'contracted' if replaces is not None else 'kept'}: {note}")
        if replaces is not None:
            replaced[module] = replaces
    where = f"on {device.title}" if device else f"at {bandwidth_gbs(None):g} GB/s, no device being named"
    rows = (
        Measurement("factored matrices kept", len(modules) - len(replaced), "", how="predicted", note=where),
        Measurement("factored matrices contracted", len(replaced), "", how="predicted", note="; ".join(notes)),
    )
    return (_view(checkpoint, replaced) if replaced else checkpoint), rows


def _decision(weight: Factored, device: Device | None) -> tuple[bool | None, str]:
    """None to keep the factors; else whether the product is rounded. And why."""
    factors = cost_of(weight, device)
    dense = cost_of_dense(weight.shape, bits=8 * weight.size_bytes / factors.numbers, device=device)
    note = f"{1e6 * factors.seconds:.1f} us for {1e6 * dense.seconds:.1f} us"
    if factors.pays_against(dense):
        return None, note
    if all(isinstance(factor, Dense) for factor in weight.factors):
        return False, note
    eight = cost_of_dense(weight.shape, bits=8 * GRID.size_bytes(weight.shape) / dense.numbers, device=device)
    if eight.seconds <= factors.seconds and weight.shape[1] >= GRID.block:
        return True, f"{note}, {1e6 * eight.seconds:.1f} us at 8 bits"
    return None, f"{note}, but {1e6 * eight.seconds:.1f} us at 8 bits, which the product needs"


def _view(checkpoint: Checkpoint, replaced: dict[str, bool]) -> Checkpoint:
    gone = {part for module in replaced for part in (module, *checkpoint.parts(module))}
    structure = {name: entry for name, entry in checkpoint.structure.items() if name not in gone}
    for module, rounded in replaced.items():
        if rounded:
            structure[module] = Entry("quantized", GRID.bits, GRID.block, checkpoint.shape(module))
    reader = _Products(checkpoint, replaced, frozenset(gone))
    return dataclasses.replace(checkpoint, tensors=reader, structure=structure)


@dataclass
class _Products:
    """A TensorReader that multiplies factors out as they are asked for; it keeps the last product."""

    checkpoint: Checkpoint
    replaced: dict[str, bool]
    gone: frozenset[str]
    _last: tuple[str, dict[str, NDArray[Any]]] = field(default=("", {}))

    def names(self) -> Sequence[str]:
        kept = [name for name in self.checkpoint.tensors.names() if name.rpartition(".")[0] not in self.gone]
        for module, rounded in self.replaced.items():
            kept += [f"{module}.codes", f"{module}.scales"] if rounded else [f"{module}.weight"]
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
        if not self.replaced[module]:
            return {f"{module}.weight": W}
        found: Quantized = round_to_grid(W, GRID, where=module)
        return {f"{module}.codes": found.codes, f"{module}.scales": found.scales}
