"""Needles in a book: one made-up fact among thousands of tokens of prose, and a question at the end.

A test of whether long context is used at all: the answer stands in one sentence, far from where it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from edgekit.errors import UserError
from edgekit.evaluate.choices import NOTHING, Answer, common
from edgekit.evaluate.perplexity import log_likelihoods
from edgekit.evaluate.scorer import Scorer
from edgekit.evaluate.text import read_text
from edgekit.runtime.session import Session

ANSWER = 16  # tokens that an answer may take
DEPTHS = (0.1, 0.5, 0.9, 0.3, 0.7)  # where needles stand, one after the other


@dataclass(frozen=True)
class Needle:
    """A fact, a question about it, and what a right answer holds."""

    needle: str
    question: str
    answer: str


def load_needles(path: Path) -> list[Needle]:
    """Read JSON lines with `needle`, `question` and `answer`. Raises UserError for another form."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            found.append(Needle(str(row["needle"]), str(row["question"]), str(row["answer"])))
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{path}:{number} must be JSON with needle, question and answer: {problem!r}") from problem
    return found


def haystack(tokenizer: Tokenizer, book: str, needle: Needle, *, context: int, depth: float) -> list[int]:
    """The book from its beginning, the needle between two paragraphs at `depth` (0 to 1) of it, and the question.

    In all `context` tokens, less the `ANSWER` that an answer may take.
    """
    question = tokenizer.encode(f"\n\nQuestion: {needle.question}\nAnswer:").ids
    fact = tokenizer.encode(f"\n\n{needle.needle}\n\n").ids
    room = context - ANSWER - len(question) - len(fact)
    if room < 0:
        raise UserError(f"a needle and its question must fit in {context} tokens: {needle.needle!r:.60} does not")
    # A token of English has about four letters: eight times the room are tokens enough.
    text = book[: 8 * room]
    cut = text.rfind("\n\n", 0, len(tokenizer.decode(tokenizer.encode(text).ids[: int(room * depth)])))
    before = tokenizer.encode(text[: max(cut, 0)]).ids
    after = tokenizer.encode(text[max(cut, 0) :]).ids[: max(0, room - len(before))]
    return [*before, *fact, *after, *question]


def find_needles(
    scorer: Scorer,
    book: str,
    needles: Sequence[Needle],
    *,
    context: int,
    on_item: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Answers to the needles' questions, each needle at the next of `DEPTHS`: right where the greedy answer holds what
    it should, with the log-likelihood of " " + answer.

    Raises UserError: a needle does not fit in `context` tokens, or they are more than the model's context.
    """
    model, tokenizer = scorer.model, scorer.tokenizer
    if context > model.context:
        raise UserError(f"--length must be at most the context of {model.context} tokens: got {context}")
    found = []
    for done, needle in enumerate(needles):
        ids = haystack(tokenizer, book, needle, context=context, depth=DEPTHS[done % len(DEPTHS)])
        model.rewind(min(common(model.tokens, ids), len(ids) - 1))
        logits = model.forward(ids[len(model.tokens) :])[-1].copy()
        answer = tokenizer.encode(f" {needle.answer}").ids[:ANSWER]
        rest = [model.forward([token])[-1].copy() for token in answer[:-1]]
        likelihood = float(log_likelihoods(np.stack([logits, *rest]), answer).sum())
        model.rewind(len(ids))
        written = [int(logits.argmax())]
        while len(written) < ANSWER and written[-1] not in scorer.eos_ids:
            written.append(int(model.forward(written[-1:])[-1].argmax()))
        picked = 0 if needle.answer in tokenizer.decode(written) else NOTHING
        found.append(Answer(picked, picked, 0, (likelihood,)))
        on_item(done + 1, len(needles))
    return found


def search(
    session: Session, book: str, needle: Needle, *, context: int, depth: float, budgets: Sequence[int]
) -> dict[int, bool]:
    """Whether the greedy answer holds what it should, for each budget of sparse attention, in a `haystack`.

    The text is read once; budgets matter from its last token on.
    """
    tokenizer, engine = session.tokenizer, session.engine
    ids = haystack(tokenizer, book, needle, context=context, depth=depth)
    engine.rewind(0)
    engine.forward(ids[:-1])
    found = {}
    for budget in budgets:
        engine.budget = budget
        engine.rewind(len(ids) - 1)
        written = [ids[-1]]
        for _ in range(ANSWER):
            written.append(int(engine.forward(written[-1:])[-1].argmax()))
        found[budget] = needle.answer in tokenizer.decode(written[1:])
    return found
