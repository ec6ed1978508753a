"""Tucker: exact at full ranks, the foretold tails, tensorly's numbers, stacked heads, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import CORPUS, tiny_folder

from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.errors import ModelError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.recipe import parse_recipe
from edgekit.tn.lowrank import truncated
from edgekit.tn.tucker import ranks_for_error, spectra, stacked_heads, tucker
from edgekit.tn.tucker_step import HeadsTucker
from edgekit.tn.whitening import relative_error, spectrum
from edgekit.weight import Factored

SHAPE = (12, 7, 3, 3)


def tensor(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def metric(width: int) -> np.ndarray:
    x = np.random.default_rng(7).standard_normal((3 * width, width)) * np.geomspace(1, 20, width)
    return x.T @ x


@pytest.mark.parametrize("modes", [1, 2, 4])
def test_full_ranks_are_the_tensor(modes: int) -> None:
    np.testing.assert_allclose(tucker(tensor(), SHAPE[:modes]).dense(), tensor(), atol=1e-12)


def test_one_mode_errs_by_its_tail_and_more_by_no_more_than_all() -> None:
    values = spectra(tensor(), 2)
    one = np.linalg.norm(tucker(tensor(), (5,)).dense() - tensor()) ** 2
    assert one == pytest.approx(np.square(values[0][5:]).sum(), rel=1e-6)
    plain, better = (np.linalg.norm(tucker(tensor(), (5, 4), passes=n).dense() - tensor()) ** 2 for n in (0, 5))
    assert better <= plain <= np.square(values[0][5:]).sum() + np.square(values[1][4:]).sum()


@pytest.mark.parametrize("ranks", [(5, 4), (12, 2), (1, 1)])
def test_it_is_tensorlys_partial_tucker(ranks: tuple[int, int]) -> None:
    decomposition = pytest.importorskip("tensorly.decomposition")
    (core, factors), _ = decomposition.partial_tucker(
        tensor(), rank=list(ranks), modes=[0, 1], n_iter_max=200, tol=1e-12
    )
    theirs = np.einsum("abhw,oa,ib->oihw", core, *factors)
    ours = tucker(tensor(), ranks, passes=200).dense()
    assert np.linalg.norm(ours - tensor()) == pytest.approx(np.linalg.norm(theirs - tensor()), rel=1e-6)


def test_hosvd_is_tensorlys_first_step() -> None:
    decomposition = pytest.importorskip("tensorly.decomposition")
    core, factors = decomposition.tucker(tensor(), rank=[5, 4, 2, 3], n_iter_max=1, init="svd")
    theirs = np.einsum("abcd,oa,ib,hc,wd->oihw", core, *factors)
    np.testing.assert_allclose(tucker(tensor(), (5, 4, 2, 3), passes=1).dense(), theirs, atol=1e-8)


@pytest.mark.parametrize("error", [0.0, 0.1, 0.5, 0.99])
def test_ranks_for_an_error_keep_it(error: float) -> None:
    ranks = ranks_for_error(tensor(), 2, error)
    found = tucker(tensor(), ranks, passes=0).dense()
    assert np.linalg.norm(found - tensor()) <= error * np.linalg.norm(tensor()) + 1e-9


def test_a_tensor_of_low_ranks_is_found_again() -> None:
    core, (U, V) = tensor((3, 2, 3, 3)), (tensor((12, 3)), tensor((7, 2)))
    T = np.einsum("abhw,oa,ib->oihw", core, U, V)
    assert ranks_for_error(T, 2, 1e-6) == (3, 2)
    np.testing.assert_allclose(tucker(T, (3, 2)).dense(), T, atol=1e-9)


def heads(mixtures: int, width: int = 4, columns: int = 20) -> np.ndarray:
    """Six heads that are mixtures of fewer."""
    parts = tensor((mixtures, width * columns)).astype(np.float32)
    return (tensor((6, mixtures)).astype(np.float32) @ parts).reshape(6 * width, columns)


def test_heads_that_are_mixtures_of_two_are_stored_as_two() -> None:
    W = heads(2)
    found = stacked_heads(W, metric(20), 6, 0.62, where="w")
    assert found is not None
    assert found.bonds == (2, 8)
    np.testing.assert_allclose(found.dense(), W, atol=1e-4)
    assert sum(factor.values.size for factor in found.factors) <= 0.62 * W.size  # type: ignore[union-attr]
    low = truncated(W, metric(20), 6, where="w")  # as many numbers as low rank may have
    assert relative_error(W, found.dense(), metric(20))[0] < relative_error(W, low.dense(), metric(20))[0]


def test_independent_heads_are_plain_low_rank_within_the_bound() -> None:
    W = tensor((24, 20)).astype(np.float32)
    for share in (0.4, 0.7, 1.2):
        found = stacked_heads(W, metric(20), 6, share, where="w")
        assert found is not None
        mixtures, directions = found.bonds
        seen = spectrum(W, metric(20), where="w")
        outputs = (seen.left * seen.values)[:, :directions].reshape(6, -1)
        bound = seen.tail(directions) ** 2 + np.square(np.linalg.svd(outputs, compute_uv=False)[mixtures:]).sum()
        assert relative_error(W, found.dense(), metric(20))[0] <= bound * (1 + 1e-5)
    assert stacked_heads(W, None, 6, 0.001, where="w") is None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="ranks must be from 1"):
        tucker(tensor(), (13, 4))
    with pytest.raises(UserError, match="ranks must be from 1"):
        tucker(tensor(), (5, 0))
    with pytest.raises(UserError, match="rows must be whole heads"):
        stacked_heads(np.ones((7, 4), np.float32), None, 2, 0.5, where="w")
    with pytest.raises(ModelError, match="must be finite"):
        tucker(np.full((3, 3), np.nan), (2, 2))


@pytest.mark.parametrize("bits", [0, 8])
def test_in_a_recipe(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("torch", reason="torch is no part of the base install")
    tiny_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(CORPUS * 30))
    text = f'name = "t"\n[calibration]\nfiles = ["{tmp_path}/text.txt"]\nsamples = 4\nlength = 64\n'
    text += '[[step]]\nuse = "tn.tucker"\nkeep = 0.9\n'
    text += f'[[step]]\nuse = "quant.int{bits}"\n' if bits else ""
    manifest = compress(open_model(str(tmp_path / "model")), parse_recipe(text, where="t"), tmp_path / "small")
    small = open_checkpoint(tmp_path / "small")
    made = small.weight("model.layers.0.self_attn.q_proj")
    assert isinstance(made, Factored)
    assert made.sites == ((4, 1), (16, 1), (1, 64))
    assert sum(np.prod(factor.shape) for factor in made.factors) <= 0.9 * 64 * 64
    assert manifest.steps[0].skipped
    assert 0 < manifest.steps[0].facts["relative_output_error"] < 0.6
    logits = forward(small, [[1, 2, 3, 4]])[0]
    assert np.isfinite(logits).all()
    export(small, tmp_path / "bundle", target=TARGETS["x86"], accept_drift=True)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keep must be a share"):
        HeadsTucker(keep=1.0)
    tiny_folder(tmp_path / "model")
    with pytest.raises(UserError, match="matches none"):
        HeadsTucker(modules=("nothing.*",)).prepare(open_model(str(tmp_path / "model")))
