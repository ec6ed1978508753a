"""The step `tn.lowrank`: from a recipe to factors in the folder, on every path that a model can take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CORPUS, tiny_folder

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.errors import BudgetError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.forecast import plan
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.recipe import parse_recipe
from edgekit.weight import Factored, Quantized

pytest.importorskip("torch", reason="torch is no part of the base install")

UP = "model.layers.0.mlp.up_proj"
SHAPE = (96, 64)


def recipe(text: str, folder: Path) -> Any:
    (folder / "text.txt").write_text("\n".join(CORPUS * 30))
    calibration = f'[calibration]\nfiles = ["{folder / "text.txt"}"]\nsamples = 4\nlength = 64\n'
    return parse_recipe(f'name = "test"\n{calibration}\n[[step]]\nuse = "tn.lowrank"\n{text}', where="test")


def made(folder: Path, text: str) -> Checkpoint:
    compress(source(folder), recipe(text, folder), folder / "small")
    return open_checkpoint(folder / "small")


def source(folder: Path) -> Checkpoint:
    if not (folder / "model").exists():
        tiny_folder(folder / "model")
    return open_model(str(folder / "model"))


def test_factors_are_stored_and_read_back(tmp_path: Path) -> None:
    found = made(tmp_path, "keep = 0.6\nmultiple = 1")
    weight = found.weight(UP)
    assert isinstance(weight, Factored)
    assert weight.is_low_rank
    assert weight.bonds == (int(0.6 * 96 * 64 / 160),)
    assert found.shape(UP) == SHAPE
    assert found.manifest is not None
    step = found.manifest.steps[0]
    assert step.changed == 14
    assert 0 < step.facts["relative_output_error"] < 1
    assert step.after_bytes < step.before_bytes
    assert sum(len(matrices) for matrices, _ in found.blocks.values()) == 15


def test_full_rank_error_zero_keeps_the_model(tmp_path: Path) -> None:
    """Where no factors would be smaller, the matrices stay, and the record says why."""
    found = made(tmp_path, "error = 1e-9\nmultiple = 1")
    assert found.manifest is not None
    assert found.manifest.steps[0].changed == 0
    reasons = {skip.path: skip.reason for skip in found.manifest.steps[0].skipped}
    assert "would not be smaller" in reasons[UP]


def test_whitened_is_better_than_plain_on_what_is_read(tmp_path: Path) -> None:
    ids = [list(range(3, 60))]
    exact = forward(source(tmp_path), ids)[0]
    gaps = []
    for whiten in ("true", "false"):
        (tmp_path / whiten).mkdir()
        gap = forward(made(tmp_path / whiten, f"keep = 0.5\nmultiple = 1\nwhiten = {whiten}"), ids)[0] - exact
        gaps.append(float(np.square(gap).mean()))
    assert gaps[0] < gaps[1]


def test_a_prediction_is_exact(tmp_path: Path) -> None:
    steps = recipe('keep = 0.6\nmultiple = 32\n[[step]]\nuse = "quant.int8"\n', tmp_path)
    predicted = plan(source(tmp_path), steps)
    compress(source(tmp_path), steps, tmp_path / "small")
    found = open_checkpoint(tmp_path / "small")
    assert found.manifest is not None
    assert predicted.after_bytes == found.manifest.steps[-1].after_bytes


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_factors_are_rounded_and_exported(tmp_path: Path, method: str) -> None:
    bits = 8 if method == "rtn" else 4
    found = made(tmp_path, f'keep = 0.9\n[[step]]\nuse = "quant.int{bits}"\nmethod = "{method}"\n')
    weight = found.weight(UP)
    assert isinstance(weight, Factored)
    assert all(isinstance(factor, Quantized) and factor.bits == bits for factor in weight.factors)
    for target in ("portable", "x86"):
        report = export(found, tmp_path / target, target=TARGETS[target], accept_drift=method == "gptq")
        assert any(row.name.startswith("parity") or "KL" in row.name for row in report.measurements)


def test_a_budget_becomes_a_plan_that_fits(tmp_path: Path) -> None:
    found = made(tmp_path, "budget = 0.8\nmultiple = 4")
    kept = dense = 0
    ranks = set()
    for matrices, _ in found.blocks.values():
        for module in matrices:
            if module.startswith("model.layers."):
                shape = found.shape(module)
                dense += shape[0] * shape[1]
                kept += sum(a * b for a, b in map(found.shape, found.parts(module)))
                ranks.add(len(found.parts(module)))
    assert 0.7 * dense < kept <= 0.8 * dense
    assert ranks == {1, 2}  # some stay as they are


def test_a_budget_that_nothing_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="must hold the smallest plan"):
        made(tmp_path, "budget = 0.0001\nmultiple = 4")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "one of keep, error, budget and plan"),
        ("keep = 0.5\nerror = 0.1", "one of keep, error"),
        ("keep = 1.5", "keep must be from 0 to 1"),
        ("keep = 0.5\nmultiple = 0", "multiple"),
        ('budget = 3\nunit = "ms"', "needs a device"),
        ('plan = ["a b"]', "MODULE RANK"),
        ('plan = ["a 1", "a 2"]', "each module once"),
        ('keep = 0.5\ndevice = "pi55"', "no device"),
        ("keep = 0.5\nwhiten = false\nfollow = 0.5", "needs the metric"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        recipe(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'plan = ["{UP} 65"]', r"at most the smaller dimension: .*up_proj.*\(96, 64\).*65"),
        ('plan = ["model.layers.9.mlp.up_proj 3"]', "it lacks model.layers.9"),
        ('keep = 0.5\nmodules = ["*.qq_proj"]', "matches none"),
    ],
)
def test_a_model_that_does_not_suit(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(tmp_path, text)


def test_a_device_on_which_factors_are_slower(tmp_path: Path) -> None:
    found = made(tmp_path, 'keep = 0.6\nmultiple = 1\ndevice = "pi5"')
    assert found.manifest is not None
    reasons = [skip.reason for skip in found.manifest.steps[0].skipped if ".layers." in skip.path]
    assert len(reasons) == 14
    assert all("slower on pi5" in reason for reason in reasons)


def mpo(text: str, folder: Path) -> Any:
    return recipe("keep = 0.5", folder) if not text else parse_recipe(
        f'name = "test"\n[calibration]\nfiles = ["{folder / "text.txt"}"]\nsamples = 4\nlength = 64\n'
        f'[[step]]\nuse = "tn.mpo"\n{text}', where="test"
    )  # fmt: skip


@pytest.mark.parametrize("sites", [2, 3])
def test_chains_are_stored_rounded_and_exported(tmp_path: Path, sites: int) -> None:
    (tmp_path / "text.txt").write_text("\n".join(CORPUS * 30))
    steps = mpo(f'keep = 0.9\nsites = {sites}\n[[step]]\nuse = "quant.int8"\n', tmp_path)
    predicted = plan(source(tmp_path), steps)
    compress(source(tmp_path), steps, tmp_path / "small")
    found = open_checkpoint(tmp_path / "small")
    weight = found.weight(UP)
    assert isinstance(weight, Factored)
    assert len(weight.sites) == sites
    assert found.manifest is not None
    assert predicted.after_bytes == found.manifest.steps[-1].after_bytes
    report = export(found, tmp_path / "bundle", target=TARGETS["x86"], accept_drift=True)
    (kept,) = [row.value for row in report.measurements if row.name == "factored matrices kept"]
    assert kept == 0


def test_a_prime_dimension_falls_to_low_rank_and_says_so(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", mlp=97)
    (tmp_path / "text.txt").write_text("\n".join(CORPUS * 30))
    compress(source(tmp_path), mpo("keep = 0.5", tmp_path), tmp_path / "small")
    found = open_checkpoint(tmp_path / "small")
    weight = found.weight(UP)
    assert isinstance(weight, Factored)
    assert weight.is_low_rank
    assert found.manifest is not None
    reasons = {skip.path: skip.reason for skip in found.manifest.steps[0].skipped}
    assert "made low rank instead" in reasons[UP]


@pytest.mark.parametrize(("text", "words"), [
    ("keep = 0.5\nerror = 0.1", "one of keep and error"), ("keep = 0.5\nsites = 1", "sites must be from 2"),
    ("keep = 2.0", "from 0 to 1"), ('keep = 0.5\nmodules = ["x"]', "matches none"),
])  # fmt: skip
def test_chains_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "text.txt").write_text("\n".join(CORPUS * 30))
    with pytest.raises(UserError, match=words):
        compress(source(tmp_path), mpo(text, tmp_path), tmp_path / "small")
