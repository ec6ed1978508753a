"""Recipes that heal: passes and trainings in a row, gone on with after a kill, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import CORPUS, tiny_folder

from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.errors import ModelError, UserError
from edgekit.forecast import plan
from edgekit.model.sources import open_path
from edgekit.recipe import load_recipe, parse_recipe

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

RECIPE = """name = "healed"
[[step]]
use = "merge.drop"
layers = [0]
repair = 0.0
[[step]]
use = "heal.distill"
data = ["text.txt"]
steps = 6
batch = 4
micro_batch = 4
length = 32
held_out = 4
measure_every = 3
learning_rate = 3e-3
[[step]]
use = "quant.int8"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("passes")
    tiny_folder(root / "source")
    (root / "text.txt").write_text(" ".join(CORPUS) * 12)
    (root / "healed.toml").write_text(RECIPE)
    return root


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_a_recipe_heals_between_two_passes(place, tmp_path):
    recipe, source = load_recipe(place / "healed.toml"), open_path(place / "source")
    seen = []
    manifest = compress(source, recipe, tmp_path / "out", on_progress=lambda state: seen.append(state.block))
    assert [step.step for step in manifest.steps] == ["merge.drop", "heal.distill", "quant.int8"]
    facts = manifest.steps[1].facts
    assert facts["held_out_after"] < facts["held_out_before"]
    assert "training" in seen
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = open_checkpoint(tmp_path / "out")  # every digest is right
    assert found.decoder.layers == 1
    assert found.manifest.recipe_sha256 == recipe.sha256
    again = parse_recipe((tmp_path / "out" / "recipe.toml").read_text(), where="here")
    assert again.steps == recipe.steps


def test_a_killed_run_goes_on_with_the_same_bytes(place, tmp_path):
    recipe, source = load_recipe(place / "healed.toml"), open_path(place / "source")
    compress(source, recipe, tmp_path / "whole")

    def kill(state):
        if state.block == "training" and state.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(source, recipe, tmp_path / "out", on_progress=kill)
    assert not (tmp_path / "out").exists()
    seen = []
    compress(source, recipe, tmp_path / "out", resume=True, on_progress=lambda state: seen.append(state.done))
    assert seen[0] == 4, "the first pass is not done again, and training goes on behind its last state"
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_teacher_is_the_recipes_or_the_callers(place, tmp_path):
    tiny_folder(place / "other", vocabulary=400)
    recipe, source = load_recipe(place / "healed.toml"), open_path(place / "source")
    with pytest.raises(ModelError, match="one vocabulary"):
        compress(source, recipe, tmp_path / "out", teacher=open_path(place / "other"))
    named = dataclasses.replace(recipe.steps[1], teacher=str(place / "other"))
    with pytest.raises(ModelError, match="one vocabulary"):
        compress(source, dataclasses.replace(recipe, steps=(recipe.steps[0], named)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused(place, tmp_path):
    recipe, source = load_recipe(place / "healed.toml"), open_path(place / "source")
    silent = dataclasses.replace(recipe, steps=(dataclasses.replace(recipe.steps[1], data=()),))
    with pytest.raises(UserError, match="needs text: name files with data"):
        compress(source, silent, tmp_path / "out")
    with pytest.raises(UserError, match=r"a teacher is for recipes with a step heal\.distill"):
        compress(source, load_recipe("int8"), tmp_path / "out", teacher=source)
    absent = dataclasses.replace(recipe, steps=(dataclasses.replace(recipe.steps[1], data=("none.txt",)),))
    with pytest.raises(UserError, match=r"a file must be readable: none\.txt"):
        compress(source, absent, tmp_path / "out")
    with pytest.raises(UserError, match="steps must be at least 1"):
        parse_recipe('name = "x"\n[[step]]\nuse = "heal.distill"\nsteps = 0\n', where="here")


def test_a_plan_counts_the_passes(place):
    found = plan(open_path(place / "source"), load_recipe(place / "healed.toml"))
    assert found.after_bytes < found.before_bytes
    assert 'use = "heal.distill"' in found.recipe


@pytest.mark.parametrize(("name", "layers", "table_bits"), [("small", 10, 4), ("tiny", 2, 3)])
def test_the_built_in_recipes_that_heal(tmp_path, name, layers, table_bits):
    tiny_folder(tmp_path / "source", layers=10)
    (tmp_path / "text.txt").write_text(" ".join(CORPUS) * 12)
    recipe, short = load_recipe(name), {"steps": 2, "batch": 4, "micro_batch": 4, "length": 32, "held_out": 4}
    text = dataclasses.replace(recipe.calibration, files=(str(tmp_path / "text.txt"),), samples=2, length=32)
    steps = tuple(dataclasses.replace(step, **(short if step.name == "heal.distill" else {})) for step in recipe.steps)
    compress(
        open_path(tmp_path / "source"), dataclasses.replace(recipe, calibration=text, steps=steps), tmp_path / "out"
    )
    found = open_checkpoint(tmp_path / "out")
    assert found.decoder.layers == layers
    weights = {path: found.weight(path) for matrices, _ in found.blocks.values() for path in matrices}
    assert {weight.bits for path, weight in weights.items() if "layers" in path} == {3}
    assert weights["model.embed_tokens"].bits == table_bits
    assert all(weight.block == 64 and weight.steps is not None for weight in weights.values())


def test_the_digest_of_a_recipe_does_not_depend_on_where_its_text_lies(place):
    recipe = load_recipe(place / "healed.toml")
    moved = dataclasses.replace(recipe.steps[1], data=("elsewhere.txt",))
    assert dataclasses.replace(recipe, steps=(recipe.steps[0], moved, recipe.steps[2])).sha256 == recipe.sha256
