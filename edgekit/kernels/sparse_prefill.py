"""Block-sparse attention of many tokens, in NumPy: what the sparse operators mean with a `prefill_budget`.

Tokens come in tiles of 64, keys in blocks of 64. A tile attends to the first block, to what lies at most about 256
positions before it or in it, and of the other blocks to the prefill_budget / 64 with the largest share. The share of a
block is what the softmax over the other blocks' keys gives to its keys, by the estimates of `edgekit.kernels.sparse`:
the largest for any query head of the group and any eighth token of the tile. What is not chosen does not count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekit.kernels import sparse
from edgekit.weight import Bytes, Floats

TOKENS, KEYS, NEAR, EVERY = 64, 64, 256, 8


def hidden(q: Floats, codes: Bytes, center: Floats, decoder: Floats, *, first: int, budget: int) -> NDArray[np.bool_]:
    """Which keys (T, total) the tokens of a group's queries (heads, T, d) do not attend to, from position `first` on;
    codes (total, C) of the key-value head, decoder (C, d)."""
    tokens, total = q.shape[1], len(codes)
    away = np.zeros((tokens, total), bool)
    for start in range(0, tokens, TOKENS):
        tile = q[:, start : start + TOKENS]
        near = max(1, (first + start - NEAR) // KEYS)
        if near - 1 <= budget // KEYS:
            continue
        shares = _shares(tile, codes[: near * KEYS], center, decoder)
        order = np.argsort(-shares, kind="stable")
        for block in 1 + order[budget // KEYS :]:
            away[start : start + TOKENS, block * KEYS : (block + 1) * KEYS] = True
    return away


def _shares(q: Floats, codes: Bytes, center: Floats, decoder: Floats) -> NDArray[np.float64]:
    """The largest share of each block but the first."""
    tokens = q.shape[1]
    asked = q[:, min(EVERY, tokens) - 1 :: EVERY].reshape(-1, q.shape[2])
    t = sparse.estimates(asked, codes, center, decoder)[:, KEYS:]
    weights = sparse.rough_power(t - np.rint(t.max(-1, keepdims=True)))
    masses = weights.reshape(len(asked), -1, KEYS).sum(-1)
    shares: NDArray[np.float64] = (masses / masses.sum(-1, keepdims=True)).max(0)
    return shares
