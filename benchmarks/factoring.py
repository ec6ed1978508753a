"""Recipes of factored models for `structure.py`: as many numbers of the decoder removed, in different ways.

    uv run benchmarks/factoring.py ROW KEEP --windows 4     one row by itself: seconds, what is left, perplexity

Calibration: C4 and Wikipedia. Perplexity: raw WikiText-2 validation, on the float factors in torch. No healing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Benchmark, data
from quant import MODEL_NAME, cut, view_perplexity

from edgekit.checkpoint import Checkpoint, open_checkpoint
from edgekit.compress import compress
from edgekit.evaluate.scorer import open_scorer
from edgekit.evaluate.text import read_text
from edgekit.model.sources import open_model
from edgekit.recipe import Recipe, calibrated_on, parse_recipe

ROWS = {  # the step of each row; KEEP is the share of the decoder's numbers that stays
    "plain SVD": 'use = "tn.lowrank"\nkeep = KEEP\nmultiple = 1\nwhiten = false',
    "whitened SVD": 'use = "tn.lowrank"\nkeep = KEEP\nmultiple = 1',
    "planned ranks": 'use = "tn.lowrank"\nbudget = KEEP\nmultiple = 16',
    "planned ranks, following": 'use = "tn.lowrank"\nbudget = KEEP\nmultiple = 16\nfollow = 0.5',
    "MPO": 'use = "tn.mpo"\nkeep = KEEP',
}


def recipe(row: str, keep: float, *, samples: int = 16) -> Recipe:
    """The recipe of a row of `ROWS` on the calibration text."""
    text = f'name = "{row}"\n[calibration]\nsamples = {samples}\n[[step]]\n{ROWS[row].replace("KEEP", str(keep))}\n'
    files = [data("text/c4_calibration.jsonl.gz"), data("text/wikipedia_sample.txt.gz")]
    return calibrated_on(parse_recipe(text, where=row), files)


def numbers(checkpoint: Checkpoint) -> int:
    """How many numbers the matrices of the decoder layers hold."""
    total = 0
    for name, (matrices, _) in checkpoint.blocks.items():
        for module in matrices if name.startswith("layers.") else ():
            total += sum(int(np.prod(checkpoint.shape(part))) for part in checkpoint.parts(module))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=list(ROWS))
    parser.add_argument("keep", type=float)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    bench = Benchmark("factoring")
    source = open_model(MODEL_NAME)
    with tempfile.TemporaryDirectory() as folder, open_scorer(MODEL_NAME) as scorer:
        started = time.perf_counter()
        compress(source, recipe(options.row, options.keep, samples=options.samples), Path(folder) / "small")
        bench.value(f"{options.row}: seconds", time.perf_counter() - started, "s")
        small = open_checkpoint(Path(folder) / "small")
        bench.value(f"{options.row}: numbers left", 100 * numbers(small) / numbers(source), "%")
        text = read_text(data("text/wikitext2_valid.raw.txt.gz"))
        view_perplexity(bench, options.row, small, cut(scorer, text, options.windows))
    bench.finish(as_json=False)


if __name__ == "__main__":
    main()
