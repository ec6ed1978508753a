"""The rows of `structure.py`: as much taken out of the decoder in different ways, and what is left of the model.

The share is that of the decoder's 106.2 million parameters; three and six of thirty layers are 10 % and 20 % of them.

    mixture            the planned mixture: neurons first, then ranks of what is left, both by measured sensitivity
    planned            heads and neurons against each other, by measured sensitivity (`prune.planned`)
    neurons            planned over the layers, 4/3 of the share since the MLPs are three quarters
    dropped            layers of least influence (ShortGPT), without repair and with
    merged             pairs of highest NPIB (MKA), without repair and with
    dropped alike      the layers that merging takes away, dropped: the control for merging
    plain SVD          the same share of each matrix, truncated without looking at what it reads
    whitened SVD       the same in the metric of the inputs; planned ranks: by measured sensitivity;
                       following: and each matrix corrected for what the ones before it lost
    MPO                two sites, refined by least squares on the inputs

    50 MB, 60 MB       bits for each matrix within the size (`quant.mixed`), of the planned model or, at 0 %, the source

Each is scored on windows 1 to 24 of the text, whose first half settings were once picked on, and on windows 25 to 48,
which nothing was picked on ("fresh"). Rows of one store may come from several machines; each says from which.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import data

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.perplexity import log_likelihoods
from edgekit.host import host_device
from edgekit.merge.drop import Drop
from edgekit.merge.layers import Merge
from edgekit.model.sources import open_model
from edgekit.prune.steps import Neurons, Planned
from edgekit.quant.mixed import Mixed
from edgekit.recipe import Recipe
from edgekit.step import CalibrationOptions, Step
from edgekit.tn.mpo_step import Mpo
from edgekit.tn.steps import LowRank
from edgekit.weight import stored_parts

MODEL_NAME = "smollm2-135m"
WINDOW = 1024
LAYERS = {10: 3, 20: 6}
TEXTS = ("wikipedia_sample.txt.gz", "c4_calibration.jsonl.gz")
CHAINS = (  # of rows: those of one chain are measured one after another, the longest chains first
    ("mixture",),
    ("planned",),
    ("neurons",),
    ("MPO",),
    ("planned ranks",),
    ("planned ranks, following",),
    ("merged", "merged, repaired", "dropped alike"),
    ("dropped, repaired",),
    ("whitened SVD",),
    ("plain SVD",),
    ("dropped",),
)
FRESH = 24  # the first window that nothing was picked on
FOLLOW = 0.3
MIXTURES: dict[int, tuple[float, float, float]] = {  # what neurons take of the share, `follow` of neurons and of ranks
    10: (0.35, FOLLOW, 0.0),
    20: (0.5, 0.0, FOLLOW),  # picked on windows 1 to 24 among 0.35, 0.5, 0.65 and, at 0.5, which of the two follows
}


@dataclass(frozen=True)
class Row:
    """One way at one share: seconds of work, perplexity on the first windows and on as many fresh ones. `parameters`:
    what is left in the decoder's layers, 0 where a row was measured before it was counted."""

    name: str
    percent: int
    samples: int
    windows: int
    seconds: float
    perplexity: float
    fresh: float
    options: dict[str, Any]
    machine: str = ""
    parameters: int = 0


@dataclass(frozen=True)
class Work:
    """How rows are measured: calibration windows, scored windows and where torch computes."""

    samples: int
    windows: int
    ids: list[int] = field(repr=False)
    compute: str = "cpu"


@dataclass(frozen=True)
class Store:
    """A folder where finished rows are kept, so that a run that was stopped goes on."""

    folder: Path

    def find(self, name: str, percent: int, work: Work) -> Row | None:
        path = self.folder / "rows.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            row = Row(**json.loads(line))
            if (row.name, row.percent, row.samples, row.windows) == (name, percent, work.samples, work.windows):
                return row
        return None

    def keep(self, row: Row) -> Row:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row.__dict__) + "\n")
        return row


def measured(store: Store, name: str, percent: int, work: Work) -> Row:
    """The row, from the store or by doing its work."""
    found = store.find(name, percent, work)
    if found is not None:
        return found
    started = time.perf_counter()
    if name == "source":
        checkpoint = open_model(MODEL_NAME)
    else:
        checkpoint = model_of(store, name, percent, work)
    seconds = time.perf_counter() - started
    made = [dict(step.options) for step in checkpoint.manifest.steps] if checkpoint.manifest else [{}]
    options = made[-1] if name != "mixture" else {"steps": made}
    row = scored(name, percent, checkpoint, work, seconds, options)
    if name not in ("source", "planned"):
        shutil.rmtree(store.folder / f"{name} {percent} {work.samples}")
    return store.keep(row)


def scored(name: str, percent: int, checkpoint: Checkpoint, work: Work, seconds: float, options: dict[str, Any]) -> Row:
    """The row of a model."""
    losses = [window_loss(checkpoint, cut(work.ids, first, work.windows), work.compute) for first in (0, FRESH)]
    at, left = machine(work.compute), parameters(checkpoint)
    return Row(name, percent, work.samples, work.windows, seconds, *losses, options, at, left)


def parameters(checkpoint: Checkpoint) -> int:
    """Numbers in the matrices of the decoder's layers; of a factored one those of its factors."""
    blocks = (checkpoint.read_block(f"layers.{index}") for index in range(checkpoint.decoder.layers))
    weights = (item for block in blocks for item in block.matrices.items())
    return sum(math.prod(part.shape) for item in weights for _, part in stored_parts(*item))


def measured_beside(store: Store, chains: Sequence[tuple[tuple[str, ...], int]], work: Work, *, jobs: int) -> None:
    """Measure chains of rows (names, percent) in `jobs` processes; what is in the store already costs nothing."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(_measure_chain, store, names, percent, work) for names, percent in chains]:
            done.result()


def _measure_chain(store: Store, names: tuple[str, ...], percent: int, work: Work) -> None:
    for name in names:
        row = measured(store, name, percent, work)
        print(f"{name}, {percent} %: {row.perplexity:.2f} in {row.seconds:.0f} s", file=sys.stderr, flush=True)


def model_of(store: Store, name: str, percent: int, work: Work) -> Checkpoint:
    """The model of a row. The folder stays in the store; a row that was measured elsewhere says what was chosen."""
    folder = store.folder / f"{name} {percent} {work.samples}"
    if folder.exists():
        return open_checkpoint(folder)
    start = model_of(store, "planned", percent, work) if name.endswith("MB") and percent else None
    known, made = store.find(name, percent, work), steps(store, name, percent, work)
    if known is not None and (known.options.get("plan") or known.options.get("steps")):
        plans = [tuple(options["plan"]) for options in known.options.get("steps", [known.options])]
        made = tuple(dataclasses.replace(step, plan=plan) for step, plan in zip(made, plans, strict=True))  # type: ignore[type-var]
    if known is not None and name == "dropped":
        made = (Drop(layers=tuple(known.options["layers"]), repair=0.0),)
    return compressed(folder, *made, samples=work.samples, source=start, compute=work.compute)


def machine(compute: str) -> str:
    """Where a row was computed."""
    host = host_device().fingerprint()["device"]
    if not compute.startswith("cuda"):
        return host
    import torch

    return f"{torch.cuda.get_device_name(compute)}, torch {torch.__version__}; {host}"


def steps(store: Store, name: str, percent: int, work: Work) -> tuple[Step, ...]:
    """The recipe of a row."""
    if name.endswith(" MB"):
        return (Mixed(target_mb=float(name.removesuffix(" MB"))),)
    share, count = percent / 100, LAYERS[percent]
    if name == "mixture":
        part, follows, ranks_follow = MIXTURES[percent]
        pruned = Neurons(remove=round(share * part * 4 / 3, 6), follow=follows)
        return pruned, LowRank(budget=(1 - share) / (1 - share * part), multiple=16, follow=ranks_follow)
    if name in ("merged, repaired", "dropped alike"):
        merged = store.find("merged", percent, work)
        assert merged is not None, "merging comes first: it says which layers"
        layers, ratios = tuple(merged.options["layers"]), tuple(merged.options["ratios"])
        return (Merge(layers=layers, ratios=ratios),) if name != "dropped alike" else (Drop(layers=layers, repair=0.0),)
    table: dict[str, Step] = {
        "planned": Planned(remove=share),
        "neurons": Neurons(remove=share * 4 / 3),
        "merged": Merge(count=count, repair=0.0),
        "dropped": Drop(count=count, repair=0.0),
        "dropped, repaired": Drop(count=count),
        "plain SVD": LowRank(keep=1 - share, multiple=1, whiten=False),
        "whitened SVD": LowRank(keep=1 - share, multiple=1),
        "planned ranks": LowRank(budget=1 - share, multiple=16),
        "planned ranks, following": LowRank(budget=1 - share, multiple=16, follow=FOLLOW),
        "MPO": Mpo(keep=1 - share),
    }
    return (table[name],)


def compressed(
    output: Path, *steps: Step, samples: int = 16, source: Checkpoint | None = None, compute: str = "cpu"
) -> Checkpoint:
    """The folder of the model after `steps`, calibrated on Wikipedia and C4."""
    files = tuple(str(data(f"text/{name}")) for name in TEXTS)
    recipe = Recipe(output.name, "", steps, calibration=CalibrationOptions(files, samples))
    compress(source or open_model(MODEL_NAME), recipe, output, compute=compute, resume=True)
    return open_checkpoint(output)


def cut(ids: list[int], first: int, count: int) -> list[list[int]]:
    """Windows `first` and on of a text."""
    return [ids[at * WINDOW : (at + 1) * WINDOW] for at in range(first, first + count)]


def window_loss(checkpoint: Checkpoint, windows: list[list[int]], compute: str = "cpu") -> float:
    """Perplexity of the second halves of the windows, in torch and float32, layer by layer."""
    import torch

    from edgekit.model.torch_view import Layer, rms_norm, torch_device

    config, on = checkpoint.decoder, torch_device(compute)
    with torch.inference_mode():
        table = torch.from_numpy(checkpoint.weight("model.embed_tokens").dense()).to(on)
        states = [table[torch.tensor([tokens], device=on)] for tokens in windows]
        for index in range(config.layers):
            layer = Layer.of(checkpoint.read_block(f"layers.{index}"), config, on)
            states = [layer(state) for state in states]
        gain = torch.from_numpy(checkpoint.vector("model.norm.weight")).to(on)
        losses = []
        for state, tokens in zip(states, windows, strict=True):
            logits = rms_norm(state[0, WINDOW // 2 : -1], gain, config.norm_eps) @ table.T
            losses.append(-log_likelihoods(logits.numpy(force=True), tokens[WINDOW // 2 + 1 :]))
    return float(np.exp(np.concatenate(losses).mean()))
