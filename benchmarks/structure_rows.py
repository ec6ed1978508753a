"""The rows of `structure.py`: as much taken out of the decoder in different ways, and what is left of the model.

The share is that of the decoder's 106.2 million parameters; three and six of thirty layers are 10 % and 20 % of them.

    planned            heads and neurons against each other, by measured sensitivity (`prune.planned`)
    neurons            planned over the layers, 4/3 of the share since the MLPs are three quarters
    dropped            layers of least influence (ShortGPT), without repair and with
    merged             pairs of highest NPIB (MKA), without repair and with
    dropped alike      the layers that merging takes away, dropped: the control for merging
    plain SVD          the same share of each matrix, truncated without looking at what it reads
    whitened SVD       the same in the metric of the inputs; planned ranks: by measured sensitivity
    MPO                two sites, refined by least squares on the inputs
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import data

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.perplexity import log_likelihoods
from edgekit.merge.drop import Drop
from edgekit.merge.layers import Merge
from edgekit.model.sources import open_model
from edgekit.prune.steps import Neurons, Planned
from edgekit.recipe import Recipe
from edgekit.step import CalibrationOptions, Step
from edgekit.tn.mpo_step import Mpo
from edgekit.tn.steps import LowRank

MODEL_NAME = "smollm2-135m"
WINDOW = 1024
LAYERS = {10: 3, 20: 6}
TEXTS = ("wikipedia_sample.txt.gz", "c4_calibration.jsonl.gz")
ROWS = (
    "planned",
    "merged",
    "merged, repaired",
    "dropped alike",
    "dropped",
    "dropped, repaired",
    "neurons",
    "planned ranks",
    "whitened SVD",
    "plain SVD",
    "MPO",
)


@dataclass(frozen=True)
class Row:
    """One way at one share: seconds of work, perplexity on the first windows and on those nothing was chosen on."""

    name: str
    percent: int
    samples: int
    windows: int
    seconds: float
    perplexity: float
    fresh: float
    options: dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A folder where finished rows are kept, so that a run that was stopped goes on."""

    folder: Path

    def find(self, name: str, percent: int, samples: int, windows: int) -> Row | None:
        path = self.folder / "rows.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            row = Row(**json.loads(line))
            if (row.name, row.percent, row.samples, row.windows) == (name, percent, samples, windows):
                return row
        return None

    def keep(self, row: Row) -> Row:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row.__dict__) + "\n")
        return row


def measured(store: Store, name: str, percent: int, *, samples: int, windows: int, ids: list[int]) -> Row:
    """The row, from the store or by doing its work. The planned model's folder stays in the store."""
    found = store.find(name, percent, samples, windows)
    if found is not None:
        return found
    started = time.perf_counter()
    folder = store.folder / f"{name} {percent} {samples}"
    if name == "source":
        checkpoint = open_model(MODEL_NAME)
    elif folder.exists():
        checkpoint = open_checkpoint(folder)
    else:
        checkpoint = compressed(folder, *steps(store, name, percent, samples, windows), samples=samples)
    seconds = time.perf_counter() - started
    options = checkpoint.manifest.steps[-1].options if checkpoint.manifest else {}
    fresh = windows // 2 if name in ("source", "planned", "neurons") else 0
    losses = [window_loss(checkpoint, cut(ids, first, count)) for first, count in ((0, windows), (24, fresh)) if count]
    row = Row(name, percent, samples, windows, seconds, losses[0], losses[1] if fresh else 0.0, dict(options))
    if name not in ("source", "planned"):
        shutil.rmtree(folder)
    return store.keep(row)


def steps(store: Store, name: str, percent: int, samples: int, windows: int) -> tuple[Step, ...]:
    """The recipe of a row."""
    share, count = percent / 100, LAYERS[percent]
    if name in ("merged, repaired", "dropped alike"):
        merged = store.find("merged", percent, samples, windows)
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
        "MPO": Mpo(keep=1 - share),
    }
    return (table[name],)


def compressed(output: Path, *steps: Step, samples: int = 16, source: Checkpoint | None = None) -> Checkpoint:
    """The folder of the model after `steps`, calibrated on Wikipedia and C4."""
    files = tuple(str(data(f"text/{name}")) for name in TEXTS)
    recipe = Recipe(output.name, "", steps, calibration=CalibrationOptions(files, samples))
    compress(source or open_model(MODEL_NAME), recipe, output)
    return open_checkpoint(output)


def cut(ids: list[int], first: int, count: int) -> list[list[int]]:
    """Windows `first` and on of a text."""
    return [ids[at * WINDOW : (at + 1) * WINDOW] for at in range(first, first + count)]


def window_loss(checkpoint: Checkpoint, windows: list[list[int]]) -> float:
    """Perplexity of the second halves of the windows, in torch and float32, layer by layer."""
    import torch

    from edgekit.model.torch_view import Layer, rms_norm

    config = checkpoint.decoder
    with torch.inference_mode():
        table = torch.from_numpy(checkpoint.weight("model.embed_tokens").dense())
        states = [table[torch.tensor([tokens])] for tokens in windows]
        for index in range(config.layers):
            layer = Layer.of(checkpoint.read_block(f"layers.{index}"), config)
            states = [layer(state) for state in states]
        gain = torch.from_numpy(checkpoint.vector("model.norm.weight"))
        losses = []
        for state, tokens in zip(states, windows, strict=True):
            logits = rms_norm(state[0, WINDOW // 2 : -1], gain, config.norm_eps) @ table.T
            losses.append(-log_likelihoods(logits.numpy(), tokens[WINDOW // 2 + 1 :]))
    return float(np.exp(np.concatenate(losses).mean()))
