"""Needles: the items' form, and that one stands where it should in as many tokens as asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import UserError
from edgekit.evaluate.needles import ANSWER, DEPTHS, Needle, find_needles, load_needles, search
from edgekit.evaluate.scorer import Scorer

BOOK = "\n\n".join(f"Paragraph {n} says that nothing happened on day {n}." for n in range(2000))
FACT = Needle("The code of the tower is 4711.", "What is the code of the tower?", "4711")


class Letters:
    """A tokenizer of single characters."""

    def encode(self, text: str) -> Any:
        @dataclass
        class Encoding:
            ids: list[int]

        return Encoding([ord(letter) for letter in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class Parrot:
    """An engine that answers with the code when its budget is large."""

    tokens: list[int] = field(default_factory=list)
    budget: int = 0

    def rewind(self, length: int) -> None:
        del self.tokens[length:]

    def forward(self, ids: list[int]) -> np.ndarray[Any, Any]:
        self.tokens.extend(ids)
        said = " 4711 it is, I say"
        answered = len(self.tokens) - self.start if hasattr(self, "start") else 0
        if ids[-1] == ord(":") and len(ids) == 1:
            self.start, answered = len(self.tokens), 0
        logits = np.zeros((1, 300), np.float32)
        logits[0, ord(said[answered]) if self.budget > 10 else ord("x")] = 1
        return logits


@dataclass
class Stand:
    tokenizer: Letters
    engine: Parrot


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9])
def test_a_needle_stands_at_its_depth_between_paragraphs(depth: float) -> None:
    session = Stand(Letters(), Parrot())
    found = search(session, BOOK, FACT, context=4096, depth=depth, budgets=(100, 1))  # type: ignore[arg-type]
    assert found == {100: True, 1: False}
    text = "".join(map(chr, session.engine.tokens))
    assert len(text) <= 4096
    assert len(text) >= 4096 - ANSWER - 1
    assert text.count(FACT.needle) == 1
    at = text.index(FACT.needle)
    assert abs(at / 4096 - depth) < 0.03
    assert text[at - 2 : at] == "\n\n"
    assert "Answer:" in text[-60:]


class Reader:
    """A model that answers with the code that stands in the book, when it may look far enough back."""

    def __init__(self, reach: int) -> None:
        self.context, self.reach, self.tokens = 4096, reach, []
        self.read = 0

    def rewind(self, length: int) -> None:
        del self.tokens[length:]

    def forward(self, ids: list[int], *, keep: int = 1) -> np.ndarray[Any, Any]:
        self.tokens.extend(ids)
        self.read += len(ids)
        text = "".join(map(chr, self.tokens))
        question, said = text.rfind("Answer:") + 7, " 4711."
        known = "4711" in text[max(0, question - self.reach) : question]
        logits = np.full((1, 300), -9, np.float32)
        logits[0, ord(said[min(len(text) - question, 5)] if known else "x")] = 9
        return logits


def test_needles_are_found_as_far_as_a_model_looks_back() -> None:
    model = Reader(reach=1500)
    scorer = Scorer("reader", model, Letters(), eos_ids=(ord("."),))  # type: ignore[arg-type]
    found = find_needles(scorer, BOOK, [FACT] * 5, context=2048)
    assert DEPTHS == (0.1, 0.5, 0.9, 0.3, 0.7)
    assert [answer.right for answer in found] == [False, True, True, True, True]
    assert found[1].sums[0] > -0.1 > found[0].sums[0]
    assert model.read < 5 * 2048, "what two have in common is read once"
    with pytest.raises(UserError, match="--length must be at most the context of 4096"):
        find_needles(scorer, BOOK, [FACT], context=4097)
    with pytest.raises(UserError, match="must fit in 80 tokens"):
        find_needles(scorer, BOOK, [FACT], context=80)


@pytest.mark.parametrize("line", ["{", "[]", '{"needle": "a", "question": "b"}'])
def test_another_form_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "needles.jsonl"
    path.write_text('{"needle": "a", "question": "b", "answer": "c"}\n' + line)
    with pytest.raises(UserError, match=r"needles\.jsonl:2 must be JSON with needle, question and answer"):
        load_needles(path)
