"""The operators of `edgekit.kernels.opset` in NumPy: their definition, slow and readable; attention: `.attention`.

Products come in four modes. "float32" takes activations as they are. The native kernels multiply in integers: each
block of a row of activations, n numbers x with peak p = max |x|, becomes, with m = STEPS[mode],

    p / m * rint(x * (m / p)),        zeros where p is 0.

What follows is exact in integers, so a kernel differs from this by the rounding of float sums alone. Kernels use
"int16" for up to FINE_ROWS rows of activations and "int8" for more; the path "amx" then has "bfloat16" for activations
and weights, rounded to nearest. Sums here are in float64. Arguments are the
operator's inputs in the table's order and its attributes by name.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.kernels.pack import Tiles, separate, untile
from edgekit.weight import Bytes, Floats, SignedBytes

Doubles = NDArray[np.float64]
Halves = NDArray[np.float16]
Activations = Literal["float32", "int16", "int8", "bfloat16"]

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


# --- what they are made of --------------------------------------------------------------------------------------------


def product(x: Floats, W: Doubles, block: int, activations: Activations) -> Doubles:
    """x W^T, after the rounding of x that `activations` asks for."""
    if activations == "bfloat16":
        exact, W = bfloat16(x), bfloat16(W)
    else:
        exact = rounded(x, block, STEPS[activations]) if activations in STEPS else x.astype(np.float64)
    y: Doubles = exact @ W.T
    return y


def bfloat16(x: NDArray[np.floating[Any]]) -> Doubles:
    """The nearest numbers of 8 bits of fraction, ties to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    values: Doubles = nearest.astype(np.uint32).view(np.float32).astype(np.float64)
    return values


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
