"""What a recipe would make of a model: sizes, memory and time, for --dry-run. Nothing is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgekit.checkpoint import Checkpoint
from edgekit.job import BlockPlan, Job, Progress, begin_walk, identity, predict, survey
from edgekit.journal import Journal
from edgekit.recipe import Recipe
from edgekit.report import Measurement
from edgekit.step import Surveyor


@dataclass(frozen=True)
class Plan:
    """What `compress` would do. `recipe` is TOML with all defaults; sizes are exact but for the shards' headers.

    `peak_memory` leaves out pages of the source's files, which the system maps and takes back as it likes. `seconds`
    is the work of the steps; reading the source and writing come on top.
    """

    recipe: str
    blocks: tuple[BlockPlan, ...]
    before_bytes: int
    after_bytes: int
    peak_memory: Measurement
    seconds: Measurement

    def to_text(self) -> str:
        """The plan for a terminal."""
        rows = [(block.name, block.before_bytes, block.after_bytes) for block in self.blocks]
        lines = [self.recipe, f"{'block':<12}{'before, MB':>12}{'after, MB':>12}"]
        for name, before, after in [*rows, ("all", self.before_bytes, self.after_bytes)]:
            lines.append(f"{name:<12}{before / 1e6:>12.2f}{after / 1e6:>12.2f}")
        for row in (self.peak_memory, self.seconds):
            value, unit = (row.value or 0.0, row.unit) if row.unit == "s" else ((row.value or 0.0) / 1e6, "MB")
            lines.append(f"{row.name.replace('_', ' ')}: {value:.1f} {unit} ({row.how})")
        return "\n".join(lines)


def plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    compute: str = "cpu",
) -> Plan:
    """Predict sizes, memory and time from shapes and a timing of well under a second; nothing is written.

    A step that surveys the model does so first, on the calibration text, and its plan is in the recipe.
    Raises UserError or ModelError as `compress` does for a recipe that does not suit the model.
    """
    job = Job.of(checkpoint, recipe)
    if any(isinstance(step, Surveyor) for step in recipe.steps):
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            walk = begin_walk(job, Path(folder), None, compute)
            job, _, _ = survey(job, walk, Journal(identity(job, walk), 0), Path(folder), on_progress)
        recipe = job.recipe
    blocks = predict(job)
    peak = psutil.Process().memory_info().rss + max(block.peak_bytes for block in blocks)
    return Plan(
        recipe=recipe.resolved(),
        blocks=blocks,
        before_bytes=sum(block.before_bytes for block in blocks),
        after_bytes=sum(block.after_bytes for block in blocks),
        peak_memory=Measurement("peak_memory", float(peak), "bytes", how="predicted"),
        seconds=Measurement("seconds", sum(block.seconds for block in blocks), "s", how="predicted"),
    )
