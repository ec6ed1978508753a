"""What lies near the largest of many logits, in one pass: native where the library is, NumPy where it is not.

The weight of x is e^((x - peak) / temperature), 1 for the peak itself. Native and NumPy weights agree to 1e-6 relative.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from edgekit.kernels import library

LOWEST = 1e-37  # weights below are nothing: float32 ends there


class NearPeak:
    """Finds the weights above a floor, and the sum of all. It keeps its buffers: one for each thread."""

    def __init__(self) -> None:
        self._native = library.near_peak()
        self._total = ctypes.c_double()
        self._ids = np.empty(0, np.int32)
        self._weights = np.empty(0, np.float32)

    def __call__(
        self, scores: NDArray[np.float32], peak: np.float32, temperature: float, *, floor: float
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], float]:
        """Of `scores` (V,) with maximum `peak`: ids (n,) ascending, their weights (n,), and the sum of all V weights.

        The arrays are overwritten by the next call. `floor` is at least `LOWEST`, `temperature` above 0; a score may be
        -inf, whose weight is 0, but not NaN.
        """
        factor = np.float32(1 / max(temperature, LOWEST))
        if self._native is None:
            return _near_peak(scores, peak, factor, floor)
        if self._ids.size < scores.size:
            self._ids, self._weights = np.empty(scores.size, np.int32), np.empty(scores.size, np.float32)
            self._places = self._ids.ctypes.data, self._weights.ctypes.data, ctypes.addressof(self._total)
        if scores.dtype != np.float32 or not scores.flags.c_contiguous:
            scores = np.ascontiguousarray(scores, np.float32)
        found = self._native(scores.ctypes.data, scores.size, peak, factor, floor, *self._places)
        return self._ids[:found], self._weights[:found], self._total.value


def _near_peak(
    scores: NDArray[np.float32], peak: np.float32, factor: np.float32, floor: float
) -> tuple[NDArray[np.int32], NDArray[np.float32], float]:
    """The reference of `csrc/peak.inl`."""
    with np.errstate(over="ignore"):  # to -inf, whose weight is 0 as it should be
        weights = np.subtract(scores, peak)
        weights *= factor
        np.exp(weights, out=weights)
    ids = np.flatnonzero(weights >= floor).astype(np.int32)
    return ids, weights[ids], float(weights.sum(dtype=np.float64))
