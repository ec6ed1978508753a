"""HQQ: never worse by its own measure, better with outliers, refused where it has nothing to move."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import UserError
from edgekit.quant.grid import Grid, Lattice, fit
from edgekit.quant.hqq import POWER, hqq
from edgekit.weight import Floats


def sparse_error(x: Floats, lattice: Lattice) -> float:
    return float(np.mean(np.abs(x - lattice.values(lattice.codes(x))) ** POWER))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("offset", ["zero", "minimum"])
@pytest.mark.parametrize("scales", ["float16", "int8"])
def test_it_never_raises_its_measure_and_lowers_it_for_heavy_tails(bits: int, offset: str, scales: str) -> None:
    x = np.random.default_rng(0).standard_t(3, (64, 4, 32)).astype(np.float32)
    plain = fit(x, Grid(bits, 32, offset, scales), where="w")  # type: ignore[arg-type]
    found = hqq(x, plain)
    assert sparse_error(x, found) <= sparse_error(x, plain)
    np.testing.assert_array_equal(found.scale, plain.scale)
    if offset == "minimum":
        assert sparse_error(x, found) < 0.999 * sparse_error(x, plain)


def test_what_lies_on_the_grid_stays() -> None:
    x = np.random.default_rng(0).integers(0, 16, (8, 2, 32)).astype(np.float32)
    x[:, :, 0], x[:, :, 1] = 0, 15
    plain = fit(x, Grid(4, 32, "zero"), where="w")
    np.testing.assert_array_equal(hqq(x, plain).values(plain.codes(x)), x)


def test_zero_blocks_stay_zero() -> None:
    x = np.zeros((3, 2, 32), np.float32)
    found = hqq(x, fit(x, Grid(3, 32, "minimum"), where="w"))
    assert (found.values(found.codes(x)) == 0).all()


def test_a_symmetric_grid_has_no_offset_to_move() -> None:
    x = np.ones((1, 1, 32), np.float32)
    with pytest.raises(UserError, match="offset must be zero or minimum"):
        hqq(x, fit(x, Grid(4, 32, "symmetric"), where="w"))
