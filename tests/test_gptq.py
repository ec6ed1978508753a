"""GPTQ: blocked equals unblocked, ours equals a dense solver, and what comes after it never makes things worse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.errors import ModelError
from edgekit.quant.gptq import (
    Metric,
    damped,
    descend,
    gptq,
    in_blocks_of,
    inverse_factor,
    output_error,
    refit,
    restored,
)
from edgekit.quant.grid import Grid, Lattice, fit, in_blocks
from edgekit.weight import Bytes, Floats

Doubles = NDArray[np.float64]
GRIDS = [
    Grid(2, 32, "minimum", "int8"),
    Grid(3, 32, "zero", "int8"),
    Grid(3, 64, "minimum", "float16"),
    Grid(4, 32, "zero", "float16"),
    Grid(4, 32, "symmetric", "float16"),
]


def problem(rows: int, columns: int, *, seed: int = 0, tokens: int = 400) -> tuple[Floats, Doubles]:
    """Weights, and the Gram matrix of inputs that are correlated and of very different sizes."""
    random = np.random.default_rng(seed)
    mix = np.eye(columns) + 0.3 * random.standard_normal((columns, columns)) / np.sqrt(columns)
    X = random.standard_normal((tokens, columns)) * np.exp(random.standard_normal(columns)) @ mix
    return random.standard_normal((rows, columns)).astype(np.float32), X.T @ X


def lattice_of(W: Floats, grid: Grid) -> Lattice:
    return fit(in_blocks(W, grid), grid, where="w")


def nearest_codes(W: Floats, lattice: Lattice) -> Bytes:
    return lattice.codes(in_blocks(W, lattice.grid)).reshape(len(W), -1)[:, : W.shape[1]]


def dense_solver(W: Floats, H: Doubles, lattice: Lattice) -> Floats:
    """The method by its definition, in float64: invert what is left of H anew for each column."""
    rest = W.astype(np.float64)
    block, (rows, columns) = lattice.grid.block, W.shape
    result = np.empty_like(rest)
    for j in range(columns):
        inverse = np.linalg.inv(H[j:, j:])
        s, z, m = (part[:, j // block].astype(np.float64) for part in (lattice.scale, lattice.zero, lattice.minimum))
        q = np.clip(np.rint((rest[:, j] - m) / np.where(s == 0, np.inf, s) + z), 0, lattice.grid.top)
        result[:, j] = s * (q - z) + m
        rest[:, j:] -= np.outer((rest[:, j] - result[:, j]) / inverse[0, 0], inverse[0])
    assert result.shape == (rows, columns)
    return result.astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocked_is_unblocked(grid: Grid) -> None:
    W, gram = problem(24, 100)
    H, lattice = damped(gram, 0.01, where="w"), lattice_of(W, grid)
    alone = gptq(W, Metric(H), lattice, batch=1)
    error = output_error(W, restored(alone, lattice), H)
    for batch in (7, 64, 1000):
        codes = gptq(W, Metric(H), lattice, batch=batch)
        assert output_error(W, restored(codes, lattice), H) == pytest.approx(error, rel=2e-3)
        assert np.mean(codes != alone) < 0.01  # float32 sums in another order


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("columns", [64, 100])
def test_it_is_the_dense_solver(grid: Grid, columns: int) -> None:
    W, gram = problem(24, columns, seed=3)
    H, lattice = damped(gram, 0.01, where="w"), lattice_of(W, grid)
    ours = output_error(W, restored(gptq(W, Metric(H), lattice), lattice), H)
    dense = output_error(W, dense_solver(W, H, lattice), H)
    assert ours == pytest.approx(dense, rel=0.01)
    assert ours < 0.9 * output_error(W, restored(nearest_codes(W, lattice), lattice), H)


def test_without_correlation_it_is_rounding() -> None:
    W, _ = problem(16, 96)
    lattice = lattice_of(W, Grid(4, 32, "zero"))
    codes = gptq(W, Metric(np.diag(np.arange(1.0, 97.0))), lattice)
    np.testing.assert_array_equal(codes, nearest_codes(W, lattice))


def test_what_lies_on_the_grid_stays() -> None:
    W, gram = problem(16, 96)
    grid = Grid(4, 32, "symmetric")
    lattice = lattice_of(W, grid)
    exact = restored(nearest_codes(W, lattice), lattice)
    codes = gptq(exact, Metric(damped(gram, 0.01, where="w")), lattice)
    np.testing.assert_array_equal(restored(codes, lattice), exact)


def test_the_order_of_columns_is_undone() -> None:
    W, gram = problem(16, 128)
    H, lattice = damped(gram, 0.01, where="w"), lattice_of(W, Grid(3, 32, "zero"))
    given = restored(gptq(W, Metric(H), lattice), lattice)
    turned = restored(gptq(W, Metric(H, "activation"), lattice), lattice)
    assert not np.array_equal(given, turned)
    rounding = output_error(W, restored(nearest_codes(W, lattice), lattice), H)
    assert output_error(W, turned, H) < 0.8 * rounding
    largest = int(np.argmax(H.diagonal()))  # comes first, so nothing has moved it
    np.testing.assert_array_equal(turned[:, largest], restored(nearest_codes(W, lattice), lattice)[:, largest])


@pytest.mark.parametrize("order", ["given", "activation"])
def test_a_column_that_nothing_went_through_is_rounded_to_nearest(order: Any) -> None:
    W, gram = problem(16, 64)
    dead = [0, 17, 63]
    gram[dead] = gram[:, dead] = 0
    H, lattice = damped(gram, 0.01, where="w"), lattice_of(W, Grid(4, 32, "zero"))
    codes = gptq(W, Metric(H, order), lattice)
    np.testing.assert_array_equal(codes[:, dead], nearest_codes(W, lattice)[:, dead])
    alive = [j for j in range(64) if j not in dead]
    assert (codes[:, alive] != nearest_codes(W, lattice)[:, alive]).any()


def test_all_columns_dead_is_rounding_and_a_zero_row_stays_zero() -> None:
    W, gram = problem(8, 64)
    W[3] = 0
    lattice = lattice_of(W, Grid(4, 32, "zero"))
    silent = gptq(W, Metric(damped(np.zeros((64, 64)), 0.01, where="w")), lattice)
    np.testing.assert_array_equal(silent, nearest_codes(W, lattice))
    H = damped(gram, 0.01, where="w")
    codes = gptq(W, Metric(H), lattice)
    assert (restored(codes, lattice)[3] == 0).all()
    again = refit(W, Metric(H), codes, lattice)
    assert (restored(codes, again)[3] == 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_descent_and_refitting_never_cost(grid: Grid) -> None:
    W, gram = problem(24, 100, seed=5)
    H, lattice = damped(gram, 0.01, where="w"), lattice_of(W, grid)
    codes = gptq(W, Metric(H), lattice)
    errors = [output_error(W, restored(codes, lattice), H)]
    for _ in range(2):
        codes = descend(W, Metric(H), lattice, codes, passes=1)
        errors.append(output_error(W, restored(codes, lattice), H))
        lattice = refit(W, Metric(H), codes, lattice)
        errors.append(output_error(W, restored(codes, lattice), H))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]
    stored = lattice.store(in_blocks_of(codes, lattice), 100)
    np.testing.assert_array_equal(stored.dense(), restored(codes, lattice))


def test_refitting_finds_the_scales_that_made_the_weights() -> None:
    random = np.random.default_rng(0)
    _, gram = problem(1, 64)
    grid = Grid(4, 32, "minimum")
    codes = random.integers(0, 16, (8, 64)).astype(np.uint8)
    true = fit(random.standard_normal((8, 2, 32)).astype(np.float32), grid, where="w")
    other = fit(random.standard_normal((8, 2, 32)).astype(np.float32), grid, where="w")
    found = refit(restored(codes, true), Metric(damped(gram, 0.01, where="w")), codes, other)
    np.testing.assert_allclose(found.scale, true.scale, rtol=2e-3)
    np.testing.assert_allclose(found.minimum, true.minimum, rtol=2e-3)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 20) | st.integers(60, 150), st.integers(0, 1000))
def test_the_factor_is_that_of_the_inverse(size: int, seed: int) -> None:
    X = np.random.default_rng(seed).standard_normal((size + 5, size))
    H = damped(X.T @ X, 0.01, where="w")
    U = inverse_factor(H, where="w")
    np.testing.assert_array_equal(U, np.triu(U))
    np.testing.assert_allclose(U.T @ U @ H, np.eye(size), atol=1e-6)


def test_damping_adds_to_live_columns_only() -> None:
    gram = np.diag([4.0, 0.0, 2.0])
    np.testing.assert_allclose(damped(gram, 0.1, where="w"), np.diag([4.3, 3.0, 2.3]))
    assert gram[1, 1] == 0  # what was given stays


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    gram = np.eye(4)
    gram[1, 2] = value
    with pytest.raises(ModelError, match="the inputs of up must be finite"):
        damped(gram, 0.01, where="up")


def test_a_gram_matrix_that_is_none_is_refused() -> None:
    with pytest.raises(ModelError, match="the Gram matrix of up must be positive definite"):
        inverse_factor(np.array([[1.0, 2.0], [2.0, 1.0]]), where="up")


@pytest.mark.slow
def test_a_real_layer_against_the_dense_solver() -> None:
    from edgekit.model.sources import open_model

    checkpoint = open_model("smollm2-135m")
    W = checkpoint.weight("model.layers.7.self_attn.k_proj").dense()
    table = checkpoint.weight("model.embed_tokens").dense()
    X = table[np.random.default_rng(0).integers(0, len(table), 3000)].astype(np.float64)
    X *= checkpoint.vector("model.layers.7.input_layernorm.weight")
    H = damped(X.T @ X, 0.01, where="k")
    lattice = lattice_of(W, Grid(3, 32, "zero"))
    ours = output_error(W, restored(gptq(W, Metric(H), lattice), lattice), H)
    assert ours == pytest.approx(output_error(W, dense_solver(W, H, lattice), H), rel=0.01)
