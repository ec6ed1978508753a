"""How many threads serve prefill and decode best on this device, found by trying, and kept.

Prefill computes and gains from every core; decode waits for memory and may lose with the last ones. Each count runs in
an engine of its own, and the counts take turns, so that a machine that slows down does not punish the later ones.
What was found is kept for the device (by its fingerprint) and the bundle, in EDGEKIT_CACHE, else in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.bundle import MODEL, Bundle
from edgekit.folder import write_file
from edgekit.host import host_device
from edgekit.profile.latency import generate
from edgekit.runtime.engine import Engine

PROMPT, ANSWER, TURNS = 128, 32, 3
NAME = "threads.json"


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
    import time

    prompt, answer = min(PROMPT, context // 2), min(ANSWER, context // 4)
    ids = [1 % bundle.spec.vocabulary] * max(1, prompt)
    rates: dict[int, list[tuple[float, float]]] = {count: [] for count in sorted(set(counts))}
    for turn in range(turns + 1):
        for count, found in rates.items():
            # The kernels' thread count holds for the whole process, so an engine is made anew each turn.
            engine = Engine(bundle.file(MODEL), bundle.spec, context=context, threads=count)
            engine.forward(ids)
            engine.rewind(0)
            clock = time.perf_counter()
            engine.forward(ids)
            prefill = len(ids) / (time.perf_counter() - clock)
            (begin, end), _ = generate(engine, ids[0], max(1, answer))
            if turn:
                found.append((prefill, max(1, answer) / (end - begin)))
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


def keep(bundle: Bundle, prefill: int, decode: int, *, folder: Path | None = None) -> None:
    """Remember the counts for this device and bundle; what the file held of others stays."""
    path = (folder or cache_folder()) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _known(path)
    known[_key(bundle)] = {"prefill": prefill, "decode": decode}
    write_file(path, json.dumps(known, indent=1, sort_keys=True).encode())


def kept(bundle: Bundle, *, folder: Path | None = None) -> tuple[int, int] | None:
    """(prefill, decode) threads that a sweep found on this device; None where none was made, or its file is broken."""
    entry = _known((folder or cache_folder()) / NAME).get(_key(bundle), {})
    counts = entry.get("prefill"), entry.get("decode")
    prefill, decode = (count if isinstance(count, int) and 1 <= count <= 1024 else None for count in counts)
    return None if prefill is None or decode is None else (prefill, decode)


def cache_folder() -> Path:
    """EDGEKIT_CACHE, else XDG_CACHE_HOME/edgekit, else ~/.cache/edgekit."""
    if os.environ.get("EDGEKIT_CACHE"):
        return Path(os.environ["EDGEKIT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekit"


def _key(bundle: Bundle) -> str:
    facts = json.dumps([host_device().fingerprint(), bundle.manifest.files[MODEL].sha256], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def _known(path: Path) -> dict[str, dict[str, object]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: entry for key, entry in known.items() if isinstance(entry, dict)}
