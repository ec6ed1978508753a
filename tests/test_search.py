"""Compositions and the search for one: plans that fit and run, a study that goes on, and what cannot be met."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import ek, ok
from tiny import CORPUS, tiny_folder

pytest.importorskip("torch", reason="torch is no part of the base install")
pytest.importorskip("optuna", reason="optuna is part of the compress extra")

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compose import MIXED, Composition, Sensitivity, composed, measure
from edgekit.compress import compress
from edgekit.device import load_device
from edgekit.errors import BudgetError, UserError
from edgekit.merge.drop import Drop
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.prune.steps import Planned
from edgekit.quant.mixed import Mixed
from edgekit.search import Goal, contenders, divergence_of, search, write_plot
from edgekit.step import CalibrationOptions, options
from edgekit.tn.steps import LowRank


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(CORPUS * 60))
    return CalibrationOptions((str(path),), 6, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_model(str(tiny_folder(tmp_path_factory.mktemp("model") / "m", layers=4)))


@pytest.fixture(scope="module")
def found(model: Checkpoint, text: CalibrationOptions) -> Sensitivity:
    return measure(model, text, mixed=dataclasses.replace(MIXED, bits=(2, 3, 4, 6), blocks=(32,), search=False))


def size_mb(model: Checkpoint) -> float:
    """What 4 bits a number take."""
    return sum(np.prod(model.shape(m)) for matrices, _ in model.blocks.values() for m in matrices) * 5 / 8 / 1e6


def test_what_is_measured_survives_its_file(found: Sensitivity, tmp_path: Path) -> None:
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found
    assert len(found.drops) == 4
    assert all(cost > 0 for cost in found.drops)
    for rows in found.widths.values():
        costs = [cost for _, _, cost in rows]
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] == 0


@pytest.mark.parametrize(
    ("layers", "prune", "rank", "kinds"),
    [
        (0, 0.0, 1.0, [Mixed]),
        (1, 0.0, 1.0, [Drop, Mixed]),
        (0, 0.2, 1.0, [Planned, Mixed]),
        (1, 0.2, 0.95, [Drop, Planned, LowRank, Mixed]),
    ],
)
def test_a_composition_is_a_recipe_that_fits(
    model: Checkpoint,
    found: Sensitivity,
    text: CalibrationOptions,
    tmp_path: Path,
    layers: int,
    prune: float,
    rank: float,
    kinds: list[type],
) -> None:
    target = size_mb(model)
    made = composed(found, Composition(layers, prune, rank, target))
    assert [type(step) for step in made.steps][: len(kinds) - 1] == kinds[:-1] or rank < 1
    assert type(made.steps[-1]) is Mixed
    manifest = compress(model, made.recipe("t", text), tmp_path / "small")
    small = open_checkpoint(tmp_path / "small")
    assert small.decoder.layers == 4 - layers
    assert manifest.steps[-1].after_bytes == made.size_bytes <= target * 1e6
    assert np.isfinite(forward(small, [[1, 2, 3]])[0]).all()
    assert divergence_of(model, small, text) > 0


def test_less_room_costs_more(model: Checkpoint, found: Sensitivity) -> None:
    whole = size_mb(model)
    losses = [composed(found, Composition(size_mb=share * whole)).loss for share in (1.2, 0.9, 0.7)]
    assert losses == sorted(losses)
    pi = load_device("pi5")
    times = [composed(found, Composition(layers=n, size_mb=whole), pi).latency_ms for n in range(3)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    "wanted", [Composition(size_mb=0.001), Composition(prune=0.9, size_mb=1), Composition(layers=4)]
)
def test_what_cannot_be_composed(found: Sensitivity, wanted: Composition) -> None:
    with pytest.raises(BudgetError):
        composed(found, wanted)


@pytest.mark.parametrize("database", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_study_goes_on_where_it_stopped(
    model: Checkpoint, found: Sensitivity, tmp_path: Path, database: bool
) -> None:
    import optuna

    goal = Goal(0.8 * size_mb(model), "pi5", 100.0)
    storage = f"sqlite:///{tmp_path}/study.db" if database else str(tmp_path / "study.journal")
    search(found, goal, storage, trials=3)
    place = storage if database else optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    assert len(optuna.load_study(study_name=goal.study(found), storage=place).trials) == 3
    assert len(search(found, Goal(2 * goal.size_mb), storage, trials=2)) >= 1  # another goal is another study
    best = search(found, goal, storage, trials=12)
    assert all(one.size_bytes <= goal.size_mb * 1e6 for one in best)
    assert len(optuna.load_study(study_name=goal.study(found), storage=place).trials) == 12
    assert search(found, goal, storage, trials=12) == best
    assert [one.loss for one in best] == sorted(one.loss for one in best)
    assert [one.size_bytes for one in best] == sorted((one.size_bytes for one in best), reverse=True)
    assert best[0].loss <= composed(found, Composition(size_mb=goal.size_mb)).loss
    finalists = contenders(best, found, goal, 3)
    assert finalists[0].composition == Composition(size_mb=goal.size_mb)
    write_plot(storage, found, best, goal, tmp_path / "plot.html")
    assert (tmp_path / "plot.html").read_text().count("<circle") >= 3


@pytest.mark.slow
def test_processes_share_a_study(model: Checkpoint, found: Sensitivity, tmp_path: Path) -> None:
    best = search(found, Goal(0.8 * size_mb(model)), str(tmp_path / "study.journal"), trials=12, jobs=2)
    assert best


def test_a_limit_is_kept_or_said_to_be_out_of_reach(model: Checkpoint, found: Sensitivity, tmp_path: Path) -> None:
    goal = Goal(size_mb(model), "pi5", 1e-6)
    with pytest.raises(BudgetError, match="no composition meets"):
        search(found, goal, str(tmp_path / "late.journal"), trials=4)
    limit = composed(found, Composition(size_mb=0.85 * goal.size_mb), load_device("pi5")).latency_ms
    best = search(found, dataclasses.replace(goal, latency_ms=limit), str(tmp_path / "s.journal"), trials=25)
    assert all(one.latency_ms <= limit for one in best)


def test_goals_that_cannot_be(found: Sensitivity, tmp_path: Path) -> None:
    for goal in ({"size_mb": 0.0}, {"size_mb": 1.0, "latency_ms": 5.0}, {"size_mb": 1.0, "device": "nothing"}):
        with pytest.raises(UserError):
            Goal(**goal)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="trials and jobs"):
        search(found, Goal(1.0), str(tmp_path / "s"), trials=0)
    with pytest.raises(UserError, match=r"\.html"):
        write_plot(str(tmp_path / "s"), found, [], Goal(1.0), tmp_path / "plot.gif")


def test_the_command(model: Checkpoint, text: CalibrationOptions, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", layers=4)
    (tmp_path / "text.txt").write_text("\n".join(CORPUS * 800))
    words = ("compress", folder, "-o", tmp_path / "small", "--target-size", f"{size_mb(model):.4f}MB", "--trials", "4")
    words += ("--calibration", tmp_path / "text.txt")
    shown = ok(*words, "--dry-run", "--plot", tmp_path / "front.html")
    assert "predicted loss" in shown.out
    done = json.loads(ok(*words, "--json").out)["finalists"]
    assert [one["kl"] for one in done] == sorted(one["kl"] for one in done)
    assert open_checkpoint(tmp_path / "small").manifest is not None
    assert not (tmp_path / "small.search").exists()
    assert "belong to a search" in ek("compress", folder, "-o", tmp_path / "x", "--device", "pi5").err
    assert options(Planned())  # the plan's options are those of the recipe
