"""docs/healing-curves.png from docs/results/heal.jsonl: held-out KL over training, and what each optimiser reached."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from heal import OPTIMIZERS, RECORDED

RUNS = ("int3", "65MB", "60MB", "53MB", "45MB", "fifth", "fifth-int3", "int2")


def main() -> None:
    rows = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    last = {row["name"]: row for row in rows if "curve" in row}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name in RUNS:
        points = [
            (step * 32 * 1024 / 1e6, held) for step, _, held in last[name]["curve"] if held is not None
        ]  # batches of 32 windows of 1,024 tokens
        left.plot(*zip(*points, strict=True), marker=".", label=name)
    left.set(xlabel="tokens trained on, millions", ylabel="held-out KL, nat a token", yscale="log")
    left.legend()
    for optimizer in OPTIMIZERS:
        mine = [
            row
            for row in rows
            if row["name"] == "optimizers" and row["optimizer"] == optimizer and row["multipliers"] == "none"
        ]
        best = {row["rate"]: row["held_out"] for row in reversed(mine)}
        right.plot(*zip(*sorted(best.items()), strict=True), marker="o", label=optimizer)
    right.set(xlabel="learning rate", ylabel="held-out KL after 1.6 M tokens", xscale="log", yscale="log")
    right.legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs" / "healing-curves.png", dpi=90)


if __name__ == "__main__":
    main()
