"""The safety sets and their lexical scorer, on texts by hand and on a tiny model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from test_evaluate import random_table, scorer_of

from edgekit.evaluate.safety import (
    Safety,
    disturbances,
    foreign,
    holds,
    judge,
    load_sets,
    measure_safety,
    repeats,
    rows_of_safety,
    with_typos,
)
from edgekit.report import Report

SETS = load_sets()


def test_the_sets_cover_several_groups_and_languages() -> None:
    assert len({twins.kind for twins in SETS.twins}) >= 6
    assert {twins.language for twins in SETS.twins} == {"en", "de", "fr", "es"}
    assert {request.kind for request in SETS.requests} == {"harmful", "harmless"}
    assert all(twins.stereotype != twins.other for twins in SETS.twins)
    assert all(phrase == phrase.lower() for phrase in SETS.refusal + SETS.toxic)
    assert len({question.question for question in SETS.questions}) == len(SETS.questions)


@pytest.mark.parametrize(
    ("text", "refused", "toxic"),
    [
        ("I'm sorry, but I can’t help with that.", True, False),
        ("Das kann ich nicht tun.", True, False),
        ("You are an IDIOT.", False, True),
        ("The idiotic plan", False, False),  # a part of a word is none
        ("Rome is the capital of Italy.", False, False),
    ],
)
def test_words_are_found_whole_and_in_any_case(text: str, refused: bool, toxic: bool) -> None:
    reply = judge(SETS.requests[0], text, SETS)
    assert (reply.refused, reply.toxic) == (refused, toxic)
    assert holds(text, SETS.toxic) == toxic


@pytest.mark.parametrize(
    ("text", "again", "strange"),
    [
        ("the cat sat on the mat " * 5, True, False),
        ("one two three", False, False),
        (" ".join(map(str, range(30))), False, False),
        ("привет, как дела", False, True),
        ("", False, False),
        ("naïve façade, größer", False, False),
    ],
)
def test_sanity(text: str, again: bool, strange: bool) -> None:
    assert repeats(text) == again
    assert foreign(text) == strange


def test_disturbed_questions_keep_their_choices_and_typos_keep_their_letters() -> None:
    found = disturbances(SETS.questions)
    assert found == disturbances(SETS.questions)
    for items in found.values():
        assert [item.choices for item in items] == [question.choices for question in SETS.questions]
    text = SETS.questions[0].question
    assert sorted(with_typos(text, random.Random(1))) == sorted(text)
    plain, typos = ([item.context for item in found[name]] for name in ("plain", "typos"))
    assert sum(a != b for a, b in zip(plain, typos, strict=True)) >= len(plain) / 2


def test_a_model_against_itself_has_not_changed() -> None:
    few = type(SETS)(
        SETS.twins[:4], (SETS.requests[0], SETS.requests[-1]), SETS.questions[:2], SETS.refusal, SETS.toxic, "few"
    )
    seen: list[tuple[int, int]] = []
    found = measure_safety(scorer_of(random_table()), few, on_item=lambda *state: seen.append(state))
    assert seen[-1][0] == seen[-1][1]
    assert Safety.from_dict(found.to_dict()) == found
    report = Report("eval", tuple(rows_of_safety(found, found)))
    changes = [row.value for row in report.measurements if "change" in row.name or "drift" in row.name]
    assert changes
    assert set(changes) == {0.0}
    assert [row.name for row in rows_of_safety(found)]


def test_the_sets_are_shipped_with_their_licence() -> None:
    text = (Path(__file__).parent.parent / "edgekit" / "evaluate" / "data" / "README.md").read_text()
    assert "Apache-2.0" in text
