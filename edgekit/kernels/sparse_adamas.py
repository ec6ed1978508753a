"""Adamas as published, in NumPy: what the sparse operators mean with the attribute `adamas`.

Hadamard-transformed keys and queries have 2 bits a channel; t is a threshold:

    code(x)_c = [h_c > -t] + [h_c > 0] + [h_c > t],   h = x H / sqrt(d)          d a power of two
    D_j       = sum_c |code(q)_c - code(k_j)_c|

One token attends exactly to the `budget` positions with the smallest D, of equal ones to those whose codes stand first
in `edgekit.kernels.sparse`'s order, and to nothing else; the newest position is always among them.

Source: Adamas, arXiv 2510.18413: L1 distances, as its accuracy scripts take them (its fast kernel takes 3 for codes 1
and 2); the newest position always, as its CUDA path. We deviate: thresholds are calibrated, half the standard deviation
of transformed queries and of keys, where the paper has 10 for every model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekit.cache_rows import hadamard
from edgekit.kernels import sparse
from edgekit.weight import Bytes, Floats


def code(x: Floats, threshold: float) -> Bytes:
    """Codes (n, d) of rows (n, d)."""
    h = hadamard(x)
    codes: Bytes = (h > -threshold).astype(np.uint8) + (h > 0) + (h > threshold)
    return codes


def store(packed: Bytes, codes: Bytes, first: int) -> None:
    """Write codes (n, d) of positions `first` on into a head's packed codes: of each its high bits, then the low."""
    bits = np.stack([codes >> 1, codes & 1], axis=1)  # (n, 2, d)
    planes = np.packbits(bits, axis=-1, bitorder="little").reshape(len(codes), codes.shape[1] // 4)
    packed.reshape(-1, codes.shape[1] // 4)[first : first + len(codes)] = planes


def load(packed: Bytes, total: int, head_dim: int) -> Bytes:
    """Undo `store` for the first `total` positions, (total, d)."""
    planes = packed.reshape(-1, 2, head_dim // 8)[:total]
    high, low = np.unpackbits(planes, axis=-1, bitorder="little").swapaxes(0, 1)
    codes: Bytes = 2 * high + low
    return codes


def distances(q: Bytes, keys: Bytes) -> NDArray[np.int64]:
    """L1 distances (heads, n) of codes (heads, d) and (n, d)."""
    apart: NDArray[np.int64] = np.abs(q[:, None].astype(np.int64) - keys).sum(-1)
    return apart


def attend(
    q: Floats,
    exact_q: NDArray[np.float64],
    keys: Floats,
    values: Floats,
    codes: Bytes,
    threshold: float,
    *,
    budget: int,
    sinks: int,
    recent: int,
) -> Floats:
    """Attention of the queries (heads, d) of one token over one key-value head, as `sparse.attend`: the heads share
    what is selected, by the smallest distance of any."""
    near = -distances(code(q, threshold), codes).min(0).astype(np.float64)
    exact, _ = sparse.select(near, budget=budget, sinks=sinks, recent=recent, followers=0)
    scores = exact_q @ keys[exact].astype(np.float64).T / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y: Floats = (weights / weights.sum(-1, keepdims=True) @ values[exact]).astype(np.float32)
    return y
