"""Thin heads: bonds cut with the error foretold, pairs that do nothing dropped for nothing, exports that agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from test_prune import IDS
from tiny import tiny_folder

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.errors import EdgekitError, ModelError, UserError
from edgekit.export.export import export
from edgekit.export.targets import find_target
from edgekit.forecast import plan
from edgekit.model.heads import PAIRS, heads_of, heads_of_layer
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.prune.bond_steps import Pairs, Values
from edgekit.prune.bonds import truncated_bond
from edgekit.prune.steps import Heads, Neurons
from edgekit.quant.methods import Int4, Int8
from edgekit.quant.scaling import Smooth
from edgekit.recipe import Recipe
from edgekit.step import CalibrationOptions, Step
from edgekit.tn.whitening import spectrum

pytest.importorskip("torch", reason="torch is no part of the base install")


def changed(folder: Path, change: object) -> Checkpoint:
    """The model in `folder` after `change` of its tensors."""
    model = open_model(str(folder))
    tensors = {name: np.array(model.tensors.read(name)) for name in model.tensors.names()}
    change(tensors)  # type: ignore[operator]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return open_model(str(folder))


def thin(model: Checkpoint, output: Path, calibration: CalibrationOptions, *steps: Step) -> Checkpoint:
    compress(model, Recipe("test", "", steps, calibration=calibration), output)
    return open_checkpoint(output)


def furthest(one: Checkpoint, other: Checkpoint) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(forward(one, IDS), forward(other, IDS), strict=True))


# --- one bond ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7, 8])
@pytest.mark.parametrize("group", [1, 3])
def test_a_bond_loses_what_was_foretold_and_no_more_than_the_best(rank: int, group: int) -> None:
    random = np.random.default_rng(rank)
    outputs = random.standard_normal((group, 13, 8))
    V = random.standard_normal((8, 21))
    X = random.standard_normal((100, 21)) * np.geomspace(1, 9, 21)
    G = X.T @ X
    bond = truncated_bond(outputs, V @ G @ V.T, rank)
    lost = np.eye(8) - bond.left @ bond.right
    found = sum(float(np.square(part @ lost @ V @ X.T).sum()) for part in outputs)
    power = sum(float(np.square(part @ V @ X.T).sum()) for part in outputs)
    assert bond.power == pytest.approx(power, rel=1e-9)
    assert bond.error == pytest.approx(found, rel=1e-6, abs=1e-9 * power)
    best = spectrum(np.concatenate([part @ V for part in outputs]).astype(np.float32), G, where="stacked")
    assert bond.error == pytest.approx(best.tail(rank) ** 2, rel=1e-4, abs=1e-6 * power)
    assert bond.right @ bond.right.T == pytest.approx(np.eye(rank), abs=1e-9)


def test_a_bond_of_zeros_and_of_few_directions_is_cut() -> None:
    random = np.random.default_rng(0)
    outputs = random.standard_normal((2, 9, 6))
    low = random.standard_normal((6, 2))
    bond = truncated_bond(outputs, low @ low.T, 2)
    assert np.abs(outputs @ (np.eye(6) - bond.left @ bond.right) @ low).max() < 1e-6
    assert truncated_bond(outputs * 0, low @ low.T, 3).error == 0
    assert np.isfinite(truncated_bond(outputs, low @ low.T * 0, 3).left).all()


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_values_of_few_directions_are_cut_for_nothing(
    tmp_path: Path, calibration: CalibrationOptions, architecture: str
) -> None:
    random = np.random.default_rng(1)

    def low(tensors: dict[str, np.ndarray]) -> None:
        for layer in range(2):  # 16 channels of a value that are 5 directions, and a bias of one more
            v = tensors[f"model.layers.{layer}.self_attn.v_proj.weight"]
            mixing = random.standard_normal((2, 16, 5)) @ random.standard_normal((2, 5, 16))
            v[:] = (mixing @ v.reshape(2, 16, -1)).reshape(v.shape) / 8

    model = changed(tiny_folder(tmp_path / "m", architecture=architecture, head_dim=16), low)
    made = thin(model, tmp_path / "out", calibration, Values(remove=0.5, multiple=2, damping=1e-9))
    assert [heads_of_layer(made, index).value_size for index in range(2)] == [8, 8]
    assert made.shape("model.layers.0.self_attn.o_proj") == (64, 32)
    assert furthest(model, made) < 2e-4
    record = made.manifest.steps[-1]  # type: ignore[union-attr]
    assert record.changed == 4
    assert record.facts["relative_error_of_bonds"] < (0.2 if architecture == "Qwen2ForCausalLM" else 1e-5)
    resolved = float(np.sqrt(np.finfo(np.float32).eps))  # products behind Gram matrices are float32
    assert record.facts["relative_output_error"] < resolved


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_pairs_that_do_nothing_go_for_nothing(
    tmp_path: Path, calibration: CalibrationOptions, architecture: str
) -> None:
    quiet = [1, 2, 6, 7]

    def silence(tensors: dict[str, np.ndarray]) -> None:
        for name, values in tensors.items():
            if "q_proj" in name:  # of four heads
                values.reshape(4, 2, 8, -1)[:, :, quiet] = 0

    model = changed(tiny_folder(tmp_path / "m", architecture=architecture, head_dim=16), silence)
    made = thin(model, tmp_path / "out", calibration, Pairs(remove=0.5, multiple=2))
    heads = heads_of_layer(made, 1)
    assert (heads.key_size, heads.value_size, heads.pairs) == (8, 16, (0, 3, 4, 5))
    assert furthest(model, made) < 1e-4
    assert made.manifest.steps[-1].facts["share_of_scores_power_gone"] == pytest.approx(0, abs=1e-12)  # type: ignore[union-attr]
    again = thin(made, tmp_path / "again", calibration, Pairs(remove=0.5, multiple=2, layers=(0,)))
    assert [heads_of_layer(again, index).key_size for index in range(2)] == [4, 8]
    assert set(heads_of_layer(again, 0).pairs) <= {0, 3, 4, 5}


def test_what_goes_is_what_was_planned_and_calibration_walks_through_thin_layers(
    tmp_path: Path, calibration: CalibrationOptions
) -> None:
    model = open_model(str(tiny_folder(tmp_path / "m", head_dim=32, layers=3)))
    steps = (Values(remove=0.5, follow=0.3), Pairs(remove=0.5, layers=(0, 2)), Smooth(), Neurons(remove=0.1, follow=0))
    foretold = plan(model, Recipe("t", "", steps[:2], calibration=calibration))
    made = thin(model, tmp_path / "two", calibration, *steps[:2])
    assert [made.read_block(block.name).size_bytes for block in foretold.blocks] == [
        block.after_bytes for block in foretold.blocks
    ]
    whole = thin(model, tmp_path / "all", calibration, *steps)
    assert [heads_of_layer(whole, index).key_size for index in range(3)] == [16, 32, 16]
    assert all(np.isfinite(logits).all() for logits in forward(whole, IDS))


@pytest.mark.parametrize(
    "steps", [(Values(remove=0.5),), (Values(remove=0.5), Pairs(remove=0.5)), (Pairs(0.5, layers=(1,)), Values(0.5))]
)
@pytest.mark.parametrize("last", [(), (Int4(),), (Int8(),)], ids=["float", "int4", "int8"])
@pytest.mark.parametrize("target", ["x86", "portable"])
def test_thin_heads_export(
    tmp_path: Path, calibration: CalibrationOptions, steps: tuple[Step, ...], last: tuple[Step, ...], target: str
) -> None:
    """`export` compares the graph with the NumPy forward and refuses one that differs."""
    model = open_model(str(tiny_folder(tmp_path / "m", architecture="Qwen2ForCausalLM", head_dim=32)))
    made = thin(model, tmp_path / "out", calibration, *steps, *last)
    export(made, tmp_path / "bundle", target=find_target(target), context=64)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_needs_heads_of_one_size_says_so(tmp_path: Path, calibration: CalibrationOptions) -> None:
    from edgekit.heal.decoder import Decoder
    from edgekit.merge.layers import Merge

    model = open_model(str(tiny_folder(tmp_path / "m", head_dim=32, layers=3)))
    made = thin(model, tmp_path / "thin", calibration, Pairs(remove=0.5))
    for step in (Heads(remove=0.5, spread="even"), Merge(count=1)):
        with pytest.raises(UserError, match=f"{step.name} needs heads of 32 channels: layer 0 has 16 in keys and 32"):
            thin(made, tmp_path / "out", calibration, step)
    with pytest.raises(UserError, match="whole heads must go before"):
        thin(model, tmp_path / "out", calibration, Values(remove=0.5), Heads(remove=0.5, spread="even", follow=0))
    with pytest.raises(UserError, match="healing needs heads of 32 channels"):
        Decoder(made)
    with pytest.raises(ModelError, match="values must not have more channels than keys to be exported"):
        export(made, tmp_path / "bundle", target=find_target("x86"), context=64)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda: Values(remove=0.0), "remove must be a share"),
        (lambda: Pairs(multiple=3), "multiple must be even"),
        (lambda: Pairs(layers=(1, 1)), "each once"),
        (lambda: Values(damping=0), "damping must be above 0"),
        (lambda: Values(remove=0.1), "leaves them all in multiples of 16"),
        (lambda: Pairs(remove=0.5, multiple=2, layers=(7,)), "layers must be from 0 to 1: got 7"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, calibration: CalibrationOptions, step: object, said: str
) -> None:
    model = open_model(str(tiny_folder(tmp_path / "m", head_dim=16)))
    with pytest.raises(EdgekitError, match=said):
        thin(model, tmp_path / "out", calibration, step())  # type: ignore[operator]


def test_too_little_text_is_refused_and_norms_keep_their_pairs(tmp_path: Path, calibration: CalibrationOptions) -> None:
    model = open_model(str(tiny_folder(tmp_path / "m", architecture="Qwen3ForCausalLM", head_dim=16)))
    short = CalibrationOptions(calibration.files, 1, 8)
    with pytest.raises(UserError, match="a refit of 32 columns needs as many calibration tokens"):
        thin(model, tmp_path / "out", short, Values(remove=0.5, multiple=2))
    made = thin(model, tmp_path / "kept", calibration, Pairs(remove=0.5, multiple=2))
    assert furthest(model, made) == 0
    assert any("norm over all its pairs" in skip.reason for skip in made.manifest.steps[-1].skipped)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([0, 0], "must ascend"),
        ([1, 0], "must ascend"),
        ([0, 9], "must ascend"),
        ([], "must ascend"),
        ([0.5, 2], "whole"),
    ],
)
def test_pairs_that_cannot_be_are_refused(pairs: list[float], said: str) -> None:
    shapes = {"q_proj": (16, 8), "k_proj": (8, 8), "v_proj": (8, 8), "o_proj": (8, 16)}
    with pytest.raises(ModelError, match=said):
        heads_of(shapes, 16, np.array(pairs, np.float32), where="layers.0")
    assert heads_of(shapes, 4, None, where="x").queries == 4
    with pytest.raises(ModelError, match="value heads must fit key heads"):
        heads_of({**shapes, "v_proj": (9, 8)}, 4, None, where="x")


def test_a_layer_with_pairs_is_renamed_with_its_layer(tmp_path: Path, calibration: CalibrationOptions) -> None:
    from edgekit.merge.drop import without

    model = open_model(str(tiny_folder(tmp_path / "m", head_dim=16, layers=3)))
    made = thin(model, tmp_path / "out", calibration, Pairs(remove=0.5, multiple=2, layers=(2,)))
    assert made.has(f"model.layers.2.{PAIRS}")
    assert without(made, (0,)).has(f"model.layers.1.{PAIRS}")
