"""What lies near the largest of many logits, in one pass: native where the library is, NumPy where it is not.

The weight of x is e^((x - peak) / temperature), 1 for the peak itself. Native and NumPy weights agree to 1e-6 relative.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.kernels import library

LOWEST = 1e-37  # weights below are nothing: float32 ends there


class Near(NamedTuple):
    """What reaches the floor: ids (n,), weights (n,), their running sums (n,), and the sum of the weights of all."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    sums: NDArray[np.float64]
    total: float


class NearPeak:
    """Finds the weights above a floor, and the sum of all. It keeps its buffers: one for each thread."""

    def __init__(self) -> None:
        self._native = library.near_peak()
        self._total = ctypes.c_double()
        self._size = 0

    def __call__(
        self, scores: NDArray[np.float32], peak: np.float32, temperature: float, *, floor: float, falling: bool = False
    ) -> Near:
        """Of `scores` (V,) with maximum `peak`: what has a weight of `floor` or more, by id or by falling weight.

        Of equal weights the lower id comes first. The arrays are overwritten by the next call. `floor` is at least
        `LOWEST`, `temperature` above 0; a score may be -inf, whose weight is 0, but not NaN.
        """
        factor = np.float32(1 / max(temperature, LOWEST))
        if self._native is None:
            return _near_peak(scores, peak, factor, floor, falling=falling)
        if self._size < scores.size:
            self._size = size = scores.size
            self._buffers = np.empty(size, np.int32), np.empty(size, np.float32), np.empty(size, np.float64)
            self._places = *(buffer.ctypes.data for buffer in self._buffers), ctypes.addressof(self._total)
        if scores.dtype != np.float32 or not scores.flags.c_contiguous:
            scores = np.ascontiguousarray(scores, np.float32)
        found = self._native(scores.ctypes.data, scores.size, peak, factor, floor, falling, *self._places)
        ids, weights, sums = self._buffers
        return Near(ids[:found], weights[:found], sums[:found], self._total.value)


def _near_peak(
    scores: NDArray[np.float32], peak: np.float32, factor: np.float32, floor: float, *, falling: bool
) -> Near:
    """The reference of `csrc/peak.inl` and of what `csrc/ops.cpp` makes of it."""
    with np.errstate(over="ignore"):  # to -inf, whose weight is 0 as it should be
        weights = np.subtract(scores, peak)
        weights *= factor
        np.exp(weights, out=weights)
    ids = np.flatnonzero(weights >= floor).astype(np.int32)
    total, weights = float(weights.sum(dtype=np.float64)), weights[ids]
    if falling:
        order = np.negative(weights).argsort(kind="stable")
        ids, weights = ids[order], weights[order]
    return Near(ids, weights, weights.cumsum(dtype=np.float64), total)
