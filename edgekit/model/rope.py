"""Rotary position embedding: the angles by which pairs of query and key channels turn with the position.

Channel i is paired with channel i + d/2 and both turn by position * f_i, f_i = theta ** (-2i / d).
Source: Su et al., arXiv 2104.09864; the `llama3` bands as in the release of Llama 3.1, the pairing as in transformers.
Stretching for longer contexts: linear (Chen et al., arXiv 2306.15595), ntk (a larger base), yarn (Peng et al., arXiv
2309.00071, sections 3.2 to 3.4; as transformers computes it, the bounds of the blend are whole pairs).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgekit.model.config import Rope


def frequencies(rope: Rope, head_dim: int) -> NDArray[np.float64]:
    """The angle per position of each pair, (head_dim / 2,) float64, after the model's scaling."""
    plain = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "ntk":  # a larger base: the fastest pair keeps its angle, the slowest turns `factor` times slower
        theta = rope.theta * rope.factor ** (head_dim / max(1, head_dim - 2))
        slower: NDArray[np.float64] = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        return slower
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    wavelength = 2 * math.pi / plain
    turns = rope.original_context / wavelength
    blend = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def tables(rope: Rope, head_dim: int, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of every angle, each (positions, head_dim / 2) float32."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * frequencies(rope, head_dim)
    scale = rope.attention_factor
    return (scale * np.cos(angles)).astype(np.float32), (scale * np.sin(angles)).astype(np.float32)


def _yarn(rope: Rope, plain: NDArray[np.float64], head_dim: int) -> NDArray[np.float64]:
    """Pairs that turn more than `beta_fast` times over the original context stay, those below `beta_slow` turns are
    stretched, and those between are blended by their index."""

    def pair_that_turns(times: float) -> float:
        wavelengths = rope.original_context / (times * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), head_dim - 1)
    blend = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return blend * plain / rope.factor + (1 - blend) * plain
