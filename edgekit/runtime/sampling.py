"""From the logits of one position to the next token.

The filters act in this order, each on what the one before has left:

1. repetition penalty r (Keskar et al. 2019, CTRL, section 4.1): the logit z of each token among the last
   `repetition_window` becomes z / r where z >= 0 and z * r where z < 0, once, however often the token occurred;
2. temperature T: z / T. T = 0 is greedy: the largest logit, the lowest id of equal ones; 3 to 5 do not apply;
3. top-k: the k largest logits, and all that are equal to the k-th;
4. top-p (Holtzman et al. 2020, section 3.1): the smallest set of the most probable tokens whose probability reaches p;
5. min-p (Nguyen et al. 2024): the tokens at least min_p times as probable as the most probable one.

The distribution is that of the logits processors in transformers. Of several equal probabilities at the edge of top-p
there the sort chooses, here the lower ids stay; weights under 1e-37 of the largest are dropped. Only a
distribution so flat that its nucleus holds much of the vocabulary is sorted as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError, UserError
from edgekit.kernels.peak import LOWEST, Near, NearPeak


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; each default switches its filter off, so `Sampling()` is greedy.

    `seed` makes a `Sampler` repeat its choices; None takes one from the operating system.
    Raises UserError for a value outside of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("temperature", "at least 0 (0 is greedy)", 0 <= self.temperature < math.inf),
            ("top_k", "at least 0 (0 is off)", self.top_k >= 0),
            ("top_p", "above 0 and at most 1 (1 is off)", 0 < self.top_p <= 1),
            ("min_p", "from 0 (off) to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0 (1 is off)", 0 < self.repetition_penalty < math.inf),
            ("repetition_window", "at least 1 token", self.repetition_window >= 1),
            ("seed", "at least 0, or none", self.seed is None or self.seed >= 0),
        )
        for name, rule, holds in rules:
            if not holds:
                raise UserError(f"{name} must be {rule}: got {getattr(self, name)}")


class Constraint(Protocol):
    """What an answer must keep to, token by token, such as a JSON schema (`edgekit.assistant.structure`)."""

    @property
    def done(self) -> bool:
        """Whether the answer is complete, so that nothing may follow."""
        ...

    def allow(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of `logits` (V,) with -inf for each token that may not come next."""
        ...

    def accept(self, token: int) -> None:
        """Go on after `token`, which was allowed. Raises ModelError when the constraint cannot be followed further."""
        ...


class Choice(NamedTuple):
    """A chosen token and the natural logarithm of its probability before all filters."""

    token: int
    logprob: float


def filtered_probabilities(
    logits: NDArray[np.float32], history: Sequence[int], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may come next, and how probable each one is.

    Arguments: `logits` (V,) float32; it is not changed. `history`: the tokens so far, oldest first.
    Returns: ids (n,) int64, ascending; probabilities (n,) float64, all positive, of sum 1; 1 <= n <= V.
    Raises: ModelError for a logit that is NaN or +inf, when all are -inf, and for a history that is not of this
    vocabulary.
    """
    scores = _penalised(logits, history, sampling)
    peak = _peak(scores)
    if sampling.temperature == 0:
        return np.array([peak]), np.ones(1)
    near, count = _kept(scores, scores[peak], sampling, NearPeak())
    ascending = np.argsort(near.ids[:count])
    probabilities = near.weights[ascending].astype(np.float64)
    return near.ids[ascending].astype(np.int64), probabilities / probabilities.sum()


class Sampler:
    """Chooses tokens by one `Sampling`, with random numbers of its own (PCG64): one for each generated text."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._near = NearPeak()

    def __call__(self, logits: NDArray[np.float32], history: Sequence[int]) -> int:
        """The next token's id. Arguments and errors: see `filtered_probabilities`."""
        scores = _penalised(logits, history, self.sampling)
        peak = _peak(scores)
        if self.sampling.temperature == 0:
            return peak
        near, count = _kept(scores, scores[peak], self.sampling, self._near)
        drawn = int(near.sums.searchsorted(self._random.random() * near.sums[count - 1], side="right"))
        return int(near.ids[min(drawn, count - 1)])

    def choose(self, logits: NDArray[np.float32], history: Sequence[int]) -> Choice:
        """The next token with its log-probability; costs one pass of `exp` over the vocabulary more than a call."""
        token = self(logits, history)
        peak = logits.max()
        with np.errstate(over="ignore"):
            total = np.exp(logits - peak).sum(dtype=np.float64)
        return Choice(token, float(logits[token]) - float(peak) - math.log(total))


def _penalised(logits: NDArray[np.float32], history: Sequence[int], sampling: Sampling) -> NDArray[np.float32]:
    """`logits` after the repetition penalty: a copy if anything changes."""
    if logits.ndim != 1 or logits.size == 0:
        raise ModelError(f"logits must be one row with a value for each token: got shape {logits.shape}")
    if sampling.repetition_penalty == 1 or len(history) == 0:
        return logits
    recent = np.unique(np.asarray(history[-sampling.repetition_window :], dtype=np.int64))
    if recent[0] < 0 or recent[-1] >= logits.size:
        wrong = recent[0] if recent[0] < 0 else recent[-1]
        raise ModelError(f"a token must have a logit: got token {wrong} of {logits.size}; is it another tokenizer?")
    penalised = logits.copy()
    old, penalty = logits[recent], np.float32(sampling.repetition_penalty)
    with np.errstate(over="ignore"):
        penalised[recent] = np.where(old < 0, old * penalty, old / penalty)
    return penalised


def _peak(scores: NDArray[np.float32]) -> int:
    """The lowest id of the largest score. One pass finds what is wrong too: NaN and +inf count as the largest."""
    peak = int(scores.argmax())
    if math.isfinite(scores[peak]):
        return peak
    if scores[peak] == -math.inf:
        raise ModelError(f"a token must be possible: got -inf for all {scores.size} logits")
    raise ModelError(f"logits must be finite: got {scores[peak]} for token {peak} of {scores.size}")


def _kept(scores: NDArray[np.float32], peak: np.float32, sampling: Sampling, near_peak: NearPeak) -> tuple[Near, int]:
    """What lies near the peak, and how many of it, from the first, the filters leave.

    In order of falling probability every filter keeps a beginning. All that it needs mostly lies near the peak, so
    floors are tried downwards until enough lies above: a few dozen tokens of a language model are sorted, and all of
    a flat distribution.
    """
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    if top_k == 0 and top_p == 1:  # nothing must be sorted
        near = near_peak(scores, peak, sampling.temperature, floor=max(min_p, LOWEST))
        return near, near.ids.size
    for floor in (2.0**-10, 2.0**-20, LOWEST):
        near = near_peak(scores, peak, sampling.temperature, floor=floor, falling=True)
        count, total = near.ids.size, near.total
        if 0 < top_k <= count:
            count = _at_least(near.weights, near.weights[top_k - 1])
            total = float(near.sums[count - 1])
        elif top_k > 0 and floor != LOWEST:
            continue
        if top_p < 1:
            needed = top_p * total
            if near.sums[count - 1] < needed and floor != LOWEST:
                continue
            count = min(count, int(near.sums.searchsorted(needed)) + 1)
        if min_p > floor:
            count = min(count, _at_least(near.weights, np.float32(min_p)))
        elif min_p > 0 and floor != LOWEST and count == near.ids.size:
            continue
        break
    return near, count


def _at_least(falling: NDArray[np.float32], least: np.float32) -> int:
    """How many of some falling numbers are `least` or more."""
    return falling.size - int(falling[::-1].searchsorted(least))
