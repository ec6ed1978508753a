"""One repetition, timed: prefill, decode token by token, and what a user waits for.

`pp512` and `tg128` are llama-bench's tests: tokens a second of a prompt of 512 tokens from an empty cache, and of 128
tokens generated one by one from an empty cache; tokenising and sampling take no part. Time to first token is what a
user waits for: tokenising, prefill and sampling of a text of that length. Each repetition reads another prompt, and the
cache is emptied before each, so that no prefix cache can help.
Before each the engine works untimed for a moment (`wake`): a pause, in which sensors were read, lets its threads sleep,
and the first tenth of a second after it is slower by up to a quarter. llama-bench never pauses and sees none of that.
Source: llama.cpp, tools/llama-bench.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from edgekit.bundle import MODEL, WEIGHTS, Bundle
from edgekit.host import read
from edgekit.profile.options import SWEEP_TOKENS
from edgekit.runtime.session import Session, Timing
from edgekit.runtime.static import Decoder

Span = tuple[float, float]  # of time.perf_counter, seconds

WAKE_S = 0.1


@dataclass(frozen=True)
class Repetition:
    """One repetition in seconds. `prefill` and `decode` are the spans that energy is counted over; of `decode`,
    `inside` seconds were spent in onnxruntime."""

    prefill: Span
    decode: Span
    gaps: tuple[float, ...]
    inside: float
    first: Timing


def repeat(session: Session, prompt_tokens: int, generate_tokens: int, *, seed: int) -> Repetition:
    """Prefill, decode and first token of the prompt that `seed` draws."""
    engine = session.engine
    ids = np.random.default_rng(seed).integers(0, session.bundle.spec.vocabulary, prompt_tokens).tolist()
    wake(engine)
    prompt = prefill(engine, ids)
    inside = engine.run_seconds
    decode, gaps = generate(engine, ids[0], generate_tokens)
    inside = engine.run_seconds - inside
    return Repetition(prompt, decode, gaps, inside, first_token(session, text_of_length(session.tokenizer, ids)))


def wake(engine: Decoder) -> None:
    """Generate for `WAKE_S` seconds, one token at least, so that what is timed next finds the threads running."""
    until = time.perf_counter() + WAKE_S
    engine.rewind(0)
    engine.forward([0])
    while time.perf_counter() < until:
        engine.rewind(len(engine.tokens) % engine.context)
        engine.forward([0])


def prefill(engine: Decoder, ids: Sequence[int]) -> Span:
    """Read a prompt from an empty cache."""
    engine.rewind(0)
    begin = time.perf_counter()
    engine.forward(ids)
    return begin, time.perf_counter()


def generate(engine: Decoder, token: int, count: int) -> tuple[Span, tuple[float, ...]]:
    """Generate greedily from an empty cache: the span of all, and the gap of each token."""
    engine.rewind(0)
    return _steps(engine, token, count)


def _steps(engine: Decoder, token: int, count: int) -> tuple[Span, tuple[float, ...]]:
    ticks = [time.perf_counter()]
    for _ in range(count):
        token = int(engine.forward([token])[-1].argmax())
        ticks.append(time.perf_counter())
    return (ticks[0], ticks[-1]), tuple(later - earlier for earlier, later in pairwise(ticks))


def first_token(session: Session, text: str) -> Timing:
    """From a text to the first token of its answer, with nothing in the cache."""
    session.engine.rewind(0)
    answer = session.generate(text, max_tokens=1)
    answer.text()
    return answer.timing


def at_depth(engine: Decoder, depth: int, *, seed: int = 0) -> tuple[float, float]:
    """Seconds for reading `SWEEP_TOKENS` tokens, and for generating as many, with `depth` tokens in the cache."""
    random = np.random.default_rng(seed)
    engine.rewind(min(depth, len(engine.tokens)))
    fill(engine, depth, seed=seed)
    ids = random.integers(0, engine.spec.vocabulary, SWEEP_TOKENS).tolist()
    clock = time.perf_counter()
    engine.forward(ids)
    prefill = time.perf_counter() - clock
    (begin, end), _ = _steps(engine, ids[0], SWEEP_TOKENS)
    return prefill, end - begin


def fill(engine: Decoder, depth: int, *, seed: int = 0) -> None:
    """Append random tokens until `depth` are in the cache."""
    missing = depth - len(engine.tokens)
    if missing > 0:
        engine.forward(np.random.default_rng(seed).integers(0, engine.spec.vocabulary, missing).tolist())


def load(path: Path, *, context: int | None, threads: int | None) -> tuple[Session, float]:
    """Open the bundle, and the seconds that it took: digests, graph, cache. Raises what `Session.open` raises."""
    clock = time.perf_counter()
    session = Session.open(path, context=context, threads=threads)
    return session, time.perf_counter() - clock


def cold_load(path: Path, *, context: int | None, threads: int | None) -> tuple[float | None, str]:
    """Seconds that opening takes with the bundle's files out of memory, or None and the reason.

    It happens in a process of its own, so that what it leaves behind in memory is not taken for the session's.
    """
    reason = drop_from_memory(path)
    if reason:
        return None, reason
    words = [sys.executable, "-c", _COLD, str(path), str(context or 0), str(threads or 0)]
    done = subprocess.run(words, capture_output=True, text=True)  # noqa: S603  this interpreter
    try:
        seconds, was_read = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or ["without a word"]
        return None, f"its process ended: {last[0][:200]}"
    size = sum(path.joinpath(name).stat().st_size for name in (MODEL, WEIGHTS))
    if was_read is None or was_read < size // 2:
        return None, "the files could not be put out of memory: they were read from it, not from storage"
    return seconds, ""


_COLD = """
import json, sys
from pathlib import Path
from edgekit.profile.latency import load, read_from_storage
path, context, threads = sys.argv[1:]
before = read_from_storage()
_, seconds = load(Path(path), context=int(context) or None, threads=int(threads) or None)
after = read_from_storage()
print(json.dumps([seconds, None if before is None or after is None else after - before]))
"""


def drop_from_memory(path: Path) -> str:
    """Ask the kernel to forget a bundle's files; "" or the reason why it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return "this system has no posix_fadvise to put files out of memory"
    for name in Bundle.open(path).manifest.files:
        handle = os.open(path / name, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as problem:
            return f"the files could not be put out of memory: {problem.strerror}"
        finally:
            os.close(handle)
    return ""


def read_from_storage() -> int | None:
    """Bytes that this process has had read from storage, by Linux's account."""
    for line in read(Path("/proc/self/io")).splitlines():
        key, _, number = line.partition(": ")
        if key == "read_bytes" and number.isdecimal():
            return int(number)
    return None


def text_of_length(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A text of `len(ids)` tokens, or a few less: what `ids` spell, cut, for it seldom makes the same tokens again.

    It has at least one character, which may take more than one token.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=False) or "a"
    while len((encoded := tokenizer.encode(text)).ids) > len(ids) and len(text) > 1:
        text = text[: max(1, *(start for start, _ in encoded.offsets[: len(ids) + 1]))]
    return str(text)
