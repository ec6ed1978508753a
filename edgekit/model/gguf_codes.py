"""The integer codes of a GGUF file as they are, in our layout: no value is rounded again.

    Q4_0   d (float16), 16 bytes     w = d * (q - 8)             4 bits, symmetric
    Q4_1   d, m (float16), 16 bytes  w = d * q + m               4 bits with minima
    Q8_0   d (float16), 32 int8      w = d * q                   8 bits, symmetric (q + 128 is stored)
    Q4_K   256 weights: d, dmin (float16), 8 scales and 8 minima of 6 bits, 128 bytes
                                     w = (d * s) * q - dmin * m  4 bits with minima, blocks of 32
    Q6_K   256 weights: 128 bytes of low halves, 64 of high pairs of bits, 16 int8 scales s, d (float16)
                                     w = (d * s) * (q - 32)      6 bits, symmetric, blocks of 16

Nibbles of a block of 32 lie as (i, i + 16) in a byte, those of Q4_K as (i, i + 32) of 64 weights; Q6_K's halves as
(i, i + 64) of 128 weights, and its pairs as (i, i + 32, i + 64, i + 96), the low bits first. The codes are kept
bit for bit; scales and minima too, except in Q4_K and Q6_K, where the products d * s and dmin * m are rounded to
float16 (by at most one part in 2,048).
Source: ggml-quants.c of llama.cpp for the formats, as the gguf package's own dequantiser reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.weight import Bytes, Halves, Quantized, pack

Codes = tuple[Bytes, Halves, Halves | None]  # (rows, blocks, block) codes, scales, minima


def _q4_0(raw: Bytes) -> Codes:
    blocks = raw.reshape(len(raw), -1, 18)
    return _nibbles(blocks[..., 2:]), _half(blocks[..., :2]), None


def _q4_1(raw: Bytes) -> Codes:
    blocks = raw.reshape(len(raw), -1, 20)
    return _nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _q8_0(raw: Bytes) -> Codes:
    blocks = raw.reshape(len(raw), -1, 34)
    return blocks[..., 2:] ^ np.uint8(128), _half(blocks[..., :2]), None


def _q4_k(raw: Bytes) -> Codes:
    rows = len(raw)
    blocks = raw.reshape(rows, -1, 144)
    d, least = (_half(blocks[..., i : i + 2]).astype(np.float32)[..., None] for i in (0, 2))
    packed = blocks[..., 4:16]
    low, high, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (rest & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([high & 63, (rest >> 4) | ((high >> 6) << 4)], axis=-1)
    pairs = blocks[..., 16:].reshape(rows, -1, 4, 1, 32)
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=-2).reshape(rows, -1, 32)
    return (
        codes,
        (d * scales).astype(np.float16).reshape(rows, -1),
        (-least * minima).astype(np.float16).reshape(rows, -1),
    )


def _q6_k(raw: Bytes) -> Codes:
    rows = len(raw)
    blocks = raw.reshape(rows, -1, 210)
    halves = blocks[..., :128].reshape(rows, -1, 2, 1, 64)  # of 128 weights each
    pairs = blocks[..., 128:192].reshape(rows, -1, 2, 1, 32)
    low = np.concatenate([halves & 15, halves >> 4], axis=-2).reshape(rows, -1, 2, 4, 32)
    high = np.concatenate([(pairs >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-2)
    scales = blocks[..., 192:208].view(np.int8) * _half(blocks[..., 208:]).astype(np.float32)[..., None]
    codes = (low | high << 4).reshape(rows, -1, 16)
    return codes, scales.astype(np.float16).reshape(rows, -1), None


@dataclass(frozen=True)
class Format:
    """What a type of GGUF becomes: its codes' bits, columns a scale, whether there are minima, and how it is read."""

    bits: int
    block: int
    minima: bool
    read: Callable[[Bytes], Codes]


FORMATS = {
    "Q4_0": Format(4, 32, False, _q4_0),
    "Q4_1": Format(4, 32, True, _q4_1),
    "Q8_0": Format(8, 32, False, _q8_0),
    "Q4_K": Format(4, 32, True, _q4_k),
    "Q6_K": Format(6, 16, False, _q6_k),
}


def read_codes(raw: Bytes, kind: str, order: NDArray[np.intp] | None = None) -> Quantized:
    """A matrix from the file's bytes, (out, bytes a row) uint8; `kind` is one of `FORMATS`.

    `order` gives, for each row of the result, the row of the file that it is.
    """
    form = FORMATS[kind]
    codes, scales, minima = form.read(raw if order is None else raw[order])
    return Quantized(
        codes=np.ascontiguousarray(pack(codes, form.bits)),
        scales=scales,
        zeros=None,
        bits=form.bits,
        block=form.block,
        columns=codes.shape[1] * form.block,
        minima=minima,
    )


def _nibbles(packed: Bytes) -> Bytes:
    """(..., 16) bytes to (..., 32) codes: low halves first, then high halves."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _half(pairs: Bytes) -> Halves:
    """(..., 2) bytes as (...) float16."""
    return np.ascontiguousarray(pairs).view(np.float16)[..., 0]
