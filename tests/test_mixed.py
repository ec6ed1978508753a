"""Mixed precision: plans that fit and are worth it, that are on record, and that a killed run keeps."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_folder, tiny_gguf

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.errors import BudgetError, UserError
from edgekit.forecast import plan
from edgekit.job import Progress
from edgekit.manifest import Manifest
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.quant.mixed import Mixed, Table, grid_of, small_scales
from edgekit.recipe import Recipe, parse_recipe, within
from edgekit.step import CalibrationOptions
from edgekit.weight import Quantized

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    text = tmp_path_factory.mktemp("text") / "book.txt"
    line = "The quick brown fox jumps over the lazy dog; a small model runs on the device in your hand.\n"
    text.write_text("".join(f"{number}. {line}" for number in range(200)))
    return CalibrationOptions((str(text),), 6, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_model(str(tiny_folder(tmp_path_factory.mktemp("model") / "m", layers=3)))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return open_model(str(tiny_gguf(path, mlp=128, quantization="Q4_1")))


# --- plans ------------------------------------------------------------------------------------------------------------


def test_the_best_plan_of_a_table_within_the_target() -> None:
    small = "3/32/zero/int8"
    table = Table({"a": [("keep", 1000, 0.0), (small, 600, 5.0)], "b": [("keep", 1000, 0.0), (small, 500, 1.0)]}, 100)
    plans = {target: Mixed(target_mb=target / 1e6).planned(table).plan for target in (2100, 2099, 1600, 1599, 1200)}
    assert plans[2100] == ("a keep", "b keep")
    assert plans[2099] == plans[1600] == ("a keep", f"b {small}")
    assert plans[1599] == plans[1200] == (f"a {small}", f"b {small}")
    with pytest.raises(BudgetError, match="must hold the smallest plan"):
        Mixed(target_mb=1199e-6).planned(table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": ()}, "bits must name one or more sizes"),
        ({"bits": (4, 4)}, "bits must name one or more sizes, each once"),
        ({"bits": (4, 7)}, "bits must be one of 2, 3, 4, 5, 6, 8: got 7"),
        ({"method": "awq"}, "method awq scales for one grid"),
        ({"method": "x"}, "method must be one of"),
        ({"follow": 2.0}, "follow must be from 0 to 1"),
        ({"plan": ("a",)}, "a line of plan must be MODULE keep"),
        ({"plan": ("a keep", "a keep")}, "each module once"),
        ({"plan": ("a 4/32/zero",)}, "a line of plan must be"),
        ({"plan": ("a x/32/zero/int8",)}, "a line of plan must be"),
        ({"plan": ("a 4/33/zero/int8",)}, "block must be one of"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixed(target_mb=1.0, **options)


def test_a_target_or_a_plan_for_this_model_is_needed(model: Checkpoint) -> None:
    with pytest.raises(UserError, match="set target_mb above 0 or pass --target-size"):
        Mixed().prepare(model)
    with pytest.raises(UserError, match=r"it lacks model\.layers\.9\.mlp\.up_proj"):
        Mixed(plan=("model.layers.9.mlp.up_proj keep",)).prepare(model)


def test_a_recipe_is_turned_to_another_size() -> None:
    recipe = Recipe("m", "", (Mixed(target_mb=5, plan=(f"{Q_PROJ} keep",)),))
    (step,) = within(recipe, 70).steps
    assert step == Mixed(target_mb=70)
    from edgekit.quant.methods import Int4

    with pytest.raises(UserError, match="a size needs a recipe with a step that plans for one"):
        within(Recipe("m", "", (Int4(),)), 70)


@pytest.mark.parametrize("offset", ["symmetric", "minimum"])
def test_scales_become_small_and_codes_stay(offset: Any) -> None:
    W = np.abs(np.random.default_rng(0).standard_normal((8, 96)).astype(np.float32))
    rounded = round_to_grid(W if offset == "minimum" else -W, Grid(4, 32, offset), where="w")
    smaller = small_scales(rounded)
    assert smaller is not None
    np.testing.assert_array_equal(smaller.codes, rounded.codes)
    assert grid_of(smaller) == Grid(4, 32, offset, "int8")
    assert smaller.size_bytes == Grid(4, 32, offset, "int8").size_bytes((8, 96)) < rounded.size_bytes
    assert np.abs(smaller.dense() - rounded.dense()).max() < 0.03 * np.abs(W).max()
    assert small_scales(smaller) is None
    assert small_scales(round_to_grid(W, Grid(4, 32, "zero"), where="w")) is None
    signed = round_to_grid(W, Grid(4, 32, "symmetric"), where="w")  # positive weights take negative scales
    assert small_scales(signed) is None


def test_a_plan_needs_no_text_without_gptq_and_gives_its_formats(gguf: Checkpoint, tmp_path: Path) -> None:
    modules = [module for matrices, _ in gguf.blocks.values() for module in matrices]
    lines = dict.fromkeys(modules, "keep")
    lines |= {modules[0]: "4/32/minimum/int8", modules[1]: "3/64/zero/float16", Q_PROJ: "2/32/minimum/int8"}
    step = Mixed(plan=tuple(f"{module} {text}" for module, text in lines.items()), method="rtn")
    assert step.needs == "weights"
    recipe = Recipe("planned", "", (step,))
    manifest = compress(gguf, recipe, tmp_path / "small")
    opened = open_checkpoint(tmp_path / "small")
    for module, text in lines.items():
        weight = opened.weight(module)
        assert isinstance(weight, Quantized)
        grid = grid_of(weight)
        found = f"{grid.bits}/{grid.block}/{grid.offset}/{grid.scales}"
        assert found == ("4/32/minimum/float16" if text == "keep" else text)
    assert manifest.steps[0].changed == 3
    assert plan(gguf, recipe).after_bytes == manifest.steps[0].after_bytes
    assert parse_recipe(recipe.resolved(), where="resolved") == recipe


# --- surveys ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "gguf"])
def test_plans_fit_their_size_and_more_room_is_worth_it(
    kind: str, calibration: CalibrationOptions, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Checkpoint = request.getfixturevalue(kind)
    ids = [[1, 5, 300, 7, 7, 2, 9, 9, 30, 250, 11]]
    exact = forward(source, ids)[0]
    errors = []
    for target in (0.048, 0.055, 0.062):
        recipe = Recipe("m", "", (Mixed(target_mb=target),), calibration=calibration)
        manifest = compress(source, recipe, tmp_path / f"{target}")
        assert 0.9 * target * 1e6 < manifest.steps[0].after_bytes <= target * 1e6
        plan_lines = manifest.steps[0].options["plan"]
        assert isinstance(plan_lines, list)
        assert {line.split()[0] for line in plan_lines} == {m for ms, _ in source.blocks.values() for m in ms}
        errors.append(float(np.square(forward(open_checkpoint(tmp_path / f"{target}"), ids)[0] - exact).mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.slow
def test_a_target_too_small_is_refused(model: Checkpoint, calibration: CalibrationOptions, tmp_path: Path) -> None:
    for target, message in ((0.02, "must hold the smallest plan"), (0.0001, "must hold the model's vectors")):
        recipe = Recipe("m", "", (Mixed(target_mb=target),), calibration=calibration)
        with pytest.raises(BudgetError, match=message):
            compress(model, recipe, tmp_path / "small")
        with pytest.raises(BudgetError, match=message):
            plan(model, recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_stops_keeps_its_plan(
    model: Checkpoint, calibration: CalibrationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe("m", "", (Mixed(target_mb=0.06),), calibration=calibration)
    compress(model, recipe, tmp_path / "whole")
    planned = plan(model, recipe)
    seen: list[str] = []

    def stop(progress: Progress) -> None:
        seen.append(progress.block)
        if progress.block == "layers.0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, recipe, tmp_path / "small", on_progress=stop)
    assert seen[0] == "survey"
    monkeypatch.setattr(Mixed, "table", functools.partial(pytest.fail, "the plan is in the journal"))
    compress(model, recipe, tmp_path / "small", resume=True)
    for name in ("recipe.toml", *(path.name for path in (tmp_path / "whole").glob("*.safetensors"))):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    resolved = (tmp_path / "small" / "recipe.toml").read_text()
    assert planned.recipe == resolved
    again = parse_recipe(resolved, where="recipe.toml")
    manifest = compress(model, again, tmp_path / "again")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert manifest.steps[0].options["plan"] == Manifest.load(tmp_path / "whole").steps[0].options["plan"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_the_estimate_is_the_divergence(tmp_path: Path, calibration: CalibrationOptions, tied: bool) -> None:
    """For small errors, one matrix at a time, the estimate is within a small factor of the KL that comes."""
    from edgekit.calibrate import begin_walk, survey_of
    from edgekit.quant.sensitivity import curvatures
    from edgekit.step import StepContext, renamed

    source = open_model(str(tiny_folder(tmp_path / "model", tied=tied)))
    recipe = Recipe("m", "", (Mixed(target_mb=1),), calibration=calibration)
    walk = begin_walk(source, source, recipe, StepContext(source.decoder, 0), tmp_path, None)
    survey = survey_of(walk, 0, lambda done, total: None)
    ids = walk.windows.ids.tolist()
    exact = log_softmax(np.concatenate(forward(source, ids)))
    random = np.random.default_rng(0)
    ratios = []
    for block, found, _ in curvatures(survey, seed=0):
        for module, curvature in found.items():
            W = block.matrices[module].dense()
            error = (0.02 * W.std() * random.standard_normal(W.shape)).astype(np.float32)
            names = {name: name for name in source.tensors.names()}
            view = renamed(source, names, config=source.config)
            moved = dataclasses.replace(view, tensors=_Moved(view.tensors, f"{module}.weight", error))
            after = log_softmax(np.concatenate(forward(moved, ids)))
            divergence = float((np.exp(exact) * (exact - after)).sum(1).mean())
            ratios.append(curvature.loss(error) / divergence)
    assert len(ratios) == 15 + (not tied)
    assert 0.6 < float(np.exp(np.mean(np.log(ratios)))) < 1.25
    assert min(ratios) > 0.25
    assert max(ratios) < 2.5


def log_softmax(x: Any) -> Any:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class _Moved:
    """A TensorReader with an error added to one tensor."""

    tensors: Any
    name: str
    error: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensors, name)

    def read(self, name: str) -> Any:
        values = self.tensors.read(name)
        return values + self.error if name == self.name else values


@pytest.mark.parametrize(("text", "size"), [("70MB", 70.0), ("0.5 GB", 500.0), ("900kB", 0.9), (" 61.5mb ", 61.5)])
def test_sizes_are_read(text: str, size: float) -> None:
    from edgekit.cli.compress import megabytes

    assert megabytes(text) == pytest.approx(size)


@pytest.mark.parametrize("text", ["70", "MB", "-5MB", "7e3MB", "70 MiB", ""])
def test_sizes_without_a_unit_are_refused(text: str) -> None:
    from edgekit.cli.compress import megabytes

    with pytest.raises(UserError, match="--target-size must be a number with kB, MB or GB"):
        megabytes(text)


def test_the_command_line_asks_for_text_and_a_planning_recipe(tmp_path: Path) -> None:
    from command_line import ek

    folder = tiny_folder(tmp_path / "model")
    refused = ek("compress", folder, "-o", tmp_path / "small", "--target-size", "1MB", "-r", "int4")
    assert refused.status == 2
    assert "a size needs a recipe with a step that plans for one" in refused.err
    refused = ek("compress", folder, "-o", tmp_path / "small", "--target-size", "1MB")
    assert refused.status == 2
    assert "--calibration" in refused.err or "pip install" in refused.err


@pytest.mark.parametrize("looked_up", [False, True])
def test_a_few_rows_tell_what_all_of_them_cost(looked_up: bool) -> None:
    pytest.importorskip("torch")
    from edgekit.quant.sensitivity import Curvature

    random = np.random.default_rng(0)
    X = random.standard_normal((300, 32))
    outputs = np.exp(2 * random.standard_normal(4000))  # a few rows matter most, as tokens do
    table = np.square(random.standard_normal((4000, 32))).astype(np.float32) * (random.random((4000, 1)) < 0.05)
    curvature = Curvature(X.T @ X / 300, outputs, table.astype(np.float32) if looked_up else None)
    error = random.standard_normal((4000, 32)).astype(np.float32) * random.uniform(0.5, 1, (4000, 1)).astype(np.float32)
    sample = curvature.sample(128)
    assert sample is not None
    assert len(sample.rows) <= 128
    assert curvature.loss(error[sample.rows], sample) == pytest.approx(curvature.loss(error), rel=0.15)
    assert curvature.sample(4000) is None
