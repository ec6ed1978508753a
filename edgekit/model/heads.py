"""The heads of one attention layer, as its own weights shape them.

A layer has the model's `head_dim` channels in each query, key and value, unless steps took some away:

    values   fewer channels in each value head: v has fewer rows, o fewer columns (`prune.values`)
    pairs    fewer rotary pairs in each query and key head: q and k have fewer rows, and the vector
             `self_attn.rotary_pairs` names those of the model that are left (`prune.pairs`)

Scores are always q k^T / sqrt(channels of a key): what takes pairs away scales q by what that changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import ModelError, UserError
from edgekit.weight import Floats

PAIRS = "self_attn.rotary_pairs"  # a vector of a layer: indices of the model's pairs, ascending, as float32
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """Query heads, key and value heads, channels of a query or key, channels of a value, and the rotary pairs left."""

    queries: int
    keys: int
    key_size: int
    value_size: int
    pairs: tuple[int, ...]

    def is_usual(self, head_dim: int) -> bool:
        return self.key_size == self.value_size == head_dim


def heads_of(shapes: Mapping[str, Shape], head_dim: int, pairs: Floats | None, *, where: str) -> Heads:
    """The heads of a layer from its shapes (out, in) by leaf, such as `q_proj`, and its vector of pairs if it has one.

    Raises ModelError: they do not fit each other.
    """
    left = range(head_dim // 2) if pairs is None else [int(pair) for pair in pairs]
    if sorted(set(left)) != list(left) or not left or not 0 <= left[0] <= left[-1] < head_dim // 2:
        raise ModelError(f"rotary pairs must ascend, from 0 to {head_dim // 2 - 1}: {where} has {list(left)[:8]}")
    if pairs is not None and not np.array_equal(pairs, left):
        raise ModelError(f"rotary pairs must be whole numbers: those of {where} are not")
    size = 2 * len(left)
    queries, keys, values = (shapes[f"{leaf}_proj"][0] for leaf in "qkv")
    if queries % size or keys % size or queries % keys:
        raise ModelError(
            f"query heads must be a multiple of key heads, each of {size} rows: {where} has {queries} query rows and"
            f" {keys} key rows"
        )
    heads = keys // size
    mixed = shapes["o_proj"][1]
    if values % heads or mixed != values // heads * (queries // size):
        raise ModelError(
            f"value heads must fit key heads, of which there are {heads}: "
            + ", ".join(f"{where}.self_attn.{leaf}_proj has shape {shapes[f'{leaf}_proj']}" for leaf in "vo")
        )
    return Heads(queries // size, heads, size, values // heads, tuple(left))


def heads_of_block(block: Block, head_dim: int) -> Heads:
    """The heads of a decoder layer in memory. Raises as `heads_of`."""
    prefix = f"model.{block.name}."
    shapes = {f"{x}_proj": block.matrices[f"{prefix}self_attn.{x}_proj"].shape for x in "qkvo"}
    return heads_of(shapes, head_dim, block.vectors.get(prefix + PAIRS), where=block.name)


def heads_of_layer(checkpoint: Checkpoint, index: int) -> Heads:
    """The heads of a decoder layer, from shapes. Raises as `heads_of`."""
    layer = f"model.layers.{index}"
    shapes = {f"{x}_proj": checkpoint.shape(f"{layer}.self_attn.{x}_proj") for x in "qkvo"}
    pairs = checkpoint.vector(f"{layer}.{PAIRS}") if checkpoint.has(f"{layer}.{PAIRS}") else None
    return heads_of(shapes, checkpoint.decoder.head_dim, pairs, where=layer)


def refuse_thin_heads(checkpoint: Checkpoint, what: str) -> None:
    """Raises UserError where a layer's heads have sizes of their own, which `what` cannot work with."""
    for index in range(checkpoint.decoder.layers):
        heads = heads_of_layer(checkpoint, index)
        if not heads.is_usual(checkpoint.decoder.head_dim):
            raise UserError(
                f"{what} needs heads of {checkpoint.decoder.head_dim} channels: layer {index} has {heads.key_size} in"
                f" keys and {heads.value_size} in values; do it before prune.values and prune.pairs, or without them"
            )


def turned_by(table: NDArray[Any], pairs: tuple[int, ...]) -> NDArray[Any]:
    """The columns of a rotary table (positions, head_dim / 2) that a layer's pairs turn by."""
    return table if len(pairs) == table.shape[1] else np.ascontiguousarray(table[:, list(pairs)])
