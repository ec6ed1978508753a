"""Cutting documents: nothing is lost, nothing crosses a heading, all fits."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.assistant.chunks import chunks
from edgekit.assistant.documents import Document, File, read
from edgekit.errors import UserError


def count(texts: Sequence[str]) -> list[int]:
    """Words of at most four characters, and two special tokens."""
    return [len(re.findall(r"\w{1,4}|[^\w\s]", text)) + 2 for text in texts]


def markdown(text: str) -> Document:
    document = read(File("a.md", "markdown"), text.encode())
    assert isinstance(document, Document)
    return document


@given(st.text(alphabet="ab.! \n#-", min_size=1, max_size=400), st.integers(16, 40))
def test_passages_are_in_order_fit_and_hold_all(text: str, tokens: int) -> None:
    document = Document("t", text)
    found = chunks(document, count=count, tokens=tokens)
    end = 0
    for chunk in found:
        assert not text[end : chunk.start].strip()
        assert chunk.start < chunk.end
        assert count([text[chunk.start : chunk.end]])[0] <= tokens
        end = chunk.end
    assert not text[end:].strip()


def test_headings_cut_and_are_named() -> None:
    document = markdown("before\n\n# A\n\none\n\n## B\n\ntwo\n\n# C\n\nthree\n\n## D\n")
    found = [(c.heading, document.text[c.start : c.end]) for c in chunks(document, count=count, tokens=100)]
    assert found == [("", "before"), ("A", "one"), ("A > B", "two"), ("C", "three"), ("C > D", "## D")]


def test_paragraphs_stay_whole_where_they_can() -> None:
    text = "\n\n".join(f"{word} " * 6 for word in ("one", "two", "six", "ten"))
    found = [text[c.start : c.end] for c in chunks(Document("t", text), count=count, tokens=16)]
    assert [set(part.split()) for part in found] == [{"one", "two"}, {"six", "ten"}]


def test_a_word_that_is_too_long_is_cut() -> None:
    found = chunks(Document("t", "x" * 10_000), count=count, tokens=16)
    assert sum(chunk.end - chunk.start for chunk in found) == 10_000


def test_too_little_room() -> None:
    with pytest.raises(UserError, match="at least 16 tokens: got 15"):
        chunks(Document("t", "x"), count=count, tokens=15)
