"""Matrix product operators: exact when nothing is cut, the predicted error else, tensorly's numbers, and the limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgekit.errors import UserError
from edgekit.tn.mpo import (
    bonds_for_error,
    bonds_for_share,
    centered,
    cores_of,
    count_numbers,
    decomposed,
    full_bonds,
    refined,
    schmidt_values,
    site_shapes,
    stored,
)
from edgekit.tn.whitening import relative_error

CASES = [((12, 20), 2), ((16, 24), 3), ((16, 16), 4), ((30, 8), 2)]


def matrix(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def metric(width: int) -> np.ndarray:
    x = np.random.default_rng(7).standard_normal((3 * width, width)) * np.geomspace(1, 20, width)
    return x.T @ x


@pytest.mark.parametrize(("shape", "count"), CASES)
def test_full_bonds_are_the_matrix(shape: tuple[int, int], count: int) -> None:
    sites = site_shapes(shape, count)
    assert sites is not None
    found = decomposed(matrix(shape), sites, full_bonds(sites), where="w")
    np.testing.assert_allclose(found.dense(), matrix(shape), atol=1e-5)
    assert found.bonds == full_bonds(sites)


@pytest.mark.parametrize(("shape", "count"), CASES)
def test_it_is_tensorlys_tensor_train(shape: tuple[int, int], count: int) -> None:
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    sites = site_shapes(shape, count)
    assert sites is not None
    bonds = tuple(min(3, most) for most in full_bonds(sites))
    W = matrix(shape)
    tensor = W.astype(np.float64).reshape(*(o for o, _ in sites), *(i for _, i in sites))
    theirs = tensorly.tt_matrix_to_tensor(tensor_train_matrix(tensor, rank=[1, *bonds, 1])).reshape(shape)
    np.testing.assert_allclose(decomposed(W, sites, bonds, where="w").dense(), theirs, atol=1e-5)


@pytest.mark.parametrize("bond", [1, 4, 9])
def test_two_sites_err_by_the_tail_of_their_bond(bond: int) -> None:
    W, sites = matrix((12, 20)), ((3, 5), (4, 4))
    found = decomposed(W, sites, (bond,), where="w")
    tail = np.sqrt(np.square(schmidt_values(W, sites, 1)[bond:]).sum())
    assert np.linalg.norm(found.dense().astype(np.float64) - W) == pytest.approx(tail, rel=1e-6)


def test_many_sites_err_by_no_more_than_all_tails() -> None:
    W, sites = matrix((16, 24)), ((2, 4), (2, 3), (4, 2))
    found = decomposed(W, sites, (4, 4), where="w")
    tails = [np.square(schmidt_values(W, sites, k)[4:]).sum() for k in (1, 2)]
    assert np.square(found.dense() - W).sum() <= sum(tails) * (1 + 1e-6)


def test_low_rank_is_the_case_of_two_flat_sites() -> None:
    W = matrix((12, 20))
    found = decomposed(W, ((12, 1), (1, 20)), (5,), where="w")
    left, values, right = np.linalg.svd(W)
    np.testing.assert_allclose(found.dense(), (left[:, :5] * values[:5]) @ right[:5], atol=1e-5)
    assert found.is_low_rank
    assert found.multiplications == 5 * 32


@pytest.mark.parametrize(("shape", "count"), CASES[:3])
def test_refining_lowers_the_error_of_the_outputs(shape: tuple[int, int], count: int) -> None:
    sites = site_shapes(shape, count)
    assert sites is not None
    W, gram = matrix(shape), metric(shape[1])
    steps = [decomposed(W, sites, tuple(min(4, most) for most in full_bonds(sites)), where="w")]
    for _ in range(3):
        steps.append(refined(steps[-1], W, gram))
    errors = [relative_error(W, step.dense(), gram)[0] for step in steps]
    assert errors[1] < 0.9 * errors[0]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_canonical_form_is_the_same_matrix(at: int) -> None:
    W, sites = matrix((24, 30)), ((2, 5), (3, 3), (4, 2))
    weight = decomposed(W, sites, (6, 5), where="w")
    cores = centered(cores_of(weight), at)
    again = stored([core.reshape(len(core), -1, core.shape[-1]) for core in cores], sites)
    np.testing.assert_allclose(again.dense(), weight.dense(), atol=1e-6)
    assert np.linalg.norm(cores[at]) == pytest.approx(np.linalg.norm(weight.dense()), rel=1e-6)
    for k, core in enumerate(cores):
        flat = core.reshape(-1, core.shape[-1]) if k < at else core.reshape(len(core), -1).T
        assert k == at or np.allclose(flat.T @ flat, np.eye(flat.shape[1]), atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_large_cores_come_as_near_by_conjugate_gradients(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = site_shapes(shape, 2)
    assert sites is not None
    W, gram = matrix(shape), metric(shape[1])
    start = decomposed(W, sites, (4,), where="w")
    solved = relative_error(W, refined(start, W, gram).dense(), gram)[0]
    monkeypatch.setattr("edgekit.tn.mpo.DIRECT", 0)
    errors = [relative_error(W, start.dense(), gram)[0]]
    for steps in (1, 2, 8, 200):
        monkeypatch.setattr("edgekit.tn.mpo.STEPS", steps)
        errors.append(relative_error(W, refined(start, W, gram).dense(), gram)[0])
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[4] == pytest.approx(solved, rel=1e-3)


def test_a_metric_of_nothing_is_survived() -> None:
    W = matrix((12, 20))
    start = decomposed(W, ((3, 5), (4, 4)), (4,), where="w")
    np.testing.assert_allclose(refined(start, W, np.zeros((20, 20))).dense(), start.dense(), atol=1e-6)


def test_refining_finds_what_low_rank_in_the_metric_finds() -> None:
    from edgekit.tn.lowrank import truncated

    W, gram = matrix((10, 12)), metric(12)
    best = relative_error(W, truncated(W, gram, 3, where="w").dense(), gram)[0]
    start = decomposed(W, ((10, 1), (1, 12)), (3,), where="w")
    found = relative_error(W, refined(start, W, gram, passes=30).dense(), gram)[0]
    assert found == pytest.approx(best, rel=1e-3)


def test_a_singular_metric_is_survived() -> None:
    W, x = matrix((12, 20)), np.random.default_rng(0).standard_normal((3, 20))
    found = refined(decomposed(W, ((3, 5), (4, 4)), (4,), where="w"), W, x.T @ x)
    error, size = relative_error(W, found.dense(), x.T @ x)
    assert np.isfinite(found.dense()).all()
    assert error < 0.1 * size


@pytest.mark.parametrize(
    ("shape", "count", "sites"),
    [
        ((576, 576), 2, ((24, 24), (24, 24))),
        ((1536, 576), 2, ((32, 24), (48, 24))),
        ((576, 1536), 3, ((8, 16), (8, 12), (9, 8))),
        ((577, 576), 2, None),
        ((4, 4), 3, None),
        ((1, 4), 2, None),
    ],
)
def test_sites(shape: tuple[int, int], count: int, sites: object) -> None:
    assert site_shapes(shape, count) == sites


def test_bonds_for_a_share_and_an_error() -> None:
    sites = ((24, 24), (24, 24))
    bonds = bonds_for_share(sites, 0.5)
    assert bonds == (144,)
    assert count_numbers(sites, bonds) == 0.5 * 576**2
    assert bonds_for_share(((2, 2), (2, 2)), 0.01) is None
    W, small = matrix((16, 24)), ((2, 4), (2, 3), (4, 2))
    found = decomposed(W, small, bonds_for_error(W, small, 0.3), where="w")
    assert np.linalg.norm(found.dense() - W) <= 0.3 * np.linalg.norm(W)


@pytest.mark.parametrize(
    ("sites", "bonds", "words"),
    [
        (((3, 5), (4, 5)), (4,), "must multiply to the matrix"),
        (((3, 5), (4, 4)), (16,), r"from 1 to \(15,\): got \(16,\)"),
        (((3, 5), (4, 4)), (0,), "from 1 to"),
        (((3, 5), (4, 4)), (2, 2), "from 1 to"),
    ],
)
def test_what_cannot_be_is_refused(sites: tuple[tuple[int, int], ...], bonds: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        decomposed(matrix((12, 20)), sites, bonds, where="model.layers.0.mlp.up_proj")
