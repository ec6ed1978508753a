"""What rounding costs: WikiText-2 perplexity of SmolLM2-135M-Instruct, source and recipes, in one run.

Raw validation text, windows of 1024 tokens, second halves scored (llama.cpp's method). The source is measured twice:
by transformers in torch from the GGUF file, and by our float32 export; they must agree. Its own weights lie on a 4-bit
grid, so rounding is also measured on the rotated model, which computes the same function off the grid. Recipes run
through `--target portable` (float32 activations) and through this machine's target (int8 activations).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from common import Benchmark, arguments, data

from edgekit.bundle import MODEL
from edgekit.checkpoint import open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.perplexity import log_likelihoods, perplexity
from edgekit.evaluate.scorer import Scorer, open_scorer
from edgekit.evaluate.text import read_text
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.model.builtin import fetch_builtin
from edgekit.model.sources import open_model
from edgekit.recipe import load_recipe

RECIPES = Path(__file__).parent / "recipes"
WINDOW = 1024


def main() -> None:
    options = arguments(__doc__ or "")
    bench = Benchmark("quant")
    windows = 12 if options.quick else 24
    text = read_text(data("text/wikitext2_valid.raw.txt.gz"))
    with tempfile.TemporaryDirectory() as folder, open_scorer("smollm2-135m") as source:
        ours = measure(bench, "source, our float32 export", source, text, windows)
        torch = torch_perplexity(source, text, windows)
        bench.value("source, torch", torch, "ppl", n=windows)
        bench.at_most("source: our float32 export against torch, % off", 100 * abs(ours / torch - 1), 0.1)
        found = {}
        for name in ("int8", "int4", "lossless", *(str(path) for path in sorted(RECIPES.glob("*.toml")))):
            found[Path(name).stem] = recipe(bench, Path(folder), name, text, windows)
    bench.at_most("int8: loss of perplexity, %", 100 * (found["int8"] / ours - 1), 0.5)
    bench.at_most("rotated, int8: loss of perplexity, %", 100 * (found["rotated-int8"] / ours - 1), 0.5)
    bench.finish(as_json=options.json)


def measure(bench: Benchmark, name: str, scorer: Scorer, text: str, windows: int, note: str = "") -> float:
    found = perplexity(scorer, text, window=WINDOW, max_windows=windows)
    bench.value(name, found.value, "ppl", n=found.windows, spread=found.spread, note=note)
    return found.value


def recipe(bench: Benchmark, folder: Path, name: str, text: str, windows: int) -> float:
    """Perplexity through this machine's target; the portable one is recorded beside it."""
    steps = load_recipe(name)
    checkpoint = folder / steps.name
    compress(open_model("smollm2-135m"), steps, checkpoint)
    value = float("nan")
    for target in ("portable", host_target()):
        bundle = folder / f"{steps.name}.{target}"
        export(open_checkpoint(checkpoint), bundle, target=find_target(target), accept_drift=True)
        size = sum(path.stat().st_size for path in bundle.glob(f"{MODEL}*")) / 1e6
        with open_scorer(str(bundle)) as scorer:
            value = measure(bench, f"{steps.name}, {target}", scorer, text, windows, f"{size:.1f} MB")
    return value


def torch_perplexity(scorer: Scorer, text: str, windows: int) -> float:
    """The same windows through transformers' own loading of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    path = fetch_builtin("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = scorer.tokenizer.encode(text, add_special_tokens=False).ids
    losses = []
    with torch.inference_mode():
        for start in range(0, windows * WINDOW, WINDOW):
            tokens = ids[start : start + WINDOW]
            logits = model(torch.tensor([tokens])).logits[0, WINDOW // 2 : -1].numpy()
            losses.append(-log_likelihoods(logits, tokens[WINDOW // 2 + 1 :]))
    return float(np.exp(np.concatenate(losses).mean()))


if __name__ == "__main__":
    main()
