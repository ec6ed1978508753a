"""Which layers may multiply activations of 8 bits, and which must not: by what rounding their inputs alone does.

Layers have the numbers from 0 on, and the head that of one more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from edgekit.checkpoint import Checkpoint
from edgekit.export.parity import DriftError, agreement, divergence
from edgekit.model.reference import Rounds, forward
from edgekit.report import Measurement
from edgekit.weight import Floats

EIGHT_BITS = 127
COARSE_KL = 1e-3  # nats that activations of 8 bits may move a model in the layers that they move least


def most_sensitive(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> list[int]:
    """The layers, and last of all numbers the head, by what rounding only their inputs to 8 bits does: most first.

    Token flips count first, then the KL. It takes one NumPy forward for each.
    """
    exact = forward(checkpoint, sequences)
    harm = {layer: _harm(checkpoint, sequences, exact, {layer}) for layer in range(checkpoint.decoder.layers + 1)}
    return sorted(harm, key=lambda layer: harm[layer], reverse=True)


def coarse_layers(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> frozenset[int]:
    """The layers, the head counting as one more, that activations of 8 bits move least: as many as change no token and
    move the model by `COARSE_KL` at most together. It takes one NumPy forward of two sequences for each layer, and a
    few of all.
    """
    order = most_sensitive(checkpoint, sequences[:2])[::-1]
    exact = forward(checkpoint, sequences)
    least, most = 0, len(order)  # the first number is known to be good
    while least < most:
        middle = (least + most + 1) // 2
        flips, kl = _harm(checkpoint, sequences, exact, order[:middle])
        least, most = (middle, most) if flips == 0 and kl <= COARSE_KL else (least, middle - 1)
    return frozenset(order[:least])


def _harm(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], exact: Sequence[Floats], layers: Iterable[int]
) -> tuple[int, float]:
    """Tokens that change, and the mean KL, when the inputs of some layers are rounded to 8 bits."""
    got = forward(checkpoint, sequences, rounds=Rounds(EIGHT_BITS, frozenset(layers)))
    pairs = list(zip(exact, got, strict=True))
    flips = sum(int((~agreement(*pair)).sum()) for pair in pairs)
    return flips, float(np.concatenate([divergence(*pair) for pair in pairs]).mean())


def fall_back(
    order: Sequence[int],
    build: Callable[..., object],
    check: Callable[[], tuple[Measurement, ...]],
) -> tuple[Measurement, ...]:
    """The graph built anew with as few layers in float32 as it takes to pass, by `order`, which has them all.

    Their number doubles from one. What `check` measured, and which layers. Raises DriftError: not even all suffice.
    """
    count = 1
    while True:
        chosen = order[:count]
        build(exact_layers=chosen)
        try:
            measured = check()
            break
        except DriftError:
            if count == len(order):
                raise
            count = min(2 * count, len(order))
    names = [_named(layer, len(order) - 1) for layer in sorted(chosen)]
    note = f"8-bit activations there flip tokens: {', '.join(names)}"
    return (*measured, Measurement("layers with float32 activations", len(chosen), "", n=len(order), note=note))


def coarse_row(coarse: Collection[int], layers: int) -> Measurement:
    """How many of a model's layers have activations of 8 bits, and which keep 15."""
    fine = sorted(set(range(layers + 1)) - set(coarse))
    named = ", ".join(_named(layer, layers) for layer in fine) or "none"
    return Measurement("layers with 8-bit activations", len(coarse), "", n=layers + 1, note=f"15 bits: {named}")


def _named(layer: int, layers: int) -> str:
    return "the head" if layer == layers else f"layer {layer}"
