"""The content filter: patterns, topics, modes, and an answer that comes in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from knowledge import word_embedder

from edgekit.assistant.filter import Filter, Gate, Policy, Rule, Verdict, load_policy
from edgekit.assistant.handover import load_settings
from edgekit.assistant.label import load_questions
from edgekit.assistant.patterns import compiled, normalised
from edgekit.errors import UserError

BOMB = Rule("bombs", patterns=(r"\bbombs?\b",), explanation="No weapons.")
PILLS = Rule("pills", action="warn", where=("question",), examples=("How many pills may I take?",), cosine=0.7)


def test_a_pattern_blocks_and_says_why() -> None:
    (verdict,) = Filter(Policy(rules=(BOMB,))).check("How are BOMBS made?", "question")
    assert verdict == Verdict("block", "question", "bombs", "No weapons. The rule 'bombs' acted: it has 'BOMBS'.")
    assert Filter(Policy(rules=(BOMB,))).check("A bombastic bathroom", "question") == []


@pytest.mark.parametrize("text", ["ｂｏｍｂ", "bo\u200bmb", "bo\u00admb", "a\u00a0bomb", "𝐛𝐨𝐦𝐛"])
def test_spelling_tricks_do_not_help(text: str) -> None:
    assert Filter(Policy(rules=(BOMB,))).check(text, "question")


def test_a_topic_is_a_neighbourhood() -> None:
    topics = Filter(Policy(rules=(PILLS,)), word_embedder())
    (verdict,) = topics.check("May I take many pills?", "question")
    assert (verdict.action, verdict.rule) == ("warn", "pills")
    assert "close to 'How many pills may I take?' (cosine 0." in verdict.explanation
    assert topics.check("Where is the Zephyr pass sold?", "question") == []
    assert topics.check("How many pills may I take?", "answer") == []


@pytest.mark.parametrize(("mode", "actions"), [("off", []), ("warn", ["warn", "warn"]), ("block", ["block", "warn"])])
def test_modes(mode: str, actions: list[str]) -> None:
    policy = Policy(mode, (BOMB, PILLS))  # type: ignore[arg-type]
    found = Filter(policy, word_embedder()).check("How many pills may I take? A bomb!", "question")
    assert [verdict.action for verdict in found][: len(actions)] == actions[: len(found)]
    assert bool(found) == (mode != "off")


def test_a_policy_file(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(
        'mode = "warn"\n[[rules]]\nname = "a"\npatterns = [\'x\\d\']\nwhere = ["answer"]\n'
    )
    assert load_policy(tmp_path / "p.toml") == Policy("warn", (Rule("a", patterns=(r"x\d",), where=("answer",)),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode = 3", "mode must be one of off, warn, block: got 3"),
        ("[[rules]]\nname = 'a'", "needs patterns or examples: 'a'"),
        ("[[rules]]\nname = 'a'\npattern = []", "unknown key 'pattern'; did you mean 'patterns'"),
        ("[[rules]]\nname = ''\npatterns = ['x']", "must have a name"),
        ("[[rules]]\nname = 'a'\npatterns = ['x']\ncosine = 2", "between 0 and 1: got 2"),
        ("[[rules]]\nname = 'a'\npatterns = ['x']\n[[rules]]\nname = 'a'\npatterns = ['y']", "'a' is there 2 times"),
        ("x = ", "must be TOML"),
    ],
)
def test_a_policy_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path / "p.toml")


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", r"rules\[0\] must be a regular"), ("x*", "empty text"), ("x" * 3000, "at most 2000")]
)
def test_patterns_that_are_wrong(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compiled([pattern], where="rules")
    with pytest.raises(UserError, match="need an embedder"):
        Filter(Policy(rules=(PILLS,)))


def test_normalised() -> None:
    assert normalised("Ｔel\u200b:\u00a0０１\u2011２\n\n x") == "Tel: 01-2 x"


def pass_through(gate: Gate, pieces: list[str]) -> list[str | Verdict]:
    out: list[str | Verdict] = []
    for piece in pieces:
        out += gate.push(piece)
    return [*out, *gate.finish()]


def test_nothing_of_a_sentence_is_shown_before_it_was_checked() -> None:
    gate = Gate(Filter(Policy(rules=(BOMB,))))
    out = pass_through(gate, ["Fine", " words. ", "Take a bo", "mb and", " run. ", "More."])
    assert out[0] == "Fine words. "
    assert isinstance(out[1], Verdict)
    text = "".join(item for item in out if isinstance(item, str))
    assert "bo" not in text
    assert "run" not in text


def test_a_warning_comes_once_and_the_text_stays_whole() -> None:
    gate = Gate(Filter(Policy("warn", (BOMB,))))
    pieces = ["A bomb. ", "No bo", "mb. End"]
    out = pass_through(gate, pieces)
    assert "".join(item for item in out if isinstance(item, str)) == "".join(pieces)
    assert len([item for item in out if isinstance(item, Verdict)]) == 1


def test_without_a_filter_pieces_pass_as_they_come() -> None:
    assert pass_through(Gate(None), ["a", "b"]) == ["a", "b"]


def test_the_example_s_files_are_right() -> None:
    folder = Path(__file__).parent.parent / "examples" / "assistant"
    policy = load_policy(folder / "policy.toml")
    blocked = Filter(policy, word_embedder()).check("4111 1111 1111 1111", "answer")
    assert [verdict.action for verdict in blocked] == ["block"]
    assert load_settings(folder / "router.toml").privacy.folders == ("hr",)
    assert len(load_questions(folder / "questions.jsonl")) == 3
