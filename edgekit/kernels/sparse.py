"""Hadamard sparse attention of one token, in NumPy: what `HadamardSparseAttention` means.

With h(x) = x H / sqrt(D), H the Hadamard matrix of size D, the head's channels padded to a power of two, and with a
calibrated center mu and step s of the keys of a key-value head:

    code(k)     = clamp(floor(h(k - mu) / s) + 2, 0, 3)                 two bits a channel
    estimate_j  = (a * s * sum_i Q_i (code_ji - 3/2) + q . mu) / sqrt(d) + v / 2
                  with Q = h(q) in integers of -127..127 and a their unit, v = 0.1188 |q|^2 s^2 / d
    w_j         = e^(estimate_j - the largest of all candidates)            for each query head, within 1 %

0.1188 is the mean squared error of the code of a normal variable; a weight whose exponent is off by a normal error of
variance v would be too small by e^(v/2) on average.

Positions that are attended exactly, S: the newest `recent`, the first `sinks`, and of the others, the candidates, those
whose estimate is nearest to the largest one in any query head of the group, `budget` in all. The other candidates count
as they are estimated: the next `followers` of them, F, with their own values u_j = v_j, the rest with u_j = the mean
value of their page of sixteen positions. Of equally near ones those are taken whose codes stand first:

    y = (sum_{j in S} e^{q.k_j / sqrt(d)} v_j + sum_{j not in S} e^{estimate_j} u_j)
      / (sum_{j in S} e^{q.k_j / sqrt(d)}     + sum_{j not in S} e^{estimate_j})

Source: Adamas, arXiv 2510.18413, for 2-bit codes of Hadamard-transformed keys as what selects. We deviate: the query is
not coded, the keys are centred and their step is calibrated, all query heads of a group share one selection, window and
sinks are always attended, and what is not selected is not dropped. docs/sparse-attention.md has what each is worth.

Layout of the codes: `csrc/sparse.inl`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import BLOCK, PAGE, code_width
from edgekit.weight import Bytes, Floats, Halves

CODE_ERROR = 0.1188  # mean squared error of the code of a normal variable, in squares of its deviation


def hadamard(x: Floats) -> Floats:
    """h(x) over the last axis, which is padded to `code_width`."""
    size = code_width(x.shape[-1])
    y = np.zeros((*x.shape[:-1], size), np.float32)
    y[..., : x.shape[-1]] = x
    half = 1
    while half < size:
        pairs = y.reshape(*y.shape[:-1], size // (2 * half), 2, half)
        a, b = pairs[..., 0, :].copy(), pairs[..., 1, :].copy()
        pairs[..., 0, :], pairs[..., 1, :] = a + b, a - b
        half *= 2
    y *= np.float32(1) / np.sqrt(np.float32(size))
    return y


def encode(keys: Floats, center: Floats, step: np.float32) -> Bytes:
    """Codes 0..3 of keys (n, d), (n, D) uint8; a key that is not a number has code 0."""
    levels = np.floor(hadamard(keys - center) / step) + 2
    codes: Bytes = np.clip(np.nan_to_num(levels, nan=0.0), 0, 3).astype(np.uint8)
    return codes


def store(packed: Bytes, codes: Bytes, first: int) -> None:
    """Write codes (n, D) of positions `first` on into a head's packed codes."""
    count, size = codes.shape
    parts = codes.reshape(count, size // 16, 4, 4)  # run, part, byte
    runs = (parts << (2 * np.arange(4, dtype=np.uint8))[:, None]).sum(2, dtype=np.uint8)  # (n, run, byte)
    position = np.arange(first, first + count)
    tiles = packed.reshape(-1, PAGE, size // 16, PAGE, 4)  # block, tile, run, page, byte
    tiles[position // BLOCK, position % PAGE, :, position % BLOCK // PAGE] = runs


def load(packed: Bytes, total: int, head_dim: int) -> Bytes:
    """Undo `store` for the first `total` positions, (total, D)."""
    size = code_width(head_dim)
    position = np.arange(total)
    tiles = packed.reshape(-1, PAGE, size // 16, PAGE, 4)
    runs = tiles[position // BLOCK, position % PAGE, :, position % BLOCK // PAGE]
    parts: Bytes = runs[:, :, None] >> (2 * np.arange(4, dtype=np.uint8))[:, None] & np.uint8(3)
    return parts.reshape(total, size)


def average(means: Halves, values: Halves, first: int) -> None:
    """Write the mean values of the pages from position `first` on; values: (total, d)."""
    for page in range(first // PAGE, -(-len(values) // PAGE)):
        rows = values[page * PAGE : (page + 1) * PAGE].astype(np.float32)
        means[page] = rows.sum(0, dtype=np.float32) * np.float32(1 / len(rows))


def estimates(q: Floats, codes: Bytes, center: Floats, step: np.float32) -> NDArray[np.float64]:
    """Estimated logits of queries (heads, d) at every position, (heads, total)."""
    spread = hadamard(q)
    peak = np.abs(spread).max(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        integers = np.where(peak > 0, np.rint(spread * (np.float32(127) / peak)), 0)
    products = integers.astype(np.float64) @ (codes.T - 1.5)
    logits: NDArray[np.float64] = (peak / 127 * step).astype(np.float64) * products + (q @ center)[:, None]
    logits /= np.sqrt(q.shape[-1])
    variance = CODE_ERROR * (spread.astype(np.float64) ** 2).sum(-1, keepdims=True) * float(step) ** 2 / q.shape[-1]
    logits += variance / 2
    return logits


def rough_exponential(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """e^x within 1 % for x <= 0, 2^-125 or so below -87: 2^n (1 + c1 f + c2 f^2), n + f = x / ln 2, |f| <= 1/2.

    As the native kernel computes it; an estimate is off by more.
    """
    t = np.maximum(x, -87.0) * 1.44269504088896341
    n = np.rint(t)
    f = t - n
    y: NDArray[np.float64] = np.ldexp((0.2402265 * f + 0.6931472) * f + 1, n.astype(np.int32))
    return y


def select(
    estimated: NDArray[np.float64], *, budget: int, sinks: int, recent: int, followers: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which positions are attended exactly, and which follow with their own values; (total,) each.

    estimated: each position's estimate less the head's largest one among the candidates, (heads, total).
    """
    total = estimated.shape[-1]
    recent = min(recent, budget)
    sinks = min(sinks, budget - recent)
    position = np.arange(total)
    forced = (position < sinks) | (position >= total - recent)
    distance = np.where(forced, np.inf, -estimated.max(0))
    free = max(0, budget - recent - sinks)
    place = position // BLOCK * BLOCK + position % PAGE * PAGE + position % BLOCK // PAGE
    order = np.lexsort((place, distance))
    exact, following = forced.copy(), np.zeros(total, bool)
    exact[order[:free]] = True
    following[order[free : free + followers]] = True
    return exact, following & ~forced


def attend(
    q: Floats,
    keys: Halves,
    values: Halves,
    codes: Bytes,
    means: Halves,
    center: Floats,
    step: np.float32,
    *,
    budget: int,
    sinks: int,
    recent: int,
    followers: int,
) -> Floats:
    """Attention of the queries (heads, d) of one token over one key-value head: keys, values (total, d), codes
    (total, D), means (pages, d); returns (heads, d). budget >= 1, total > budget."""
    total, head_dim = keys.shape
    logits = estimates(q, codes, center, step)
    free = np.arange(total)
    candidate = (free >= min(sinks, budget - min(recent, budget))) & (free < total - min(recent, budget))
    peak = logits[:, candidate].max(-1, keepdims=True, initial=-1e30)
    weights = np.where(candidate, rough_exponential(np.minimum(logits - peak, 0)), 0)
    exact, following = select(logits - peak, budget=budget, sinks=sinks, recent=recent, followers=followers)
    scores = q.astype(np.float64) @ keys[exact].astype(np.float64).T / np.sqrt(head_dim)
    top = np.maximum(scores.max(-1, keepdims=True), peak)
    near, far = np.exp(scores - top), np.where(exact, 0, weights) * np.exp(peak - top)
    own = np.where(following[:, None], values, means[free // PAGE]).astype(np.float64)
    y = near @ values[exact].astype(np.float64) + far @ own
    y /= near.sum(-1, keepdims=True) + far.sum(-1, keepdims=True)
    rounded: Floats = y.astype(np.float32)
    return rounded
