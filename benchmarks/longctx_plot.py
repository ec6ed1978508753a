"""docs/longctx-*.png from a run's JSON: speed against context, and perplexity's loss against budget.

python benchmarks/longctx.py --json > longctx.json; python benchmarks/longctx_plot.py longctx.json
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.ticker import NullLocator

DOCS = Path(__file__).parents[1] / "docs"
DECODE = re.compile(r"decode after (\d+), (.+)")
LOSS = re.compile(r"perplexity at (\d+), budget (\d+), (.+): loss")


def main() -> None:
    rows = [row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())["measurements"]]
    speeds: dict[str, list[tuple[int, float]]] = defaultdict(list)
    losses: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if found := DECODE.fullmatch(row["name"]):
            speeds[found[2]].append((int(found[1]), row["value"]))
        if found := LOSS.fullmatch(row["name"]):
            losses[found[1], found[3]].append((int(found[2]), row["value"]))
    if speeds:
        figure, axes = plt.subplots(figsize=(6, 4))
        for name, points in speeds.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(xlabel="tokens of context", ylabel="tokens a second", xscale="log", yscale="log")
        contexts = sorted({context for points in speeds.values() for context, _ in points})
        ticks(axes.xaxis, contexts)
        ticks(axes.yaxis, [10, 20, 50, 100, 200, 400])
        axes.tick_params(axis="x", labelrotation=40)
        axes.legend()
        save(figure, "longctx-speed.png")
    if losses:
        figure, both = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
        for axes, window in zip(both, ("4096", "8192"), strict=True):
            for (at, name), points in losses.items():
                if at == window:
                    axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
            axes.set(title=f"{window} tokens", xlabel="budget", xscale="log", yscale="symlog")
            ticks(axes.xaxis, [64, 128, 256])
            ticks(axes.yaxis, [0, 1, 10, 100])
        both[0].set_ylabel("loss of perplexity, %")
        both[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "longctx-quality.png")


def ticks(axis: Axis, places: list[int]) -> None:
    axis.set_ticks(places, [f"{place:,}" for place in places])
    axis.set_minor_locator(NullLocator())


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / name, dpi=90)


if __name__ == "__main__":
    main()
