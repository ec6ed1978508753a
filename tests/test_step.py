"""What steps share: the table of names, facts that join, outlines, and views of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_folder

from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.errors import UserError
from edgekit.model.sources import open_model
from edgekit.quant.methods import Int4
from edgekit.recipe import load_recipe
from edgekit.step import STEPS, Fact, Needs, join_facts, options, outline_of, renamed, step_class


@pytest.mark.parametrize("name", STEPS)
def test_each_named_step_loads_and_keeps_the_protocol(name: str) -> None:
    if name.startswith("heal."):
        pytest.importorskip("torch")
    found = step_class(name, where="here")
    options = {"keep": 0.5} if name.startswith("tn.") else {}  # without which nothing says how much to keep
    step = found(**options)
    assert found.name == name
    assert step.needs in get_args(Needs)
    assert dataclasses.is_dataclass(step)
    assert step == found(**options)  # frozen dataclasses compare by their options
    for field in dataclasses.fields(step):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(step, field.name, None)
    for method in ("prepare", "apply", "predict"):
        assert callable(getattr(step, method))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quant.int5", r"r\.toml, step\[0\]: use must name a step: got 'quant.int5'; did you mean 'quant.int"),
        ("rotate", "did you mean 'quant.rotate'"),
        (
            "zzz",
            r"known are .*merge\.drop, .*quant\.awq, quant\.int2, quant\.int3, quant\.int4, quant\.int8, quant\.keep",
        ),
    ],
)
def test_an_unknown_step_names_the_place_and_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        step_class(name, where="r.toml, step[0]")


def test_options_are_what_json_knows() -> None:
    expected = {
        "block": 64,
        "offset": "zero",
        "scales": "float16",
        "search": False,
        "embedding": "int8",
        "skip": ["*.o_proj"],
        "method": "rtn",
        "order": "given",
        "damping": 0.01,
        "refine": 1,
        "follow": 0.0,
    }
    assert options(Int4(block=64, skip=("*.o_proj",))) == expected
    assert json.loads(json.dumps(expected)) == expected


def test_facts_join_as_they_say() -> None:
    first = {"n": Fact(2, "sum"), "worst": Fact(1, "max"), "e": Fact(0.3, "rms", 10), "m": Fact(1, "mean", 3)}
    second = {"n": Fact(5, "sum"), "worst": Fact(4, "max"), "e": Fact(0.4, "rms", 30), "m": Fact(5, "mean", 1)}
    assert join_facts([first, {}, second]) == {
        "n": 7,
        "worst": 4,
        "e": pytest.approx(math.sqrt((10 * 0.09 + 30 * 0.16) / 40)),
        "m": 2,
    }
    assert join_facts([]) == {}
    assert join_facts([{"e": Fact(0, "rms", 0)}, {"e": Fact(0, "rms", 0)}]) == {"e": 0}
    with pytest.raises(AssertionError):
        join_facts([{"e": Fact(0, "rms")}, {"e": Fact(0, "sum")}])


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 10)), min_size=1, max_size=8), st.randoms())
def test_the_joined_fact_lies_between_its_parts_in_any_order(parts: list[tuple[float, float]], random: object) -> None:
    for how in ("mean", "rms"):
        facts = [{"x": Fact(value, how, weight)} for value, weight in parts]  # type: ignore[arg-type]
        joined = join_facts(facts)["x"]
        values = [value for value, _ in parts]
        assert min(values) - 1e-9 <= joined <= max(values) + 1e-9
        assert join_facts(reversed(facts))["x"] == joined


@pytest.mark.parametrize("recipe", [None, "int4", "int8"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_an_outline_has_the_sizes_of_the_block(tmp_path: Path, recipe: str | None, architecture: str) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "model", architecture=architecture, dtype="bfloat16")))
    if recipe:
        compress(checkpoint, load_recipe(recipe), tmp_path / "small")
        checkpoint = open_checkpoint(tmp_path / "small")
    for name in checkpoint.blocks:
        outline, block = outline_of(checkpoint, name), checkpoint.read_block(name)
        assert outline.size_bytes == block.size_bytes
        assert {module: matrix.shape for module, matrix in outline.matrices.items()} == {
            module: weight.shape for module, weight in block.matrices.items()
        }
        assert {matrix.dense for matrix in outline.matrices.values()} <= {recipe is None}


@pytest.mark.parametrize("quantised", [False, True])
def test_a_view_shows_tensors_under_other_names(tmp_path: Path, quantised: bool) -> None:
    checkpoint = open_model(str(tiny_folder(tmp_path / "model")))
    if quantised:
        compress(checkpoint, load_recipe("int4"), tmp_path / "small")
        checkpoint = open_checkpoint(tmp_path / "small")
    names = {name: name for name in checkpoint.tensors.names() if "layers.1." not in name}
    table = {name.replace("model.embed_tokens", "lm_head"): name for name in names if "embed_tokens" in name}
    view = renamed(checkpoint, names | table, config={**checkpoint.config, "num_hidden_layers": 1})
    assert list(view.blocks) == ["embedding", "layers.0", "final"]
    assert view.decoder.layers == 1
    assert checkpoint.decoder.layers == 2
    assert set(view.structure) <= {module for modules, _ in view.blocks.values() for module in modules}
    assert ("lm_head" in view.structure) == quantised
    np.testing.assert_array_equal(
        view.weight("lm_head").dense(), checkpoint.weight("model.embed_tokens").dense(), strict=True
    )
    assert view.shape("lm_head") == checkpoint.shape("model.embed_tokens")
