"""The attention operators of `edgekit.kernels.opset` in NumPy: their definition, slow and readable.

The cache of one layer is its arrays in the operators' order: keys and values (1, kv_heads, S, head_dim), and where
these are whole numbers of 8 or 4 bits (`edgekit.cache_rows`; then two to a byte), their scales (1, 2 kv_heads, S), the
keys' first. Keys are rounded as they were turned. One token's queries then have 15 bits (`reference.rounded`, a head as
one block), so that their products are of whole numbers; with 4 bits they are multiplied by the Hadamard matrix before.
Arguments are the operators' inputs in the table's order and their attributes by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit import cache_rows
from edgekit.bundle import PAGE
from edgekit.kernels import sparse, sparse_adamas, sparse_prefill
from edgekit.kernels.reference import STEPS, rms_norm, rounded
from edgekit.weight import Bytes, Floats, Halves, SignedBytes

Doubles = NDArray[np.float64]
Array = NDArray[Any]


def attention(
    qkv: Floats,
    past_key: Halves,
    past_value: Halves,
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    **attributes: Any,
) -> tuple[Array, ...]:
    """Causal attention of T tokens, the last of them at index `last`, over a cache of S places.

    qkv: (1, T, (num_heads + 2 kv_num_heads) head_dim), the heads of q, then k, then v. past_*: (1, kv_num_heads, S,
    head_dim). cos, sin: (places, head_dim / 2), a row for each position. local_window_size: a token sees that many, the
    last of which is itself; -1: all before it.

    Returns y (1, T, num_heads * head_dim), present_key and present_value, which are the past with rotated keys and
    values of the T tokens written in, rounded to float16. Places past `last` are not read, and what they hold
    afterwards is undefined.
    """
    return _dense(qkv, (past_key, past_value), last, cos, sin, **attributes)


def norm_attention(
    qkv: Floats,
    past_key: Halves,
    past_value: Halves,
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    q_norm: Floats,
    k_norm: Floats,
    **attributes: Any,
) -> tuple[Array, ...]:
    """`attention` after RMSNorm of each head of q and k: norms (head_dim,)."""
    return _dense(qkv, (past_key, past_value), last, cos, sin, norms=(q_norm, k_norm), **attributes)


def attention_whole(
    qkv: Floats,
    past_key: SignedBytes | Bytes,
    past_value: SignedBytes | Bytes,
    past_scales: Halves,
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    **attributes: Any,
) -> tuple[Array, ...]:
    """`attention` over a cache in 8 or 4 bits; also returns present_scales."""
    return _dense(qkv, (past_key, past_value, past_scales), last, cos, sin, **attributes)


def norm_attention_whole(
    qkv: Floats,
    past_key: SignedBytes | Bytes,
    past_value: SignedBytes | Bytes,
    past_scales: Halves,
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    q_norm: Floats,
    k_norm: Floats,
    **attributes: Any,
) -> tuple[Array, ...]:
    """`norm_attention` over a cache in 8 or 4 bits; also returns present_scales."""
    return _dense(qkv, (past_key, past_value, past_scales), last, cos, sin, norms=(q_norm, k_norm), **attributes)


def hadamard_sparse_attention(
    qkv: Floats,
    past_key: Halves,
    past_value: Halves,
    past_codes: Bytes,
    past_means: Bytes,
    *calibrated: Array,
    **attributes: Any,
) -> tuple[Array, ...]:
    """`attention` for several tokens, or with a prefill_budget `sparse_prefill`; for one token at a length above
    `dense_below` and `budget`, `sparse.attend`.

    past_codes (1, kv_num_heads, bytes) and past_means (1, kv_num_heads, bytes) summarise the cache in the layout of
    `edgekit.kernels.sparse`. `calibrated` are last, cos, sin, center, encoder, decoder and budget: center
    (kv_num_heads, head_dim), encoder and decoder (kv_num_heads, head_dim, coded channels) each, which is transposed.
    With the attribute `adamas` it is `sparse_adamas.attend`, center holds the thresholds (kv_num_heads, 2) of queries
    and keys, and encoder and decoder nothing. With `per_query_head` each query head selects for itself, else a group.
    """
    return _sparse(qkv, (past_key, past_value), (past_codes, past_means), *calibrated, **attributes)


def hadamard_sparse_attention_int8(
    qkv: Floats,
    past_key: SignedBytes,
    past_value: SignedBytes,
    past_scales: Halves,
    past_codes: Bytes,
    past_means: Bytes,
    *calibrated: Array,
    **attributes: Any,
) -> tuple[Array, ...]:
    """`hadamard_sparse_attention` over a cache in 8 bits; codes are of the keys as they are kept there."""
    return _sparse(qkv, (past_key, past_value, past_scales), (past_codes, past_means), *calibrated, **attributes)


# --- what they are made of --------------------------------------------------------------------------------------------


def rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """x (heads, T, head_dim) with each pair of channels (i, i + head_dim / 2) turned; cos, sin: (T, head_dim / 2)."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def read_cache(cache: Sequence[Array], total: int) -> tuple[Doubles, Doubles]:
    """Keys and values of the first `total` positions as they count, (kv_heads, total, head_dim) each."""
    keys, values = (part[0, :, :total] for part in cache[:2])
    if len(cache) == 2:
        return keys.astype(np.float64), values.astype(np.float64)
    key_scales, value_scales = np.split(cache[2][0, :, :total], 2)
    return cache_rows.restore(keys, key_scales), cache_rows.restore(values, value_scales)


def asked(q: Floats, cache: Sequence[Array]) -> Doubles:
    """Queries (heads, T, head_dim) as they meet the cache's keys."""
    if len(cache) == 2 or q.shape[1] > 1:
        return q.astype(np.float64)
    if cache[0].dtype == np.int8:
        return rounded(q, q.shape[2], STEPS["int16"])
    return cache_rows.hadamard(rounded(cache_rows.hadamard(q), q.shape[2], STEPS["int16"]))


def append(cache: Sequence[Array], keys: Floats, values: Floats, first: int) -> tuple[Array, ...]:
    """The cache with rotated keys and values (kv_heads, T, head_dim) at positions from `first` on."""
    present = tuple(part.copy() for part in cache)
    span = slice(first, first + keys.shape[1])
    if len(cache) == 2:
        present[0][0, :, span], present[1][0, :, span] = keys, values
        return present
    bits: Literal[8, 4] = 8 if cache[0].dtype == np.int8 else 4
    (key_codes, key_scales), (value_codes, value_scales) = (cache_rows.keep(rows, bits) for rows in (keys, values))
    present[0][0, :, span], present[1][0, :, span] = key_codes, value_codes
    present[2][0, :, span] = np.concatenate([key_scales, value_scales])
    return present


def _heads(qkv: Floats, num_heads: int, kv_num_heads: int, head_dim: int) -> tuple[Floats, Floats, Floats]:
    """q, k and v of (1, T, heads * head_dim), (heads, T, head_dim) each."""
    heads = qkv[0].reshape(qkv.shape[1], qkv.shape[2] // head_dim, head_dim).swapaxes(0, 1)
    q, k, v = np.split(heads, [num_heads, num_heads + kv_num_heads])
    return q, k, v


def _dense(
    qkv: Floats,
    cache: Sequence[Array],
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    *,
    num_heads: int,
    kv_num_heads: int,
    head_dim: int,
    local_window_size: int,
    epsilon: float = 0.0,
    norms: tuple[Floats, Floats] | None = None,
    away: NDArray[np.bool_] | None = None,
) -> tuple[Array, ...]:
    q, k, v = _heads(qkv, num_heads, kv_num_heads, head_dim)
    if norms is not None:
        q, k = rms_norm(q, norms[0], epsilon), rms_norm(k, norms[1], epsilon)
    tokens, total = q.shape[1], int(last.reshape(())) + 1
    position = np.arange(total - tokens, total)
    q, k = rotated(q, cos[position], sin[position]), rotated(k, cos[position], sin[position])
    present = append(cache, k, v, total - tokens)
    keys, values = (part.repeat(len(q) // len(k), axis=0) for part in read_cache(present, total))
    scores = asked(q, cache) @ keys.swapaxes(1, 2) / np.sqrt(head_dim)
    distance = position[:, None] - np.arange(total)
    scores[:, (distance < 0) | (distance >= (local_window_size if local_window_size > 0 else total))] = -np.inf
    if away is not None:  # (heads, T, total): attended by none
        scores[away] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True)) @ values  # (heads, T, head_dim)
    return y.swapaxes(0, 1).reshape(1, tokens, len(q) * head_dim).astype(np.float32), *present


def _sparse(
    qkv: Floats,
    cache: Sequence[Array],
    summaries: Sequence[Bytes],
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    center: Floats,
    encoder: Floats,
    decoder: Floats,
    budget: NDArray[np.int32],
    *,
    dense_below: int,
    per_query_head: int,
    adamas: int,
    prefill_budget: int,
    sinks: int,
    recent: int,
    followers: int,
    **sizes: Any,
) -> tuple[Array, ...]:
    kv_heads, head_dim = sizes["kv_num_heads"], sizes["head_dim"]
    tokens, total, positions = qkv.shape[1], int(last.reshape(())) + 1, int(budget.reshape(()))
    first, place = total - tokens, np.arange(total - tokens, total)
    q, k, v = _heads(qkv, sizes["num_heads"], kv_heads, head_dim)
    q, k = rotated(q, cos[place], sin[place]), rotated(k, cos[place], sin[place])
    keys, values = (part.astype(np.float32) for part in read_cache(append(cache, k, v, first), total))
    codes, means = (part.copy() for part in summaries)
    center = center.reshape(kv_heads, -1)
    away = np.zeros((kv_heads, tokens, total), bool)
    estimated = tokens == 1 and total > max(dense_below, positions)
    # While tokens are exact, a page's codes and mean are made once it is whole; what the window holds needs no codes.
    page, made = first // PAGE * PAGE, tokens > 1 or (tokens == 1 and total % PAGE == 0)
    encodes = made or (estimated and total - min(recent, positions) > page)
    for head, queries in enumerate(np.split(q, kv_heads)):
        if adamas:
            sparse_adamas.store(codes[0, head], sparse_adamas.code(k[head], center[head, 1]), first)
            continue
        if encodes:
            coded = sparse.encode(keys[head, page:], center[head], encoder.reshape(kv_heads, head_dim, -1)[head].T)
            sparse.store(codes[0, head], coded, page, head_dim=head_dim)
        if prefill_budget and tokens > 1:
            known = sparse.load(codes[0, head], total, head_dim=head_dim)
            decoded = decoder.reshape(kv_heads, head_dim, -1)[head].T
            away[head] = sparse_prefill.hidden(
                queries, known, center[head], decoded, first=first, budget=prefill_budget
            )
    y, *present = _dense(qkv, cache, last, cos, sin, away=away.repeat(len(q) // kv_heads, axis=0), **sizes)
    for head in range(kv_heads if not adamas and (estimated or made) else 0):
        sparse.average(means[0, head], values[head], first)
    if estimated:
        forced: dict[str, Any] = {"budget": positions, "sinks": sinks, "recent": recent}
        shared = 1 if per_query_head else len(q) // kv_heads  # query heads that share what is selected
        found = []
        for first in range(0, len(q), shared):
            head = first * kv_heads // len(q)
            queries, exact = q[first : first + shared, 0], asked(q, cache)[first : first + shared, 0]
            kept = keys[head], values[head]
            if adamas:
                coded = sparse_adamas.load(codes[0, head], total, head_dim)
                found.append(sparse_adamas.attend(queries, exact, *kept, coded, center[head, 0], **forced))
            else:
                coded = sparse.load(codes[0, head], total, head_dim=head_dim)
                average = sparse.load_means(means[0, head], head_dim)
                decoded = decoder.reshape(kv_heads, head_dim, -1)[head].T
                found.append(
                    sparse.attend(
                        queries, exact, *kept, coded, average, center[head], decoded, followers=followers, **forced
                    )
                )
        y = np.concatenate(found).reshape(1, 1, -1)
    return y, *present, codes, means
