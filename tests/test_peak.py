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
                near = NearPeak()(scores, peak, temperature, floor=floor)
                wanted = _near_peak(scores, peak, np.float32(1 / temperature), floor, falling=False)
                edge = np.setxor1d(near.ids, wanted.ids)  # weights within their error of the floor may fall either side
                with np.errstate(over="ignore"):
                    at_edge = np.exp((scores[edge].astype(np.float64) - float(peak)) / temperature)
                np.testing.assert_allclose(at_edge, floor, rtol=1e-4)
                common = np.intersect1d(near.ids, wanted.ids)
                assert (np.diff(near.ids) > 0).all()
                np.testing.assert_allclose(
                    near.weights[np.isin(near.ids, common)],
                    wanted.weights[np.isin(wanted.ids, common)],
                    rtol=2e-5,
                    atol=1e-37,
                )
                np.testing.assert_allclose(near.sums, near.weights.cumsum(dtype=np.float64), rtol=1e-12)
                assert near.total == pytest.approx(wanted.total, rel=1e-6)
    finally:
        library.choose_path(best)


def test_the_buffers_grow() -> None:
    near = NearPeak()
    for size in (3, 70, 5):
        found = near(np.zeros(size, np.float32), np.float32(0), 1.0, floor=0.5)
        assert found.ids.tolist() == list(range(size))
        assert found.weights.tolist() == [1.0] * size
        assert found.sums.tolist() == list(range(1, size + 1))
        assert found.total == size


def test_falling_weights_and_the_lower_id_first() -> None:
    scores = np.round(np.random.default_rng(3).normal(0, 2, 3001)).astype(np.float32)  # many are equal
    peak = scores.max()
    rising, falling = (NearPeak()(scores, peak, 0.7, floor=LOWEST, falling=falling) for falling in (False, True))
    order = np.lexsort((rising.ids, -rising.weights))
    assert falling.ids.tolist() == rising.ids[order].tolist()
    assert falling.weights.tolist() == rising.weights[order].tolist()
    np.testing.assert_allclose(falling.sums, falling.weights.cumsum(dtype=np.float64), rtol=1e-12)
    reference = _near_peak(scores, peak, np.float32(1 / 0.7), LOWEST, falling=True)
    assert reference.ids.tolist() == falling.ids.tolist()


def test_what_is_far_below_counts_for_nothing() -> None:
    scores = np.array([-1e30, 5.0, -np.inf, -100.0], np.float32)
    near = NearPeak()(scores, np.float32(5), 1.0, floor=LOWEST)
    assert near.ids.tolist() == [1]
    assert near.weights.tolist() == [1.0]
    assert near.total == pytest.approx(1.0)
