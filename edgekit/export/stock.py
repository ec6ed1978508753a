"""Quantised matrices as onnxruntime's own operators take them.

MatMulNBits has fast kernels for 4 and 8 bits with integer zero points. So codes of 2 and 3 bits are stored in 4, of 5
and 6 in 8, all moved up so that the middle code stays the middle; and a block's minimum m becomes an offset from there:

    s * q + m = s * (q - middle) + o,    o = m + s * middle
    x W^T = MatMulNBits(x) + sums(x) o^T,    sums(x) the sums of x over each block

Float zero points, the operator's own way for minima, are 60 times as slow at 4 bits (onnxruntime 1.32) and
refused at 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekit.weight import Bytes, Floats, Quantized, pack, unpack


def stock_bits(bits: int) -> int:
    """The bits that codes of `bits` bits are stored in."""
    return 4 if bits <= 4 else 8


@dataclass(frozen=True)
class StockMatrix:
    """codes (out, blocks, bytes) and zeros (out, bytes) as in `Quantized`, scales (out, blocks), offsets (blocks, out).

    Without zeros the middle code is zero; at most one of zeros and offsets is there.
    """

    codes: Bytes
    scales: Floats
    zeros: Bytes | None
    offsets: Floats | None
    bits: int
    block: int
    columns: int


def stock_matrix(weight: Quantized) -> StockMatrix:
    """The same values, with offsets to a rounding of float32."""
    bits, scales = stock_bits(weight.bits), weight.block_scales()
    rows, blocks = scales.shape
    middle = 1 << (weight.bits - 1)
    codes, zeros, offsets = weight.codes, weight.zeros, None
    if (minima := weight.block_minima()) is not None:
        offsets = np.ascontiguousarray((minima + scales * np.float32(middle)).T)
    if bits != weight.bits:
        up = np.uint8((1 << (bits - 1)) - middle)
        codes = pack(unpack(codes, weight.bits).reshape(rows, blocks, weight.block) + up, bits)
        if zeros is not None:
            zeros = pack(unpack(zeros, weight.bits)[:, :blocks] + up, bits)
    return StockMatrix(codes, scales, zeros, offsets, bits, weight.block, weight.columns)
