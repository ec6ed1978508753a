"""Multiple choice: the model's choice is the one whose text it finds most likely after the context.

A file holds one JSON object a line: `context`, `choices`, `answer` (an index), and for partial evaluation `contexts`
(one for each choice) with `continuation`. A choice is scored as log p(" " + choice | context); `accuracy` takes the
highest sum, `accuracy_norm` the highest sum over the choice's UTF-8 bytes. A single choice is scored by greedy match.
Source: EleutherAI/lm-evaluation-harness, whose tokenisation of context and continuation this follows.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.errors import UserError
from edgekit.evaluate.perplexity import log_likelihoods
from edgekit.evaluate.scorer import Scorer
from edgekit.schema import parse


@dataclass(frozen=True)
class Item:
    """One question. `pairs` gives (context, continuation) for each choice."""

    context: str
    choices: tuple[str, ...]
    answer: int
    contexts: tuple[str, ...] = ()
    continuation: str = ""

    def __post_init__(self) -> None:
        if not self.choices or not 0 <= self.answer < len(self.choices):
            raise UserError(f"the answer must be an index of its {len(self.choices)} choices: got {self.answer}")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        if self.contexts:
            return [(context, " " + self.continuation) for context in self.contexts]
        return [(self.context, " " + choice) for choice in self.choices]


@dataclass(frozen=True)
class Accuracy:
    """Shares in percent, each with the half-width of its 95% interval (normal approximation), over `n` items."""

    accuracy: float
    accuracy_norm: float
    spread: float
    spread_norm: float
    n: int


def load_items(path: Path, *, limit: int | None = None) -> list[Item]:
    """Read items from .jsonl or .jsonl.gz. Raises UserError naming the line that is wrong."""
    known = set(Item.__dataclass_fields__)
    items: list[Item] = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(items) >= limit:
                    break
                data = json.loads(line)
                where = f"{path}:{number}"
                if not isinstance(data, dict):
                    raise UserError(f"{where} must be a JSON object")
                items.append(parse(Item, {k: v for k, v in data.items() if k in known}, where=where))
    except (OSError, ValueError, EOFError) as problem:
        raise UserError(f"{path} must be readable lines of JSON: {problem}") from problem
    if not items:
        raise UserError(f"{path} must hold at least one item")
    return items


def accuracy(
    scorer: Scorer, items: Sequence[Item], *, on_item: Callable[[int, int], None] = lambda done, total: None
) -> Accuracy:
    """Score every item; `on_item` is told (items done, items in all)."""
    plain, normed = [], []
    for done, item in enumerate(items, 1):
        sums, greedy = zip(*(score(scorer, *pair) for pair in item.pairs), strict=True)
        if len(item.choices) == 1:
            plain.append(greedy[0])
            normed.append(greedy[0])
        else:
            sizes = [max(1, len(choice.encode())) for choice in item.choices]
            plain.append(int(np.argmax(sums)) == item.answer)
            normed.append(int(np.argmax(np.divide(sums, sizes))) == item.answer)
        on_item(done, len(items))
    return Accuracy(
        accuracy=100 * float(np.mean(plain)),
        accuracy_norm=100 * float(np.mean(normed)),
        spread=_half_width(plain),
        spread_norm=_half_width(normed),
        n=len(items),
    )


def score(scorer: Scorer, context: str, continuation: str) -> tuple[float, bool]:
    """log p(continuation | context) in nats, and whether greedy decoding would write just that.

    Spaces at the context's end move to the continuation, as tokenizers join them to the following word. A pair longer
    than the model's context loses its beginning, as in the harness.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = scorer.tokenizer.encode(stripped + continuation).ids
    start = len(scorer.tokenizer.encode(stripped).ids)
    targets = whole[start:]
    ids = whole[-scorer.model.context - 1 :]
    if not targets or len(ids) <= len(targets):
        raise UserError(f"an item needs a context and a continuation: got {context[-40:]!r} and {continuation[:40]!r}")
    inputs = ids[:-1]
    shared = min(_common(scorer.model.tokens, inputs), len(inputs) - len(targets))
    scorer.model.rewind(shared)
    logits = scorer.model.forward(inputs[shared:], keep=len(targets))
    greedy = bool((logits.argmax(-1) == np.asarray(targets)).all())
    return float(log_likelihoods(logits, targets).sum()), greedy


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _half_width(outcomes: Sequence[bool]) -> float:
    share = float(np.mean(outcomes))
    return 196 * math.sqrt(share * (1 - share) / len(outcomes))
