"""Models of the healing runs in memory: float weights, other grids, and weights as they would be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgekit.checkpoint import Checkpoint
from edgekit.heal.decoder import ROLES, Decoder, Layer, layer_forward
from edgekit.heal.fake_quant import FakeQuant, Levels, fake_quantise
from edgekit.weight import Quantized


@dataclass(frozen=True)
class Memory:
    """A TensorReader of arrays."""

    tensors: dict[str, Any]

    def names(self) -> Sequence[str]:
        return sorted(self.tensors)

    def files(self) -> set[Path]:
        return set()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Any:
        return self.tensors[name]


def dense(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with float matrices."""
    tensors = {}
    for matrices, vectors in checkpoint.blocks.values():
        tensors.update({f"{path}.weight": checkpoint.weight(path).dense() for path in matrices})
        tensors.update({name: checkpoint.vector(name) for name in vectors})
    return replace(checkpoint, tensors=Memory(tensors), structure={})


def regridded(checkpoint: Checkpoint, grid: Callable[[str], Levels | None]) -> Checkpoint:
    """The same model, float in each matrix that does not lie on the grid that `grid` has for it."""
    tensors, structure = {}, {}
    for matrices, vectors in checkpoint.blocks.values():
        tensors.update({name: checkpoint.vector(name) for name in vectors})
        for path in matrices:
            weight = checkpoint.weight(path)
            if isinstance(weight, Quantized) and FakeQuant.of(weight).levels == grid(path):
                names = [name for name in checkpoint.tensors.names() if name.startswith(f"{path}.")]
                tensors.update({name: checkpoint.tensors.read(name) for name in names})
                structure[path] = checkpoint.structure[path]
            else:
                tensors[f"{path}.weight"] = weight.dense()
    return replace(checkpoint, tensors=Memory(tensors), structure=structure)


def plain(model: Decoder, dtype: torch.dtype) -> Decoder:
    """A copy that computes uncompiled in `dtype` with the weights as they would be written."""
    copy = Decoder.__new__(Decoder)
    torch.nn.Module.__init__(copy)
    copy.config, copy.recompute, copy.dtype, copy._tables = model.config, False, dtype, None
    copy.embedding, copy.norm = _Constant(model.embedding, dtype), model.norm
    copy.lm_head = None if model.lm_head is None else _Constant(model.lm_head, dtype)
    copy.layers = torch.nn.ModuleList()
    for layer in model.layers:
        twin = Layer.__new__(Layer)
        torch.nn.Module.__init__(twin)
        twin.config, twin.dtype, twin.compute = layer.config, dtype, layer_forward
        twin.biases, twin.gains = layer.biases, layer.gains
        for role in ROLES:
            setattr(twin, role, _Constant(getattr(layer, role), dtype))
        copy.layers.append(twin)
    return copy


class _Constant(torch.nn.Module):
    """A matrix that is only read."""

    def __init__(self, matrix: Any, dtype: torch.dtype) -> None:
        super().__init__()
        quantiser = getattr(matrix, "quantiser", None)
        compute = getattr(quantiser, "compute", None)
        if quantiser is not None:
            quantiser.compute = fake_quantise  # for once without compiling
        self.W = matrix.weight().detach().to(dtype)
        if quantiser is not None:
            quantiser.compute = compute

    def weight(self) -> torch.Tensor:
        return self.W
