"""Whitening: singular values in the metric of the inputs, whatever that metric is."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import ModelError
from edgekit.tn.whitening import StreamedGram, checked, cholesky, relative_error, spectrum


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def inputs(tokens: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (rng.standard_normal((tokens, width)) @ rng.standard_normal((width, width))).astype(np.float32)


def test_rows_may_come_a_few_at_a_time() -> None:
    x = inputs(30, 5)
    streamed = StreamedGram(5)
    for part in np.array_split(x, 4):
        streamed.add(part)
    assert streamed.tokens == 30
    np.testing.assert_allclose(streamed.gram, x.astype(np.float64).T @ x, rtol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(5, 9, 40), (9, 5, 40), (7, 7, 40), (9, 5, 3), (5, 9, 3)])
def test_singular_values_are_those_of_the_outputs(rows: int, columns: int, tokens: int) -> None:
    W, x = matrix(rows, columns), inputs(tokens, columns).astype(np.float64)
    found = spectrum(W, x.T @ x, where="w")
    wanted = np.zeros(min(rows, columns))
    values = np.linalg.svd(x @ W.T, compute_uv=False)[: len(wanted)]
    wanted[: len(values)] = values
    np.testing.assert_allclose(found.values, wanted, atol=1e-6 * wanted[0])
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(min(rows, columns)), atol=1e-10)
    assert found.norm == pytest.approx(np.linalg.norm(x @ W.T))


def test_without_a_metric_they_are_those_of_the_matrix() -> None:
    W = matrix(6, 4)
    np.testing.assert_allclose(spectrum(W, None, where="w").values, np.linalg.svd(W)[1], rtol=1e-6)


@pytest.mark.parametrize("tokens", [40, 3, 0])
def test_a_root_of_every_gram_matrix(tokens: int) -> None:
    x = inputs(tokens, 6).astype(np.float64)
    gram = x.T @ x
    root = cholesky(gram)
    assert (root.shift == 0) == (tokens == 40)
    np.testing.assert_allclose(root.values @ root.values.T, gram + root.shift * np.eye(6), atol=1e-9 * (1 + gram.max()))


def test_a_gram_matrix_that_is_negative_by_rounding_is_lifted() -> None:
    root = cholesky(np.diag([1.0, -1e-3]))
    assert root.shift > 1e-3


@pytest.mark.parametrize(
    ("gram", "words"),
    [
        (np.eye(3), "must be \\(4, 4\\)"),
        (np.full((4, 4), np.nan), "finite"),
        (np.triu(np.ones((4, 4))), "symmetric"),
    ],
)
def test_what_is_no_metric_is_refused(gram: np.ndarray, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        checked(gram, 4, where="model.layers.0.mlp.up_proj")
    with pytest.raises(ModelError, match=words):
        spectrum(matrix(3, 4), gram, where="w")


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="finite"):
        spectrum(np.full((2, 2), np.inf, np.float32), None, where="w")


def test_relative_error_is_of_the_outputs() -> None:
    W, other, x = matrix(4, 5), matrix(4, 5, seed=3), inputs(20, 5).astype(np.float64)
    error, size = relative_error(W, other, x.T @ x)
    assert error == pytest.approx(np.square(x @ (other - W).T).sum(), rel=1e-5)
    assert size == pytest.approx(np.square(x @ W.T).sum(), rel=1e-5)
