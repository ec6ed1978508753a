"""Calibrate sparse attention: where the keys of each head lie, and how far they spread.

The exact graph reads a text, and its own key cache is measured. For each key-value head of a sparse layer, over the
rotated keys k of the text's tokens, each turned on to a position somewhere in the whole context:

    center = mean of k over the tokens            step = standard deviation of h(k - center), over tokens and channels

h is the Hadamard transform of `edgekit.kernels.sparse`. Where the text's tokens really stood, slow channels have hardly
turned: their mean would be right for the beginning of a context and wrong for its end (docs/log.md). Without a text the
model writes one itself, at temperature 1 from a fixed seed: no data is needed, and the keys are those that the model
meets when it speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import LayerCache
from edgekit.errors import ModelError, UserError
from edgekit.kernels import sparse
from edgekit.model.config import Rope
from edgekit.model.rope import frequencies
from edgekit.runtime.engine import Engine
from edgekit.runtime.sampling import Sampler, Sampling
from edgekit.weight import Floats

TOKENS = 2048  # of a calibration text
WRITTEN = 1024  # where the model writes it
FEWEST = 256


@dataclass(frozen=True)
class SparseOptions:
    """Sparse attention as an export asks for it.

    budget: positions that a token attends to exactly, unless the runtime is told otherwise. recent and sinks: the
    newest and first positions, which are always among them. followers: how many further positions count with their own
    values, but estimated weights. dense_layers: layers at the beginning that stay exact.
    dense_below: contexts up to this length are attended exactly. Raises UserError for a value out of range.
    """

    budget: int = 256
    recent: int = 32
    sinks: int = 4
    followers: int = 192
    dense_layers: int = 2
    dense_below: int = 1024

    def __post_init__(self) -> None:
        rules = (("budget", 1), ("recent", 1), ("sinks", 0), ("followers", 0), ("dense_layers", 0), ("dense_below", 0))
        for name, least in rules:
            value = getattr(self, name)
            if not least <= value <= 1 << 20:
                raise UserError(f"{name} of sparse attention must be from {least} to {1 << 20}: got {value}")


@dataclass(frozen=True)
class KeyStatistics:
    """Of one layer: center (kv_heads, head_dim) and step (kv_heads,), float32."""

    center: Floats
    step: Floats


def written_text(engine: Engine, prompt: Sequence[int], *, tokens: int) -> list[int]:
    """`tokens` tokens that the model writes after `prompt`, at temperature 1; always the same."""
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    ids = list(prompt)
    logits = engine.forward(ids)
    while len(ids) < tokens:
        ids.append(sampler(logits[-1], ids))
        logits = engine.forward(ids[-1:])
    return ids


def calibrate(engine: Engine, layers: Sequence[LayerCache], rope: Rope, *, context: int) -> list[KeyStatistics]:
    """The statistics of every layer, from the tokens in the engine's cache, for a context of `context` positions.

    Raises UserError when they are too few, ModelError when keys are not numbers or all alike.
    """
    count = len(engine.tokens)
    if count < FEWEST:
        raise UserError(f"a calibration text must have at least {FEWEST} tokens: this one has {count}")
    found = []
    for index in range(len(layers)):
        keys = engine.keys(index).astype(np.float32)
        differ = bool((keys.std(axis=1) > 0).any(axis=1).all())
        keys = _spread(keys, frequencies(rope, keys.shape[2]), context)
        center = keys.mean(axis=1, dtype=np.float64).astype(np.float32)
        step = sparse.hadamard(keys - center[:, None]).std(axis=(1, 2), dtype=np.float64).astype(np.float32)
        if not (np.isfinite(center).all() and np.isfinite(step).all() and differ):
            raise ModelError(f"keys must be numbers that differ: those of layer {index} are not; is the model damaged?")
        found.append(KeyStatistics(center, step))
    return found


def _spread(keys: Floats, speeds: NDArray[np.float64], context: int) -> Floats:
    """Keys (heads, n, d) of positions 0 to n - 1, turned on to n positions spread evenly over the context, shuffled."""
    count = keys.shape[1]
    position = np.random.default_rng(0).permutation(count) * (context / count)
    angles = (position - np.arange(count))[:, None] * speeds
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = np.split(keys, 2, axis=2)
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=2)
