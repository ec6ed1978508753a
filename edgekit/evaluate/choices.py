"""Multiple choice: the model's choice is the one whose text it finds most likely after the context.

A file holds one JSON object a line: `context`, `choices`, `answer` (an index), and for partial evaluation `contexts`
(one for each choice) with `continuation`; other keys are left alone. A choice is scored as log p(" " + choice |
context); `accuracy` takes the highest sum, `accuracy_norm` the highest sum over the UTF-8 bytes of what is scored, the
first of equal ones. A single choice is scored by greedy match.
Source: EleutherAI/lm-evaluation-harness, whose split of context and continuation into tokens this follows. Of special
tokens it has what the tokenizer adds by itself; what the harness adds depends on its version.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.errors import ModelError, UserError
from edgekit.evaluate.perplexity import log_likelihoods
from edgekit.evaluate.scorer import Scorer
from edgekit.evaluate.text import read_text
from edgekit.schema import parse

NOTHING = -1  # a choice that is none of them


@dataclass(frozen=True)
class Item:
    """One question. `pairs` gives (context, continuation) for each choice."""

    context: str
    choices: tuple[str, ...]
    answer: int
    contexts: tuple[str, ...] = ()
    continuation: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.choices):
            raise UserError(f"the answer must be an index of its {len(self.choices)} choices: got {self.answer}")
        if self.contexts and len(self.contexts) != len(self.choices):
            raise UserError(
                f"contexts must be one for each of the {len(self.choices)} choices: got {len(self.contexts)}"
            )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        if self.contexts:
            return [(context, " " + self.continuation) for context in self.contexts]
        return [(self.context, " " + choice) for choice in self.choices]


@dataclass(frozen=True)
class Accuracy:
    """Shares in percent, each with the half-width of its 95% interval (Wilson's), over `n` items."""

    accuracy: float
    accuracy_norm: float
    spread: float
    spread_norm: float
    n: int


@dataclass(frozen=True)
class Answer:
    """What a model chose: the index of the likeliest choice, of the likeliest by bytes, and the right one.

    Of a single choice, `picked` is 0 when greedy decoding writes it, else `NOTHING`. `sums` are the log-likelihoods.
    """

    picked: int
    picked_norm: int
    answer: int
    sums: tuple[float, ...]

    @property
    def right(self) -> bool:
        return self.picked == self.answer

    @property
    def right_norm(self) -> bool:
        return self.picked_norm == self.answer


def load_items(path: Path, *, limit: int | None = None) -> list[Item]:
    """Read items, the first `limit` of them, from .jsonl or .jsonl.gz; blank lines do not count.

    Raises UserError: the file cannot be read or holds no item, and for a wrong line, which it names.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1: got {limit}")
    known = set(Item.__dataclass_fields__)
    items: list[Item] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if len(items) == limit:
            break
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise UserError(f"{where} must be a JSON object: {problem}") from problem
        if not isinstance(data, dict):
            raise UserError(f"{where} must be a JSON object: got {line.strip():.40}")
        items.append(parse(Item, {key: value for key, value in data.items() if key in known}, where=where))
    if not items:
        raise UserError(f"{path} must hold at least one item, a JSON object a line")
    return items


def answers(
    scorer: Scorer, items: Sequence[Item], *, on_item: Callable[[int, int], None] = lambda done, total: None
) -> list[Answer]:
    """Score every item; `on_item` is told (items done, items in all). Raises UserError as `score` does."""
    found = []
    for done, item in enumerate(items, 1):
        sums, greedy = zip(*(score(scorer, *pair) for pair in item.pairs), strict=True)
        if len(item.choices) == 1:
            picked = picked_norm = 0 if greedy[0] else NOTHING
        else:
            sizes = [max(1, len(continuation[1:].encode())) for _, continuation in item.pairs]
            picked, picked_norm = int(np.argmax(sums)), int(np.argmax(np.divide(sums, sizes)))
        found.append(Answer(picked, picked_norm, item.answer, tuple(sums)))
        on_item(done, len(items))
    return found


def accuracy(
    scorer: Scorer, items: Sequence[Item], *, on_item: Callable[[int, int], None] = lambda done, total: None
) -> Accuracy:
    """The share of right answers. Raises UserError as `score` does."""
    return share_of(answers(scorer, items, on_item=on_item))


def share_of(found: Sequence[Answer]) -> Accuracy:
    """The accuracy of these answers, at least one."""
    plain, normed = [answer.right for answer in found], [answer.right_norm for answer in found]
    return Accuracy(
        accuracy=100 * float(np.mean(plain)),
        accuracy_norm=100 * float(np.mean(normed)),
        spread=_half_width(plain),
        spread_norm=_half_width(normed),
        n=len(found),
    )


def score(scorer: Scorer, context: str, continuation: str) -> tuple[float, bool]:
    """log p(continuation | context) in nats, and whether greedy decoding would write just that.

    Spaces at the context's end move to the continuation, as tokenizers join them to the following word. A pair longer
    than the model's context loses its beginning, as in the harness. Raises UserError: no context or continuation is
    left, or the continuation alone is longer than the model's context; ModelError: a logit is not finite.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = scorer.tokenizer.encode(stripped + continuation).ids
    start = len(scorer.tokenizer.encode(stripped).ids)
    targets, limit = whole[start:], scorer.model.context
    if not start or not targets:
        raise UserError(f"an item needs a context and a continuation: got {context[-40:]!r} and {continuation[:40]!r}")
    if len(targets) > limit:
        raise UserError(
            f"a choice must fit in the context of {limit} tokens: {continuation[:40]!r}... has {len(targets)}"
        )
    inputs = whole[-limit - 1 : -1]
    shared = min(common(scorer.model.tokens, inputs), len(inputs) - len(targets))
    scorer.model.rewind(shared)
    logits = scorer.model.forward(inputs[shared:], keep=len(targets))
    greedy = bool((logits.argmax(-1) == np.asarray(targets)).all())
    likelihood = float(log_likelihoods(logits, targets).sum())
    if not math.isfinite(likelihood):
        raise ModelError(f"a log-likelihood must be finite: it is {likelihood}; the model is damaged")
    return likelihood, greedy


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _half_width(outcomes: Sequence[bool]) -> float:
    """Of Wilson's interval in percent: unlike the normal one it is not zero where all items came out alike.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    z, n, share = 1.96, len(outcomes), float(np.mean(outcomes))
    return 100 * z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
