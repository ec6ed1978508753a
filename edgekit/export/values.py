"""Value heads smaller than key heads: rows of zeros make them fit the attention operators, which know one size.

The operators read queries, keys and values of one size a layer. A layer whose values have fewer channels gets rows of
zeros in v, and what attention gives is cut back before o reads it: the same sums, exactly. It saves the columns of o
and the rows of v in the checkpoint, but no cache and, in the bundle, no rows of v. Where keys and values of a layer
have the same size, however small, nothing is padded and the cache is as small as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError
from edgekit.model.heads import Heads

KEPT = ("codes", "zeros")  # rows of zeros have a scale of zero, so what their codes are does not matter


def padded_values(checkpoint: Checkpoint, heads: Sequence[Heads]) -> Checkpoint:
    """A view of the checkpoint with v as wide as k in all layers. Raises ModelError: a v to be padded is factored."""
    wider = {
        f"model.layers.{at}.self_attn.v_proj": one for at, one in enumerate(heads) if one.value_size < one.key_size
    }
    if not wider:
        return checkpoint
    structure = dict(checkpoint.structure)
    for module, one in wider.items():
        entry = structure.get(module)
        if entry is not None and entry.kind == "factored":
            raise ModelError(f"values of a size of their own must not be factored to be exported: {module} is")
        if entry is not None:
            structure[module] = dataclasses.replace(entry, shape=(one.keys * one.key_size, entry.shape[1]))
    return dataclasses.replace(checkpoint, tensors=_Padded(checkpoint, wider), structure=structure)


@dataclass(frozen=True)
class _Padded:
    """A TensorReader that puts rows of zeros behind each value head of some layers."""

    checkpoint: Checkpoint
    wider: dict[str, Heads]

    def names(self) -> Sequence[str]:
        return self.checkpoint.tensors.names()

    def files(self) -> set[Path]:
        return self.checkpoint.tensors.files()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.checkpoint.tensors.shape(name)
        one = self.wider.get(name.rpartition(".")[0])
        return shape if one is None else (one.keys * one.key_size, *shape[1:])

    def read(self, name: str) -> NDArray[Any]:
        values = self.checkpoint.tensors.read(name)
        module, _, leaf = name.rpartition(".")
        one = self.wider.get(module)
        if one is None:
            return values
        split = values.reshape(one.keys, one.value_size, *values.shape[1:])
        empty = [(0, 0), (0, one.key_size - one.value_size), *((0, 0) for _ in values.shape[1:])]
        padded = np.pad(split, empty, mode="edge" if leaf in KEPT else "constant")
        return np.ascontiguousarray(padded.reshape(one.keys * one.key_size, *values.shape[1:]))
