"""Cutting a document into passages: by headings first, then by tokens.

A passage never crosses a heading. A section that has more tokens than a passage may have is cut between paragraphs;
a paragraph that has more, between sentences; a sentence that has more, between words, and a longer word in its middle.
Pieces are joined again, first to last, as long as they fit. So the passages of a document are disjoint, in order, and
hold all of its text but for headings, which each passage names, and for the white space between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edgekit.assistant.documents import Document, Heading
from edgekit.errors import UserError

Count = Callable[[Sequence[str]], list[int]]  # how many tokens each of the texts has
Span = tuple[int, int]

# Where a text may be cut, the better places first. A pattern matches what lies between two pieces.
_CUTS = (re.compile(r"\n[ \t]*\n\s*"), re.compile(r"(?<=[.!?;:])\s+|\n"), re.compile(r"\s+"))
_SURE = 50  # characters a token: a text of more is too long without being counted


@dataclass(frozen=True)
class Chunk:
    """A passage: the text from character `start` to `end`, and the headings above it, "Travel > Meals"."""

    start: int
    end: int
    heading: str


def chunks(document: Document, *, count: Count, tokens: int) -> list[Chunk]:
    """The passages of a document, of at most `tokens` tokens as `count` counts them, special ones included.

    A single character that has more tokens than that is a passage nevertheless. Raises UserError for `tokens` below 16.
    """
    if tokens < 16:
        raise UserError(f"a passage must have room for at least 16 tokens: got {tokens}")
    text = document.text
    return [
        Chunk(*span, heading)
        for section, heading in _sections(document)
        for span in _joined(text, list(_pieces(text, section, count, tokens, 0)), count, tokens)
    ]


def _sections(document: Document) -> Iterator[tuple[Span, str]]:
    """The text below each heading, and the path of headings to it. A heading with nothing below it is its own text."""
    headings = document.headings
    above: list[Heading] = []
    yield (0, headings[0].start if headings else len(document.text)), ""
    for at, heading in enumerate(headings):
        after = headings[at + 1] if at + 1 < len(headings) else None
        end = after.start if after else len(document.text)
        above = [*(outer for outer in above if outer.level < heading.level), heading]
        path = " > ".join(outer.title for outer in above if outer.title)
        leaf = after is None or after.level <= heading.level
        empty = not document.text[heading.end : end].strip()
        yield (heading.start if leaf and empty else heading.end, end), path


def _pieces(text: str, span: Span, count: Count, tokens: int, level: int) -> Iterator[tuple[Span, int]]:
    """The span cut into pieces that fit, each with its number of tokens."""
    begin, end = _trimmed(text, *span)
    if begin == end:
        return
    own = count([text[begin:end]])[0] if end - begin <= _SURE * tokens else tokens + 1
    if own <= tokens or end - begin == 1:
        yield (begin, end), own
        return
    if level < len(_CUTS):
        parts = _split(text, begin, end, _CUTS[level])
    else:
        middle = (begin + end) // 2
        parts = [(begin, middle), (middle, end)]
    for part in parts:
        yield from _pieces(text, part, count, tokens, min(level + 1, len(_CUTS)))


def _trimmed(text: str, begin: int, end: int) -> Span:
    while begin < end and text[begin].isspace():
        begin += 1
    while begin < end and text[end - 1].isspace():
        end -= 1
    return begin, end


def _split(text: str, begin: int, end: int, cut: re.Pattern[str]) -> list[Span]:
    edges = [begin]
    for found in cut.finditer(text, begin, end):
        edges += [found.start(), found.end()]
    edges.append(end)
    return list(zip(edges[::2], edges[1::2], strict=True))


def _joined(text: str, pieces: list[tuple[Span, int]], count: Count, tokens: int) -> list[Span]:
    """Neighbours together as long as they fit: by the sum of their counts, and then by the count of the whole, which
    can be larger for some tokenizers; then the last of them begins the next passage."""
    special = 2 * count(["a"])[0] - count(["a a"])[0] if pieces else 0  # [CLS] and [SEP], say
    found: list[Span] = []
    at = 0
    while at < len(pieces):
        last, room = at, tokens - pieces[at][1]
        while last + 1 < len(pieces) and pieces[last + 1][1] - special <= room:
            last += 1
            room -= pieces[last][1] - special
        while last > at and count([text[pieces[at][0][0] : pieces[last][0][1]]])[0] > tokens:
            last -= 1
        found.append((pieces[at][0][0], pieces[last][0][1]))
        at = last + 1
    return found
