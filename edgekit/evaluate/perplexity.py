"""Perplexity of a text, by llama.cpp's method.

The text is cut into windows of `window` tokens that do not overlap. In each, the first half is context only, and the
second half is scored:

    perplexity = exp( - 1/N * sum log p(token | the window's tokens before it) )

With a `stride` the windows begin every `stride` tokens instead, and each scores its last `stride` tokens; the first one
scores all but its first token. So every token has a long context, at the price of reading most of them several times.
Source: tools/perplexity of llama.cpp, and transformers' documentation for strides. Where llama.cpp's tokenizer adds a
beginning-of-text token it replaces each window's first token with it; so do we.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError, UserError
from edgekit.evaluate.scorer import Scorer, Sequencer
from edgekit.weight import Floats

LARGEST_LOSS = 700.0  # nats: exp of more is no float


@dataclass(frozen=True)
class Perplexity:
    """`value` with the half-width of its 95% interval, over `tokens` scored tokens of `windows` windows.

    `bits_per_byte` is comparable between tokenizers: bits over the UTF-8 bytes of the scored tokens.
    """

    value: float
    spread: float
    tokens: int
    windows: int
    bits_per_byte: float


def perplexity(
    scorer: Scorer,
    text: str,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity of `text`; `on_window` is told (windows done, windows in all).

    The spread treats each window's mean as one observation.
    Raises UserError: the text is shorter than one window, the window longer than the model's context, the stride not
    below it, or no window is asked for; ModelError: the loss is not finite, or so large that its perplexity is not.
    """
    if not 4 <= window <= scorer.model.context:
        raise UserError(f"--window must be from 4 to the context of {scorer.model.context} tokens: got {window}")
    if max_windows is not None and max_windows < 1:
        raise UserError(f"--windows must be at least 1: got {max_windows}")
    if stride is not None and not 1 <= stride < window:
        raise UserError(f"--stride must be from 1 to below the window of {window}: got {stride}")
    ids = scorer.tokenizer.encode(text, add_special_tokens=False).ids
    step = stride or window
    total = (len(ids) - window) // step + 1 if len(ids) >= window else 0
    total = total if max_windows is None else min(total, max_windows)
    if total < 1:
        raise UserError(f"the text must fill one window of {window} tokens: it has {len(ids)}; pass a smaller --window")
    first = scorer.tokenizer.encode("", add_special_tokens=True).ids[:1]
    losses, size = [], 0
    for index in range(total):
        tokens = ids[index * step : index * step + window]
        tokens[: len(first)] = first
        scored = window - 1 - window // 2 if stride is None else stride if index else window - 1
        losses.append(window_losses(scorer.model, tokens, scored=scored))
        size += len(scorer.tokenizer.decode(tokens[-scored:], skip_special_tokens=False).encode())
        on_window(index + 1, total)
    means = np.array([loss.mean() for loss in losses])
    count = sum(map(len, losses))
    mean = float(np.concatenate(losses).mean())
    if not mean < LARGEST_LOSS:
        raise ModelError(f"the loss must be finite: it is {mean:.4g} nats a token; the model is damaged")
    half = 1.96 * means.std(ddof=1) / math.sqrt(total) if total > 1 else float("nan")
    return Perplexity(
        value=math.exp(mean),
        spread=math.exp(mean) * float(half),
        tokens=count,
        windows=total,
        bits_per_byte=mean * count / math.log(2) / max(1, size),
    )


def window_losses(model: Sequencer, tokens: list[int], *, scored: int) -> NDArray[np.float64]:
    """Negative log-likelihood of each of the last `scored` tokens of one window, (scored,) in nats."""
    model.rewind(0)
    logits = model.forward(tokens[:-1], keep=scored)
    return -log_likelihoods(logits, tokens[-scored:])


def log_likelihoods(logits: Floats, targets: list[int]) -> NDArray[np.float64]:
    """log p of each target under its row of logits (T, vocabulary), (T,) float64."""
    with np.errstate(invalid="ignore"):  # an infinite logit gives NaN, which the callers refuse
        shifted = logits - logits.max(-1, keepdims=True)
    chosen = shifted[np.arange(len(targets)), targets].astype(np.float64)
    total: NDArray[np.float64] = np.exp(shifted).sum(-1, dtype=np.float64)
    likelihood: NDArray[np.float64] = chosen - np.log(total)
    return likelihood
