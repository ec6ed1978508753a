"""What taking structure out of SmolLM2-135M-Instruct costs, and what it saves: perplexity at 10 % and 20 %, and speed.

Raw WikiText-2 validation, windows of 1024 tokens, second halves scored, in torch on float weights, no healing.
Calibration: 32 windows of 1024 tokens of Wikipedia and C4 (text/wikipedia_sample, text/c4_calibration), none of
WikiText-2; no twelve words in a row are in both. The share is that of the decoder's 106.2 million parameters: three and
six of thirty layers are 10 % and 20 % of them, so dropping removes exactly as much.

    planned        heads and neurons by measured sensitivity (`prune.planned`)
    neurons        as wide everywhere; and by sensitivity, 1.25 times the share since the MLPs are three quarters
    dropped        layers of least influence (ShortGPT); the same with the seams refitted
    merged         pairs of highest NPIB (MKA); the same with the seams refitted
    dropped alike  the layers that merging takes away, dropped: the control for merging

Speed: both models at the same bits through this machine's target, 128 tokens after a prompt, in turns.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Benchmark, arguments, data
from quant import cut, view_perplexity

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.scorer import open_scorer
from edgekit.evaluate.text import read_text
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.merge.drop import Drop
from edgekit.merge.layers import Merge
from edgekit.model.sources import open_model
from edgekit.prune.elimination import error_of, rank_columns, refit, regular
from edgekit.prune.steps import Neurons, Planned
from edgekit.quant.methods import Int4
from edgekit.recipe import Recipe
from edgekit.runtime.session import Session
from edgekit.step import CalibrationOptions, Step

MODEL_NAME = "smollm2-135m"
LAYERS = {10: 3, 20: 6}
PLANNED_20 = 24.0
FASTER = 1.15


def main() -> None:
    options = arguments(__doc__ or "")
    bench = Benchmark("structure")
    exactness(bench)
    text = read_text(data("text/wikitext2_valid.raw.txt.gz"))
    with tempfile.TemporaryDirectory() as folder, open_scorer(MODEL_NAME) as source:
        tokens = cut(source, text, 12 if options.quick else 24)
        view_perplexity(bench, "source", open_model(MODEL_NAME), tokens)
        for percent in (20,) if options.quick else (10, 20):
            best = table(bench, Path(folder), percent, tokens)
        speed(bench, Path(folder), best, rounds=3 if options.quick else 7)
    bench.finish(as_json=options.json)


def exactness(bench: Benchmark) -> None:
    """The error that elimination foretells against the one that its refit reaches."""
    random = np.random.default_rng(0)
    X = random.standard_normal((2000, 256)) @ (random.standard_normal((256, 256)) * 0.98 ** np.arange(256))
    W, G = random.standard_normal((64, 256)), regular(X.T @ X, 1e-6, where="exactness")
    for choice in ("elimination", "interpolative"):
        ranking = rank_columns(W, G, choice=choice)  # type: ignore[arg-type]
        kept = ranking.kept(192)
        reached = error_of(W, G, kept, refit(W, G, kept))
        bench.at_most(
            f"{choice}: error foretold against reached, relative", abs(ranking.errors[192] / reached - 1), 1e-6
        )


def table(bench: Benchmark, folder: Path, percent: int, tokens: list[list[int]]) -> Checkpoint:
    """The perplexities at one share; returns the planned model."""
    share, count = percent / 100, LAYERS[percent]
    found: dict[str, float] = {}

    def measured(name: str, *steps: Step) -> Checkpoint:
        started = time.perf_counter()
        checkpoint = compressed(folder / f"{name} {percent}", *steps)
        bench.value(f"{name}, {percent} %: work", time.perf_counter() - started, "s")
        found[name] = view_perplexity(bench, f"{name}, {percent} %", checkpoint, tokens)
        return checkpoint

    best = measured("planned", Planned(remove=share))
    measured("neurons, even", Neurons(remove=share * 4 / 3, spread="even", follow=0.0))
    measured("neurons, planned", Neurons(remove=share * 4 / 3))
    measured("dropped", Drop(count=count, repair=0.0))
    measured("dropped, repaired", Drop(count=count))
    merged = measured("merged", Merge(count=count, repair=0.0))
    assert merged.manifest is not None
    options: dict[str, Any] = merged.manifest.steps[-1].options
    layers, ratios = tuple(options["layers"]), tuple(options["ratios"])
    measured("merged, repaired", Merge(layers=layers, ratios=ratios))
    measured("dropped alike", Drop(layers=layers, repair=0.0))
    others = min(value for name, value in found.items() if name != "planned")
    bench.at_most(f"{percent} %: planned against the best of the others, ppl", found["planned"], others)
    bench.at_most(f"{percent} %: merged and repaired against dropping the same layers, ppl", found["merged, repaired"],
                  found["dropped alike"])  # fmt: skip
    if percent == 20:
        bench.at_most("20 %: planned, ppl", found["planned"], PLANNED_20)
    return best


def compressed(output: Path, *steps: Step, source: Checkpoint | None = None) -> Checkpoint:
    files = tuple(str(data(f"text/{name}")) for name in ("wikipedia_sample.txt.gz", "c4_calibration.jsonl.gz"))
    recipe = Recipe(output.name, "", steps, calibration=CalibrationOptions(files, 32))
    compress(source or open_model(MODEL_NAME), recipe, output)
    return open_checkpoint(output)


def speed(bench: Benchmark, folder: Path, pruned: Checkpoint, *, rounds: int) -> None:
    """Tokens a second of the source and the pruned model at 4 bits, measured in turns."""
    sessions = {}
    for name, checkpoint in (("source, int4", open_model(MODEL_NAME)), ("planned 20 %, int4", pruned)):
        small = compressed(folder / f"{name} small", Int4(), source=checkpoint)
        export(small, folder / name, target=find_target(host_target()), accept_drift=True)
        sessions[name] = Session.open(str(folder / name), context=512)
    rates: dict[str, list[float]] = {name: [] for name in sessions}
    for at in range(rounds + 1):
        for name, session in sessions.items():
            engine = session.engine
            engine.rewind(0)
            engine.forward(list(range(100, 132)))
            started = time.perf_counter()
            for token in range(128):
                engine.forward([200 + token])
            if at:
                rates[name].append(128 / (time.perf_counter() - started))
    medians = {name: bench.samples(f"{name}: decode", values, unit="tok/s") for name, values in rates.items()}
    bench.at_least("20 % pruned: decode against the source at the same bits, x", medians["planned 20 %, int4"]
                   / medians["source, int4"], FASTER)  # fmt: skip


if __name__ == "__main__":
    main()
