"""Long contexts: sparse attention beside our own dense attention and beside llama.cpp, in one run.

Speed. Decoding 32 tokens after a context of 512 to 65,536 tokens, edgekit int4 (all matrices at 4 bits, symmetric,
blocks of 32) sparse and dense, and llama.cpp Q4_0 of the same model with flash attention, 2 threads each, taking turns.
The context is stretched by linear rope scaling, and beyond 8,192 tokens both caches are filled with copies of what
those left there: speed depends on how many positions there are, not on what they hold.

Quality. Four books, windows of 4,096 and 8,192 tokens at three places of each: perplexity of the last 256 tokens, each
decoded on its own, with budgets of 64, 128 and 256, against the same bundle with a budget of the whole context, which
is dense attention to the bit.

Needles. 200 made-up facts, each hidden in 4,096 or 8,192 tokens of a book at depths of 10 to 90 %: how often the greedy
answer holds the code, with budget 256 and dense.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from common import Benchmark, arguments, data
from contestants import Worker
from speed import RECIPE, quantize_peer

from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.needles import load_needles, search
from edgekit.evaluate.perplexity import log_likelihoods
from edgekit.evaluate.text import read_text
from edgekit.export.export import export
from edgekit.export.sparse import SparseOptions
from edgekit.export.targets import find_target, host_target
from edgekit.model.builtin import fetch_builtin
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe
from edgekit.runtime.session import Session

BOOKS = ("middlemarch", "moby-dick", "the-count-of-monte-cristo", "war-and-peace")
BUDGETS = {256: 0.8, 128: 1.5, 64: 4.0}  # and the most percent of perplexity that each may cost
WINDOWS = (4096, 8192)
SCORED = 256
ALL = 1 << 30
STEPS = 32
SECTIONS = ("speed", "quality", "needles")


def main() -> None:
    options = arguments(__doc__ or "", sections=SECTIONS)
    bench = Benchmark("longctx")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        compress(open_model("smollm2-135m"), load_recipe(str(RECIPE)), work / "int4")
        checkpoint, target = open_checkpoint(work / "int4"), find_target(host_target())
        if "speed" in options.only:
            for name, sparse in (("sparse", SparseOptions()), ("dense", None)):
                export(
                    checkpoint,
                    work / f"{name}.long",
                    target=target,
                    context=65536 + STEPS,
                    rope_scaling=("linear", 16.0),
                    sparse=sparse,
                    accept_drift=True,
                )
            quantize_peer(fetch_builtin("smollm2-135m"), work / "q4_0.gguf")
            speed(bench, work, quick=options.quick)
        if {"quality", "needles"} & set(options.only):
            export(checkpoint, work / "sparse", target=target, sparse=SparseOptions(), accept_drift=True)
            session = Session.open(work / "sparse", context=8192)
            if "quality" in options.only:
                quality(bench, session, quick=options.quick)
            if "needles" in options.only:
                needles(bench, session, quick=options.quick)
    bench.finish(as_json=options.json)


def speed(bench: Benchmark, work: Path, *, quick: bool) -> None:
    contexts = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    peers = (8192, 32768)
    workers = {name: Worker("edgekit-long", work / f"{name}.long") for name in ("sparse", "dense")}
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
            ratio = found["sparse", context] / found["llama.cpp Q4_0", context]
            bench.at_least(f"decode after {context}: sparse over llama.cpp Q4_0", ratio, bound)
    bench.at_least("decode after 512: sparse over dense", found["sparse", 512] / found["dense", 512], 0.97)
    long = [context for context in contexts if context > 1024]
    slope, base = np.polyfit(long, [1e3 / found["sparse", context] for context in long], 1)
    bench.value("milliseconds a token at no context, fitted", float(base), "ms")
    bench.value("milliseconds a token for 1,024 positions more, fitted", float(slope) * 1024, "ms")
    codes, means = 32768 * 64 / 4, 32768 / 16 * 64 * 2  # of one head: codes, and a mean of float16 a page
    bench.value("bytes read for each position and head: codes", codes / 32768, "B")
    bench.value("bytes read for each position and head: codes and means", (codes + means) / 32768, "B")
    bench.at_most("bytes that grow with the context, over bytes of codes", (codes + means) / codes, 1.3)


def quality(bench: Benchmark, session: Session, *, quick: bool) -> None:
    losses: dict[tuple[int, int], list[float]] = {}
    for book in BOOKS[:2] if quick else BOOKS:
        ids = session.tokenizer.encode(read_text(data(f"longctx/{book}.txt.gz"))).ids
        for place in range(1 if quick else 3):
            start = 20000 + 40000 * place
            for key, loss in last_losses(session, ids[start : start + 8192]).items():
                losses.setdefault(key, []).append(loss)
    for window in WINDOWS:
        dense = np.array(losses[window, ALL])
        count = len(dense) * SCORED
        bench.value(f"perplexity at {window}, dense", math.exp(dense.mean()), "ppl", n=count)
        for budget, bound in BUDGETS.items():
            sparse = np.array(losses[window, budget])
            spread = 100 * float((sparse - dense).std(ddof=1)) / math.sqrt(len(dense))
            note = f"standard error of the loss over windows: {spread:.2f} %"
            bench.value(f"perplexity at {window}, budget {budget}", math.exp(sparse.mean()), "ppl", n=count, note=note)
            loss = 100 * math.expm1(float((sparse - dense).mean()))
            bench.at_most(f"perplexity at {window}, budget {budget}: loss, %", loss, bound)


def last_losses(session: Session, ids: list[int]) -> dict[tuple[int, int], float]:
    """Mean loss of the last `SCORED` tokens of each window, which all begin with ids[0], and budget: the context is
    read once, those tokens one by one."""
    engine = session.engine
    engine.rewind(0)
    found = {}
    for window in WINDOWS:
        start = window - SCORED
        engine.forward(ids[len(engine.tokens) : start - 1])
        for budget in (*BUDGETS, ALL):  # the exact one last: what comes after builds on it
            engine.budget = budget
            engine.rewind(start - 1)
            losses = []
            for at in range(start - 1, window - 1):
                logits = engine.forward([ids[at]])
                losses.append(-float(log_likelihoods(logits[-1:], [ids[at + 1]])[0]))
            found[window, budget] = float(np.mean(losses))
    return found


def needles(bench: Benchmark, session: Session, *, quick: bool) -> None:
    items = load_needles(data("longctx/needles.jsonl.gz"))[:: 20 if quick else 1]
    found = {ALL: 0, 256: 0}
    for number, item in enumerate(items):
        book = read_text(data(f"longctx/{BOOKS[number % 4]}.txt.gz"))
        context, depth = (4096, 8192)[number % 2], 0.1 + 0.8 * (number // 2 % 9) / 8
        for budget, hit in search(session, book, item, context=context, depth=depth, budgets=tuple(found)).items():
            found[budget] += hit
    dense, sparse = (100 * found[budget] / len(items) for budget in (ALL, 256))
    bench.value("needles found, dense", dense, "%", n=len(items))
    bench.value("needles found, budget 256", sparse, "%", n=len(items))
    bench.at_least("needles found: budget 256 less dense, points", sparse - dense, -1.0)


if __name__ == "__main__":
    main()
