"""Labelled answers for the router: the assistant answers questions whose answers are known.

An answer is right when it contains one of the known answers as whole words, upper and lower case, punctuation and
articles aside (the normalisation of SQuAD: Rajpurkar et al. 2016, section 6.1). "I don't know" is wrong here, since the
questions have answers. Numbers of citations, [1], do not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.assistant.answer import Assistant, Finished
from edgekit.assistant.index import Index
from edgekit.assistant.router import Draft, Labelled, encoded, features
from edgekit.errors import UserError
from edgekit.schema import parse

_NUMBER = re.compile(r"\[\d+\]")


@dataclass(frozen=True)
class Question:
    """A question and the texts of which a right answer has one."""

    question: str
    answers: tuple[str, ...]


def load_questions(path: Path) -> list[Question]:
    """Questions, one JSON object a line; other keys are passed over. Raises UserError for a file that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"questions must be a file that can be read: {path}: {problem}") from problem
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise UserError(f"a question must be JSON: {path}, line {number}: {problem}") from problem
        kept = {key: data[key] for key in ("question", "answers") if key in data} if isinstance(data, dict) else data
        found.append(parse(Question, kept, where=f"{path}, line {number}"))
    return found


def label(assistant: Assistant, index: Index, question: Question, *, max_tokens: int = 64) -> Labelled:
    """Let the assistant, which must be watched and have no router, answer a question; the answer's features and whether
    it is wrong."""
    events = list(assistant.answer(question.question, max_tokens=max_tokens))
    (reply,) = (event.reply for event in events if isinstance(event, Finished))
    made = assistant.last
    assert made is not None
    draft = made.draft or Draft(0.0, 0.0, 0)
    values = features(question.question, made.found, made.evidence, draft)
    vector = index.embedder.embed([question.question or " "], truncate=True)[0]
    return Labelled(question.question, not is_right(reply.text, question.answers), values, encoded(vector))


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether a text contains one of the answers."""
    whole = " " + _plain(_NUMBER.sub(" ", text)) + " "
    return any(f" {_plain(answer)} " in whole for answer in answers if _plain(answer))


def _plain(text: str) -> str:
    words = re.sub(r"[^\w\s]|_", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
