"""From passages to the sentences that answer: quotes with spans.

Each sentence of the passages gets the score

    cosine(question, sentence) + coverage(question, sentence)

where coverage is as in search.py, but with words compared by their first five letters. A quote holds its span in the
document, and is given out only when the index has that very text there.

Used for both styles of answers: an answer of quotes is made of the best of them, and of an answer that a model wrote,
each sentence is traced to the one that it shares the most words with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.assistant.index import Index
from edgekit.assistant.search import Found, terms

# A sentence ends at a full stop that white space and no small letter follow, or at the end of a line of a list.
_BREAK = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[^\sa-z])|\n[ \t]*(?=[-*+#>|]|\d+[.)]|\n)\s*")
_ABBREVIATED = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|No|vs|e\.g|i\.e|c|ca|cf|approx|Inc|Ltd|Co|Jr|Sr|U\.S))\.$"
)
_STEM = 5
LONGEST = 600  # characters of a quote
SUPPORTED = 0.5  # share of a written sentence's words that its source must have


@dataclass(frozen=True)
class Quote:
    """A sentence of a document: `text` stands there from `start` to `end`. `number` is that of its passage (from 1)."""

    number: int
    document: str
    title: str
    heading: str
    start: int
    end: int
    text: str
    score: float


def quotes(index: Index, question: str, found: Found, *, limit: int) -> list[Quote]:
    """The sentences that seem to answer a question, best first; none that the index does not have where it should."""
    candidates = [
        Quote(at, p.document, p.title, p.heading, p.start + begin, p.start + end, p.text[begin:end], 0.0)
        for at, p in enumerate(found.passages, 1)
        for begin, end in sentences(p.text)
    ]
    if not candidates:
        return []
    embedder = index.embedder
    vector = embedder.embed([question or " "], truncate=True)[0]
    cosines = embedder.embed([quote.text for quote in candidates], truncate=True) @ vector
    shares = _shares(index, terms(question), [quote.text for quote in candidates])
    order = np.argsort(-(cosines + shares), kind="stable")
    ranked = [_scored(candidates[at], float(cosines[at] + shares[at])) for at in order]
    distinct = list({quote.text: quote for quote in reversed(ranked)}.values())[::-1]
    return [quote for quote in distinct if stands(index, quote)][:limit]


def stands(index: Index, quote: Quote) -> bool:
    """Whether the document has the quote's text at its span."""
    return quote.text != "" and index.text(quote.document, quote.start, quote.end) == quote.text


def sentences(text: str) -> list[tuple[int, int]]:
    """The spans of the sentences of a text; one of more than LONGEST characters is cut at a space."""
    found, begin = [], 0
    for cut in [*_BREAK.finditer(text), None]:
        end = cut.start() if cut else len(text)
        if cut and _ABBREVIATED.search(text, max(begin, end - 12), end):
            continue
        while end - begin > LONGEST:
            space = text.rfind(" ", begin + 1, begin + LONGEST)
            middle = space if space > 0 else begin + LONGEST
            found.append((begin, middle))
            begin = middle
        found.append((begin, end))
        begin = cut.end() if cut else end
    trimmed = [
        (a + len(text[a:b]) - len(text[a:b].lstrip()), b - len(text[a:b]) + len(text[a:b].rstrip())) for a, b in found
    ]
    return [(a, b) for a, b in trimmed if a < b]


def traced(written: str, passages: Sequence[Quote]) -> list[Quote]:
    """For each sentence of a written text, the quote that shares the most words with it, where that is enough; each
    quote once. `passages` are the sentences of all sources."""
    stems = [_stems(quote.text) for quote in passages]
    found: dict[Quote, None] = {}
    for begin, end in sentences(written):
        own = _stems(" ".join(terms(written[begin:end])))
        if not own or not passages:
            continue
        shares = [len(own & theirs) / len(own) for theirs in stems]
        best = int(np.argmax(shares))
        if shares[best] >= SUPPORTED:
            found.setdefault(passages[best])
    return list(found)


def _scored(quote: Quote, score: float) -> Quote:
    return Quote(quote.number, quote.document, quote.title, quote.heading, quote.start, quote.end, quote.text, score)


def _shares(index: Index, words: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    everything = max(index.passages, 1)
    weights = {word: math.log(1 + everything / max(index.holders(word, ())[0], 1)) for word in words}
    total = sum(weights.values()) or 1.0
    stems = [_stems(text) for text in texts]
    return np.array([sum(w for word, w in weights.items() if word[:_STEM] in found) / total for found in stems])


def _stems(text: str) -> frozenset[str]:
    return frozenset(word[:_STEM] for word in re.findall(r"\w+", text.lower()))
