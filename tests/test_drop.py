"""Taking layers out: which go, that the others are as they were, and that repaired seams are better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_prune import IDS, divergence, pruned
from tiny import tiny_folder

from edgekit.checkpoint import Checkpoint
from edgekit.errors import UserError
from edgekit.export.export import export
from edgekit.export.targets import find_target
from edgekit.merge.drop import Drop, influence, without
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.prune.steps import Planned
from edgekit.step import CalibrationOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Five layers, of which layer 3 adds next to nothing."""
    import safetensors.numpy

    folder = tiny_folder(tmp_path_factory.mktemp("model") / "m", layers=5)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for leaf in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.3.{leaf}.weight"] *= 0.01
    safetensors.numpy.save_file(tensors, path)
    return open_model(str(folder))


def test_influence_is_how_far_states_turn() -> None:
    x = np.array([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]], np.float32)
    assert influence(x, 3 * x) == pytest.approx(0)
    assert influence(x, -x) == pytest.approx(4 / 3)
    assert influence(x[:, :2], x[:, :2, ::-1]) == pytest.approx(1)


def test_the_layer_that_does_least_goes(model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions) -> None:
    smaller = pruned(model, tmp_path / "small", calibration, Drop(count=1, repair=0.0))
    assert smaller.decoder.layers == 4
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        ours, theirs = (c.weight(f"model.layers.3.{name}").dense() for c in (smaller, without(model, [3])))
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(theirs, model.weight(f"model.layers.4.{name}").dense())
    manifest = smaller.manifest
    assert manifest is not None
    assert manifest.steps[0].options["layers"] == [3]
    assert divergence(model, smaller) < 0.05


@pytest.mark.parametrize("layers", [(2,), (1, 2), (0,)])
def test_a_repaired_seam_is_nearer_to_the_model(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions, layers: tuple[int, ...]
) -> None:
    plain = pruned(model, tmp_path / "plain", calibration, Drop(layers=layers, repair=0.0))
    repaired = pruned(model, tmp_path / "repaired", calibration, Drop(layers=layers))
    assert {name: plain.tensors.shape(name) for name in plain.tensors.names()} == {
        name: repaired.tensors.shape(name) for name in repaired.tensors.names()
    }
    assert divergence(model, repaired) < 0.7 * divergence(model, plain)


def test_the_last_layer_stays_whatever_it_does(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions
) -> None:
    smaller = pruned(model, tmp_path / "small", calibration, Drop(count=4, repair=0.0))
    np.testing.assert_array_equal(
        smaller.weight("model.layers.0.mlp.up_proj").dense(), model.weight("model.layers.4.mlp.up_proj").dense()
    )


@pytest.mark.parametrize(
    ("layers", "name", "expected"),
    [
        ((), "layers.2", ("layers.2",)),
        ((1,), "layers.0", ("layers.0",)),
        ((1,), "layers.1", ("layers.1", "layers.2")),
        ((0, 1), "layers.0", ("layers.0", "layers.1", "layers.2")),
        ((1, 3), "layers.2", ("layers.3", "layers.4")),
    ],
)
def test_what_a_layer_stands_for(layers: tuple[int, ...], name: str, expected: tuple[str, ...]) -> None:
    step = Drop(layers=layers) if layers else Drop(count=1)
    assert step.stands_for(name) == expected


def test_dropping_and_pruning_together_can_be_exported(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions
) -> None:
    steps = (Drop(count=1), Planned(remove=0.2, multiple=8, follow=0.0))
    smaller = pruned(model, tmp_path / "small", calibration, *steps)
    assert smaller.decoder.layers == 4
    assert np.isfinite(forward(smaller, IDS)[0]).all()
    export(smaller, tmp_path / "bundle", target=find_target("portable"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": -1}, "needs count or layers, one of them"),
        ({"count": 1, "layers": (2,)}, "needs count or layers, one of them"),
        ({"layers": (1, 1)}, "each once: got"),
        ({"layers": (-1,)}, "from 0 on"),
        ({"count": 1, "repair": 2.0}, "repair must be from 0 to 1"),
        ({"count": 1, "damping": 0.0}, "damping must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Drop(**options)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Drop(), "set count, or name them with layers"),
        (Drop(count=5), "must leave a layer: the model has 5, 5 are to go"),
        (Drop(layers=(0, 1, 2, 3, 4)), "must leave a layer"),
        (Drop(layers=(5,)), "layers must be from 0 to 4: got 5"),
    ],
)
def test_all_layers_cannot_go(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions, step: Drop, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pruned(model, tmp_path / "small", calibration, step)
