"""Rotary position embedding: the angles by which pairs of query and key channels turn with the position.

Channel i is paired with channel i + d/2 and both turn by position * f_i, f_i = theta ** (-2i / d).
Source: Su et al., arXiv 2104.09864; the `llama3` bands as in the release of Llama 3.1, the pairing as in transformers.
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
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    wavelength = 2 * math.pi / plain
    turns = rope.original_context / wavelength
    blend = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def tables(rope: Rope, head_dim: int, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of every angle, each (positions, head_dim / 2) float32."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * frequencies(rope, head_dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
