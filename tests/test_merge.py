"""Joining layers: averages, matched neurons, repaired outputs, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from test_prune import divergence, pruned
from tiny import tiny_folder

from edgekit.checkpoint import Checkpoint
from edgekit.errors import UserError
from edgekit.merge.drop import Drop
from edgekit.merge.layers import Merge, pairs_of
from edgekit.model.sources import open_model
from edgekit.step import CalibrationOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Five layers; layer 3 is layer 2 with its neurons in another order."""
    folder = tiny_folder(tmp_path_factory.mktemp("model") / "m", layers=5)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    order = np.random.default_rng(0).permutation(96)
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        values = tensors[name]
        if ".mlp." in name:
            values = values[:, order] if "down" in name else values[order]
        tensors[name.replace("layers.2.", "layers.3.")] = np.ascontiguousarray(values)
    safetensors.numpy.save_file(tensors, path)
    return open_model(str(folder))


def test_matched_neurons_of_equal_layers_give_that_layer_again(model: Checkpoint) -> None:
    merged = Merge(layers=(3,), ratio=0.6).prepare(model)
    mixed = Merge(layers=(3,), ratio=0.6, match=False).prepare(model)
    assert merged.decoder.layers == 4
    for leaf in ("mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj"):
        ours, theirs = (c.weight(f"model.layers.2.{leaf}").dense() for c in (merged, model))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert not np.allclose(
        mixed.weight("model.layers.2.mlp.up_proj").dense(), model.weight("model.layers.2.mlp.up_proj").dense()
    )
    np.testing.assert_array_equal(
        merged.weight("model.layers.3.mlp.up_proj").dense(), model.weight("model.layers.4.mlp.up_proj").dense()
    )


def test_the_average_is_weighted(model: Checkpoint) -> None:
    merged = Merge(layers=(1,), ratio=0.75, match=False).prepare(model)
    name = "model.layers.{}.self_attn.v_proj"
    expected = 0.75 * model.weight(name.format(0)).dense() + 0.25 * model.weight(name.format(1)).dense()
    np.testing.assert_allclose(merged.weight(name.format(0)).dense(), expected, rtol=1e-6)


def test_a_survey_joins_pairs_and_a_repair_brings_the_output_back(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions
) -> None:
    plain = pruned(model, tmp_path / "plain", calibration, Merge(count=1, measure="cosine", repair=0.0))
    assert plain.decoder.layers == 4
    assert plain.manifest is not None
    second = plain.manifest.steps[0].options["layers"]
    assert isinstance(second, list)
    layers = tuple(second)
    enough = dataclasses.replace(calibration, samples=96)  # fifty tokens for each column that is fitted
    repaired = pruned(model, tmp_path / "repaired", enough, Merge(layers=layers, damping=0.1))
    dropped = pruned(model, tmp_path / "dropped", calibration, Drop(layers=layers, repair=0.0))
    assert divergence(model, repaired) < 0.7 * min(divergence(model, plain), divergence(model, dropped))


def test_a_repair_reaches_the_layers_behind_the_seam() -> None:
    step = Merge(layers=(2,), reach=1)
    assert [step._refits(f"layers.{layer}") for layer in range(4)] == [False, True, True, False]
    assert not any(Merge(layers=(2,), repair=0.0)._refits(f"layers.{layer}") for layer in range(4))
    assert [Drop(layers=(0,), reach=2)._refits(f"layers.{layer}") for layer in range(4)] == [True, True, True, False]
    assert not Drop(layers=(0,))._refits("final")
    with pytest.raises(UserError, match="reach must be 0 or more"):
        Drop(count=1, reach=-1)


@pytest.mark.parametrize(
    ("layers", "name", "expected"),
    [
        ((3,), "layers.1", ("layers.1",)),
        ((3,), "layers.2", ("layers.2", "layers.3")),
        ((3,), "layers.3", ("layers.4",)),
        ((1, 3), "layers.1", ("layers.2", "layers.3")),
    ],
)
def test_what_a_layer_stands_for(layers: tuple[int, ...], name: str, expected: tuple[str, ...]) -> None:
    assert Merge(layers=layers).stands_for(name) == expected


def test_pairs_do_not_overlap_and_spare_the_last_layer() -> None:
    table = np.zeros((5, 5))
    for second, value in {1: 0.5, 2: 0.9, 3: 0.8, 4: 1.0}.items():
        table[second - 1, second] = value
    assert pairs_of(table, 1) == (2,)
    assert pairs_of(table, 2) == (2, 4)
    with pytest.raises(UserError, match="found 2 pairs"):
        pairs_of(table, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0,)}, "named by the second"),
        ({"layers": (1, 2)}, "named by the second"),
        ({"count": 1, "measure": "magic"}, "measure must be one of"),
        ({"count": 1, "ratio": 1.0}, "a ratio must be above 0 and below 1"),
        ({"layers": (1,), "ratios": (0.5, 0.5)}, "ratios must be as many as layers"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Merge(**options)


def test_all_layers_cannot_be_joined(model: Checkpoint) -> None:
    with pytest.raises(UserError, match="3 pairs need 6 layers of 5"):
        Merge(count=3).prepare(model)
    with pytest.raises(UserError, match="layers must be from 0 to 4: got 9"):
        Merge(layers=(9,)).prepare(model)
