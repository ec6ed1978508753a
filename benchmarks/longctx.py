"""Long contexts: sparse attention beside our own dense attention and beside llama.cpp, in one run.

Speed. Decoding 128 tokens after a context of 512 to 65,536 tokens, edgekit int4 (all matrices at 4 bits, symmetric,
blocks of 32) sparse and dense, and llama.cpp Q4_0 of the same model with flash attention, 2 threads each, taking turns.
The context is stretched by linear rope scaling, and beyond 8,192 tokens both caches are filled with copies of what
those left there: speed depends on how many positions there are, not on what they hold.

Quality. Four books, windows of 4,096 and 8,192 tokens at three places of each: perplexity of the last 256 tokens, each
decoded on its own, with budgets of 64, 128 and 256, against the same bundle with a budget of the whole context, which
is dense attention to the bit. Beside it the same bundle with a cache in 8 bits, with no wide layers, and Adamas as
published; and what else could pick positions, `longctx_methods`. Windows are shared between processes of two threads.

Prefill. 512 tokens at the end of 8,192 and 32,768, read exactly and block by block, with what that costs in perplexity.

Needles. 200 made-up facts, each hidden in 4,096 or 8,192 tokens of a book at depths of 10 to 90 %: how often the greedy
answer holds the code, with budget 256 and dense. Shared between processes, too.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from common import Benchmark, arguments, data
from contestants import THREADS, Worker
from longctx_methods import METHODS, Selected
from speed import RECIPE, quantize_peer

from edgekit.bundle import LayerCache
from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.needles import load_needles, search
from edgekit.evaluate.perplexity import log_likelihoods
from edgekit.evaluate.text import read_text
from edgekit.export.export import export, open_tokenizer
from edgekit.export.sparse import SparseOptions
from edgekit.export.targets import find_target, host_target
from edgekit.kernels.opset import CacheType
from edgekit.model.builtin import fetch_builtin
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime.session import Session

BOOKS = ("middlemarch", "moby-dick", "the-count-of-monte-cristo", "war-and-peace")
BUDGETS = {256: 0.8, 128: 1.5, 64: 4.0}  # and the most percent of perplexity that each may cost
WINDOWS = (4096, 8192)
SCORED = 256
ALL = 1 << 30
STEPS = 128
BUNDLES: tuple[tuple[str, SparseOptions | None, CacheType], ...] = (
    ("sparse", SparseOptions(), "float16"),
    ("sparse, int8 cache", SparseOptions(), "int8"),
    ("dense", None, "float16"),
    ("dense, int8 cache", None, "int8"),
)
METHODS_OF_OURS: dict[str, tuple[SparseOptions, CacheType]] = {
    "sparse": (SparseOptions(), "float16"),
    "sparse, int8 cache": (SparseOptions(), "int8"),
    "no wide layers": (SparseOptions(wide_layers=0), "float16"),
    "Adamas": (SparseOptions.as_published(), "float16"),
}
SECTIONS = ("speed", "quality", "needles", "prefill")


def main() -> None:
    options = arguments(__doc__ or "", sections=SECTIONS)
    bench = Benchmark("longctx")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        compress(open_model("smollm2-135m"), load_recipe(str(RECIPE)), work / "int4")
        checkpoint, target = open_checkpoint(work / "int4"), find_target(host_target())
        if "speed" in options.only:
            for name, sparse, cache in BUNDLES:
                export(
                    checkpoint,
                    work / f"{name}.long",
                    cache=cache,
                    target=target,
                    context=65536 + STEPS,
                    rope_scaling=("linear", 16.0),
                    sparse=sparse,
                    accept_drift=True,
                )
            quantize_peer(fetch_builtin("smollm2-135m"), work / "q4_0.gguf")
            speed(bench, work, quick=options.quick)
        if "prefill" in options.only:
            for name, sparse in (("exact", SparseOptions()), ("sparse prefill", SparseOptions(prefill_budget=2048))):
                export(
                    checkpoint,
                    work / name,
                    target=target,
                    context=32768,
                    rope_scaling=("yarn", 4.0),
                    sparse=sparse,
                    accept_drift=True,
                )
            prefill(bench, work, quick=options.quick)
        if {"quality", "needles"} & set(options.only):
            for name in METHODS_OF_OURS if "quality" in options.only else ["sparse"]:
                sparse, cache = METHODS_OF_OURS[name]
                export(checkpoint, work / name, target=target, sparse=sparse, cache=cache, accept_drift=True)
            if "quality" in options.only:
                quality(bench, work, quick=options.quick)
            if "needles" in options.only:
                needles(bench, work, quick=options.quick)
    bench.finish(as_json=options.json)


def speed(bench: Benchmark, work: Path, *, quick: bool) -> None:
    contexts = (512, 2048, 8192, 32768) if quick else (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    peers = (8192, 32768)
    workers = {name: Worker("edgekit-long", work / f"{name}.long") for name, _, _ in BUNDLES}
    workers["llama.cpp Q4_0"] = Worker("llama.cpp-long", work / "q4_0.gguf")
    found: dict[tuple[str, int], float] = {}
    for context in contexts:
        names = [name for name in workers if name != "llama.cpp Q4_0" or context in peers]
        for name in names:
            workers[name].fill(context)
        turns = [{name: workers[name].steps(STEPS) for name in names} for _ in range(3 if quick else 7)]
        for name in names:
            rates = [turn[name] for turn in turns]
            found[name, context] = bench.samples(f"decode after {context}, {name}", rates, unit="tok/s")
    for worker in workers.values():
        worker.close()
    for context, bound in ((8192, 6.0), (32768, 15.0)):
        if context in peers:
            for name in ("sparse", "sparse, int8 cache"):
                ratio = found[name, context] / found["llama.cpp Q4_0", context]
                bench.at_least(f"decode after {context}: {name} over llama.cpp Q4_0", ratio, bound)
    bench.at_least("decode after 512: sparse over dense", found["sparse", 512] / found["dense", 512], 0.97)
    long = [context for context in contexts if context >= 1024]
    slope, base = np.polyfit(long, [1e3 / found["sparse", context] for context in long], 1)
    bench.value("milliseconds a token at no context, fitted", float(base), "ms")
    bench.value("milliseconds a token for 1,024 positions more, fitted", float(slope) * 1024, "ms")
    layer = LayerCache(1, 64, sparse=True)
    codes, means = layer.code_shape(32768)[2], layer.mean_shape(32768)[2]
    bench.value("bytes read for each position and head: codes", codes / 32768, "B")
    bench.value("bytes read for each position and head: codes and means", (codes + means) / 32768, "B")
    bench.at_most("bytes that grow with the context, over bytes of codes", (codes + means) / codes, 1.3)


Item = TypeVar("Item")
Found = TypeVar("Found")


def shared(work: Path, do: Callable[[tuple[Path, Item]], Found], items: Sequence[Item]) -> Iterator[Found]:
    """`do` of each item, in order, in as many processes as there are pairs of processors."""
    count = max(1, min(len(items), (os.cpu_count() or 1) // THREADS))
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, found in enumerate(pool.map(do, [(work, item) for item in items])):
            if sys.stderr.isatty():
                print(f"\r{number + 1} of {len(items)}", end="\n" if number + 1 == len(items) else "", file=sys.stderr)
            yield found


OPEN: dict[str, Any] = {}  # what a process has opened


def opened(work: Path, name: str) -> Session:
    if name not in OPEN:
        OPEN[name] = Session.open(work / name, context=8192, threads=THREADS)
    session: Session = OPEN[name]
    return session


def window_losses(task: tuple[Path, tuple[str, int]]) -> dict[tuple[str, int, int], float]:
    """What `last_losses` finds in 8,192 tokens of a book from some place on."""
    work, (book, start) = task
    torch.set_num_threads(THREADS)
    sessions = {name: opened(work, name) for name in METHODS_OF_OURS}
    if "selected" not in OPEN:
        OPEN["selected"] = Selected(open_checkpoint(work / "int4"))
    ids = sessions["sparse"].tokenizer.encode(read_text(data(f"longctx/{book}.txt.gz"))).ids
    return last_losses(sessions, OPEN["selected"], ids[start : start + 8192])


def quality(bench: Benchmark, work: Path, *, quick: bool) -> None:
    """Losses of our bundles and of what torch picks, over the same windows."""
    losses: dict[tuple[str, int, int], list[float]] = {}
    windows = itertools.product(BOOKS[:2] if quick else BOOKS, range(20000, 60000 if quick else 140000, 40000))
    for found in shared(work, window_losses, list(windows)):
        for key, loss in found.items():
            losses.setdefault(key, []).append(loss)
    for window in WINDOWS:
        dense = np.array(losses["sparse", window, ALL])
        count = len(dense) * SCORED
        bench.value(f"perplexity at {window}, dense", math.exp(dense.mean()), "ppl", n=count)
        small = 100 * math.expm1(float((np.array(losses["sparse, int8 cache", window, ALL]) - dense).mean()))
        bench.value(f"perplexity at {window}, dense, int8 cache: loss", small, "%", n=count)
        for method in (*METHODS_OF_OURS, *METHODS):
            for budget, bound in BUDGETS.items():
                change = np.array(losses[method, window, budget]) - dense
                spread = 100 * float(change.std(ddof=1)) / math.sqrt(len(dense))
                note = f"standard error over {len(dense)} windows: {spread:.2f} %"
                loss = 100 * math.expm1(float(change.mean()))
                if method == "sparse":
                    bench.at_most(f"perplexity at {window}, budget {budget}: loss, %", loss, bound)
                bench.value(f"perplexity at {window}, budget {budget}, {method}: loss", loss, "%", n=count, note=note)


def prefill(bench: Benchmark, work: Path, *, quick: bool) -> None:
    """Reading a prompt exactly and block by block: seconds for 512 tokens in turns, and the perplexity of a window's
    last `SCORED` tokens where it was read so, which are decoded exactly."""
    engines = {name: Session.open(work / name).engine for name in ("exact", "sparse prefill")}
    text = read_text(data("longctx/moby-dick.txt.gz"))
    ids = open_tokenizer(open_checkpoint(work / "int4")).encode(text).ids
    for context in (8192,) if quick else (8192, 32768):
        times: dict[str, list[float]] = {name: [] for name in engines}
        for name, engine in engines.items():
            engine.budget = ALL
            engine.forward(ids[20000 + len(engine.tokens) : 20000 + context - SCORED - 1])
            clock, start = time.perf_counter(), len(engine.tokens)
            losses = []
            for at in range(start, start + SCORED):
                logits = engine.forward([ids[20000 + at]])
                losses.append(-float(log_likelihoods(logits[-1:], [ids[20000 + at + 1]])[0]))
            note = f"one window of Moby-Dick, decoded in {time.perf_counter() - clock:.0f} s"
            bench.value(f"perplexity at {context}, {name}", math.exp(np.mean(losses)), "ppl", n=SCORED, note=note)
        for _ in range(3):
            for name, engine in engines.items():
                engine.rewind(context - 512)
                clock = time.perf_counter()
                engine.forward(ids[20000 + context - 512 : 20000 + context])
                times[name].append(time.perf_counter() - clock)
        for name in engines:
            bench.samples(f"512 tokens before {context}, {name}", times[name], unit="s")


def last_losses(sessions: Mapping[str, Session], others: Selected, ids: list[int]) -> dict[tuple[str, int, int], float]:
    """Mean loss of the last `SCORED` tokens of each window, which all begin with ids[0], by method and budget: the
    context is read once for each bundle, those tokens one by one."""
    found = {}
    for name, session in sessions.items():
        engine = session.engine
        engine.rewind(0)
        for window in WINDOWS:
            start = window - SCORED - 1
            engine.forward(ids[len(engine.tokens) : start])
            if name == "sparse":
                for (method, pick), budget in itertools.product(METHODS.items(), BUDGETS):
                    cache = engine.kept(start)
                    loss = others.loss(cache, ids[:window], first=start, pick=pick, budget=budget)
                    found[method, window, budget] = loss
            for budget in (*BUDGETS, ALL):  # the exact one last: what comes after builds on it
                engine.budget = budget
                engine.rewind(start)
                losses = []
                for at in range(start, window - 1):
                    logits = engine.forward([ids[at]])
                    losses.append(-float(log_likelihoods(logits[-1:], [ids[at + 1]])[0]))
                found[name, window, budget] = float(np.mean(losses))
    return found


def found_by(task: tuple[Path, tuple[int, Any]]) -> dict[int, bool]:
    """With which budgets the answer holds needle number `number`."""
    work, (number, item) = task
    book = read_text(data(f"longctx/{BOOKS[number % 4]}.txt.gz"))
    context, depth = (4096, 8192)[number % 2], 0.1 + 0.8 * (number // 2 % 9) / 8
    return search(opened(work, "sparse"), book, item, context=context, depth=depth, budgets=(ALL, 256))


def needles(bench: Benchmark, work: Path, *, quick: bool) -> None:
    items = load_needles(data("longctx/needles.jsonl.gz"))[:: 20 if quick else 1]
    hits = list(shared(work, found_by, list(enumerate(items))))
    dense, sparse = (100 * sum(hit[budget] for hit in hits) / len(items) for budget in (ALL, 256))
    bench.value("needles found, dense", dense, "%", n=len(items))
    bench.value("needles found, budget 256", sparse, "%", n=len(items))
    bench.at_least("needles found: budget 256 less dense, points", sparse - dense, -1.0)


if __name__ == "__main__":
    main()
