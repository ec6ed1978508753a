"""Layer similarity: against scikit-learn's and scipy's parts, and what must hold of any measure."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import UserError
from edgekit.merge.similarity import (
    MEASURES,
    Doubles,
    Measure,
    _digamma,
    diffusion_map,
    entropy,
    kernel,
    mutual_information,
    npib,
    ranks,
    similarities,
)


def rows(seed: int = 0, count: int = 60) -> Doubles:
    return np.random.default_rng(seed).standard_normal((count, 12)) * 3


def test_digamma_is_scipys() -> None:
    special = pytest.importorskip("scipy.special")
    for n in (1, 2, 5, 9, 10, 57, 4000):
        assert _digamma(n) == pytest.approx(special.digamma(n), abs=1e-12)


def test_the_kernel_and_the_map_are_those_of_scikit_learns_parts() -> None:
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    decomposition = pytest.importorskip("sklearn.utils.extmath")
    H = rows()
    distance = pairwise.paired_euclidean_distances(np.repeat(H, len(H), 0), np.tile(H, (len(H), 1))).reshape(60, 60)
    K = np.exp(-np.sqrt(distance / 8))
    K = K / np.sqrt(np.outer(K.sum(0), K.sum(0)))
    A = K / np.sqrt(np.outer(K.sum(0), K.sum(0)))
    np.testing.assert_allclose(kernel(H), A, rtol=1e-6)
    u = decomposition.randomized_svd(A, 3, n_iter=50, random_state=0)[0]
    Phi = u[:, 1:3] / u[:, :1]
    ours = diffusion_map(H)
    np.testing.assert_allclose(np.abs(ours), np.abs(Phi), rtol=1e-3, atol=1e-4)


def test_mutual_information_is_scikit_learns() -> None:
    selection = pytest.importorskip("sklearn.feature_selection")
    random = np.random.default_rng(1)
    x = random.permutation(200) / 200
    y = ranks((x + 0.1 * random.standard_normal(200))[:, None])[:, 0]
    # scikit-learn divides by the standard deviation and adds noise of 1e-10: on ranks alone neighbours tie
    noisy = (values + 1e-7 * random.standard_normal(200) for values in (x, y))
    a, b = noisy
    theirs = selection.mutual_info_regression(a[:, None] / a.std(), b / b.std(), n_neighbors=5, random_state=0)[0]
    assert mutual_information(a / a.std(), b / b.std()) == pytest.approx(theirs, abs=1e-6)


def test_entropy_grows_with_spread() -> None:
    values = np.random.default_rng(2).uniform(size=(300, 2))
    assert entropy(2 * values) == pytest.approx(entropy(values) + 2 * np.log(2))


@pytest.mark.parametrize("measure", MEASURES)
def test_layers_that_are_alike_score_higher_and_order_does_not_matter(measure: Measure) -> None:
    first = rows(3, 120)
    near, far = first + 0.05 * rows(4, 120), rows(5, 120)
    table = similarities([first, near, far], measure)
    np.testing.assert_allclose(table, table.T)
    assert table[0, 1] > table[0, 2]
    assert table[0, 1] > table[1, 2]


def test_maps_that_share_nothing_have_next_to_no_similarity() -> None:
    one, other = (ranks(np.random.default_rng(seed).uniform(size=(400, 2))) for seed in (6, 7))
    assert npib(one, other) < 0.1 < npib(one, one)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="measure must be one of npib"):
        similarities([rows(), rows()], "magic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="on 8 or more windows: got 4"):
        similarities([rows(count=4), rows(count=4)])
