"""Hadamard sparse attention of one token, in NumPy: what `HadamardSparseAttention` means.

Keys k and queries q of a key-value head, d channels each, are coded in C = d - d_f channels, of which the first
d_f = 16 floor(d / 64) have four bits and the others two, by calibrated matrices E and D, (C, d) each, and a center mu.
With o_c = 15/2 or 3/2:

    code(k)_c  = clamp(floor(E (k - mu))_c + o_c + 1/2, 0, 2 o_c)         d / 4 bytes a position
    t_j        = (u sum_c Q_c (code_jc - o_c) + q . mu) / (sqrt(d) ln 2)  estimates q . k_j / sqrt(d), in powers of two
                 with Q = D q in integers of -127..127 and u their unit
    w_j        = 2^(t_j - R) within 1 %, R the whole number nearest to the largest t of the candidates

Positions that are attended exactly, S: the newest `recent`, the first `sinks`, and of the others, the candidates, those
with the largest share in any query head of the group, `budget` in all. The share of a position is what the softmax
gives it, where the window and the sinks count with their logits and the candidates with their estimates. The other
candidates count as they are estimated: the next `followers` of them, F, with their own values u_j = v_j, the rest with
u_j = the mean value of their page of sixteen positions. Of equal ones those are taken whose codes stand first:

    y = (sum_{j in S} e^{q.k_j / sqrt(d)} v_j + sum_{j not in S} 2^{t_j} u_j)
      / (sum_{j in S} e^{q.k_j / sqrt(d)}     + sum_{j not in S} 2^{t_j})

E holds Hadamard matrices times the eigenvectors of the keys' covariance, as the queries weigh it; its formula stands in
`edgekit.export.sparse`. Channels that matter have four bits, those that matter least none.

Source: Adamas, arXiv 2510.18413, for 2-bit codes of Hadamard-transformed keys as what selects. We deviate: the query is
not coded, the keys are centred and coded in calibrated channels, all query heads of a group share one selection, window
and sinks are always attended, and what is not selected is not dropped. docs/sparse-attention.md has what each is worth.

Codes are of the keys as the cache keeps them. A page's codes and mean are made when it is whole; before that by a token
that selects, the codes where its window does not hold the whole page.

What is left of a page's weight meets its mean value in whole numbers. A block of 256 positions, sixteen pages p, adds

    A / 127 sum_p P_p M_pc        P_p = rint(127 a_p / A),  a_p = scale_p sum_j 2^{t_j},  A = max_p a_p

to the numerator, M_pc being the mean's numbers of 8 bits and scale_p their scale; the denominator has the weights.

Layout of the codes: `csrc/sparse.inl`, and of means, rows in 8 bits as those of a cache (`edgekit.kernels.attention`):
`csrc/path.h`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import BLOCK, PAGE
from edgekit.cache_rows import round_rows
from edgekit.weight import Bytes, Floats

RUN = 16  # channels that stand together
_LOG2E = 1.44269504088896341


def fine_channels(head_dim: int) -> int:
    """How many channels have four bits; as many have none, and the others two."""
    return head_dim // 64 * RUN


def coded_channels(head_dim: int) -> int:
    """How many channels have a code."""
    return head_dim - fine_channels(head_dim)


def offsets(head_dim: int) -> Floats:
    """What zero is in each coded channel, between two codes: o_c."""
    fine = fine_channels(head_dim)
    return np.repeat(np.array([7.5, 1.5], np.float32), [fine, head_dim - 2 * fine])


def encode(keys: Floats, center: Floats, encoder: Floats) -> Bytes:
    """Codes of keys (n, d), (n, C) uint8; encoder: (C, d). What is not a number has code 0."""
    offset = offsets(keys.shape[-1])
    levels = np.floor((keys - center) @ encoder.T) + (offset + np.float32(0.5))
    codes: Bytes = np.clip(np.nan_to_num(levels, nan=0.0), 0, 2 * offset).astype(np.uint8)
    return codes


def store(packed: Bytes, codes: Bytes, first: int, *, head_dim: int) -> None:
    """Write codes (n, C) of positions `first` on into a head's packed codes."""
    count, fine = len(codes), fine_channels(head_dim)
    nibbles = codes[:, :fine].reshape(count, fine // 8, 2, 4)  # line, part, byte
    quarters = codes[:, fine:].reshape(count, (head_dim - 2 * fine) // RUN, 4, 4)
    lines = np.concatenate([_joined(nibbles, 4), _joined(quarters, 2)], axis=1)  # (n, line, byte)
    position = np.arange(first, first + count)
    tiles = packed.reshape(-1, PAGE, head_dim // RUN, PAGE, 4)  # block, tile, line, page, byte
    tiles[position // BLOCK, position % PAGE, :, position % BLOCK // PAGE] = lines


def load(packed: Bytes, total: int, *, head_dim: int) -> Bytes:
    """Undo `store` for the first `total` positions, (total, C)."""
    position, split = np.arange(total), fine_channels(head_dim) // 8
    tiles = packed.reshape(-1, PAGE, head_dim // RUN, PAGE, 4)
    lines = tiles[position // BLOCK, position % PAGE, :, position % BLOCK // PAGE]
    parts = [_parted(lines[:, :split], 4), _parted(lines[:, split:], 2)]
    return np.concatenate([part.reshape(total, part.shape[1] * part.shape[2] * 4) for part in parts], axis=1)


def _joined(codes: Bytes, bits: int) -> Bytes:
    """Codes (n, line, part, byte) of so many bits as bytes, the first part lowest."""
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)[:, None]
    joined: Bytes = (codes << shifts).sum(2, dtype=np.uint8)
    return joined


def _parted(lines: Bytes, bits: int) -> Bytes:
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)[:, None]
    parted: Bytes = lines[:, :, None] >> shifts & np.uint8((1 << bits) - 1)
    return parted


def average(packed: Bytes, values: Floats, first: int) -> None:
    """Write the mean values of the pages from position `first` on into a head's packed means; values: (total, d)."""
    total, head_dim = values.shape
    blocks = packed.reshape(-1, PAGE * (head_dim + 2))
    for page in range(first // PAGE, -(-total // PAGE)):
        rows = values[page * PAGE : (page + 1) * PAGE].astype(np.float32)
        mean = rows.sum(0, dtype=np.float32) * np.float32(1 / len(rows))
        codes, scale = round_rows(mean)
        block, lane = blocks[page // PAGE], page % PAGE
        lines = block[: PAGE * head_dim].reshape(-1, 4, RUN, 4)  # sixteen channels, four pages, channel, page
        lines[:, lane // 4, :, lane % 4] = codes.view(np.uint8).reshape(-1, RUN)
        block[PAGE * head_dim :].view(np.float16)[lane] = scale


def load_means(packed: Bytes, head_dim: int) -> tuple[Floats, Floats]:
    """The mean values of all pages: whole numbers (pages, d) and their scales (pages,)."""
    blocks = packed.reshape(-1, PAGE * (head_dim + 2))
    lines = blocks[:, : PAGE * head_dim].view(np.int8).reshape(len(blocks), -1, 4, RUN, 4)
    codes = lines.transpose(0, 2, 4, 1, 3).reshape(-1, head_dim).astype(np.float32)
    scales = np.ascontiguousarray(blocks[:, PAGE * head_dim :]).view(np.float16).reshape(-1).astype(np.float32)
    return codes, scales


def weigh_means(pages: NDArray[np.float64], codes: Floats, scales: Floats) -> NDArray[np.float64]:
    """Weights (heads, pages), a whole number of blocks, times the pages' mean values (`load_means`), (heads, d)."""
    scaled = (pages * scales).reshape(len(pages), -1, PAGE)
    peaks = scaled.max(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        numbers = np.where(peaks > 0, np.rint(scaled * (127 / peaks)), 0)
    weighed: NDArray[np.float64] = (numbers * (peaks / 127)).reshape(len(pages), -1) @ codes.astype(np.float64)
    return weighed


def estimates(q: Floats, codes: Bytes, center: Floats, decoder: Floats) -> NDArray[np.float64]:
    """t of queries (heads, d) at every position, (heads, total); decoder: (C, d)."""
    spread = q @ decoder.T
    peak = np.abs(spread).max(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        integers = np.where(peak > 0, np.rint(spread * (np.float32(127) / peak)), 0)
    products = integers.astype(np.float64) @ (codes - offsets(q.shape[-1])).T
    logits: NDArray[np.float64] = (peak / 127).astype(np.float64) * products + (q @ center)[:, None]
    logits *= _LOG2E / np.sqrt(q.shape[-1])
    return logits


def grains(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms t to base 2 as whole numbers of 256ths, 15 lower than they are: see `rough_power`."""
    whole: NDArray[np.float64] = np.rint(256 * t) - 15
    return whole


def rough_power(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """2^t within 4 %, and right on average; 2^-126 at least.

    n + f = t, in whole `grains`, becomes (1 + f) 2^n, as the bits of a float do. As the native kernel computes it; an
    estimate is off by more.
    """
    whole = np.maximum(grains(t), -126 * 256)
    n = np.floor(whole / 256)
    y: NDArray[np.float64] = np.ldexp(1 + whole / 256 - n, n.astype(np.int32))
    return y


def select(
    shares: NDArray[np.float64], *, budget: int, sinks: int, recent: int, followers: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which positions are attended exactly, and which follow with their own values; (total,) each.

    shares: of each position, the largest of the group's query heads, or their logarithms, (total,).
    """
    total = len(shares)
    position = np.arange(total)
    forced = _forced(total, budget=budget, sinks=sinks, recent=recent)
    free = max(0, budget - int(forced.sum()))
    place = position // BLOCK * BLOCK + position % PAGE * PAGE + position % BLOCK // PAGE
    order = np.lexsort((place, np.where(forced, np.inf, -shares)))
    exact, following = forced.copy(), np.zeros(total, bool)
    exact[order[:free]] = True
    following[order[free : free + followers]] = True
    return exact, following & ~forced


def _forced(total: int, *, budget: int, sinks: int, recent: int) -> NDArray[np.bool_]:
    """The window and the sinks, as far as the budget allows."""
    recent = min(recent, budget)
    position = np.arange(total)
    forced: NDArray[np.bool_] = (position < min(sinks, budget - recent)) | (position >= total - recent)
    return forced


def attend(
    q: Floats,
    exact_q: NDArray[np.float64],
    keys: Floats,
    values: Floats,
    codes: Bytes,
    means: tuple[Floats, Floats],
    center: Floats,
    decoder: Floats,
    *,
    budget: int,
    sinks: int,
    recent: int,
    followers: int,
) -> Floats:
    """Attention of the queries (heads, d) of one token over one key-value head: keys, values (total, d), codes
    (total, C), means as `load_means` gives them, the decoder (C, d); returns (heads, d). budget >= 1, total > budget.
    exact_q: the queries as they meet the keys."""
    total, head_dim = keys.shape
    t = estimates(q, codes, center, decoder)
    forced = _forced(total, budget=budget, sinks=sinks, recent=recent)
    reference = np.rint(t[:, ~forced].max(-1, keepdims=True, initial=-1e30))
    weights = np.where(forced, 0, rough_power(np.minimum(t - reference, 1)))
    scores = exact_q @ keys.astype(np.float64).T / np.sqrt(head_dim)
    top = np.maximum(scores[:, forced].max(-1, keepdims=True), reference / _LOG2E)
    weights *= np.exp(reference / _LOG2E - top)
    near = np.exp(scores - top)
    whole = np.where(forced, near, weights).sum(-1, keepdims=True)
    shares = grains(t) - np.rint(256 * (_LOG2E * top + np.log2(whole)))
    exact, following = select(shares.max(0), budget=budget, sinks=sinks, recent=recent, followers=followers)
    near, far = np.where(exact, near, 0), np.where(exact, 0, weights)
    pages = np.zeros((len(q), len(means[0]) * PAGE))
    pages[:, :total] = np.where(following, 0, far)
    y = near[:, exact] @ values[exact].astype(np.float64) + far[:, following] @ values[following].astype(np.float64)
    y += weigh_means(pages.reshape(len(q), -1, PAGE).sum(-1), *means)
    y /= near.sum(-1, keepdims=True) + far.sum(-1, keepdims=True)
    rounded: Floats = y.astype(np.float32)
    return rounded
