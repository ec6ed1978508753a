"""The quantising steps with a method: what they need, what they choose, and that calibrated runs are whole."""

from __future__ import annotations

import dataclasses
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_folder

import edgekit.compress as runner
from edgekit.checkpoint import Block, Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.errors import ModelError, UserError
from edgekit.forecast import plan
from edgekit.job import Progress
from edgekit.model.sources import open_model
from edgekit.quant.gptq import output_error
from edgekit.quant.grid import Grid, round_to_grid
from edgekit.quant.methods import Compensation, Int2, Int3, Int4, Int8, compensated, hqq_rounded
from edgekit.quant.rotate import Rotate
from edgekit.quant.scaling import Awq
from edgekit.recipe import Recipe
from edgekit.step import CalibrationOptions, InputStatistics, Step, StepContext, outline_of
from edgekit.weight import Floats, Quantized


def problem(rows: int, columns: int) -> tuple[Floats, InputStatistics]:
    random = np.random.default_rng(0)
    X = random.standard_normal((300, columns)) @ (np.eye(columns) + random.standard_normal((columns, columns)) / 8)
    W = random.standard_normal((rows, columns)).astype(np.float32)
    return W, InputStatistics(X.T @ X, np.abs(X).mean(0), np.abs(X).max(0), 300)


class Fixed:
    """The same kind of inputs for every matrix, of its width."""

    def statistics(self, block: Block, module: str) -> InputStatistics:
        return problem(1, block.matrices[module].shape[1])[1]


@pytest.mark.parametrize(
    ("step", "needs"),
    [
        (Int4(), "weights"),
        (Int3(method="hqq"), "weights"),
        (Int4(method="gptq"), "activations"),
        (Int2(method="awq"), "activations"),
        (Int8(method="gptq", follow=0.5), "originals"),
    ],
)
def test_what_a_step_needs_follows_from_its_method(step: Step, needs: str) -> None:
    assert step.needs == needs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of rtn, gptq, awq, hqq: got 'magic'"),
        ({"order": "random"}, "order must be one of given, activation"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"damping": float("nan")}, "damping must be above 0"),
        ({"refine": -1}, "refine must be from 0 to 20"),
        ({"follow": 1.5}, "follow must be from 0 to 1"),
        ({"block": 48}, "block must be one of 32, 64, 128"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Int4(**options)


@pytest.mark.parametrize("grid", [Grid(2, 32, "minimum", "int8"), Grid(4, 64, "zero"), Grid(3, 32, "symmetric")])
@pytest.mark.parametrize("search", [False, True])
def test_compensation_lowers_the_output_error(grid: Grid, search: bool) -> None:
    W, found = problem(40, 100)
    rounded = output_error(W, round_to_grid(W, grid, where="w", search=search).dense(), found.gram)
    last = rounded
    for refine in (0, 1, 3):
        result, (error, power) = compensated(W, found, grid, Compensation(refine=refine), "w", search=search)
        assert error == pytest.approx(output_error(W, result.dense(), found.gram))
        assert power == pytest.approx(output_error(W, np.zeros_like(W), found.gram))
        assert error < last
        last = error
    assert last < 0.7 * rounded


def test_rows_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    W, found = problem(40, 64)
    whole, _ = compensated(W, found, Grid(3, 32, "minimum", "int8"), Compensation(), "w", search=True)
    monkeypatch.setattr("edgekit.quant.methods.ROWS", 7)
    parts, _ = compensated(W, found, Grid(3, 32, "minimum", "int8"), Compensation(), "w", search=True)
    np.testing.assert_allclose(parts.dense(), whole.dense(), atol=1e-5)


def test_following_moves_towards_the_original_outputs() -> None:
    """The matrix reads x but shall give what it gave for x': W* is the least squares answer."""
    W, _ = problem(30, 64)
    random = np.random.default_rng(1)
    there = random.standard_normal((2000, 64))
    here = there @ (np.eye(64) + 0.2 * random.standard_normal((64, 64)) / 8)
    drift = random.standard_normal((2000, 30)) * 0.5 + here @ random.standard_normal((64, 30)) * 0.1
    found = InputStatistics(here.T @ here, np.abs(here).mean(0), np.abs(here).max(0), 2000)
    found = dataclasses.replace(found, cross=there.T @ here, drift=drift.T @ here)
    grid = Grid(8, 32, "minimum")

    def distance(follow: float, where: str) -> float:
        weight, _ = compensated(W, found, grid, Compensation(damping=1e-4, follow=follow), where, search=False)
        target = there @ W.T + (drift if where.endswith("o_proj") else 0)
        return float(np.square(here @ weight.dense().T.astype(np.float64) - target).mean())

    for where in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj"):
        assert distance(1.0, where) < distance(0.5, where) < distance(0.0, where)
        assert distance(1.0, where) < 0.1 * distance(0.0, where)


def test_the_block_is_taken_in_the_order_in_which_it_runs(tmp_path: Path) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "model")))
    seen: list[tuple[str, int]] = []

    class Watching(Fixed):
        def statistics(self, block: Block, module: str) -> InputStatistics:
            done = sum(isinstance(weight, Quantized) for weight in block.matrices.values())
            seen.append((module.rpartition(".")[2], done))
            return super().statistics(block, module)

    block = checkpoint.read_block("layers.1")
    after, changes = Int4(method="gptq", skip=("*.k_proj",)).apply(
        block, StepContext(checkpoint.decoder, 0, Watching())
    )
    assert seen == [("q_proj", 0), ("v_proj", 1), ("o_proj", 2), ("gate_proj", 3), ("up_proj", 4), ("down_proj", 5)]
    assert changes.changed == 6
    assert [skip.path for skip in changes.skipped] == ["model.layers.1.self_attn.k_proj"]
    assert 0 < changes.facts["relative_output_error"].value < changes.facts["relative_error"].value
    assert all(not isinstance(weight, Quantized) for weight in block.matrices.values())
    assert sorted(after.matrices) == sorted(block.matrices)


@pytest.mark.parametrize("step", [Int4(method="gptq"), Int3(method="awq"), Int2(method="hqq"), Int8(method="gptq")])
@pytest.mark.parametrize("tied", [True, False])
def test_predicted_sizes_are_the_real_ones(tmp_path: Path, step: Step, tied: bool) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "model", tied=tied)))
    for name in checkpoint.blocks:
        inputs = None if name == "embedding" and not tied else Fixed()
        block, _ = step.apply(checkpoint.read_block(name), StepContext(checkpoint.decoder, 0, inputs))
        predicted = step.predict(outline_of(checkpoint, name), StepContext(checkpoint.decoder, 0))
        assert predicted.outline.size_bytes == block.size_bytes


def test_hqq_needs_offsets_and_takes_ragged_ends() -> None:
    W = np.random.default_rng(0).standard_t(3, (10, 70)).astype(np.float32)
    found = hqq_rounded(W, Grid(4, 32, "minimum"), "w")
    assert found.shape == W.shape
    assert np.abs(found.dense() - W).max() < 2
    with pytest.raises(UserError, match="offset must be zero or minimum"):
        hqq_rounded(W, Grid(4, 32, "symmetric"), "w")


# --- through the runner -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    text = tmp_path_factory.mktemp("text") / "book.txt"
    line = "The quick brown fox jumps over the lazy dog; a small model runs on the device in your hand.\n"
    text.write_text("".join(f"{number}. {line}" for number in range(200)))
    return CalibrationOptions((str(text),), 6, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_model(str(tiny_folder(tmp_path_factory.mktemp("model") / "m", layers=3)))


STEPS: list[tuple[Step, ...]] = [
    (Int4(method="gptq", embedding="int4"),),
    (Rotate(), Int3(method="gptq", embedding="int4", follow=0.5)),
    (Awq(bits=3), Int3(method="gptq", embedding="keep")),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "edgekit.json"}


def folder_of(model: Checkpoint) -> Path:
    (file,) = model.tensors.files()
    return file.parent


KILLED = """
import os, pickle, signal, sys
from edgekit.compress import compress

count, (folder, recipe, output) = int(sys.argv[1]), pickle.loads(bytes.fromhex(sys.argv[2]))

def die(progress):
    if progress.done == count:
        os.kill(os.getpid(), signal.SIGKILL)

from edgekit.model.sources import open_model
compress(open_model(folder), recipe, output, on_progress=die)
"""  # another process: torch's threads do not survive a fork


@pytest.mark.slow
@pytest.mark.parametrize("steps", STEPS, ids=["gptq", "rotate, follow", "awq then gptq"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    model: Checkpoint, calibration: CalibrationOptions, tmp_path: Path, steps: tuple[Step, ...]
) -> None:
    recipe = Recipe("calibrated", "", steps, calibration=calibration)
    manifest = compress(model, recipe, tmp_path / "whole")
    compress(model, recipe, tmp_path / "spilled", activations_bytes=0)
    assert contents(tmp_path / "spilled") == contents(tmp_path / "whole")
    for count in (1, 2, 4):
        output = tmp_path / f"resumed{count}"
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(count), pickle.dumps((str(folder_of(model)), recipe, output)).hex()],
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        done = []
        compress(model, recipe, output, resume=True, on_progress=done.append)
        assert len(done) == 5 - count
        assert contents(output) == contents(tmp_path / "whole")
    said = manifest.steps[-1].options["calibration"]
    assert isinstance(said, dict)
    assert (said["files"], said["samples"], said["length"], len(said["sha256"])) == (("book.txt",), 6, 32, 64)


@pytest.mark.slow
def test_another_text_may_not_go_on(model: Checkpoint, calibration: CalibrationOptions, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    recipe = Recipe("calibrated", "", (Int4(method="gptq"),), calibration=calibration)
    with pytest.raises(KeyboardInterrupt):
        compress(model, recipe, tmp_path / "small", on_progress=stop)
    (tmp_path / "other.txt").write_text("Nothing of the kind was ever heard of in that house.\n" * 300)
    other = dataclasses.replace(calibration, files=(str(tmp_path / "other.txt"),))
    with pytest.raises(UserError, match="the calibration text changed"):
        compress(model, dataclasses.replace(recipe, calibration=other), tmp_path / "small", resume=True)


@pytest.mark.slow
def test_calibration_is_asked_for_before_anything_is_written(model: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe("calibrated", "", (Int4(method="gptq"),))
    with pytest.raises(UserError, match="needs calibration text: name files with --calibration"):
        compress(model, recipe, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
    twice = Recipe("twice", "", (Int4(method="gptq", follow=1.0), Int3(method="gptq", follow=1.0)))
    with pytest.raises(UserError, match="one step of a recipe may follow the original model"):
        compress(model, twice, tmp_path / "small")
    assert plan(model, recipe).after_bytes > 0  # sizes need no text


def test_without_torch_the_way_out_is_named(model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edgekit.calibrate", None)
    with pytest.raises(UserError, match=r"quant\.int4 as set here needs .* pip install 'edgekit\[compress\]'"):
        compress(model, Recipe("calibrated", "", (Int4(method="gptq"),)), tmp_path / "small")


@pytest.mark.slow
def test_a_damaged_layer_is_named(tmp_path: Path, calibration: CalibrationOptions) -> None:
    import safetensors.numpy

    folder = tiny_folder(tmp_path / "model")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][3, 3] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    recipe = Recipe("calibrated", "", (Int4(method="gptq"),), calibration=calibration)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.\w+_proj"):
        compress(open_model(str(folder)), recipe, tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_gptq_computes_closer_to_the_original_on_the_text(
    model: Checkpoint, calibration: CalibrationOptions, tmp_path: Path
) -> None:
    from edgekit.model.reference import forward
    from edgekit.model.windows import token_windows

    ids = token_windows(model, calibration, seed=0).ids.tolist()
    exact = np.concatenate(forward(model, ids))
    errors = {}
    for name, options in {"rtn": {}, "hqq": {"method": "hqq"}, "gptq": {"method": "gptq"}}.items():
        step = Int3(embedding="keep", **options)  # type: ignore[arg-type]
        compress(model, Recipe("x", "", (step,), calibration=calibration), tmp_path / name)
        found = np.concatenate(forward(open_checkpoint(tmp_path / name), ids))
        errors[name] = float(np.square(found - exact).mean())
    assert errors["gptq"] < 0.6 * errors["rtn"]
    assert runner.RECIPE in contents(tmp_path / "gptq")
