"""Rows of a key-value cache as whole numbers. A row x of d numbers with p = max |x| is, with L = 127 in 8 bits,

    s = float16(p / L),    codes = clamp(rint(x / s), -L, L),    zeros where s is 0,    and counts as s * codes.

In 4 bits L is 7, and before that x is multiplied by a normalised Hadamard matrix, so that no channel stands out;
products of rows that were both multiplied are what they were. Byte i holds channel i plus 8 in its low half, and
channel i + d / 2 plus 8 in its high half. A row with something that is not a number has a scale that is none.

Source: QuaRot, arXiv 2404.00456, for 4-bit keys and values behind a Hadamard matrix. We deviate: one symmetric scale a
row.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.weight import Bytes, Floats, Halves, SignedBytes

LIMITS = {8: 127, 4: 7}


def keep(x: Floats, bits: Literal[8, 4]) -> tuple[SignedBytes | Bytes, Halves]:
    """Codes of rows (..., d), int8 (..., d) or uint8 (..., d / 2), and their scales (...)."""
    if bits == 8:
        return round_rows(x)
    codes, scales = round_rows(hadamard(x), LIMITS[4])
    low, high = np.split((codes + 8).astype(np.uint8), 2, axis=-1)
    return low | high << 4, scales


def restore(codes: SignedBytes | Bytes, scales: Halves) -> NDArray[np.float64]:
    """What rows count as; their type tells 4 bits from 8."""
    steps = scales[..., None].astype(np.float64)
    if codes.dtype == np.int8:
        return codes * steps
    halves = np.concatenate([codes & 15, codes >> 4], axis=-1)
    return hadamard((halves.astype(np.float64) - 8) * steps)


def round_rows(x: Floats, limit: int = LIMITS[8]) -> tuple[SignedBytes, Halves]:
    """Whole numbers up to `limit` either side of zero, (..., d), and their scales (...)."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scales = (np.abs(x).max(-1) / np.float32(limit)).astype(np.float16)
        steps = scales.astype(np.float32)[..., None]
        inverse = np.where(steps > 0, np.float32(1) / steps, np.float32(0))
        codes = np.clip(np.nan_to_num(np.rint(x * inverse), nan=limit), -limit, limit).astype(np.int8)
    return codes, scales


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
