"""Weights near the peak: native against NumPy on every path, over odd sizes, floors and logits of -inf."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.kernels import library
from edgekit.kernels.peak import LOWEST, NearPeak, _near_peak

PATHS = library.known_paths()


@pytest.mark.parametrize("path", PATHS or ["none"])
@pytest.mark.parametrize("size", [1, 15, 16, 63, 64, 65, 1000, 4096, 5003])
def test_native_equals_numpy(path: str, size: int) -> None:
    if not PATHS:
        pytest.skip("the install has no kernels")
    best = library.path_name()
    assert best is not None
    scores = np.random.default_rng(size).normal(0, 6, size).astype(np.float32)
    scores[size // 3 :: 7] = -np.inf
    scores[0] = 1.0
    peak = scores.max()
    library.choose_path(path)
    try:
        for temperature in (1e-30, 0.05, 1.0, 40.0):
            for floor in (2.0**-10, 2.0**-20, LOWEST):
                ids, weights, total = NearPeak()(scores, peak, temperature, floor=floor)
                wanted, exact, whole = _near_peak(scores, peak, np.float32(1 / temperature), floor)
                edge = np.setxor1d(ids, wanted)  # weights within their error of the floor may fall on either side
                with np.errstate(over="ignore"):
                    at_edge = np.exp((scores[edge].astype(np.float64) - float(peak)) / temperature)
                np.testing.assert_allclose(at_edge, floor, rtol=1e-4)
                common = np.intersect1d(ids, wanted)
                assert (np.diff(ids) > 0).all()
                np.testing.assert_allclose(
                    weights[np.isin(ids, common)], exact[np.isin(wanted, common)], rtol=2e-5, atol=1e-37
                )
                assert total == pytest.approx(whole, rel=1e-6)
    finally:
        library.choose_path(best)


def test_the_buffers_grow() -> None:
    near = NearPeak()
    for size in (3, 70, 5):
        ids, weights, total = near(np.zeros(size, np.float32), np.float32(0), 1.0, floor=0.5)
        assert ids.tolist() == list(range(size))
        assert weights.tolist() == [1.0] * size
        assert total == size


def test_what_is_far_below_counts_for_nothing() -> None:
    scores = np.array([-1e30, 5.0, -np.inf, -100.0], np.float32)
    ids, weights, total = NearPeak()(scores, np.float32(5), 1.0, floor=LOWEST)
    assert ids.tolist() == [1]
    assert weights.tolist() == [1.0]
    assert total == pytest.approx(1.0)
