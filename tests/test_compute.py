"""Torch devices: names that cannot be are refused, and a GPU gives what the CPU gives.

Steps that round are not compared: a code flips where a sum differs in its last bit, and gptq carries that on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_folder

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.errors import UserError
from edgekit.merge.layers import Merge
from edgekit.model.sources import open_model
from edgekit.prune.steps import Planned
from edgekit.recipe import Recipe
from edgekit.step import CalibrationOptions, Step
from edgekit.tn.mpo_step import Mpo
from edgekit.tn.steps import LowRank

torch = pytest.importorskip("torch", reason="torch is no part of the base install")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_model(str(tiny_folder(tmp_path_factory.mktemp("model") / "m", layers=4)))


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(
    model: Checkpoint, calibration: CalibrationOptions, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError, match=r"torch must have the device on this machine: got"):
        compress(model, Recipe("t", "", (Planned(),), calibration=calibration), tmp_path / "out", compute=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize(
    "step",
    [
        Planned(remove=0.15, multiple=8, plan=("layers.1 neurons 64", "layers.2 neurons 80")),
        Planned(remove=0.15, multiple=8),
        Merge(count=1),
        LowRank(keep=0.6, multiple=4, follow=0.5),
        LowRank(budget=0.8, multiple=4),
        Mpo(keep=0.7),
    ],
    ids=lambda step: step.name,
)
def test_a_gpu_gives_what_the_cpu_gives(
    model: Checkpoint, calibration: CalibrationOptions, tmp_path: Path, step: Step
) -> None:
    found = []
    for name in ("cpu", "cuda"):
        compress(model, Recipe("t", "", (step,), calibration=calibration), tmp_path / name, compute=name)
        found.append(open_checkpoint(tmp_path / name))
    surveyed = (step.name, getattr(step, "plan", None)) in (("prune.planned", ()), ("tn.lowrank", ()))
    for module in [m for matrices, _ in found[0].blocks.values() for m in matrices]:
        if surveyed and getattr(step, "budget", 1.0):  # its plan comes from tokens that each device draws anew
            assert np.isfinite(found[1].weight(module).dense()).all()
            continue
        one, other = (checkpoint.weight(module).dense() for checkpoint in found)
        assert np.abs(one - other).max() < 1e-3 * np.abs(one).max()
