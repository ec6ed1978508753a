"""Compress a checkpoint: stream its blocks through a recipe's steps into a new folder.

For each block in order: read it, let every step work on it, write its shard, flush it to disk, note it in the journal,
free it. So memory holds one block before and after a step, whatever the model's size, and a killed run goes on where it
stopped (`edgekit.journal`) with the same bytes. The target appears by one rename, when all of it is there.

Where a step needs activations, the calibration text walks along (`edgekit.calibrate`, which needs torch): each block is
given what the blocks before it, as compressed, make of the text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING

import psutil
import safetensors

from edgekit.checkpoint import Checkpoint, refuse_overlap, write_block, write_frame
from edgekit.errors import BudgetError, UserError
from edgekit.folder import digest, explain_write_errors, publish, refuse_existing, sync
from edgekit.journal import NAME as JOURNAL
from edgekit.journal import DoneBlock, Identity, Journal, StepOnBlock, begin, locked_work_folder
from edgekit.manifest import FileRecord, Manifest, StepRecord, now, record_files, versions
from edgekit.model.encoder_config import step_facts
from edgekit.recipe import Recipe, parse_recipe
from edgekit.report import Measurement
from edgekit.step import StepContext, Surveyor, join_facts, options, outline_of, renamed

if TYPE_CHECKING:
    from edgekit.calibrate import Walk

RECIPE = "recipe.toml"


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


def compress(
    checkpoint: Checkpoint,
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    teacher: Checkpoint | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    activations_bytes: int | None = None,
    compute: str = "cpu",
) -> Manifest:
    """Write `checkpoint`, changed by `recipe`, to the new folder `output`, and return its manifest.

    A recipe that heals runs in passes (`edgekit.passes`); `teacher` then goes before the one that it names.

    `resume` goes on with a run that was killed, and begins one where there is none. `force` replaces an output that
    stands there, and discards a killed run unless `resume` is set. Hidden states of calibration take at most
    `activations_bytes` of memory (half of what is free when None); what is beyond spills to disk, beside the output.
    `compute` is the torch device that runs the calibration text, such as "cuda"; the steps' algebra stays on the CPU.

    Raises UserError: the output exists, cannot be written, or overlaps the source; a killed run is in the way, or
    another process is at work; a step does not suit the model; calibration text is missing or too short. BudgetError:
    the disk is too small. ModelError: weights that cannot be right. Whatever is raised, the output stays as it was.
    """
    if any(step.needs == "model" for step in recipe.steps):
        from edgekit.passes import in_passes

        def stream(current: Checkpoint, part: Recipe, folder: Path) -> Manifest:
            _Job.of(current, part)  # before an earlier run is thrown away
            return compress(
                current,
                part,
                folder,
                resume=resume,
                on_progress=on_progress,
                activations_bytes=activations_bytes,
                compute=compute,
            )

        def report(what: str, done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(Progress(what, done, total, 0, 0))

        return in_passes(
            checkpoint, recipe, output, compress=stream, teacher=teacher, resume=resume, force=force, on_progress=report
        )
    if teacher is not None:
        raise UserError(f"a teacher is for recipes with a step heal.distill: {recipe.name} has none")
    output = Path(os.path.abspath(output))
    with explain_write_errors(output):
        refuse_overlap(checkpoint, output)
        refuse_existing(output, force=force)
        job = _Job.of(checkpoint, recipe)
        with locked_work_folder(output) as work:
            walk = _begin_walk(job, work, activations_bytes, compute)
            fresh = Journal(_identity(job, walk), len(job.prepared.blocks))
            journal = begin(work, fresh, resume=resume, force=force)
            job, walk, journal = _survey(job, walk, journal, work, on_progress)
            _refuse_small_disk(job, journal, work)
            for index, name in enumerate(job.prepared.blocks):
                shard = f"model-{index + 1:05}-of-{journal.total:05}.safetensors"
                if name in journal.done:
                    _replay(job, walk, journal, name, work / shard)
                    continue
                done = _compress_block(job, walk, name, work / shard)
                journal = journal.with_block(name, done)
                journal.save(work)
                if on_progress is not None:
                    sizes = done.steps[0].before_bytes, done.steps[-1].after_bytes
                    on_progress(Progress(name, len(journal.done), journal.total, *sizes))
            manifest = _finish(job, walk, journal, work)
            refuse_existing(output, force=force)  # it may have come meanwhile
            publish(work, output)
            (output / JOURNAL).unlink()  # it goes last: until here a killed run can be resumed
    return manifest


@dataclass(frozen=True)
class _Job:
    """What is to be done: the source, the same as the steps want to see it, and the steps."""

    source: Checkpoint
    prepared: Checkpoint
    recipe: Recipe

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe) -> _Job:
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


def _begin_walk(job: _Job, work: Path, activations_bytes: int | None, compute: str) -> Walk | None:
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


def _identity(job: _Job, walk: Walk | None) -> Identity:
    found, calibration = _versions(), ""
    if walk is not None:
        import torch

        compute = str(walk.room.compute)
        found |= versions("torch")
        found |= {"threads": str(torch.get_num_threads()), "compute": compute}  # they decide the order of additions
        calibration = walk.record.sha256
    return Identity(_digest(job.source), job.recipe.sha256, found, calibration)


def _survey(
    job: _Job, walk: Walk | None, journal: Journal, work: Path, on_progress: Callable[[Progress], None] | None
) -> tuple[_Job, Walk | None, Journal]:
    """The job with the plans of its steps that make one; they are made once and kept in the journal."""
    surveyors = [index for index, step in enumerate(job.recipe.steps) if isinstance(step, Surveyor)]
    if walk is None or not surveyors:
        return job, walk, journal
    from edgekit.calibrate import survey_of

    if journal.surveyed:
        job = _Job.of(job.source, parse_recipe(journal.surveyed, where=str(work / JOURNAL)))
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
            job = _Job.of(job.source, dataclasses.replace(job.recipe, steps=steps))
            walk.follow(job.prepared, job.recipe.steps, job.context)
        total = len(job.prepared.blocks)
        journal = dataclasses.replace(journal, surveyed=job.recipe.resolved(), total=total)
        journal.save(work)
    return job, walk, journal


def _replay(job: _Job, walk: Walk | None, journal: Journal, name: str, shard: Path) -> None:
    """Take the calibration text past a block that is done."""
    if walk is not None:
        from edgekit.calibrate import read_shard

        walk.replay(read_shard(shard, name, journal.done[name].structure, job.prepared))


def _digest(checkpoint: Checkpoint) -> str:
    """A digest of the weights to be read: the source's own, joined with the files' of a compressed checkpoint."""
    if checkpoint.manifest is None:
        return checkpoint.source.digest
    files = sorted((name, record.sha256) for name, record in checkpoint.manifest.files.items())
    return hashlib.sha256(repr((checkpoint.source.digest, files)).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return versions("numpy", "safetensors", "ml-dtypes", "gguf")


def _refuse_small_disk(job: _Job, journal: Journal, work: Path) -> None:
    needed = sum(block.after_bytes for block in _predict(job) if block.name not in journal.done)
    free = disk_usage(work).free
    if free < needed:
        raise BudgetError(
            f"the disk must have room for the compressed model: {needed / 1e6:.1f} MB are to be written to {work},"
            f" {free / 1e6:.1f} MB are free; free space or choose another disk"
        )


def _compress_block(job: _Job, walk: Walk | None, name: str, path: Path) -> DoneBlock:
    """Take one block through all steps and write it to `path`, on disk when this returns."""
    size_bytes = outline_of(job.source, name).size_bytes  # an untied head is no part of the source
    block = job.prepared.read_block(name)
    steps = []
    for index, step in enumerate(job.recipe.steps):
        peak, started = _peak_memory(), time.perf_counter()
        block, changes = step.apply(block, job.context) if walk is None else walk.apply(index, block)
        seconds = time.perf_counter() - started
        steps.append(StepOnBlock(changes, size_bytes, block.size_bytes, seconds, _peak_since(peak)))
        size_bytes = block.size_bytes
    if walk is not None:
        walk.leave(block)
    try:
        structure = write_block(path, block)
    except safetensors.SafetensorError as problem:
        raise _write_error(problem, path) from problem
    sync(path)
    sync(path.parent)
    return DoneBlock(path.name, FileRecord(path.stat().st_size, digest(path)), structure, tuple(steps))


def _write_error(problem: Exception, path: Path) -> Exception:
    """safetensors puts the operating system's error into its text: `... (os error 28)`."""
    number = re.search(r"os error (\d+)", str(problem))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else problem


def _peak_memory() -> int:
    """The most memory that this process was ever resident in."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_since(earlier: int) -> int:
    """The process's peak where it rose since `earlier`; else what is resident now, which is all that can be known."""
    peak = _peak_memory()
    return peak if peak > earlier else int(psutil.Process().memory_info().rss)


def _finish(job: _Job, walk: Walk | None, journal: Journal, work: Path) -> Manifest:
    """Write all that stands around the shards; the manifest last."""
    done = [journal.done[name] for name in job.prepared.blocks]
    structure = {module: entry for block in done for module, entry in block.structure.items()}
    shards = {block.shard: _tensor_names(work / block.shard) for block in done}
    (work / RECIPE).write_text(job.recipe.resolved(), encoding="utf-8")
    names = {RECIPE, *write_frame(work, job.prepared, shards=shards, structure=structure)}
    files = record_files(work, names - shards.keys()) | {block.shard: block.file for block in done}
    earlier = job.source.manifest
    manifest = Manifest(
        kind="checkpoint",
        source=job.source.source,
        files=dict(sorted(files.items())),
        recipe=job.recipe.name,
        recipe_sha256=job.recipe.sha256,
        seed=job.recipe.seed,
        steps=(*(earlier.steps if earlier else ()), *_step_records(job.recipe, walk, done)),
        measurements=earlier.measurements if earlier else (),
        versions=journal.identity.versions,
        created=now(),
    )
    manifest.save(work)
    return manifest


def _tensor_names(shard: Path) -> list[str]:
    with safetensors.safe_open(shard, framework="np") as file:
        return sorted(file.keys())


def _step_records(recipe: Recipe, walk: Walk | None, done: list[DoneBlock]) -> list[StepRecord]:
    """One record a step, joined over the blocks; steps that were calibrated say on what."""
    text = {} if walk is None else {"calibration": dataclasses.asdict(walk.record)}
    records = []
    for index, step in enumerate(recipe.steps):
        blocks = [block.steps[index] for block in done]
        records.append(
            StepRecord(
                step=step.name,
                options=options(step) if step.needs == "weights" else {**options(step), **text},
                changed=sum(block.changes.changed for block in blocks),
                before_bytes=sum(block.before_bytes for block in blocks),
                after_bytes=sum(block.after_bytes for block in blocks),
                facts=join_facts(block.changes.facts for block in blocks),
                skipped=tuple(skip for block in blocks for skip in block.changes.skipped),
                seconds=sum(block.seconds for block in blocks),
                peak_memory_bytes=max(block.peak_memory_bytes for block in blocks),
            )
        )
    return records


# --- the dry run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockPlan:
    """What will become of one block. Bytes before count floats as float32, the form in which steps see them."""

    name: str
    before_bytes: int
    after_bytes: int
    seconds: float
    peak_bytes: int


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
    job = _Job.of(checkpoint, recipe)
    if any(isinstance(step, Surveyor) for step in recipe.steps):
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            walk = _begin_walk(job, Path(folder), None, compute)
            job, _, _ = _survey(job, walk, Journal(_identity(job, walk), 0), Path(folder), on_progress)
        recipe = job.recipe
    blocks = _predict(job)
    peak = psutil.Process().memory_info().rss + max(block.peak_bytes for block in blocks)
    return Plan(
        recipe=recipe.resolved(),
        blocks=blocks,
        before_bytes=sum(block.before_bytes for block in blocks),
        after_bytes=sum(block.after_bytes for block in blocks),
        peak_memory=Measurement("peak_memory", float(peak), "bytes", how="predicted"),
        seconds=Measurement("seconds", sum(block.seconds for block in blocks), "s", how="predicted"),
    )


def _predict(job: _Job) -> tuple[BlockPlan, ...]:
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
