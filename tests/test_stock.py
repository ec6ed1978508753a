"""Matrices as stock operators take them: the same values in 4 or 8 bits, with offsets from the middle code."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_cases import Offsets, Scales, random_matrix

from edgekit.export.stock import stock_bits, stock_matrix
from edgekit.weight import unpack


@pytest.mark.parametrize("scales", ["float16", "int8"])
@pytest.mark.parametrize("offsets", ["symmetric", "zeros", "minima"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_values_are_the_same(bits: int, offsets: Offsets, scales: Scales) -> None:
    weight = random_matrix(np.random.default_rng(0), 7, 150, bits=bits, block=32, offsets=offsets, scales=scales)
    stock = stock_matrix(weight)
    assert stock.bits == stock_bits(bits) == (4 if bits <= 4 else 8)
    codes = unpack(stock.codes, stock.bits).reshape(7, 5, 32).astype(np.float64)
    middle = np.full((7, 5), 1 << (stock.bits - 1))
    zeros = middle if stock.zeros is None else unpack(stock.zeros, stock.bits)[:, :5]
    values = (codes - zeros[:, :, None]) * stock.scales[:, :, None]
    assert (stock.zeros is None) == (offsets != "zeros")
    assert (stock.offsets is None) == (offsets != "minima")
    if stock.offsets is not None:
        values += stock.offsets.T[:, :, None]
    np.testing.assert_allclose(values.reshape(7, -1)[:, :150], weight.dense(), rtol=1e-5, atol=1e-6)
    reach = np.abs(codes - zeros[:, :, None]).max()
    assert reach <= (1 << bits) - (offsets != "zeros") * (1 << (bits - 1))  # small codes meet rounded activations
