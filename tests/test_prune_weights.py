"""Single weights set to zero: what goes, by the plain formulas, and that SparseGPT makes up for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CORPUS, tiny_folder

from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.errors import UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.forecast import plan
from edgekit.model.sources import open_model
from edgekit.prune.weights import Choice, Weights, lowest, sparsegpt
from edgekit.quant.gptq import damped
from edgekit.recipe import parse_recipe


def problem(rows: int = 12, columns: int = 32, tokens: int = 200) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    X = (
        random.standard_normal((tokens, columns))
        * 0.9 ** np.arange(columns)
        @ random.standard_normal((columns, columns))
    )
    return random.standard_normal((rows, columns)).astype(np.float32), X.T @ X


def error(W: Any, thin: Any, G: Any) -> float:
    moved = thin.astype(np.float64) - W
    return float(np.vdot(moved, moved @ G))


def test_the_lowest_go_and_the_first_of_equals() -> None:
    scores = np.array([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert lowest(scores, 2).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert not lowest(scores, 0).any()


def test_wanda_looks_at_the_inputs_and_magnitude_does_not() -> None:
    W = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    G = np.diag([100.0, 1.0])
    assert Weights(choice="magnitude").thinned(W, G, where="w").tolist() == [[0, 2], [0, 4]]
    assert Weights(choice="wanda").thinned(W, G, where="w").tolist() == [[1, 0], [3, 0]]


@pytest.mark.parametrize("choice", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_as_many_zeros_as_asked(choice: Choice, pattern: str) -> None:
    W, G = problem()
    thin = Weights(choice=choice, pattern=pattern).thinned(W, G, where="w")
    assert ((thin == 0).sum(1) == 16).all()
    if pattern:
        assert ((thin.reshape(12, 8, 4) == 0).sum(-1) == 2).all()


def test_what_looks_further_loses_less() -> None:
    W, G = problem()
    wanda, sparse = (Weights(choice=choice).thinned(W, G, where="w") for choice in ("wanda", "sparsegpt"))
    assert error(W, sparse, G) < 0.7 * error(W, wanda, G)
    alone = np.diag(G.diagonal())  # where inputs are independent, wanda is the best mask there is
    magnitude = Weights(choice="magnitude").thinned(W, G, where="w")
    assert error(W, wanda, alone) < error(W, magnitude, alone)


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_blocks_change_no_more_than_the_mask(batch: int) -> None:
    """With the weights that go given, blocks are only another order of additions."""
    W, G = problem()
    H = damped(G, 0.01, where="w")
    gone = lowest(np.abs(W).astype(np.float64), 16)

    def given(step: int) -> Any:
        starts = iter(range(0, 32, step))

        def chosen(scores: Any) -> Any:
            at = next(starts)
            return gone[:, at : at + step]

        return sparsegpt(W, H, chosen, batch=step)

    np.testing.assert_allclose(given(batch), given(32), atol=1e-5)
    assert ((given(batch) == 0) == gone).all()


def test_the_first_column_that_goes_is_made_up_for_by_least_squares() -> None:
    W, G = problem(columns=8)
    H = damped(G, 0.01, where="w")
    gone = np.zeros((12, 8), bool)
    gone[:, 0] = True
    found = sparsegpt(W, H, lambda scores: gone, batch=8)
    wanted = W[:, 1:] + W[:, :1] @ np.linalg.solve(H[1:, 1:], H[1:, :1]).T
    np.testing.assert_allclose(found[:, 1:], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", ["magnitude", "wanda", "sparsegpt"])
def test_in_a_recipe(tmp_path: Path, choice: str) -> None:
    if choice != "magnitude":
        pytest.importorskip("torch", reason="torch is no part of the base install")
    tiny_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(CORPUS * 30))
    text = f'name = "t"\n[calibration]\nfiles = ["{tmp_path}/text.txt"]\nsamples = 4\nlength = 64\n[[step]]\n'
    recipe = parse_recipe(f'{text}use = "prune.weights"\nchoice = "{choice}"\npattern = "2:4"\n', where="t")
    model = open_model(str(tmp_path / "model"))
    foretold = plan(model, recipe)
    manifest = compress(model, recipe, tmp_path / "small")
    small = open_checkpoint(tmp_path / "small")
    assert foretold.after_bytes == manifest.steps[0].after_bytes
    assert manifest.steps[0].facts["zeros"] == 0.5 * sum(
        np.prod(small.shape(module)) for module in small.blocks["layers.0"][0]
    ) * len([name for name in small.blocks if name.startswith("layers.")])
    export(small, tmp_path / "bundle", target=TARGETS["portable"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"choice": "magic"}, "choice must be one of magnitude, wanda, sparsegpt"),
        ({"remove": 1.0}, "remove must be a share"),
        ({"pattern": "4:2"}, "pattern must be n:m"),
        ({"pattern": "1:3"}, "m a power of 2"),
        ({"damping": 0.0}, "damping must be above 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Weights(**options)


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    with pytest.raises(UserError, match="matches none"):
        Weights(modules=("nothing.*",)).prepare(open_model(str(tmp_path / "model")))
