"""Pruning steps: exact where nothing is lost, plans that fit, checkpoints that run, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LINE, tiny_folder, tiny_tokenizer

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.errors import EdgekitError, UserError
from edgekit.export.export import export
from edgekit.export.targets import find_target
from edgekit.forecast import plan
from edgekit.job import Progress
from edgekit.model.reference import forward
from edgekit.model.sources import open_model
from edgekit.prune.steps import CostTable, Heads, Neurons, Planned
from edgekit.quant.methods import Int4
from edgekit.recipe import Recipe, parse_recipe
from edgekit.step import CalibrationOptions, Step

pytest.importorskip("torch", reason="torch is no part of the base install")

IDS = [tiny_tokenizer(384).encode(f"{number}. {LINE}").ids[:40] for number in (931, 977)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_model(str(tiny_folder(tmp_path_factory.mktemp("model") / "m", layers=3)))


def pruned(
    model: Checkpoint, output: Path, calibration: CalibrationOptions, *steps: Step, **options: Any
) -> Checkpoint:
    compress(model, Recipe("test", "", steps, calibration=calibration), output, **options)
    return open_checkpoint(output)


def shapes(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """(neurons, key rows) of each layer."""
    prefixes = [f"model.layers.{index}" for index in range(checkpoint.decoder.layers)]
    return [(checkpoint.shape(f"{p}.mlp.down_proj")[1], checkpoint.shape(f"{p}.self_attn.k_proj")[0]) for p in prefixes]


def divergence(one: Checkpoint, other: Checkpoint) -> float:
    return float(np.abs(forward(one, IDS)[0] - forward(other, IDS)[0]).mean())


@pytest.mark.parametrize("qwen", [False, True])
def test_neurons_that_do_nothing_are_found_and_cost_nothing(
    tmp_path: Path, calibration: CalibrationOptions, qwen: bool
) -> None:
    architecture = "Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"
    folder = tiny_folder(tmp_path / "m", architecture=architecture, seed=3)
    model = open_model(str(folder))
    tensors = {name: np.array(model.tensors.read(name)) for name in model.tensors.names()}
    for layer in range(2):  # the last 32 of 96 neurons are sums of two others each
        up, gate = (tensors[f"model.layers.{layer}.mlp.{leaf}_proj.weight"] for leaf in ("up", "gate"))
        up[64:], gate[64:] = up[:32] + up[32:64], gate[:32]
        gate[32:64] = gate[:32]
    import safetensors.numpy

    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    model = open_model(str(folder))
    step = Neurons(remove=1 / 3, spread="even", multiple=8, damping=1e-5, follow=0.0)
    smaller = pruned(model, tmp_path / "small", calibration, step)
    assert [neurons for neurons, _ in shapes(smaller)] == [64, 64]
    assert divergence(model, smaller) < 2e-3
    worse = dataclasses.replace(step, remove=0.5)
    assert divergence(model, pruned(model, tmp_path / "smaller", calibration, worse)) > 2e-2


def test_the_refit_beats_cutting_alone(model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions) -> None:
    smaller = pruned(model, tmp_path / "small", calibration, Neurons(remove=0.3, spread="even", multiple=1))
    weights: dict[str, Any] = {}
    for layer in range(3):
        p = f"model.layers.{layer}.mlp."
        ours = smaller.weight(p + "up_proj").dense()
        theirs = model.weight(p + "up_proj").dense()
        at = [int(np.abs(theirs - row).sum(1).argmin()) for row in ours]
        weights[p + "down_proj.weight"] = np.ascontiguousarray(model.weight(p + "down_proj").dense()[:, at])
    cut = dataclasses.replace(smaller, tensors=Replaced(smaller, weights))
    assert divergence(model, smaller) < 0.9 * divergence(model, cut)


@dataclasses.dataclass(frozen=True)
class Replaced:
    checkpoint: Checkpoint
    weights: dict[str, Any]

    def names(self) -> Any:
        return self.checkpoint.tensors.names()

    def files(self) -> set[Path]:
        return set()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.read(name).shape

    def read(self, name: str) -> Any:
        return self.weights[name] if name in self.weights else self.checkpoint.tensors.read(name)


@pytest.mark.parametrize("part", ["neurons 64", "heads 1"])
def test_a_planned_part_is_cut_where_the_plan_says(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions, part: str
) -> None:
    smaller = pruned(model, tmp_path / "small", calibration, Planned(plan=(f"layers.1 {part}",)))
    expected = [(96, 32), (64, 32) if "neurons" in part else (96, 16), (96, 32)]
    assert shapes(smaller) == expected
    assert smaller.shape("model.layers.1.self_attn.o_proj")[1] == (64 if "neurons" in part else 32)
    manifest = smaller.manifest
    assert manifest is not None
    removed = manifest.steps[0].facts["parameters_removed"]
    assert removed == (3 * 32 * 64 if "neurons" in part else 64 * (16 * 6))


def test_a_survey_plans_for_the_share_and_the_result_runs(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions
) -> None:
    step = Planned(remove=0.2, multiple=8)
    smaller = pruned(model, tmp_path / "small", calibration, step)
    before, after = (
        sum(np.prod(c.shape(m)) for name, (ms, _) in c.blocks.items() if name.startswith("layers.") for m in ms)
        for c in (model, smaller)
    )
    assert 0.2 - 1e-9 <= 1 - after / before < 0.25
    manifest = smaller.manifest
    assert manifest is not None
    recipe = parse_recipe((tmp_path / "small" / "recipe.toml").read_text(), where="recipe")
    assert isinstance(recipe.steps[0], Planned)
    assert recipe.steps[0].plan
    again = pruned(model, tmp_path / "again", calibration, *recipe.steps)
    np.testing.assert_array_equal(forward(smaller, IDS)[0], forward(again, IDS)[0])
    export(smaller, tmp_path / "bundle", target=find_target("portable"))  # checks parity with the NumPy forward


def test_pruning_and_rounding_in_one_recipe_and_a_killed_run(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions
) -> None:
    steps = (Planned(remove=0.15, multiple=32), Int4(method="gptq"))
    whole = pruned(model, tmp_path / "whole", calibration, *steps)

    def stop(progress: Progress) -> None:
        if progress.block == "layers.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruned(model, tmp_path / "cut", calibration, *steps, on_progress=stop)
    resumed = pruned(model, tmp_path / "cut", calibration, *steps, resume=True)
    for name in whole.tensors.names():
        np.testing.assert_array_equal(whole.tensors.read(name), resumed.tensors.read(name))


def test_even_widths_stay_plain_transformers(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions
) -> None:
    steps = (Neurons(remove=0.3, spread="even", follow=0.0), Heads(remove=0.5, spread="even", follow=0.0))
    smaller = pruned(model, tmp_path / "small", calibration, *steps)
    wanted = {"intermediate_size": 64, "num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 16}
    assert {key: smaller.config[key] for key in wanted} == wanted
    assert set(shapes(smaller)) == {(64, 16)}


@pytest.mark.slow
def test_transformers_gives_the_same_logits(model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    steps = (Neurons(remove=0.3, spread="even", follow=0.0), Heads(remove=0.5, spread="even", follow=0.0))
    smaller = pruned(model, tmp_path / "small", calibration, *steps)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    with torch.inference_mode():
        logits = theirs(torch.tensor(IDS)).logits[0].numpy()
    np.testing.assert_allclose(logits, forward(smaller, IDS)[0], atol=1e-4)


def test_the_dry_run_foretells_sizes(model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions) -> None:
    recipe = Recipe("test", "", (Planned(remove=0.25, multiple=8),), calibration=calibration)
    foretold = plan(model, recipe)
    manifest = compress(model, recipe, tmp_path / "small")
    assert foretold.after_bytes == manifest.steps[0].after_bytes


def test_the_best_plan_of_a_table() -> None:
    table = CostTable(
        {("layers.0", "neurons"): [(2, 20, 5.0), (4, 40, 0.0)], ("layers.1", "neurons"): [(2, 20, 1.0), (4, 40, 0.0)]},
        80,
    )
    assert Neurons(remove=0.25).planned(table).plan == ("layers.0 neurons 4", "layers.1 neurons 2")
    with pytest.raises(UserError, match=r"can remove at most 50\.0%"):
        Neurons(remove=0.6).planned(table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": 0.0}, "remove must be a share above 0 and below 1"),
        ({"remove": float("nan")}, "remove must be a share"),
        ({"spread": "odd"}, "spread must be one of planned, even: got 'odd'"),
        ({"multiple": 0}, "multiple must be 1 or more"),
        ({"choice": "magic"}, "choice must be one of elimination, interpolative: got 'magic'"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"follow": 2.0}, "follow must be from 0 to 1"),
        ({"plan": ("layers.0 neurons",)}, "a line of plan must be BLOCK PART WIDTH"),
        ({"plan": ("layers.0 neurons 0",)}, "a line of plan must be"),
        ({"plan": ("layers.0 heads 1",)}, "prune.neurons works on neurons: its plan names heads"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Neurons(**options)


def test_a_plan_for_another_model_is_refused(
    model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions
) -> None:
    with pytest.raises(UserError, match=r"must name a layer of the model: it lacks layers\.7"):
        pruned(model, tmp_path / "small", calibration, Neurons(plan=("layers.7 neurons 64",)))


def test_too_little_text_is_refused(model: Checkpoint, tmp_path: Path, calibration: CalibrationOptions) -> None:
    few = dataclasses.replace(calibration, samples=1, length=16)
    with pytest.raises(EdgekitError, match="needs as many calibration tokens, better ten times"):
        pruned(model, tmp_path / "small", few, Neurons(spread="even"))
