"""Low rank: exact at full rank, the predicted error below it, and shared bases."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UserError
from edgekit.tn.lowrank import (
    even_rank,
    rank_for_bytes,
    rank_for_error,
    rank_for_share,
    shared_basis,
    truncated,
)
from edgekit.tn.whitening import Whitening, relative_error, spectrum

SHAPES = [(12, 20), (20, 12), (13, 13)]


def case(shape: tuple[int, int], tokens: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A matrix and the Gram matrix of inputs that are far from white."""
    rng = np.random.default_rng(sum(shape))
    x = rng.standard_normal((tokens, shape[1])) * np.geomspace(1, 30, shape[1])
    return rng.standard_normal(shape).astype(np.float32), x.T @ x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", get_args(Whitening))
@pytest.mark.parametrize("metric", [True, False])
def test_full_rank_is_the_matrix(shape: tuple[int, int], method: Whitening, metric: bool) -> None:
    W, gram = case(shape)
    found = truncated(W, gram if metric else None, min(shape), where="w", method=method)
    np.testing.assert_allclose(found.dense(), W, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", get_args(Whitening))
@pytest.mark.parametrize("metric", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_is_the_tail_of_singular_values(
    shape: tuple[int, int], method: Whitening, metric: bool, rank: int
) -> None:
    W, gram = case(shape)
    known = gram if metric else None
    A, B = (f.dense().astype(np.float64) for f in truncated(W, known, rank, where="w", method=method).factors)
    error, _ = relative_error(W, A @ B, known)
    assert np.sqrt(error) == pytest.approx(spectrum(W, known, where="w").tail(rank), rel=1e-6)


def test_the_metric_helps_where_it_counts() -> None:
    W, gram = case((12, 20))
    with_metric, plain = (relative_error(W, truncated(W, g, 5, where="w").dense(), gram)[0] for g in (gram, None))
    assert with_metric < 0.7 * plain


def test_too_little_text_is_fitted_exactly_and_stays_finite() -> None:
    W, gram = case((12, 20), tokens=4)  # a Gram matrix of rank 4
    found = truncated(W, gram, 4, where="w")
    error, size = relative_error(W, found.dense(), gram)
    assert error < 1e-8 * size
    assert np.isfinite(found.dense()).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 40))
def test_the_error_falls_with_the_rank(rows: int, columns: int, tokens: int) -> None:
    W, gram = case((rows, columns), tokens)
    errors = [
        relative_error(W, truncated(W, gram, r, where="w").dense(), gram)[0] for r in range(1, min(rows, columns) + 1)
    ]
    slack = 1e-6 * errors[0] + 1e-6 * np.trace(gram)
    assert all(b <= a + slack for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("rank", [0, -1, 13])
def test_a_rank_beyond_the_matrix_is_refused(rank: int) -> None:
    with pytest.raises(UserError, match=r"rank must be from 1 .*up_proj.*" + str(rank)):
        truncated(*case((12, 20)), rank, where="model.layers.0.mlp.up_proj")


def test_a_shared_basis_is_stored_once_and_its_errors_add_up() -> None:
    (one, first), (other, _) = case((12, 20)), case((9, 20))
    parts, errors = shared_basis([one, other], [first, first], 10, where="two")
    np.testing.assert_array_equal(parts[0].factors[1].dense(), parts[1].factors[1].dense())
    assert [part.shape for part in parts] == [one.shape, other.shape]
    stacked = spectrum(np.concatenate([one, other]), 2 * first, where="two")
    assert 2 * sum(errors) == pytest.approx(stacked.tail(10) ** 2, rel=1e-5)
    full, _ = shared_basis([one, other], [first, first], 20, where="two")
    np.testing.assert_allclose(full[1].dense(), other, atol=1e-5)


def test_a_shared_basis_needs_one_width() -> None:
    with pytest.raises(UserError, match="same width"):
        shared_basis([np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)], [np.eye(3), np.eye(4)], 1, where="w")


def test_ranks() -> None:
    assert even_rank((576, 576)) == 287
    assert rank_for_share((576, 576), 0.5) == 144
    assert rank_for_share((1536, 576), 0.8, multiple=32) == 320
    assert rank_for_share((4, 4), 0.1) == 0
    assert rank_for_bytes((576, 576), 576 * 64 * 2, bits=8) == 64
    W, gram = case((12, 20))
    found = spectrum(W, gram, where="w")
    rank = rank_for_error(found, 0.2)
    assert found.tail(rank) <= 0.2 * found.norm < found.tail(rank - 1)
    assert rank_for_error(found, 0.0) == 12
    assert rank_for_error(found, 0.2, multiple=8) % 4 == 0
