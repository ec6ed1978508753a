"""Strict parsing: each supported type, each refusal with its place, and the nearest known key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import EdgekitError, ModelError, UserError
from edgekit.schema import nearest, parse


@dataclass(frozen=True)
class Inner:
    size: int
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UserError(f"size must not be below zero: got {self.size}")


@dataclass(frozen=True)
class Outer:
    name: str
    on: bool = False
    kind: Literal["a", "b", 4] = "a"
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    numbers: list[int] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=dict)
    anything: object = None
    derived: int = field(init=False, default=0)


FULL = Outer(
    name="x",
    on=True,
    kind=4,
    inner=Inner(3, 0.5),
    many=(Inner(1), Inner(2)),
    numbers=[1, 2],
    table={"a": 1.0},
    anything={"free": [1, None]},
)


def test_everything_comes_back() -> None:
    data = dataclasses.asdict(FULL)
    del data["derived"]
    assert parse(Outer, data, where="f") == FULL


def test_defaults_fill_what_is_absent() -> None:
    assert parse(Outer, {"name": "x"}, where="f") == Outer("x")


def test_an_int_may_stand_for_a_float_and_becomes_one() -> None:
    ratio = parse(Inner, {"size": 1, "ratio": 2}, where="f").ratio
    assert (ratio, type(ratio)) == (2.0, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "f must be a table: got []"),
        (None, "f must be a table: got None"),
        ({}, "f: the key 'name' is missing"),
        ({"name": "x", "knd": "a"}, "f: unknown key 'knd'; did you mean 'kind'?"),
        ({"name": "x", "zzz": 1}, "f: unknown key 'zzz'; known are anything, inner, kind, many"),
        ({"name": "x", "derived": 1}, "f: unknown key 'derived'"),
        ({"name": 1}, "f: name must be a string: got 1"),
        ({"name": None}, "f: name must be a string: got None"),
        ({"name": "x", "on": 1}, "f: on must be true or false: got 1"),
        ({"name": "x", "kind": "c"}, "f: kind must be one of a, b, 4: got 'c'"),
        ({"name": "x", "kind": 4.0}, "f: kind must be one of a, b, 4: got 4.0"),
        ({"name": "x", "kind": ["a"]}, "f: kind must be one of a, b, 4: got ['a']"),
        ({"name": "x", "inner": 3}, "f: inner must be a table: got 3"),
        ({"name": "x", "inner": {"size": True}}, "f: inner: size must be an integer: got True"),
        ({"name": "x", "inner": {"size": 1.0}}, "f: inner: size must be an integer: got 1.0"),
        ({"name": "x", "inner": {"size": -1}}, "f: inner: size must not be below zero: got -1"),
        ({"name": "x", "inner": {"size": 1, "ratio": "2"}}, "f: inner: ratio must be a number: got '2'"),
        ({"name": "x", "inner": {"size": 1, "ratio": True}}, "f: inner: ratio must be a number: got True"),
        ({"name": "x", "inner": {"size": 1, "ratio": 10**400}}, "f: inner: ratio is out of range"),
        ({"name": "x", "many": "ab"}, "f: many must be a list: got 'ab'"),
        ({"name": "x", "many": [{"size": 1}, {"sise": 2}]}, "f: many[1]: unknown key 'sise'; did you mean 'size'?"),
        ({"name": "x", "numbers": [1, "2"]}, "f: numbers[1] must be an integer: got '2'"),
        ({"name": "x", "table": []}, "f: table must be a table: got []"),
        ({"name": "x", "table": {"k": "v"}}, "f: table.k must be a number: got 'v'"),
    ],
)
@pytest.mark.parametrize("error", [UserError, ModelError])
def test_refusals_name_the_place(data: object, message: str, error: type[EdgekitError]) -> None:
    with pytest.raises(error) as caught:
        parse(Outer, data, where="f", error=error)
    assert str(caught.value).startswith(message)
    assert type(caught.value) is error


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(UserError) as caught:
        parse(Outer, {"name": ["x" * 1000]}, where="f")
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("blok", ["block", "bits"], "; did you mean 'block'?"),
        ("qqq", ["block", "bits"], "; known are bits, block"),
        ("qqq", [], ""),
        ("Block", {"block": 1}, "; did you mean 'block'?"),
    ],
)
def test_nearest(word: str, known: Any, hint: str) -> None:
    assert nearest(word, known) == hint


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
near_misses = st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Outer)]), json_values)


@given(near_misses | json_values)
def test_any_json_is_parsed_or_refused(data: Any) -> None:
    try:
        parsed = parse(Outer, data, where="f")
    except UserError:
        return
    assert isinstance(parsed, Outer)
    assert isinstance(parsed.name, str)
    assert type(parsed.on) is bool
    assert all(type(number) is int for number in parsed.numbers)
