"""Needles in a book: one made-up fact among thousands of tokens of prose, and a question at the end.

A test of whether long context is used at all: the answer stands in one sentence, far from where it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import UserError
from edgekit.evaluate.text import read_text
from edgekit.runtime.session import Session

ANSWER = 16  # tokens that an answer may take


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


def search(
    session: Session, book: str, needle: Needle, *, context: int, depth: float, budgets: Sequence[int]
) -> dict[int, bool]:
    """Whether the greedy answer holds what it should, for each budget of sparse attention.

    `context` tokens in all: the book from its beginning, the needle between two paragraphs at `depth` (0 to 1) of it,
    and the question. The text is read once; budgets matter from its last token on.
    """
    tokenizer, engine = session.tokenizer, session.engine
    question = tokenizer.encode(f"\n\nQuestion: {needle.question}\nAnswer:").ids
    fact = tokenizer.encode(f"\n\n{needle.needle}\n\n").ids
    room = context - ANSWER - len(question) - len(fact)
    # A token of English has about four letters: eight times the room are tokens enough.
    text = book[: 8 * room]
    cut = text.rfind("\n\n", 0, len(tokenizer.decode(tokenizer.encode(text).ids[: int(room * depth)])))
    before = tokenizer.encode(text[: max(cut, 0)]).ids
    after = tokenizer.encode(text[max(cut, 0) :]).ids[: max(0, room - len(before))]
    ids = [*before, *fact, *after, *question]
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
