"""What quantising costs: WikiText-2 perplexity of SmolLM2-135M-Instruct, its size, and the work of getting there.

Raw validation text, windows of 1024 tokens, second halves scored (llama.cpp's method), 24 windows. Sections, each of
which can run alone (`--only`):

    source      the source by transformers in torch and by our float32 export, which must agree; recipes as they come
    product     the plain model at file sizes (model.onnx and model.onnx.data) from 60 to 97 MB, through this machine's
                bundle; bits by sensitivity, one survey for all sizes, no healing
    cache       keys and values in float16, 8 and 4 bits, through this machine's bundle of the codes that the file has
    peers       llama.cpp's own quants of the same GGUF file, made and run by llama.cpp (a GGUF holds its vocabulary,
                too: about 2 MB); with product, ours must be below the best of them at every size or smaller
    rotated     the rotated model, all linears on the grid, table and head float: its weights lie on no grid before.
                12 windows, in torch on the dequantised weights. "Recovered" is the share of the log-perplexity lost
                by plain rounding that a method gets back
    solver      gptq on one real layer against its definition in float64, on the same Gram matrix
    work        int4 by gptq of the whole model, and of a synthetic Llama of 1.1 billion weights, in processes of their
                own

`--work FOLDER` keeps what is made there, and takes it from there the next time: a run that was stopped goes on.
Calibration: 16 windows of C4 and Wikipedia (text/c4_calibration, text/wikipedia_sample), none of WikiText-2.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Benchmark, arguments, data
from perplexities import WINDOW, llama_perplexity, quantised_by_llama, torch_perplexity, view_perplexity

from edgekit.bundle import MODEL, Bundle
from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.perplexity import perplexity
from edgekit.evaluate.scorer import Scorer, open_scorer
from edgekit.evaluate.text import read_text
from edgekit.export.export import export
from edgekit.export.targets import find_target, host_target
from edgekit.kernels.opset import CACHES
from edgekit.model.builtin import fetch_builtin
from edgekit.model.sources import open_model
from edgekit.quant.gptq import Metric, damped, gptq, output_error, restored
from edgekit.quant.grid import Grid, fit, in_blocks
from edgekit.quant.mixed import Mixed, Table
from edgekit.recipe import Recipe, calibrated_on, load_recipe, within

RECIPES = Path(__file__).parent / "recipes"
MODEL_NAME = "smollm2-135m"
BOUNDS = {97: 15.26, 90: 15.5, 80: 15.8, 75: 16.6, 70: 19.0, 60: 28.0}  # file size in MB -> perplexity at most
FRAME_MB = 0.35  # the graph, alignment and what is no weight; sizes are checked on the files
PEERS = (  # of llama.cpp: name, pure
    *(("Q4_K_M", False), ("Q3_K_M", False), ("Q4_0", False), ("IQ4_NL", True), ("Q4_0", True), ("Q3_K_S", True)),
    *(("Q2_K", False), ("Q2_K", True)),
)
CACHE_LOSS = {"int8": 0.5, "int4": 5.0}  # percent
RECOVERED = {4: 65.0, 3: 70.0}  # percent, the best combination; gptq alone half
GRAM_LAYER = "model.layers.7.mlp.up_proj"


def main() -> None:
    options = arguments(__doc__ or "", sections=tuple(SECTIONS), work=True)
    with tempfile.TemporaryDirectory() as fresh:
        run = Run(
            Benchmark("quant"),
            Path(options.work or fresh),
            read_text(data("text/wikitext2_valid.raw.txt.gz")),
            quick=options.quick,
        )
        run.folder.mkdir(parents=True, exist_ok=True)
        for section in options.only:
            SECTIONS[section](run)
    if run.ours and run.peers:
        against_peers(run)
    run.bench.finish(as_json=options.json)


@dataclasses.dataclass
class Run:
    """One run: what is measured, and where checkpoints and bundles lie. `ours`, `peers`: (MB, perplexity)."""

    bench: Benchmark
    folder: Path
    text: str
    quick: bool
    ours: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    peers: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def windows(self) -> int:
        return 8 if self.quick else 24

    def checkpoint(self, name: str, recipe: Callable[[], Recipe], model: str = MODEL_NAME) -> Checkpoint:
        """The checkpoint that a recipe makes, or made the last time."""
        path = self.folder / name
        if not path.exists():
            compress(open_model(model), dataclasses.replace(recipe(), name=name), path, resume=True)
        return open_checkpoint(path)

    def measure(self, name: str, scorer: Scorer, note: str = "") -> float:
        found = perplexity(scorer, self.text, window=WINDOW, max_windows=self.windows)
        self.bench.value(name, found.value, "ppl", n=found.windows, spread=found.spread, note=note)
        return found.value

    def bundle(self, name: str, checkpoint: Checkpoint, target: str = host_target()) -> tuple[float, float]:
        """(perplexity, MB of model.onnx and model.onnx.data) of an exported checkpoint, through the runtime."""
        bundle = self.folder / f"{name}.{target}"
        if not bundle.exists():
            export(checkpoint, bundle, target=find_target(target))
        size = sum(path.stat().st_size for path in bundle.glob(f"{MODEL}*")) / 1e6
        with open_scorer(str(bundle)) as scorer:
            return self.measure(f"{name}, {target}", scorer, f"{size:.1f} MB"), size

    def tokens(self, windows: int) -> list[list[int]]:
        """The windows as `perplexity` cuts them; this model's tokenizer puts nothing before a text."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(open_model(MODEL_NAME).assets["tokenizer.json"].decode())
        ids = tokenizer.encode(self.text, add_special_tokens=False).ids
        return [ids[start : start + WINDOW] for start in range(0, windows * WINDOW, WINDOW)]


def calibrated(steps: Recipe) -> Recipe:
    files = [data("text/c4_calibration.jsonl.gz"), data("text/wikipedia_sample.txt.gz")]
    return calibrated_on(steps, files)


# --- sections ---------------------------------------------------------------------------------------------------------


def source(run: Run) -> None:
    with open_scorer(MODEL_NAME) as scorer:
        ours = run.measure("source, our float32 export", scorer)
    theirs = torch_perplexity(fetch_builtin(MODEL_NAME), run.tokens(run.windows))
    run.bench.value("source, torch", theirs, "ppl", n=run.windows)
    run.bench.at_most("source: our float32 export against torch, % off", 100 * abs(ours / theirs - 1), 0.1)
    for name in ("int8", "int4", "int4-gptq", "lossless"):
        found, _ = run.bundle(name, run.checkpoint(name, lambda name=name: calibrated(load_recipe(name))))  # type: ignore[misc]
        if name == "int8":
            run.bench.at_most("int8: loss of perplexity, %", 100 * (found / ours - 1), 0.5)


def product(run: Run) -> None:
    for size in (80, 60) if run.quick else tuple(BOUNDS):
        name = f"mixed-{size}"
        checkpoint = run.checkpoint(name, lambda size=size: planned(run, size - FRAME_MB))  # type: ignore[misc]
        value, found = run.bundle(name, checkpoint)
        run.ours.append((found, value))
        run.bench.at_most(f"file for {size} MB, MB", found, size)
        run.bench.at_most(f"perplexity at {size} MB", value, BOUNDS[size])


def planned(run: Run, target_mb: float) -> Recipe:
    """The recipe `mixed` for a size; what its survey finds does not depend on it, and is made once."""
    steps = calibrated(within(load_recipe("mixed"), target_mb))
    (step,) = steps.steps
    options = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}  # type: ignore[arg-type]
    return dataclasses.replace(steps, steps=(Surveyed(**options, file=str(run.folder / "survey.json")),))


@dataclasses.dataclass(frozen=True)
class Surveyed(Mixed):
    """`quant.mixed` that keeps its survey in a file."""

    file: str = ""

    def survey(self, survey: Any) -> Mixed:
        file = Path(self.file)
        if file.exists():
            held = json.loads(file.read_text())
            table = Table({name: [tuple(row) for row in rows] for name, rows in held[0].items()}, held[1])
        else:
            table = self.table(survey)
            file.write_text(json.dumps([table.choices, table.vector_bytes]))
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(Mixed)}
        return Mixed(**options).planned(table)


def cache(run: Run) -> None:
    checkpoint = run.checkpoint("lossless", lambda: load_recipe("lossless"))
    found, bytes_of = {}, {}
    for kept in CACHES:
        bundle = run.folder / f"cache {kept}"
        if not bundle.exists():
            export(checkpoint, bundle, target=find_target(host_target()), cache=kept)
        bytes_of[kept] = Bundle.open(bundle).spec.token_bytes
        with open_scorer(str(bundle)) as scorer:
            found[kept] = run.measure(f"lossless, cache in {kept}", scorer, f"{bytes_of[kept]} bytes a token")
    for kept, bound in CACHE_LOSS.items():
        loss = 100 * (found[kept] / found["float16"] - 1)
        run.bench.at_most(f"cache in {kept}: loss of perplexity, %", loss, bound)


def peers(run: Run) -> None:
    gguf = fetch_builtin(MODEL_NAME)
    tokens = run.tokens(run.windows)
    for kind, pure in (("Q4_1", False), *(PEERS[:1] + PEERS[3:4] if run.quick else PEERS)):
        name = f"llama.cpp {kind}{', pure' if pure else ''}"
        path = gguf if kind == "Q4_1" else quantised_by_llama(gguf, run.folder / f"{name}.gguf", kind, pure=pure)
        value, size = llama_perplexity(path, tokens), path.stat().st_size / 1e6
        run.bench.value(name, value, "ppl", n=len(tokens), note=f"{size:.1f} MB" + (", the source" * (path == gguf)))
        run.peers.append((size, value))


def against_peers(run: Run) -> None:
    """At each of our sizes the best of llama.cpp's that is no larger, if it has one."""
    for size, value in run.ours:
        rivals = [theirs for mb, theirs in run.peers if mb <= math.ceil(size)]
        if rivals:
            run.bench.at_most(f"ours at {size:.1f} MB over llama.cpp's best there or smaller", value / min(rivals), 1.0)


def rotated(run: Run) -> None:
    tokens = run.tokens(12)

    def made(suffix: str) -> float:
        name = f"rotated{suffix}"
        checkpoint = run.checkpoint(name, lambda: calibrated(load_recipe(RECIPES / f"{name}.toml")))
        value = view_perplexity(checkpoint, tokens)
        run.bench.value(f"{name}, torch", value, "ppl", n=len(tokens))
        return value

    exact = made("")
    run.bench.at_most("rotated, int8: loss of perplexity, %", 100 * (made("-int8") / exact - 1), 0.2)
    for bits, bound in RECOVERED.items():
        lost = math.log(made(f"-int{bits}") / exact)
        back = {name: 100 * (1 - math.log(made(f"-int{bits}-{name}") / exact) / lost) for name in ("gptq", "refined")}
        for name, value in back.items():
            run.bench.value(f"rotated, int{bits}, {name}: recovered", value, "%", n=len(tokens))
        run.bench.at_least(f"rotated, int{bits}: the best combination recovers, %", max(back.values()), bound)
        run.bench.at_least(f"rotated, int{bits}: gptq alone recovers, %", back["gptq"], 50)


def solver(run: Run) -> None:
    """Output errors of ours over the definition's: 0.99 to 1.01 is the same, below is better."""
    checkpoint = open_model(MODEL_NAME)
    W = checkpoint.weight(GRAM_LAYER).dense()[:256]
    table = checkpoint.weight("model.embed_tokens").dense()
    X = table[np.array(run.tokens(4)).reshape(-1)].astype(np.float64)
    X *= checkpoint.vector("model.layers.7.post_attention_layernorm.weight")
    H = damped(X.T @ X, 0.01, where=GRAM_LAYER)
    for bits in (4, 3):
        lattice = fit(in_blocks(W, Grid(bits, 32, "zero")), Grid(bits, 32, "zero"), where=GRAM_LAYER)
        ours = output_error(W, restored(gptq(W, Metric(H), lattice), lattice), H)
        theirs = output_error(W, by_definition(W, H, lattice), H)
        run.bench.at_most(f"gptq at {bits} bits: output error over the definition's in float64", ours / theirs, 1.01)


def by_definition(W: Any, H: Any, lattice: Any) -> Any:
    """GPTQ column by column in float64, by the inverse of what is left of H (arXiv 2210.17323, equations 2 and 3)."""
    rest, inverse = W.astype(np.float64), np.linalg.inv(H)
    result = np.empty_like(rest)
    for j in range(W.shape[1]):
        at = j // lattice.grid.block
        s, z = (part[:, at].astype(np.float64) for part in (lattice.scale, lattice.zero))
        q = np.clip(np.rint(rest[:, j] / np.where(s == 0, np.inf, s) + z), 0, lattice.grid.top)
        result[:, j] = s * (q - z)
        rest -= np.outer((rest[:, j] - result[:, j]) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result.astype(np.float32)


MEASURED = """
import resource, sys
from pathlib import Path
from edgekit.compress import compress
from edgekit.model.sources import open_model
from edgekit.recipe import calibrated_on, load_recipe

compress(open_model(sys.argv[1]), calibrated_on(load_recipe("int4-gptq"), map(Path, sys.argv[3:])), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def work(run: Run) -> None:
    models = {"smollm2-135m": MODEL_NAME}
    if not run.quick:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from test_compress import large_folder

        folder = run.folder / "large"
        models["synthetic 1.1B"] = str(folder if folder.exists() else large_folder(folder))
    text = str(data("text/c4_calibration.jsonl.gz"))
    for name, model in models.items():
        with tempfile.TemporaryDirectory(dir=run.folder) as output:
            started = time.perf_counter()
            command = [sys.executable, "-c", MEASURED, model, f"{output}/small", text]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, peak = time.perf_counter() - started, float(done.stdout.split()[-1])
        run.bench.value(f"{name}, int4 by gptq", seconds, "s")
        run.bench.value(f"{name}, int4 by gptq: peak memory", peak / 1e9, "GB")
        if name == "smollm2-135m":
            run.bench.at_most("int4 by gptq of the whole model, s", seconds, 120)
        else:
            run.bench.at_most("synthetic 1.1B, int4 by gptq: peak memory, GB", peak / 1e9, 8)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "source": source,
    "product": product,
    "cache": cache,
    "peers": peers,
    "rotated": rotated,
    "solver": solver,
    "work": work,
}


if __name__ == "__main__":
    main()
