"""One run of a recipe over a model: what is to be done, the calibration walk, its surveys and its predicted sizes.

`edgekit.compress` does it, `edgekit.forecast` says what it would do.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.checkpoint import Checkpoint
from edgekit.errors import UserError
from edgekit.journal import NAME as JOURNAL
from edgekit.journal import Identity, Journal
from edgekit.manifest import versions
from edgekit.model.encoder_config import step_facts
from edgekit.recipe import Recipe, parse_recipe
from edgekit.step import StepContext, Surveyor, outline_of, renamed

if TYPE_CHECKING:
    from edgekit.calibrate import Walk


@dataclass(frozen=True)
class Progress:
    """One more block is done: `done` of `total`, its name, and its bytes before the first and after the last step.

    Before them, while a step surveys the model, `block` is "survey" and the sizes are 0; "training" while one heals.
    """

    block: str
    done: int
    total: int
    before_bytes: int
    after_bytes: int


@dataclass(frozen=True)
class Job:
    """What is to be done: the source, the same as the steps want to see it, and the steps."""

    source: Checkpoint
    prepared: Checkpoint
    recipe: Recipe

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe) -> Job:
        """Prepare all steps; nothing large is read. Raises UserError or ModelError when one does not suit the model."""
        if step_facts(checkpoint.config).tied and checkpoint.has("lm_head"):  # some writers store the tied table twice
            names = {name: name for name in checkpoint.tensors.names() if not name.startswith("lm_head.")}
            checkpoint = renamed(checkpoint, names, config=checkpoint.config)
        prepared = checkpoint
        for step in recipe.steps:
            prepared = step.prepare(prepared)
        return cls(checkpoint, prepared, recipe)

    @property
    def context(self) -> StepContext:
        return StepContext(step_facts(self.prepared.config), self.recipe.seed)


def begin_walk(job: Job, work: Path, activations_bytes: int | None, compute: str) -> Walk | None:
    """The walk of the calibration text, where a step needs one."""
    needy = next((step for step in job.recipe.steps if step.needs not in ("weights", "model")), None)
    if needy is None:
        return None
    try:
        from edgekit.calibrate import begin_walk
    except ModuleNotFoundError as problem:
        raise UserError(
            f"{needy.name} as set here needs {problem.name}: pip install 'edgekit[compress]', or choose a method that"
            " takes no calibration, such as rtn"
        ) from problem
    return begin_walk(job.source, job.prepared, job.recipe, job.context, work, activations_bytes, compute)


def identity(job: Job, walk: Walk | None) -> Identity:
    found, calibration = _versions(), ""
    if walk is not None:
        import torch

        compute = str(walk.room.compute)
        found |= versions("torch")
        found |= {"threads": str(torch.get_num_threads()), "compute": compute}  # they decide the order of additions
        calibration = walk.record.sha256
    return Identity(_digest(job.source), job.recipe.sha256, found, calibration)


def survey(
    job: Job, walk: Walk | None, journal: Journal, work: Path, on_progress: Callable[[Progress], None] | None
) -> tuple[Job, Walk | None, Journal]:
    """The job with the plans of its steps that make one; they are made once and kept in the journal."""
    surveyors = [index for index, step in enumerate(job.recipe.steps) if isinstance(step, Surveyor)]
    if walk is None or not surveyors:
        return job, walk, journal
    from edgekit.calibrate import survey_of

    if journal.surveyed:
        job = Job.of(job.source, parse_recipe(journal.surveyed, where=str(work / JOURNAL)))
        walk.follow(job.prepared, job.recipe.steps, job.context)
    else:

        def report(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(Progress("survey", done, total, 0, 0))

        for index in surveyors:
            step = job.recipe.steps[index]
            assert isinstance(step, Surveyor)
            planned = step.survey(survey_of(walk, index, report))
            steps = (*job.recipe.steps[:index], planned, *job.recipe.steps[index + 1 :])
            job = Job.of(job.source, dataclasses.replace(job.recipe, steps=steps))
            walk.follow(job.prepared, job.recipe.steps, job.context)
        total = len(job.prepared.blocks)
        journal = dataclasses.replace(journal, surveyed=job.recipe.resolved(), total=total)
        journal.save(work)
    return job, walk, journal


def _digest(checkpoint: Checkpoint) -> str:
    """A digest of the weights to be read: the source's own, joined with the files' of a compressed checkpoint."""
    if checkpoint.manifest is None:
        return checkpoint.source.digest
    files = sorted((name, record.sha256) for name, record in checkpoint.manifest.files.items())
    return hashlib.sha256(repr((checkpoint.source.digest, files)).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return versions("numpy", "safetensors", "ml-dtypes", "gguf")


@dataclass(frozen=True)
class BlockPlan:
    """What will become of one block. Bytes before count floats as float32, the form in which steps see them."""

    name: str
    before_bytes: int
    after_bytes: int
    seconds: float
    peak_bytes: int


def predict(job: Job) -> tuple[BlockPlan, ...]:
    plans = []
    for name in job.prepared.blocks:
        outline = outline_of(job.prepared, name)
        seconds, peak = 0.0, 2 * outline.size_bytes  # reading may convert a matrix
        for step in job.recipe.steps:
            predicted = step.predict(outline, job.context)
            peak = max(peak, outline.size_bytes + predicted.outline.size_bytes + predicted.workspace_bytes)
            outline, seconds = predicted.outline, seconds + predicted.seconds
        peak = max(peak, 2 * outline.size_bytes)  # writing copies the block
        before_bytes = outline_of(job.source, name).size_bytes
        plans.append(BlockPlan(name, before_bytes, outline.size_bytes, seconds, peak))
    return tuple(plans)
