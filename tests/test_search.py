"""Search, and the sentences that it leads to."""

from __future__ import annotations

from pathlib import Path

import pytest
from knowledge import make_index

from edgekit.assistant.evidence import Quote, quotes, sentences, stands, traced
from edgekit.assistant.index import Index
from edgekit.assistant.search import RRF_K, VECTOR_WEIGHT, fused, relevance, search, terms


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_index(tmp_path_factory.mktemp("search"))[0]


def test_fusion_is_the_formula() -> None:
    scores = fused([7, 8], [8, 9])
    assert scores == {
        7: pytest.approx(VECTOR_WEIGHT / (RRF_K + 1)),
        8: pytest.approx(VECTOR_WEIGHT / (RRF_K + 2) + 1 / (RRF_K + 1)),
        9: pytest.approx(1 / (RRF_K + 2)),
    }
    assert fused([], []) == {}


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the Zephyr pass?", ["zephyr", "pass"]),
        ("Who are you?", ["who", "are", "you"]),
        ("a A", ["a"]),
        ("", []),
        ("?!", []),
    ],
)
def test_terms(question: str, expected: list[str]) -> None:
    assert terms(question) == expected


def test_the_passage_with_the_answer_comes_first(index: Index) -> None:
    found = search(index, "Where is the Zephyr pass sold?")
    assert found.passages[0].document == "travel/trains.md"
    assert found.known
    assert found.passages[0].coverage == 1
    assert 0 < found.relevance == relevance(found.passages) <= 1
    assert [p.score for p in found.passages] == sorted((p.score for p in found.passages), reverse=True)


@pytest.mark.parametrize("question", ["Wer gewann die Weltmeisterschaft?", "", "?", "\0", "x" * 100_000, '"*^()'])
def test_what_is_not_there_is_not_known(index: Index, question: str) -> None:
    assert not search(index, question).known


def test_limits_and_thresholds(index: Index) -> None:
    assert len(search(index, "leave", limit=1).passages) == 1
    assert not search(index, "Zephyr pass", threshold=1.01).known


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? 4 is it.", ["One.", "Two!", "Three?", "4 is it."]),
        ("Dr. Ada met J. Quill. They left.", ["Dr. Ada met J. Quill.", "They left."]),
        ("It cost 3.5 marks. and more", ["It cost 3.5 marks. and more"]),
        ("a list:\n- one\n- two\n\nafter", ["a list:", "- one", "- two", "after"]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert [text[a:b] for a, b in sentences(text)] == expected


def test_a_sentence_without_end_is_cut() -> None:
    text = "word " * 1000
    spans = sentences(text)
    assert max(b - a for a, b in spans) <= 600
    assert " ".join(text[a:b] for a, b in spans) == text.strip()


def test_quotes_stand_in_the_documents(index: Index) -> None:
    question = "How many days of annual leave has an employee?"
    found = quotes(index, question, search(index, question), limit=3)
    assert found[0].text == "Every employee has thirty days of annual leave in a calendar year."
    for quote in found:
        assert stands(index, quote)
        assert index.text(quote.document, quote.start, quote.end) == quote.text


@pytest.mark.parametrize("change", [{"start": 3}, {"text": "Every employee has ninety days."}, {"document": "pay.md"}])
def test_a_quote_that_does_not_stand_is_seen(index: Index, change: dict[str, object]) -> None:
    import dataclasses

    question = "annual leave"
    (quote,) = quotes(index, question, search(index, question), limit=1)
    assert not stands(index, dataclasses.replace(quote, **change))


def test_a_document_that_changed_meanwhile_is_not_quoted(tmp_path: Path) -> None:
    index, _ = make_index(tmp_path)
    found = search(index, "Zephyr pass")
    index.remove("travel/trains.md")
    assert [q.document for q in quotes(index, "Zephyr pass", found, limit=9) if "train" in q.document] == []


def test_written_sentences_are_traced() -> None:
    sources = [
        Quote(1, "a.md", "", "", 0, 1, "Every employee has thirty days of annual leave.", 0),
        Quote(2, "b.md", "", "", 0, 1, "The Zephyr pass is sold at counter twelve.", 0),
    ]
    assert traced("You buy the Zephyr pass at counter twelve. Bananas are yellow fruit.", sources) == [sources[1]]
    assert traced("Bananas.", sources) == traced("", sources) == traced("Zephyr", []) == []
