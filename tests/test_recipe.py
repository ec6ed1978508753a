"""Recipes: what comes with edgekit, strict reading, and the text and digest of a resolved one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.errors import UserError
from edgekit.quant.methods import Int4, Int8
from edgekit.quant.rotate import Rotate
from edgekit.recipe import Recipe, built_in_recipes, load_recipe

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
patterns = st.lists(texts, max_size=3).map(tuple)
steps = st.one_of(
    st.builds(Rotate),
    st.builds(
        Int4,
        block=st.sampled_from([32, 64, 128]),
        offset=st.sampled_from(["symmetric", "zero", "minimum"]),
        skip=patterns,
    ),
    st.builds(Int8, embedding=st.sampled_from(["int4", "int8", "keep"]), skip=patterns),
)
recipes = st.builds(
    Recipe,
    name=texts.filter(bool),
    description=texts,
    steps=st.lists(steps, min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**63 - 1),
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", built_in_recipes())
def test_each_built_in_recipe_loads_by_name_and_says_what_it_is(name: str) -> None:
    if name in ("small", "tiny") and find_spec("torch") is None:
        with pytest.raises(UserError, match="needs torch: pip install"):
            load_recipe(name)
        return
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.description) > 20


def test_the_built_in_recipes_are_these() -> None:
    assert {"int4", "int8"} <= set(built_in_recipes())
    assert load_recipe("int4").steps == (Int4(block=32, offset="zero", embedding="int8"),)
    assert load_recipe("int8").steps == (Int8(block=32, offset="symmetric", embedding="int8"),)


@settings(deadline=None)
@given(recipe=recipes)
@example(recipe=Recipe("\x7f\x00\"'\\", "\n\r\t\u2028", (Int4(skip=("[a-b]*\x7f", "ü")),)))
def test_the_resolved_text_reads_back_to_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe
) -> None:
    path = tmp_path_factory.getbasetemp() / "resolved.toml"
    path.write_text(recipe.resolved(), encoding="utf-8", newline="")
    again = load_recipe(path)
    assert again == recipe
    assert again.resolved() == recipe.resolved()
    assert again.sha256 == recipe.sha256


def test_the_digest_is_of_the_meaning(tmp_path: Path) -> None:
    short = load_recipe(write(tmp_path, 'name = "x"\n[[step]]\nuse = "quant.int4"\n')).sha256
    long = load_recipe(
        write(tmp_path, 'seed = 0\nname = "x" # comment\n[[step]]\nskip = []\nblock = 32\nuse = "quant.int4"\n')
    ).sha256
    assert short == long
    others = {
        load_recipe(write(tmp_path, f'name = "x"\n{top}[[step]]\nuse = "quant.int4"\n{option}\n')).sha256
        for top, option in (("", "block = 64"), ("", 'offset = "symmetric"'), ("seed = 1\n", ""), ("", 'skip = ["*"]'))
    }
    assert len(others | {short}) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"', r"mine\.toml: a recipe must have at least one \[\[step\]\]"),
        ('name = ""\n[[step]]\nuse = "quant.int4"', "name must not be empty"),
        ('[[step]]\nuse = "quant.int4"', r"mine\.toml: the key 'name' is missing"),
        ('name = "x"\nseed = -1\n[[step]]\nuse = "quant.int4"', r"seed must be from 0 to 2\*\*63 - 1: got -1"),
        ('name = "x"\nseed = "1"\n[[step]]\nuse = "quant.int4"', "seed must be an integer: got '1'"),
        ('name = "x"\n[[steps]]\nuse = "quant.int4"', r"unknown key 'steps'; did you mean 'step'\?"),
        ('name = "x"\n[step]\nuse = "quant.int4"', "step must be a list"),
        ('name = "x"\n[[step]]\nblock = 32', r"step\[0\]: the key 'use' must name a step"),
        ('name = "x"\n[[step]]\nuse = 4', r"step\[0\]: the key 'use' must name a step: got 4"),
        (
            'name = "x"\n[[step]]\nuse = "quant.int8"\n[[step]]\nuse = "quant.in4"',
            r"mine\.toml, step\[1\]: use must name a step: got 'quant\.in4'; did you mean 'quant\.int4'\?",
        ),
        (
            'name = "x"\n[[step]]\nuse = "quant.rotate"\n[[step]]\nuse = "quant.int4"\nblok = 32',
            r"mine\.toml, step\[1\]: unknown key 'blok'; did you mean 'block'\?",
        ),
        (
            'name = "x"\n[[step]]\nuse = "quant.int4"\nblock = 48',
            r"mine\.toml, step\[0\]: block must be one of 32, 64, 128: got 48",
        ),
        ('name = "x"\n[[step]]\nuse = "quant.int4"\nblock = 32.0', r"step\[0\]: block must be one of .*got 32\.0"),
        (
            'name = "x"\n[[step]]\nuse = "quant.int4"\noffset = 1',
            "offset must be one of symmetric, zero, minimum: got 1",
        ),
        ('name = "x"\n[[step]]\nuse = "quant.int4"\nembedding = "int7"', "must be one of int2, .*, keep: got 'int7'"),
        ('name = "x"\n[[step]]\nuse = "quant.int4"\nskip = [1]', r"skip\[0\] must be a string: got 1"),
        ('name = "x"\n[[step]]\nuse = "quant.rotate"\nseed = 1', "unknown key 'seed'"),
        ('name = "x"\nname = "y"', r"readable TOML file: .*mine\.toml"),
        ("name = ", "readable TOML file"),
        ("\x00", "readable TOML file"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="readable TOML file"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int5", "got 'int5'; did you mean 'int"),
        ("recipes/int4.tml", "got 'recipes/int4.tml'; did you mean 'int4'"),
        ("", "built-in name or a TOML file"),
    ],
)
def test_a_recipe_that_is_not_there_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(name)


def test_a_built_in_name_wins_over_a_file_and_a_path_over_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("int4").write_text('name = "file"\n[[step]]\nuse = "quant.int8"\n')
    assert load_recipe("int4").name == "int4"
    assert load_recipe("./int4").name == "file"
    assert load_recipe(Path("int4")).name == "file"
