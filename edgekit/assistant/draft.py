"""What a model thinks of a text: the log-probabilities that it gives to its tokens.

For tokens t_1 ... t_n after a context, with p_i the model's distribution before t_i:

    logprob = 1/n sum_i log p_i(t_i)        entropy = -1/n sum_i sum_v p_i(v) log p_i(v)        (nats)

One pass over all tokens, at the speed of a prompt. The probability that a sentence gives to the question ranks the
sentences that may answer it. Source: Sachan et al. 2022 (UPR), equation 2, there for passages; here it is added to the
score of evidence.py with weight QUESTION_WEIGHT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.assistant.evidence import Quote
from edgekit.assistant.prompt import Neutral
from edgekit.assistant.router import Draft
from edgekit.runtime.session import Generation, Session

QUESTION_WEIGHT = 0.5
MOST_TOKENS = 96  # of a question that are looked at: the last ones
PIECE = 64  # tokens whose logits are in memory at a time


def reordered(session: Session, question: str, quotes: Sequence[Quote]) -> tuple[list[Quote], Draft | None]:
    """The quotes, the most likely answer first, with the question's likelihood in their scores; and what the best one
    says of the question. Ends early, with the order that they had, where the session is told not to go on."""
    neutral = Neutral(session.tokenizer)
    found: list[tuple[float, Quote, Draft]] = []
    wanted = _ids(session, f" {neutral(question)}")[-MOST_TOKENS:]
    for quote in quotes:
        if not session.go_on():
            return list(quotes), None
        before = _ids(session, f"{neutral(quote.title)}: {neutral(quote.text)}\nQuestion:")
        room = session.engine.context - len(wanted)
        if room < 1 or not wanted or not before:
            return list(quotes), None
        draft = read(session, before[-room:], wanted)
        found.append((quote.score + QUESTION_WEIGHT * draft.logprob, quote, draft))
    found.sort(key=lambda row: -row[0])
    ranked = [dataclasses.replace(quote, score=score) for score, quote, _ in found]
    return ranked, found[0][2] if found else None


def read(session: Session, before: Sequence[int], tokens: Sequence[int]) -> Draft:
    """The model's view of `tokens` after `before`, both not empty. What the cache shares with them is used."""
    engine = session.engine
    whole = [*before, *tokens]
    shared = 0
    while shared < min(len(engine.tokens), len(before) - 1) and engine.tokens[shared] == whole[shared]:
        shared += 1
    engine.rewind(shared)
    logprobs, entropies = [], []
    if shared < len(before) - 1:
        engine.forward(whole[shared : len(before) - 1])
    for start in range(len(before) - 1, len(whole) - 1, PIECE):
        piece = whole[start : min(start + PIECE, len(whole) - 1)]
        logs = _log_softmax(engine.forward(piece, keep=len(piece)))
        nexts = whole[start + 1 : start + 1 + len(piece)]
        logprobs += logs[np.arange(len(piece)), nexts].tolist()
        entropies += (-(np.exp(logs) * logs).sum(axis=1)).tolist()
    return Draft(float(np.mean(logprobs)), float(np.mean(entropies)), len(tokens))


def of_generation(session: Session, answer: Generation) -> Draft | None:
    """The model's view of what it has just said; None when it said nothing."""
    prompt = session.engine.tokens[: answer.prompt_tokens]
    return read(session, prompt, answer.tokens) if answer.tokens and prompt else None


def _ids(session: Session, text: str) -> list[int]:
    ids: list[int] = session.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
