"""How fast a bundle is on this machine.

`pp512` and `tg128` are llama-bench's tests: tokens a second of a prompt of 512 tokens from an empty cache, and of 128
tokens generated one by one from an empty cache; tokenising and sampling take no part. Time to first token is what a
user waits for: tokenising, prefill and sampling of a text of that length. One repetition of each is discarded first,
and each repetition reads another prompt, so that no prefix cache can help.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from edgekit.errors import UserError
from edgekit.host import host_device
from edgekit.manifest import now, versions
from edgekit.profile.memory import PeakMemory
from edgekit.profile.stats import drift, measured
from edgekit.report import Measurement, Report
from edgekit.runtime.session import Session

Samples = dict[str, tuple[str, list[float]]]  # name -> (unit, one number a repetition)


def profile(
    path: Path,
    *,
    prompt_tokens: int = 512,
    generate_tokens: int = 128,
    repetitions: int = 5,
    context: int | None = None,
    threads: int | None = None,
    on_repetition: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Measure a bundle; `on_repetition` is told (repetitions done, in all).

    Raises UserError for counts below one or over the context, and what `Session.open` raises.
    """
    for option, count in (("--prompt", prompt_tokens), ("--generate", generate_tokens), ("--repeat", repetitions)):
        if count < 1:
            raise UserError(f"{option} must be at least 1: got {count}")
    samples: Samples = {}
    gaps: list[float] = []
    with PeakMemory() as peak:
        clock = time.perf_counter()
        session = Session.open(path, context=context, threads=threads)
        loaded = time.perf_counter() - clock
        if max(prompt_tokens, generate_tokens) >= session.engine.context:
            raise UserError(
                f"--prompt and --generate must each be below the context of {session.engine.context} tokens:"
                f" got {prompt_tokens} and {generate_tokens}; pass smaller ones, or a larger --context"
            )
        on_repetition(0, repetitions)
        for repetition in range(repetitions + 1):
            figures, between = _repeat(session, prompt_tokens, generate_tokens, seed=repetition)
            if repetition == 0:
                continue  # warm-up
            on_repetition(repetition, repetitions)
            gaps += [gap * 1e3 for gap in between]
            for name, (unit, numbers) in figures.items():
                samples.setdefault(name, (unit, []))[1].extend(numbers)
    rows = [measured(name, numbers, unit=unit) for name, (unit, numbers) in samples.items()]
    rows += [
        Measurement("gap between tokens, p90", float(np.percentile(gaps, 90)), "ms", n=len(gaps)),
        Measurement("gap between tokens, p99", float(np.percentile(gaps, 99)), "ms", n=len(gaps)),
        _drift(gaps),
        Measurement("load", loaded * 1e3, "ms", note="digests, graph and packing; files may be in the page cache"),
        Measurement("size of graph and weights", _size_mb(session), "MB"),
        *_memory(session, peak),
    ]
    return Report(
        title="profile",
        subject=f"{path.resolve().name} {session.bundle.manifest.files['model.onnx'].sha256[:12]}",
        measurements=tuple(rows),
        machine={**host_device().fingerprint(), "threads": str(session.engine.threads)},
        versions={**versions("numpy", "onnxruntime", "tokenizers"), "kernels": session.engine.kernels},
        samples={name: tuple(numbers) for name, (_, numbers) in samples.items()},
        created=now(),
    )


def _repeat(session: Session, prompt_tokens: int, generate_tokens: int, *, seed: int) -> tuple[Samples, list[float]]:
    """One number of each kind, and the single gaps in seconds: those are no samples, each depends on the one before."""
    engine = session.engine
    ids = np.random.default_rng(seed).integers(0, session.bundle.spec.vocabulary, prompt_tokens).tolist()
    engine.rewind(0)
    clock = time.perf_counter()
    engine.forward(ids)
    prefill = time.perf_counter() - clock
    engine.rewind(0)
    token, gaps = ids[0], []
    for _ in range(generate_tokens):
        clock = time.perf_counter()
        logits = engine.forward([token])
        gaps.append(time.perf_counter() - clock)
        token = int(logits[-1].argmax())
    return {
        f"pp{prompt_tokens}": ("tok/s", [prompt_tokens / prefill]),
        f"tg{generate_tokens}": ("tok/s", [generate_tokens / sum(gaps)]),
        "time to first token": ("ms", [_first_token(session, ids) * 1e3]),
        "gap between tokens": ("ms", [float(np.median(gaps)) * 1e3]),
    }, gaps


def _first_token(session: Session, ids: Sequence[int]) -> float:
    """Seconds from a text of as many tokens to the first token of its answer."""
    text = text_of_length(session.tokenizer, ids)
    session.engine.rewind(0)
    answer = session.generate(text, max_tokens=1)
    answer.text()
    return answer.timing.first_token


def text_of_length(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A text of `len(ids)` tokens, or a few less: what `ids` spell, cut, for it seldom makes the same tokens again.

    It has at least one character, which may take more than one token.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=False) or "a"
    while len((encoded := tokenizer.encode(text)).ids) > len(ids) and len(text) > 1:
        text = text[: max(1, *(start for start, _ in encoded.offsets[: len(ids) + 1]))]
    return str(text)


def _drift(gaps: Sequence[float]) -> Measurement:
    """Last quarter of the gaps over the first: well above 1 when the machine slows down, by heat for instance."""
    found = drift(gaps)
    return Measurement("drift of the gaps", found, "ratio", n=len(gaps), note="" if found else "too few tokens")


def _memory(session: Session, peak: PeakMemory) -> list[Measurement]:
    note = f"with all {session.engine.context} tokens of context in the cache"
    rows = [Measurement("memory predicted", session.memory.total_bytes / 1e6, "MB", "predicted", note=note)]
    for name, size in (("peak PSS", peak.peak_pss_bytes), ("peak RSS", peak.peak_rss_bytes)):
        note = "" if size is not None else "this system does not report it"
        rows.append(Measurement(name, None if size is None else size / 1e6, "MB", note=note))
    return rows


def _size_mb(session: Session) -> float:
    files = session.bundle.manifest.files
    return sum(record.size_bytes for name, record in files.items() if name.startswith("model.onnx")) / 1e6
