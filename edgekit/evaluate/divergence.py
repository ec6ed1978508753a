"""How far one model's predictions are from another's, token by token on the same text.

    KL(A || B) = sum over v of p_A(v) (log p_A(v) - log p_B(v)),   in nats, averaged over the scored tokens

Windows and what is scored in them are those of `edgekit.evaluate.perplexity`. The interval treats each window's mean as
one observation. Accuracy hides what this shows: wrong answers may cancel, divergence cannot.
Not supported: models of different vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgekit.errors import ModelError, UserError
from edgekit.evaluate.paired import PairedMean, mean_interval
from edgekit.evaluate.scorer import Scorer
from edgekit.weight import Floats

LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Divergence:
    """B against A on `tokens` scored tokens.

    `kl` in nats a token; `agreement` the share of tokens, in percent, that both find most likely; `loss` the mean
    difference of negative log-likelihoods, B - A, in nats; exp of it is the ratio of perplexities `a` and `b`.
    """

    kl: PairedMean
    agreement: PairedMean
    loss: PairedMean
    a: float
    b: float
    tokens: int


def divergence(
    a: Scorer,
    b: Scorer,
    text: str,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Divergence:
    """Read `text` with both models. Raises UserError: as `perplexity`, or the tokenizers differ; ModelError: a loss is
    not finite."""
    limit = min(a.model.context, b.model.context)
    if not 4 <= window <= limit:
        raise UserError(f"--window must be from 4 to the context of {limit} tokens: got {window}")
    if max_windows is not None and max_windows < 1:
        raise UserError(f"--windows must be at least 1: got {max_windows}")
    ids = a.tokenizer.encode(text, add_special_tokens=False).ids
    if ids != b.tokenizer.encode(text, add_special_tokens=False).ids:
        raise UserError(f"divergence needs one tokenizer: {a.name} and {b.name} split the text differently")
    total = len(ids) // window if max_windows is None else min(len(ids) // window, max_windows)
    if total < 1:
        raise UserError(f"the text must fill one window of {window} tokens: it has {len(ids)}; pass a smaller --window")
    first = a.tokenizer.encode("", add_special_tokens=True).ids[:1]
    kl, agreement, losses = [], [], []
    for index in range(total):
        tokens = ids[index * window : (index + 1) * window]
        tokens[: len(first)] = first
        x, y = _logits(a, tokens), _logits(b, tokens)
        if x.shape != y.shape:
            raise UserError(f"divergence needs one vocabulary: {a.name} has {x.shape[1]}, {b.name} {y.shape[1]}")
        divergences, agree, loss_a, loss_b = _token_by_token(x, y, tokens[window // 2 + 1 :])
        kl.append(divergences)
        agreement.append(agree)
        losses.append((loss_a, loss_b))
        on_window(index + 1, total)
    means = np.array(losses)
    if not means.max() < LARGEST_LOSS:
        raise ModelError(f"the loss must be finite: it is {means.max():.4g} nats a token; a model is damaged")
    return Divergence(
        kl=mean_interval(kl),
        agreement=mean_interval(100 * np.array(agreement)),
        loss=mean_interval(means[:, 1] - means[:, 0]),
        a=math.exp(float(means[:, 0].mean())),
        b=math.exp(float(means[:, 1].mean())),
        tokens=total * (window - 1 - window // 2),
    )


def _logits(scorer: Scorer, tokens: list[int]) -> Floats:
    scorer.model.rewind(0)
    return scorer.model.forward(tokens[:-1], keep=len(tokens) - 1 - len(tokens) // 2)


def _token_by_token(a: Floats, b: Floats, targets: list[int]) -> tuple[float, float, float, float]:
    """Means over the rows of logits (T, vocabulary): KL, share of equal peaks, and both losses."""
    kl = agree = loss_a = loss_b = 0.0
    for x, y, target in zip(a, b, targets, strict=True):
        p, q = _log_softmax(x), _log_softmax(y)
        kl += float((np.exp(p) * (p - q)).sum())
        agree += bool(x.argmax() == y.argmax())
        loss_a -= float(p[target])
        loss_b -= float(q[target])
    n = len(targets)
    return max(0.0, kl / n), agree / n, loss_a / n, loss_b / n


def _log_softmax(row: Floats) -> Floats:
    values = row.astype(np.float64)
    with np.errstate(invalid="ignore"):
        values -= values.max()
        found: Floats = values - np.log(np.exp(values).sum())
    return found
