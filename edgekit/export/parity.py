"""Does the exported graph compute what the checkpoint means?

The graph and the NumPy forward read the same prompts, the graph half of each at once and half token by token, for
which onnxruntime has kernels of their own. The next-token distributions p (NumPy) and q (graph) are compared at every
position:

    KL(p || q) = sum_v p_v (log p_v - log q_v),   top-1 agreement = share of positions with the same most likely token.

Positions where NumPy's two best logits lie within 0.05 of each other do not count as disagreement: either answer is
then as good. A float32 graph must agree to rounding; integer activations may drift, within `BOUNDS`.

What a rounding does depends on the model: one that fell apart at 2 bits turns the same rounding into a thousand times
the KL. Where our operators break their bound, the NumPy forward is run once more with their roundings
(`edgekit.model.reference`), and the graph may drift `SLACK` times as far as that did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError
from edgekit.model.reference import Kept, Rounds, forward
from edgekit.report import Measurement
from edgekit.runtime.static import Decoder
from edgekit.weight import Floats

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Water boils at one hundred degrees Celsius because its vapour pressure then equals the pressure of the air.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "In 1969, two astronauts walked on the Moon while a third one waited in orbit around it.",
    "Dear Sir or Madam,\n\nI am writing to ask whether the room that you advertised last week is still",
)
TIE = 0.05
OUR_STEPS = 16383
SLACK = 3.0
FLIPS = 0.02  # share of positions by which top-1 agreement may then be lower, too


class DriftError(ModelError):
    """The graph runs, and is too far from the checkpoint."""


@dataclass(frozen=True)
class Bounds:
    """The parity that an export must reach: mean KL in nats at most, top-1 agreement at least.

    `rounds`: the graph rounds as our operators do, and may drift as far as that takes this model.
    """

    kl: float
    agreement: float
    rounds: bool = False


BOUNDS = {
    "float32": Bounds(kl=1e-7, agreement=1.0),
    "int15": Bounds(kl=1e-4, agreement=1.0, rounds=True),  # our operators, up to 64 tokens at a time
    "mixed": Bounds(kl=0.005, agreement=0.98),  # ours, some layers with activations of 8 bits: see `.coarse`
    "int8": Bounds(kl=0.05, agreement=0.9),
}


def check_parity(
    checkpoint: Checkpoint,
    engine: Decoder,
    sequences: Sequence[Sequence[int]],
    *,
    bounds: Bounds,
    cache: Kept = "float16",
) -> tuple[Measurement, ...]:
    """Compare the graph with the NumPy forward over token sequences. `cache`: what the graph keeps keys and values in.

    Raises DriftError with the number that broke its bound; ModelError: logits are not finite.
    """
    kls, agreed, drifts = [], [], []
    exact = forward(checkpoint, sequences)
    for ids, expected in zip(sequences, exact, strict=True):
        logits = all_logits(engine, ids)
        kls.append(divergence(expected, logits))
        agreed.append(agreement(expected, logits))
        drifts.append(np.abs(expected - logits).max())
    engine.rewind(0)
    kl, share, drift = float(np.concatenate(kls).mean()), float(np.concatenate(agreed).mean()), float(max(drifts))
    positions = sum(map(len, sequences))
    if not np.isfinite(kl):
        raise ModelError(f"logits must be finite: mean KL is {kl} over {positions} positions; the weights are damaged")
    sensitivity: tuple[Measurement, ...] = ()
    if bounds.rounds and (kl > bounds.kl or share < bounds.agreement):
        bounds, own = widened(bounds, exact, forward(checkpoint, sequences, rounds=Rounds(OUR_STEPS, cache=cache)))
        sensitivity = (Measurement("parity: mean KL that the same roundings make in NumPy", own, "nat", n=positions),)
    if kl > bounds.kl or share < bounds.agreement:
        raise DriftError(
            f"the exported graph must agree with the checkpoint: mean KL {kl:.2g} (bound {bounds.kl:g}), top-1"
            f" agreement {share:.1%} (bound {bounds.agreement:.0%}) over {positions} positions; nothing was written;"
            " export with --target portable, or pass --accept-drift"
        )
    return (
        Measurement("parity: mean KL to the NumPy forward", kl, "nat", n=positions),
        Measurement("parity: top-1 agreement", share * 100, "%", n=positions),
        Measurement("parity: largest logit difference", drift, "", n=positions),
        *sensitivity,
    )


def widened(bounds: Bounds, exact: Sequence[Floats], rounded: Sequence[Floats]) -> tuple[Bounds, float]:
    """Bounds for a model that the roundings alone take from the logits `exact` to `rounded`, and their mean KL."""
    pairs = list(zip(exact, rounded, strict=True))
    own = float(np.concatenate([divergence(*pair) for pair in pairs]).mean())
    share = float(np.concatenate([agreement(*pair) for pair in pairs]).mean())
    return Bounds(max(bounds.kl, SLACK * own), min(bounds.agreement, share - FLIPS)), own


def all_logits(engine: Decoder, ids: Sequence[int]) -> Floats:
    """The graph's logits at every position, (T, vocabulary): half of the tokens read at once, the others one by one."""
    half = (len(ids) + 1) // 2
    engine.rewind(0)
    parts = [engine.forward(ids[:half], keep=half).copy()]
    parts += [engine.forward([token]).copy() for token in ids[half:]]
    return np.concatenate(parts)


def divergence(expected: Floats, got: Floats) -> NDArray[np.float64]:
    """KL(p || q) at each position, (T,), from logits (T, vocabulary)."""
    p, q = _log_softmax(expected), _log_softmax(got)
    kl: NDArray[np.float64] = np.sum(np.exp(p) * (p - q), axis=-1)
    return kl


def agreement(expected: Floats, got: Floats) -> NDArray[np.bool_]:
    """Whether the most likely token is the same at each position, (T,); near ties count as agreement."""
    chosen = np.take_along_axis(expected, got.argmax(-1)[:, None], axis=-1)[:, 0]
    same: NDArray[np.bool_] = chosen >= expected.max(-1) - TIE
    return same


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    values: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return values
