"""The operators of `edgekit.kernels.opset` in NumPy: their definition, slow and readable.

Products come in three modes. "float32" takes activations as they are. The native kernels multiply in integers: each
block of a row of activations, n numbers x with peak p = max |x|, becomes, with m = STEPS[mode],

    p / m * rint(x * (m / p)),        zeros where p is 0.

What follows is exact in integers, so a kernel differs from this by the rounding of float sums alone. Kernels use
"int16" for up to FINE_ROWS rows of activations and "int8" for more. Sums here are in float64. Arguments are the
operator's inputs in the table's order and its attributes by name.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.kernels import sparse
from edgekit.kernels.pack import Tiles, separate, untile
from edgekit.weight import Bytes, Floats, SignedBytes

Doubles = NDArray[np.float64]
Halves = NDArray[np.float16]
Activations = Literal["float32", "int16", "int8"]

STEPS = {"int16": 254 * 127 + 126, "int8": 127}  # integers on either side of zero; int16 is two int8, 254 high + low
FINE_ROWS = 64


def quant_linear(
    x: Floats,
    codes: Bytes,
    scales: Halves | Bytes,
    zeros: Bytes,
    minima: Halves | SignedBytes,
    bias: Floats,
    residual: Floats,
    steps: Halves,
    *,
    N: int,
    K: int,
    bits: int,
    block: int,
    activations: Activations = "float32",
) -> Floats:
    """x W^T + bias + residual: (..., N) float32 from x (..., K)."""
    W = matrix(_tiles(codes, scales, zeros, minima, steps, N=N, K=K, bits=bits, block=block))
    return (product(x, W, block, activations) + bias + residual).astype(np.float32)


def norm_quant_linear(
    x: Floats,
    norm: Floats,
    codes: Bytes,
    scales: Halves | Bytes,
    zeros: Bytes,
    minima: Halves | SignedBytes,
    bias: Floats,
    steps: Halves,
    *,
    N: int,
    K: int,
    bits: int,
    block: int,
    epsilon: float,
    activations: Activations = "float32",
) -> Floats:
    """RMSNorm(x) W^T + bias: (..., N) float32."""
    W = matrix(_tiles(codes, scales, zeros, minima, steps, N=N, K=K, bits=bits, block=block))
    return (product(rms_norm(x, norm, epsilon), W, block, activations) + bias).astype(np.float32)


def gated_norm_quant_linear(
    x: Floats,
    norm: Floats,
    codes: Bytes,
    scales: Halves | Bytes,
    zeros: Bytes,
    minima: Halves | SignedBytes,
    steps: Halves,
    *,
    N: int,
    K: int,
    bits: int,
    block: int,
    epsilon: float,
    activations: Activations = "float32",
) -> Floats:
    """silu(n Wg^T) * (n Wu^T) with n = RMSNorm(x): (..., N / 2) float32. N counts the rows of Wg and of Wu."""
    halves = separate(_tiles(codes, scales, zeros, minima, steps, N=N, K=K, bits=bits, block=block))
    normed = rms_norm(x, norm, epsilon)
    gate, up = (product(normed, matrix(half), block, activations) for half in halves)
    with np.errstate(over="ignore"):  # where exp(-gate) is inf, silu is 0, as it should be
        y: Floats = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
    return y


def quant_embedding(
    ids: NDArray[np.int64],
    codes: Bytes,
    scales: Halves | Bytes,
    zeros: Bytes,
    minima: Halves | SignedBytes,
    steps: Halves,
    *,
    N: int,
    K: int,
    bits: int,
    block: int,
) -> Floats:
    """W[ids]: (..., K) float32 from ids (...)."""
    W = matrix(_tiles(codes, scales, zeros, minima, steps, N=N, K=K, bits=bits, block=block))
    return W.astype(np.float32)[ids]


def attention(
    qkv: Floats,
    past_key: Halves,
    past_value: Halves,
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    *,
    num_heads: int,
    kv_num_heads: int,
    head_dim: int,
    local_window_size: int,
) -> tuple[Floats, Halves, Halves]:
    """Causal attention of T tokens, the last of them at index `last`, over a cache of S places.

    qkv: (1, T, (num_heads + 2 kv_num_heads) head_dim), the heads of q, then k, then v. past_*: (1, kv_num_heads, S,
    head_dim). cos, sin: (places, head_dim / 2), a row for each position. local_window_size: a token sees that many, the
    last of which is itself; -1: all before it.

    Returns y (1, T, num_heads * head_dim), present_key and present_value, which are the past with rotated keys and
    values of the T tokens written in, rounded to float16. Places past `last` are not read, and what they hold
    afterwards is undefined.
    """
    heads = _heads(qkv, head_dim)
    q, k, v = np.split(heads, [num_heads, num_heads + kv_num_heads])
    return _attend(q, k, v, past_key, past_value, last, cos, sin, local_window_size)


def norm_attention(
    qkv: Floats,
    past_key: Halves,
    past_value: Halves,
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    q_norm: Floats,
    k_norm: Floats,
    *,
    num_heads: int,
    kv_num_heads: int,
    head_dim: int,
    local_window_size: int,
    epsilon: float,
) -> tuple[Floats, Halves, Halves]:
    """`attention` after RMSNorm of each head of q and k: norms (head_dim,)."""
    heads = _heads(qkv, head_dim)
    q, k, v = np.split(heads, [num_heads, num_heads + kv_num_heads])
    q, k = rms_norm(q, q_norm, epsilon), rms_norm(k, k_norm, epsilon)
    return _attend(q, k, v, past_key, past_value, last, cos, sin, local_window_size)


def hadamard_sparse_attention(
    qkv: Floats,
    past_key: Halves,
    past_value: Halves,
    past_codes: Bytes,
    past_means: Halves,
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    center: Floats,
    encoder: Floats,
    decoder: Floats,
    budget: NDArray[np.int32],
    *,
    num_heads: int,
    kv_num_heads: int,
    head_dim: int,
    local_window_size: int,
    sinks: int,
    recent: int,
    followers: int,
    dense_below: int,
) -> tuple[Floats, Halves, Halves, Bytes, Halves]:
    """`attention` for several tokens; for one token at a length above `dense_below` and `budget`, `sparse.attend`.

    past_codes (1, kv_num_heads, bytes) and past_means (1, kv_num_heads, pages, head_dim) summarise the cache in the
    layout of `edgekit.kernels.sparse`; center (kv_num_heads, head_dim), encoder and decoder, (kv_num_heads, head_dim,
    coded channels) each, which is transposed, are calibrated.
    """
    y, keys, values = attention(
        qkv,
        past_key,
        past_value,
        last,
        cos,
        sin,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        head_dim=head_dim,
        local_window_size=local_window_size,
    )
    tokens, total = qkv.shape[1], int(last.reshape(())) + 1
    position = np.arange(total - tokens, total)
    q, k, _ = np.split(_heads(qkv, head_dim), [num_heads, num_heads + kv_num_heads])
    q, k = rotated(q, cos[position], sin[position]), rotated(k, cos[position], sin[position])
    codes, means = past_codes.copy(), past_means.copy()
    center = center.reshape(kv_num_heads, head_dim)
    shape = (kv_num_heads, head_dim, sparse.coded_channels(head_dim))
    encoder, decoder = encoder.reshape(shape), decoder.reshape(shape)
    for head in range(kv_num_heads):
        coded = sparse.encode(k[head], center[head], encoder[head].T)
        sparse.store(codes[0, head], coded, position[0], head_dim=head_dim)
        sparse.average(means[0, head], values[0, head, :total], position[0])
    if tokens == 1 and total > max(dense_below, int(budget.reshape(()))):
        group = num_heads // kv_num_heads
        y = np.concatenate(
            [
                sparse.attend(
                    q[head * group : (head + 1) * group, 0],
                    keys[0, head, :total],
                    values[0, head, :total],
                    sparse.load(codes[0, head], total, head_dim=head_dim),
                    means[0, head],
                    center[head],
                    decoder[head].T,
                    budget=int(budget.reshape(())),
                    sinks=sinks,
                    recent=recent,
                    followers=followers,
                ).reshape(1, 1, -1)
                for head in range(kv_num_heads)
            ],
            axis=-1,
        )
    return y, keys, values, codes, means


# --- what they are made of --------------------------------------------------------------------------------------------


def product(x: Floats, W: Doubles, block: int, activations: Activations) -> Doubles:
    """x W^T, after the rounding of x that `activations` asks for."""
    exact = x.astype(np.float64) if activations == "float32" else rounded(x, block, STEPS[activations])
    y: Doubles = exact @ W.T
    return y


def rounded(x: Floats, block: int, steps: int) -> Doubles:
    """x (..., K) after rounding each block of `block` columns to `steps` integers on either side of zero."""
    columns = x.shape[-1]
    padded = np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -columns % block)])
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block)
    peak = np.abs(blocks).max(-1, keepdims=True)
    codes = np.rint(blocks * (np.float32(steps) / np.where(peak == 0, np.float32(np.inf), peak)))
    values: Doubles = ((peak / np.float32(steps)).astype(np.float64) * codes).reshape(padded.shape)[..., :columns]
    return values


def matrix(tiles: Tiles) -> Doubles:
    """The values scale * (code - zero) + minimum of a matrix in tiles, (rows, columns)."""
    return untile(tiles).dense().astype(np.float64)


def rms_norm(x: Floats, norm: Floats, epsilon: float) -> Floats:
    """x / sqrt(mean(x^2) + epsilon) * norm over the last axis, float32. Source: Zhang, Sennrich, arXiv 1910.07467."""
    mean = np.mean(np.square(x.astype(np.float64)), axis=-1, keepdims=True)
    normed: Floats = x * (1 / np.sqrt(mean + epsilon)).astype(np.float32) * norm
    return normed


def rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """x (heads, T, head_dim) with each pair of channels (i, i + head_dim / 2) turned; cos, sin: (T, head_dim / 2)."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _tiles(
    codes: Bytes,
    scales: Halves | Bytes,
    zeros: Bytes,
    minima: Halves | SignedBytes,
    steps: Halves,
    *,
    N: int,
    K: int,
    bits: int,
    block: int,
) -> Tiles:
    """The constants of an operator as a matrix; single zero points, minima and steps are the defaults of the table."""
    offsets = minima if minima.size > 1 else zeros if zeros.size > 1 else None
    given = steps if scales.dtype == np.uint8 else None
    return Tiles(codes, scales, offsets, bits=bits, block=block, rows=N, columns=K, steps=given)


def _heads(qkv: Floats, head_dim: int) -> Floats:
    """(1, T, heads * head_dim) as (heads, T, head_dim)."""
    heads: Floats = qkv[0].reshape(qkv.shape[1], qkv.shape[2] // head_dim, head_dim).swapaxes(0, 1)
    return heads


def _attend(
    q: Floats,
    k: Floats,
    v: Floats,
    past_key: Halves,
    past_value: Halves,
    last: NDArray[np.int32],
    cos: Floats,
    sin: Floats,
    window: int,
) -> tuple[Floats, Halves, Halves]:
    """Attention of heads (heads, T, head_dim) that are normed but not yet rotated."""
    tokens, head_dim = q.shape[1:]
    total = int(last.reshape(())) + 1
    position = np.arange(total - tokens, total)
    keys, values = past_key.copy(), past_value.copy()
    keys[0][:, position] = rotated(k, cos[position], sin[position])
    values[0][:, position] = v

    shared = len(q) // len(k)  # query heads that read the same keys
    seen_keys, seen_values = (cache[0, :, :total].astype(np.float64).repeat(shared, axis=0) for cache in (keys, values))
    queries = rotated(q, cos[position], sin[position]).astype(np.float64)
    scores = queries @ seen_keys.swapaxes(1, 2) / np.sqrt(head_dim)
    distance = position[:, None] - np.arange(total)
    scores[:, (distance < 0) | (distance >= (window if window > 0 else total))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True)) @ seen_values  # (heads, T, head_dim)
    return y.swapaxes(0, 1).reshape(1, tokens, len(q) * head_dim).astype(np.float32), keys, values
