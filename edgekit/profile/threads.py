"""How many threads serve prefill and decode best on this device, found by trying, and kept.

Prefill computes and gains from every core; decode waits for memory and may lose with the last ones. Each count runs in
an engine of its own, and the counts take turns, so that a machine that slows down does not punish the later ones.
`edgekit.runtime.threads` keeps what was found.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgekit.bundle import MODEL, Bundle
from edgekit.profile.latency import generate, prefill, wake
from edgekit.runtime.engine import Engine

PROMPT, ANSWER, TURNS = 128, 32, 3


@dataclass(frozen=True)
class ThreadRates:
    """Median tokens a second with `threads` threads."""

    threads: int
    prefill: float
    decode: float


def sweep(
    bundle: Bundle,
    counts: Sequence[int],
    *,
    context: int,
    turns: int = TURNS,
    on_turn: Callable[[], None] = lambda: None,
) -> tuple[ThreadRates, ...]:
    """Measure each thread count, in ascending order; one turn is discarded. Raises what `Engine` raises."""
    prompt, answer = min(PROMPT, context // 2), min(ANSWER, context // 4)
    ids = [1 % bundle.spec.vocabulary] * max(1, prompt)
    rates: dict[int, list[tuple[float, float]]] = {count: [] for count in sorted(set(counts))}
    for turn in range(turns + 1):
        for count, found in rates.items():
            # The kernels' thread count holds for the whole process, so an engine is made anew each turn.
            engine = Engine(bundle.file(MODEL), bundle.spec, context=context, threads=count)
            prefill(engine, ids)
            wake(engine)
            spans = prefill(engine, ids), generate(engine, ids[0], max(1, answer))[0]
            read, wrote = (end - begin for begin, end in spans)
            if turn:
                found.append((len(ids) / read, max(1, answer) / wrote))
            del engine
            on_turn()
    return tuple(
        ThreadRates(count, *(statistics.median(column) for column in zip(*found, strict=True)))
        for count, found in rates.items()
    )


def best(rates: Sequence[ThreadRates]) -> tuple[int, int]:
    """The thread counts for prefill and for decode; the smaller of two that are within 2%, for it leaves cores free."""

    def pick(value: Callable[[ThreadRates], float]) -> int:
        top = max(map(value, rates))
        return min(rate.threads for rate in rates if value(rate) >= 0.98 * top)

    return pick(lambda rate: rate.prefill), pick(lambda rate: rate.decode)
