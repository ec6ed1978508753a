"""What healing gives back. `--only` takes some of these parts:

    layers     measured here: SmolLM2-135M-Instruct at 3 bits, each layer matched to its original on this CPU. "Back" is
               the share of the lost log-perplexity on raw WikiText-2 validation that was regained
    products   measured here, where `--products FOLDER` holds checkpoints of `heal_runs.py` named 65MB, 60MB ...: the
               exported file's size, and its perplexity through this machine's target
    recorded   the long runs need a GPU (`heal_runs.py`). Their rows in docs/results/heal.jsonl are checked as they were
               recorded; they are named so, and say what a run was trained on

The checks of the states want runs on the healing files alone where there is one; rows that were also trained on text
that the source wrote are shown beside, and checked where they are all there is.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Benchmark, data
from heal_sets import WINDOW, perplexity

from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.perplexity import perplexity as text_perplexity
from edgekit.evaluate.scorer import open_scorer
from edgekit.evaluate.text import read_text
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.heal.data import Encoder, load
from edgekit.heal.decoder import frozen
from edgekit.heal.heal import Options, trainable
from edgekit.heal.layerwise import heal_layers
from edgekit.model.sources import open_model
from edgekit.recipe import parse_recipe

RECORDED = Path(__file__).parents[1] / "docs" / "results" / "heal.jsonl"
STATES = (
    ("int3", "3 bits", 16.8), ("int2", "2 bits", 28), ("fifth", "a fifth dropped", 18.3),
    ("fifth-int3", "a fifth dropped, 3 bits", 21),
)  # fmt: skip
PRODUCTS = {"65MB": (65, 17.2), "60MB": (60, 19), "53MB": (53, 22), "45MB": (45, 29)}  # MB, perplexity
PARTS = ("layers", "products", "recorded")
OPTIMIZERS = ("adamw", "muon", "mano", "mano-v2")
RECIPE = 'name = "int3"\n[[step]]\nuse = "quant.int3"\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer windows and steps, under ten minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--products", type=Path, help="a folder of healed checkpoints")
    options = parser.parse_args()
    bench = Benchmark("heal")
    if "layers" in options.only:
        layer_wise(bench, windows=4 if options.quick else 24, steps=15 if options.quick else 36)
    if "products" in options.only and options.products is not None:
        products(bench, options.products, windows=4 if options.quick else 24)
    if "recorded" in options.only:
        rows = [json.loads(line) for line in RECORDED.read_text().splitlines()]
        recorded_states(bench, rows)
        recorded_products(bench, rows)
        recorded_optimizers(bench, rows)
    bench.finish(as_json=options.json)


def layer_wise(bench: Benchmark, *, windows: int, steps: int) -> None:
    source, device = open_model("smollm2-135m"), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        compress(source, parse_recipe(RECIPE, where="int3"), Path(folder) / "int3")
        small = open_checkpoint(Path(folder) / "int3")
        text = read_text(data("text/wikitext2_valid.raw.txt.gz"))
        ids = Encoder(source).tokenizer.encode(text, add_special_tokens=False).ids[: windows * WINDOW]
        test = np.array(ids).reshape(windows, WINDOW)
        teacher = frozen(source, device=device, dtype=torch.float32)
        student = trainable(small, Options(), device)
        found = [perplexity(teacher, test, device), perplexity(student, test, device)]
        corpus = load([data("heal/textbooks.jsonl.gz")], small, length=256, held_out=32, seed=0).train
        began = time.perf_counter()
        heal_layers(student, teacher, corpus, steps=steps, rate=Options().layer_rate)
        seconds = time.perf_counter() - began
        found.append(perplexity(student, test, device))
    for name, value in zip(("source", "3 bits", "3 bits, healed layer by layer"), found, strict=True):
        bench.value(name, value, "ppl", n=windows)
    bench.value("layer-wise healing", seconds, "s", note=f"{steps} steps a layer, {torch.get_num_threads()} threads")
    whole, rounded, healed = map(math.log, found)
    bench.at_least("layer-wise healing: back, %", 100 * (rounded - healed) / (rounded - whole), 25)
    bench.at_most("layer-wise healing: minutes", seconds / 60, 10)


def products(bench: Benchmark, folder: Path, *, windows: int) -> None:
    """Size and perplexity of the healed checkpoints that are at hand."""
    text = read_text(data("text/wikitext2_valid.raw.txt.gz"))
    for name, (size, bound) in PRODUCTS.items():
        if not (folder / name).is_dir():
            continue
        with tempfile.TemporaryDirectory() as place:
            bundle = Path(place) / name
            export(open_checkpoint(folder / name), bundle, target=find_target(host_target()))
            megabytes = sum(path.stat().st_size for path in bundle.glob("model.onnx*")) / 1e6
            with open_scorer(str(bundle)) as scorer:
                found = text_perplexity(scorer, text, window=WINDOW, max_windows=windows)
        note = f"{megabytes:.2f} MB"
        bench.value(f"product {name}", found.value, "ppl", n=found.windows, spread=found.spread, note=note)
        bench.at_most(f"product {name}: file, MB", megabytes, size)
        bench.at_most(f"product {name}: WikiText-2", found.value, bound)


# --- recorded GPU runs ------------------------------------------------------------------------------------------------


def recorded_states(bench: Benchmark, rows: list[dict[str, Any]]) -> None:
    for name, label, bound in STATES:
        before = [row for row in rows if row["name"] == f"{name} before"][-1]
        mine = [row for row in rows if row["name"] == name]
        for row in mine:
            note = f"trained on {row['data']}; one H200, not measured here"
            bench.value(f"recorded: {label}", row["wikitext2"], "ppl", n=24, note=note)
        alone = [row for row in mine if row["data"] == "files"]
        after = min(alone or mine, key=lambda row: row["wikitext2"])
        bench.at_most(f"recorded: {label}, {after['data']}, WikiText-2", after["wikitext2"], bound)
        moved(bench, f"recorded: {label}", before, after)
        bench.at_most(f"recorded: {label}, training minutes", after["seconds"] / 60, 10)


def moved(bench: Benchmark, label: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Whether books and multiple choice moved the way that WikiText-2 did."""
    ratio = max(after["books"][book] / before["books"][book] for book in after["books"])
    bench.at_most(f"{label}, books after / before, worst of four", ratio, 1)
    if "accuracy" in before:
        gain = np.mean([*after["accuracy"].values()]) - np.mean([*before["accuracy"].values()])
        bench.at_least(f"{label}, five tasks, points gained", float(gain), 0)


def recorded_products(bench: Benchmark, rows: list[dict[str, Any]]) -> None:
    for name, (size, bound) in PRODUCTS.items():
        before = [row for row in rows if row["name"] == f"{name} before"][-1]
        after = [row for row in rows if row["name"] == name and "file_mb" in row][-1]
        note = f"{after['file_mb']} MB ({after['file_size']}) with a context of {after['context']}; not measured here"
        bench.value(f"recorded: product of {size} MB", after["wikitext2"], "ppl", n=24, note=note)
        bench.at_most(f"recorded: product of {size} MB, file, MB", after["file_mb"], size)
        bench.at_most(f"recorded: product of {size} MB, WikiText-2", after["wikitext2"], bound)
        moved(bench, f"recorded: product of {size} MB", before, after)


def recorded_optimizers(bench: Benchmark, rows: list[dict[str, Any]]) -> None:
    """Each at its best rate by held-out KL; the product's default must be the winner."""
    best = {}
    for optimizer in OPTIMIZERS:
        mine = [row for row in rows if row["name"] == "optimizers" and row["optimizer"] == optimizer]
        for placement in ("none", "minimal", "full"):
            row = min((row for row in mine if row["multipliers"] == placement), key=lambda row: row["held_out"])
            note = f"rate {row['rate']:g}, {row['tokens'] / 1e6:.1f} M tokens, WikiText-2 {row['wikitext2']:.2f}"
            bench.value(f"recorded: {optimizer}, multipliers {placement}", row["held_out"], "nat", note=note)
            best[optimizer, placement] = row["held_out"]
    default = best[Options().optimizer, Options().multipliers]
    bench.at_most("recorded: the default's held-out KL / the best one's", default / min(best.values()), 1)


if __name__ == "__main__":
    main()
