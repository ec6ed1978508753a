"""Rows of a key-value cache as whole numbers. A row x of d numbers with p = max |x| is, with L = 127 in 8 bits,

    s = float16(p / L),    codes = clamp(rint(x / s), -L, L),    zeros where s is 0,    and counts as s * codes.

In 4 bits x is first multiplied by a normalised Hadamard matrix, so that no channel stands out; products of rows that
were both multiplied are what they were. Then s = float16(-e / 8) for the element e of largest magnitude (the positive
one of two), and codes are clamped to -8..7, of which e becomes -8: all sixteen are used. Byte i holds channel i plus 8
in its low half, and channel i + d / 2 plus 8 in its high half.

A row with something that is not a number has a scale that is none.

Source: QuaRot, arXiv 2404.00456, for 4-bit keys and values behind a Hadamard matrix. We deviate: one scale a row,
with a sign.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.weight import Bytes, Floats, Halves, SignedBytes

LIMIT = 127


def keep(x: Floats, bits: Literal[8, 4]) -> tuple[SignedBytes | Bytes, Halves]:
    """Codes of rows (..., d), int8 (..., d) or uint8 (..., d / 2), and their scales (...)."""
    if bits == 8:
        return round_rows(x)
    x = hadamard(x)
    with np.errstate(invalid="ignore", over="ignore"):
        peaks = np.abs(x).max(-1)
        scales = (np.where(x.max(-1) == peaks, -peaks, peaks) / np.float32(8)).astype(np.float16)
    codes = _codes(x, scales, -8, 7)
    low, high = np.split((codes + 8).astype(np.uint8), 2, axis=-1)
    return low | high << 4, scales


def restore(codes: SignedBytes | Bytes, scales: Halves) -> NDArray[np.float64]:
    """What rows count as; their type tells 4 bits from 8."""
    steps = scales[..., None].astype(np.float64)
    if codes.dtype == np.int8:
        return codes * steps
    halves = np.concatenate([codes & 15, codes >> 4], axis=-1)
    return hadamard((halves.astype(np.float64) - 8) * steps)


def round_rows(x: Floats) -> tuple[SignedBytes, Halves]:
    """Codes (..., d) of rows in 8 bits and their scales (...)."""
    with np.errstate(invalid="ignore", over="ignore"):
        scales = (np.abs(x).max(-1) / np.float32(LIMIT)).astype(np.float16)
    return _codes(x, scales, -LIMIT, LIMIT), scales


def _codes(x: Floats, scales: Halves, least: int, most: int) -> SignedBytes:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        steps = scales.astype(np.float32)[..., None]
        inverse = np.where(np.abs(steps) > 0, np.float32(1) / steps, np.float32(0))
        codes: SignedBytes = np.clip(np.nan_to_num(np.rint(x * inverse), nan=most), least, most).astype(np.int8)
    return codes


def hadamard(x: NDArray[Any]) -> NDArray[Any]:
    """x times the normalised Hadamard matrix, its own inverse, of each run of the last axis: as many channels as the
    largest power of two that divides the axis.
    """
    run = x.shape[-1] & -x.shape[-1]
    y, half = x, 1
    with np.errstate(invalid="ignore", over="ignore"):
        while half < run:
            pairs = y.reshape(*x.shape[:-1], x.shape[-1] // (2 * half), 2, half)
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            y = np.stack([a + b, a - b], -2).reshape(x.shape)
            half *= 2
    turned: NDArray[Any] = y / np.sqrt(np.float32(run))
    return turned
