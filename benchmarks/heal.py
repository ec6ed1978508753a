"""What layer-wise healing gives back on this CPU: SmolLM2-135M-Instruct at 3 bits, each layer matched to its original.

The long end-to-end runs need a GPU: `heal_runs.py`. What they gave stands in docs/results/heal.jsonl and is checked
here as it was recorded; rows named "recorded" are not measured by this program. A product's row is the best recorded
state whose weights fit the size.
"Back" is the share of the lost log-perplexity on raw WikiText-2 validation that healing regained.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import Benchmark, arguments, data

from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.heal.data import Encoder, load
from edgekit.heal.decoder import Decoder, frozen
from edgekit.heal.heal import Options, trainable
from edgekit.heal.layerwise import heal_layers
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe

WINDOW = 1024
RECORDED = Path(__file__).parents[1] / "docs" / "results" / "heal.jsonl"
STATES = (
    ("int3", "3 bits", 16.8), ("int2", "2 bits", 28), ("fifth", "a fifth dropped", 18.3),
    ("fifth-int3", "a fifth dropped, 3 bits", 21),
)  # fmt: skip
PRODUCTS = ((65, 17.2), (60, 19), (53, 22), (45, 29))
RECIPE = 'name = "int3"\n[[step]]\nuse = "quant.int3"\n'


def main() -> None:
    options = arguments(__doc__ or "")
    bench = Benchmark("heal")
    windows, steps = (4, 15) if options.quick else (24, 40)
    source, device = open_model("smollm2-135m"), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "int3.toml"
        recipe.write_text(RECIPE)
        compress(source, load_recipe(recipe), Path(folder) / "int3")
        small = open_checkpoint(Path(folder) / "int3")
        text = Encoder(source).tokenizer.encode(wikitext(), add_special_tokens=False).ids[: windows * WINDOW]
        ids = torch.tensor(text).view(windows, WINDOW)
        teacher = frozen(source, device=device, dtype=torch.float32)
        student = trainable(small, Options(), device)
        found = [perplexity(teacher, ids), perplexity(student, ids)]
        corpus = load([data("heal/textbooks.jsonl.gz")], small, length=256, held_out=32, seed=0).train
        began = time.perf_counter()
        heal_layers(student, teacher, corpus, steps=steps, rate=3e-4)
        seconds = time.perf_counter() - began
        found.append(perplexity(student, ids))
    for name, value in zip(("source", "3 bits", "3 bits, healed layer by layer"), found, strict=True):
        bench.value(name, value, "ppl", n=windows)
    bench.value("layer-wise healing", seconds, "s", note=f"{steps} steps a layer")
    whole, rounded, healed = map(math.log, found)
    bench.at_least("layer-wise healing: back, %", 100 * (rounded - healed) / (rounded - whole), 25)
    bench.at_most("layer-wise healing: minutes", seconds / 60, 10)
    check_recorded(bench)
    bench.finish(as_json=options.json)


def check_recorded(bench: Benchmark) -> None:
    """The bounds of the GPU runs, on their recorded rows; the last row of a name counts."""
    rows = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    last = {row["name"]: row for row in rows}
    note = "recorded on one H200, not measured here"
    for name, label, bound in STATES:
        before, after = last[f"{name} before"], last[name]
        bench.value(f"recorded: {label}, before", before["wikitext2"], "ppl", n=24, note=note)
        bench.value(f"recorded: {label}, healed", after["wikitext2"], "ppl", n=24, note=note)
        bench.value(f"recorded: {label}, five tasks", np.mean([*after["accuracy"].values()]).item(), "%", note=note)
        bench.at_most(f"recorded: {label}, WikiText-2", after["wikitext2"], bound)
        ratio = max(after["books"][book] / before["books"][book] for book in after["books"])
        bench.at_most(f"recorded: {label}, books after / before, worst", ratio, 1)
        bench.at_most(f"recorded: {label}, training minutes", after["seconds"] / 60, 10)
    for size, bound in PRODUCTS:
        best = min(row["wikitext2"] for row in rows if row.get("weights_mb", math.inf) <= size)
        bench.at_most(f"recorded: product of at most {size} MB, WikiText-2", best, bound)


def wikitext() -> str:
    from edgekit.evaluate.text import read_text

    return read_text(data("text/wikitext2_valid.raw.txt.gz"))


@torch.no_grad()
def perplexity(model: Decoder, ids: torch.Tensor) -> float:
    """Second halves of the windows, as everywhere."""
    losses = []
    for row in ids:
        state, head = model(row[None])
        logits = (state[0, WINDOW // 2 : -1] @ head.T).log_softmax(-1)
        losses.append(-logits.gather(-1, row[WINDOW // 2 + 1 :, None]).numpy())
    return float(np.exp(np.concatenate(losses).mean()))


if __name__ == "__main__":
    main()
