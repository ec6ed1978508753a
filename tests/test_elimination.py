"""Dropping columns and refitting the others: exact errors, equal to least squares, monotone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgekit.errors import ModelError, UserError
from edgekit.prune.elimination import CHOICES, Choice, Doubles, error_of, rank_columns, refit, regular


def problem(rows: int = 20, columns: int = 48, *, seed: int = 0) -> tuple[Doubles, Doubles, Doubles]:
    random = np.random.default_rng(seed)
    X = random.standard_normal((400, columns)) @ (
        random.standard_normal((columns, columns)) * 0.9 ** np.arange(columns)
    )
    return random.standard_normal((rows, columns)), X, regular(X.T @ X, 1e-9, where="test")


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("group", "batch", "keep"), [(1, 1, 30), (1, 7, 13), (4, 1, 5), (4, 3, 11)])
def test_the_error_that_is_foretold_is_the_one_that_is_reached(
    choice: Choice, group: int, batch: int, keep: int
) -> None:
    W, _, G = problem()
    ranking = rank_columns(W, G, group=group, least=keep, batch=batch, choice=choice)
    assert sorted(ranking.order) == list(range(48 // group))
    columns = (ranking.kept(keep)[:, None] * group + np.arange(group)).reshape(-1)
    reached = error_of(W, G, columns, refit(W, G, columns))
    assert ranking.errors[keep] == pytest.approx(reached, rel=1e-6)
    assert 0 < reached < ranking.total


@pytest.mark.parametrize("choice", CHOICES)
def test_errors_fall_with_every_column_and_end_at_zero(choice: Choice) -> None:
    W, _, G = problem()
    errors = rank_columns(W, G, batch=1, choice=choice).errors
    ordered = [errors[count] for count in sorted(errors)]
    assert all(fewer >= more for fewer, more in itertools.pairwise(ordered))
    assert ordered[-1] == 0


def test_the_refit_is_least_squares() -> None:
    W, X, G = problem()
    kept = np.arange(0, 48, 3)
    expected = np.linalg.lstsq(X[:, kept], X @ W.T, rcond=None)[0].T
    np.testing.assert_allclose(refit(W, G, kept), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("choice", CHOICES)
def test_columns_that_others_make_go_first_and_cost_nothing(choice: Choice, batch: int) -> None:
    random = np.random.default_rng(1)
    X = random.standard_normal((300, 12))
    X[:, 9:] = X[:, :9] @ random.standard_normal((9, 3))
    W = random.standard_normal((6, 12))
    G = regular(X.T @ X, 1e-10, where="test")
    ranking = rank_columns(W, G, batch=batch, choice=choice)
    assert ranking.errors[9] / ranking.total < 1e-7
    assert ranking.errors[6] / ranking.total > 1e-4


def test_elimination_sees_the_outputs_and_the_other_does_not() -> None:
    X = np.random.default_rng(2).standard_normal((500, 10)) * np.array([9.0, *[1.0] * 9])
    W = np.ones((4, 10))
    W[:, 0] = 0  # the loudest input is not used
    G = regular(X.T @ X, 1e-9, where="test")
    assert 0 not in rank_columns(W, G, batch=1).kept(9)
    assert 0 in rank_columns(W, G, choice="interpolative").kept(9)


def test_singular_gram_matrices_are_made_regular() -> None:
    W = np.ones((3, 8))
    G = np.zeros((8, 8))
    G[:2, :2] = 5.0  # two columns that are one, and six that nothing went through
    found = rank_columns(W, regular(G, 1e-3, where="test"), batch=1)
    V = refit(W, regular(G, 1e-3, where="test"), found.kept(1))
    assert np.isfinite(V).all()
    with pytest.raises(ModelError, match="must be positive definite"):
        refit(W, G, np.array([0, 1]))


def test_what_cannot_be_is_refused() -> None:
    W, _, G = problem()
    with pytest.raises(ModelError, match="the inputs of down must be finite"):
        regular(np.full((2, 2), np.nan), 1e-3, where="down")
    with pytest.raises(UserError, match="48 columns must make groups of 5"):
        rank_columns(W, G, group=5)
    with pytest.raises(UserError, match="at least 49 of them"):
        rank_columns(W, G, least=49)
