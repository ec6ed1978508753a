"""What quantising costs: WikiText-2 perplexity of SmolLM2-135M-Instruct, its size, and the work of getting there.

Raw validation text, windows of 1024 tokens, second halves scored (llama.cpp's method). Three parts, one run:

    recipes     built-in recipes through `--target portable` (float32 activations) and this machine's target (int8)
    algorithm   the rotated model, all linears on the grid, table and head float: its weights lie on no grid before.
                12 windows, in torch on the dequantised weights. "Recovered" is the share of the log-perplexity lost
                by plain rounding that a method gets back
    product     the plain model at file sizes (model.onnx and model.onnx.data) from 60 to 90 MB, through this machine's
                bundle; bits by sensitivity, no healing

The source is measured twice: by transformers in torch from the GGUF file, and by our float32 export; they must agree.
Calibration: 16 windows of C4 and Wikipedia (text/c4_calibration, text/wikipedia_sample), none of WikiText-2. Work:
int4 by gptq of the whole model, and of a synthetic Llama of 1.1 billion weights, in processes of their own.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Benchmark, arguments, data

from edgekit.bundle import MODEL
from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.perplexity import log_likelihoods, perplexity
from edgekit.evaluate.scorer import Scorer, open_scorer
from edgekit.evaluate.text import read_text
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.model.builtin import fetch_builtin
from edgekit.model.sources import open_model
from edgekit.recipe import Recipe, calibrated_on, load_recipe, within

RECIPES = Path(__file__).parent / "recipes"
WINDOW = 1024
MODEL_NAME = "smollm2-135m"
BOUNDS = {90: 15.5, 80: 15.8, 75: 16.6, 70: 19.0, 60: 28.0}  # file size in MB -> perplexity at most
FRAME_MB = 3.5  # rotary tables, the graph and alignment stand beside the weights; sizes are checked on the files
RECOVERED = {4: 65.0, 3: 70.0}  # percent, the best combination; gptq alone half


def main() -> None:
    options = arguments(__doc__ or "")
    bench = Benchmark("quant")
    windows = 12 if options.quick else 24
    text = read_text(data("text/wikitext2_valid.raw.txt.gz"))
    with tempfile.TemporaryDirectory() as folder, open_scorer(MODEL_NAME) as source:
        ours = measure(bench, "source, our float32 export", source, text, windows)
        torch = torch_perplexity(source, text, windows)
        bench.value("source, torch", torch, "ppl", n=windows)
        bench.at_most("source: our float32 export against torch, % off", 100 * abs(ours / torch - 1), 0.1)
        for name in ("int8", "int4", "lossless", str(RECIPES / "int4-symmetric.toml")):
            found = recipe(bench, Path(folder), load_recipe(name), text, windows)
            if name == "int8":
                bench.at_most("int8: loss of perplexity, %", 100 * (found / ours - 1), 0.5)
        algorithm(bench, Path(folder), source, text)
        product(bench, Path(folder), text, windows, sizes=(80, 60) if options.quick else tuple(BOUNDS))
        work(bench, Path(folder), large=not options.quick)
    bench.finish(as_json=options.json)


def measure(bench: Benchmark, name: str, scorer: Scorer, text: str, windows: int, note: str = "") -> float:
    found = perplexity(scorer, text, window=WINDOW, max_windows=windows)
    bench.value(name, found.value, "ppl", n=found.windows, spread=found.spread, note=note)
    return found.value


def recipe(bench: Benchmark, folder: Path, steps: Recipe, text: str, windows: int) -> float:
    """Perplexity through this machine's target; the portable one is recorded beside it."""
    checkpoint = folder / steps.name
    compress(open_model(MODEL_NAME), steps, checkpoint)
    value = float("nan")
    for target in ("portable", host_target()):
        value, _ = bundle_perplexity(bench, f"{steps.name}, {target}", checkpoint, target, text, windows)
    return value


def bundle_perplexity(
    bench: Benchmark, name: str, checkpoint: Path, target: str, text: str, windows: int
) -> tuple[float, float]:
    """(perplexity, MB of model.onnx and model.onnx.data) of an exported checkpoint."""
    bundle = checkpoint.with_name(f"{checkpoint.name}.{target}")
    export(open_checkpoint(checkpoint), bundle, target=find_target(target), accept_drift=True)
    size = sum(path.stat().st_size for path in bundle.glob(f"{MODEL}*")) / 1e6
    with open_scorer(str(bundle)) as scorer:
        return measure(bench, name, scorer, text, windows, f"{size:.1f} MB"), size


def torch_perplexity(scorer: Scorer, text: str, windows: int) -> float:
    """The same windows through transformers' own loading of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    path = fetch_builtin(MODEL_NAME)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    losses = []
    with torch.inference_mode():
        for tokens in cut(scorer, text, windows):
            logits = model(torch.tensor([tokens])).logits[0, WINDOW // 2 : -1].numpy()
            losses.append(-log_likelihoods(logits, tokens[WINDOW // 2 + 1 :]))
    return float(np.exp(np.concatenate(losses).mean()))


def cut(scorer: Scorer, text: str, windows: int) -> list[list[int]]:
    ids = scorer.tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[start : start + WINDOW] for start in range(0, windows * WINDOW, WINDOW)]


# --- algorithm --------------------------------------------------------------------------------------------------------


def algorithm(bench: Benchmark, folder: Path, source: Scorer, text: str) -> None:
    tokens = cut(source, text, 12)
    exact = view_perplexity(bench, "rotated, float", compressed(folder, "rotated"), tokens)
    int8 = view_perplexity(bench, "rotated, int8", compressed(folder, "rotated-int8"), tokens)
    bench.at_most("rotated, int8: loss of perplexity, %", 100 * (int8 / exact - 1), 0.2)
    for bits, bound in RECOVERED.items():
        found = {
            name: view_perplexity(
                bench, f"rotated, int{bits}, {name}", compressed(folder, f"rotated-int{bits}{suffix}"), tokens
            )
            for name, suffix in (("rounding", ""), ("gptq", "-gptq"), ("gptq, refined", "-refined"))
        }
        lost = math.log(found.pop("rounding") / exact)
        back = {name: 100 * (1 - math.log(value / exact) / lost) for name, value in found.items()}
        for name, value in back.items():
            bench.value(f"rotated, int{bits}, {name}: recovered", value, "%", n=12)
        bench.at_least(f"rotated, int{bits}: the best combination recovers, %", max(back.values()), bound)
        bench.at_least(f"rotated, int{bits}: gptq alone recovers, %", back["gptq"], 50)


def calibrated(steps: Recipe) -> Recipe:
    files = [data("text/c4_calibration.jsonl.gz"), data("text/wikipedia_sample.txt.gz")]
    return calibrated_on(steps, files)


def compressed(folder: Path, name: str) -> Checkpoint:
    compress(open_model(MODEL_NAME), calibrated(load_recipe(RECIPES / f"{name}.toml")), folder / name)
    return open_checkpoint(folder / name)


def view_perplexity(bench: Benchmark, name: str, checkpoint: Checkpoint, windows: list[list[int]]) -> float:
    """Perplexity in torch on the dequantised weights, block by block."""
    import torch

    from edgekit.model.torch_view import Layer, rms_norm

    config = checkpoint.decoder
    with torch.inference_mode():
        table = torch.from_numpy(checkpoint.weight("model.embed_tokens").dense())
        states = [table[torch.tensor([tokens])] for tokens in windows]
        for index in range(config.layers):
            layer = Layer.of(checkpoint.read_block(f"layers.{index}"), config)
            states = [layer(state) for state in states]
        head = table if config.tied else torch.from_numpy(checkpoint.weight("lm_head").dense())
        gain = torch.from_numpy(checkpoint.vector("model.norm.weight"))
        losses = []
        for state, tokens in zip(states, windows, strict=True):
            logits = rms_norm(state[0, WINDOW // 2 : -1], gain, config.norm_eps) @ head.T
            losses.append(-log_likelihoods(logits.numpy(), tokens[WINDOW // 2 + 1 :]))
    value = float(np.exp(np.concatenate(losses).mean()))
    bench.value(name, value, "ppl", n=len(windows))
    return value


# --- product ----------------------------------------------------------------------------------------------------------


def product(bench: Benchmark, folder: Path, text: str, windows: int, *, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        steps = calibrated(within(load_recipe("mixed"), size - FRAME_MB))
        checkpoint = folder / f"mixed-{size}"
        compress(open_model(MODEL_NAME), dataclasses.replace(steps, name=checkpoint.name), checkpoint)
        value, found = bundle_perplexity(bench, checkpoint.name, checkpoint, host_target(), text, windows)
        bench.at_most(f"file for {size} MB, MB", found, size)
        bench.at_most(f"perplexity at {size} MB", value, BOUNDS[size])


# --- work -------------------------------------------------------------------------------------------------------------

MEASURED = """
import resource, sys
from pathlib import Path
from edgekit.compress import compress
from edgekit.model.sources import open_model
from edgekit.recipe import calibrated_on, load_recipe

compress(open_model(sys.argv[1]), calibrated_on(load_recipe("int4-gptq"), map(Path, sys.argv[3:])), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def work(bench: Benchmark, folder: Path, *, large: bool) -> None:
    models = {"smollm2-135m": MODEL_NAME}
    if large:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from test_compress import large_folder

        models["synthetic 1.1B"] = str(large_folder(folder / "large"))
    text = str(data("text/c4_calibration.jsonl.gz"))
    for name, model in models.items():
        started = time.perf_counter()
        command = [sys.executable, "-c", MEASURED, model, str(folder / f"gptq {name}"), text]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, peak = time.perf_counter() - started, float(done.stdout.split()[-1])
        bench.value(f"{name}, int4 by gptq", seconds, "s")
        bench.value(f"{name}, int4 by gptq: peak memory", peak / 1e9, "GB")
        if name == "smollm2-135m":
            bench.at_most("int4 by gptq of the whole model, s", seconds, 120)
        else:
            bench.at_most("synthetic 1.1B, int4 by gptq: peak memory, GB", peak / 1e9, 8)


if __name__ == "__main__":
    main()
