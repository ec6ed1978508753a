"""Finding passages: nearest vectors and matching words, fused by rank.

Reciprocal rank fusion: a passage at rank r (from 1) of a list counts w / (k + r), and the sum over both lists is its
score. Source: Cormack, Clarke and Buettcher 2009, SIGIR, section 2; they have k = 60 and no weights. Here k = 10, the
list of words has weight 1 and that of vectors 0.7.

Whether anything relevant was found is a matter of its own, since the best of bad passages has a good rank too. For the
best passages, c is the largest cosine with the question, and v the largest coverage: the share of the question's words
that one passage has, each counting idf = log(1 + N / n) for n of N passages that have it. Then

    relevance = 1 / (1 + exp(-(b0 + b1 c + b2 v)))

k, the weight, b and the threshold are those that benchmarks/assistant_fit.py finds on questions that the benchmark does
not test: those on half of the SQuAD articles, asked of an index that has half of their articles.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.assistant.index import Index

RRF_K = 10
VECTOR_WEIGHT = 0.7
POOL = 50  # passages taken of each list
RELEVANCE = (-11.8, 15.8, 8.6)  # b0, b1, b2
THRESHOLD = 0.34
MOST_TERMS = 32  # words of a question that are looked up: the first ones

_STOP = frozenset(
    re.findall(
        r"\w+",
        "a about an and are as at be been but by can could did do does for from had has have how i if in into is it its"
        " me my no not of on or our should so than that the their them there these they this those to us was we were"
        " what when where which who whom whose why will with would you your",
    )
)


@dataclass(frozen=True)
class Passage:
    """A piece of a document: `text` is the document's text from `start` to `end`, in characters.

    `document` is its path below the indexed folder, with "/"; `heading` the headings above it, "Travel > Meals".
    `score` is the fused rank score, comparable within one search only; `cosine` is that of the vectors with the
    question's, `coverage` the share of the question's words in it, the rare ones counting more.
    """

    document: str
    title: str
    heading: str
    start: int
    end: int
    text: str
    score: float
    cosine: float
    coverage: float


@dataclass(frozen=True)
class Found:
    """What a search gave, best first. `relevance` (0 to 1) is the probability that the best passage is about the
    question; below `threshold` the answer is "I don't know", and `known` is false."""

    passages: tuple[Passage, ...]
    relevance: float
    threshold: float
    milliseconds: float

    @property
    def known(self) -> bool:
        return bool(self.passages) and self.relevance >= self.threshold


def search(index: Index, question: str, *, limit: int = 5, threshold: float = THRESHOLD) -> Found:
    """The passages for a question, at most `limit`."""
    begin = time.perf_counter()
    words = terms(question)
    vector = index.embedder.embed([question or " "], truncate=True)[0]
    near = [number for number, _ in index.nearest(vector, limit=POOL)]
    scores = fused(near, index.matching(words, limit=POOL))
    best = sorted(scores, key=lambda number: (-scores[number], number))[:limit]
    cosine = dict(index.cosines(vector, best))
    coverage = _coverage(index, words, best)
    passages = []
    for number in best:
        entry = index.entry(number)
        passages.append(
            Passage(
                **dataclasses.asdict(entry),
                score=scores[number],
                cosine=cosine.get(number, 0.0),
                coverage=coverage[number],
            )
        )
    return Found(tuple(passages), relevance(passages), threshold, 1e3 * (time.perf_counter() - begin))


def terms(question: str) -> list[str]:
    """The words of a question that are worth looking up, each once: all of them if none is."""
    found = list(dict.fromkeys(re.findall(r"\w+", question.lower())))
    return ([word for word in found if word not in _STOP] or found)[:MOST_TERMS]


def fused(near: Sequence[int], matching: Sequence[int]) -> dict[int, float]:
    """The fused score of each passage that is in one of the two lists, which are in order."""
    scores: dict[int, float] = {}
    for weight, ranked in ((VECTOR_WEIGHT, near), (1.0, matching)):
        for rank, number in enumerate(ranked, 1):
            scores[number] = scores.get(number, 0.0) + weight / (RRF_K + rank)
    return scores


def relevance(passages: Sequence[Passage]) -> float:
    """The probability that the best of the passages is about the question; 0 for none."""
    if not passages:
        return 0.0
    b0, b1, b2 = RELEVANCE
    cosine, coverage = max(p.cosine for p in passages), max(p.coverage for p in passages)
    return 1 / (1 + math.exp(-(b0 + b1 * cosine + b2 * coverage)))


def _coverage(index: Index, words: Sequence[str], passages: Sequence[int]) -> dict[int, float]:
    """For each passage, the share of the words that it has, weighted by their rarity."""
    total, sums = 0.0, dict.fromkeys(passages, 0.0)
    everything = index.passages
    for word in words:
        count, holders = index.holders(word, passages)
        weight = math.log(1 + everything / max(count, 1))
        total += weight
        for number in holders:
            sums[number] += weight
    return {number: value / total if total else 0.0 for number, value in sums.items()}
