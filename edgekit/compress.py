"""Compress a checkpoint: stream its blocks through a recipe's steps into a new folder.

For each block in order: read it, let every step work on it, write its shard, flush it to disk, note it in the journal,
free it. So memory holds one block before and after a step, whatever the model's size, and a killed run goes on where it
stopped (`edgekit.journal`) with the same bytes. The target appears by one rename, when all of it is there.

Where a step needs activations, the calibration text walks along (`edgekit.calibrate`, which needs torch): each block is
given what the blocks before it, as compressed, make of the text.
"""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING

import psutil
import safetensors

from edgekit.checkpoint import Checkpoint, refuse_overlap, write_block, write_frame
from edgekit.errors import BudgetError, UserError
from edgekit.folder import digest, explain_write_errors, publish, refuse_existing, sync
from edgekit.job import Job, Progress, begin_walk, identity, predict, survey
from edgekit.journal import NAME as JOURNAL
from edgekit.journal import DoneBlock, Journal, StepOnBlock, begin, locked_work_folder
from edgekit.manifest import FileRecord, Manifest, StepRecord, now, record_files
from edgekit.recipe import Recipe
from edgekit.step import join_facts, options, outline_of

if TYPE_CHECKING:
    from edgekit.calibrate import Walk

RECIPE = "recipe.toml"


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
            Job.of(current, part)  # before an earlier run is thrown away
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
        job = Job.of(checkpoint, recipe)
        with locked_work_folder(output) as work:
            walk = begin_walk(job, work, activations_bytes, compute)
            fresh = Journal(identity(job, walk), len(job.prepared.blocks))
            journal = begin(work, fresh, resume=resume, force=force)
            job, walk, journal = survey(job, walk, journal, work, on_progress)
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


def _replay(job: Job, walk: Walk | None, journal: Journal, name: str, shard: Path) -> None:
    """Take the calibration text past a block that is done."""
    if walk is not None:
        from edgekit.calibrate import read_shard

        walk.replay(read_shard(shard, name, journal.done[name].structure, job.prepared))


def _refuse_small_disk(job: Job, journal: Journal, work: Path) -> None:
    needed = sum(block.after_bytes for block in predict(job) if block.name not in journal.done)
    free = disk_usage(work).free
    if free < needed:
        raise BudgetError(
            f"the disk must have room for the compressed model: {needed / 1e6:.1f} MB are to be written to {work},"
            f" {free / 1e6:.1f} MB are free; free space or choose another disk"
        )


def _compress_block(job: Job, walk: Walk | None, name: str, path: Path) -> DoneBlock:
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


def _finish(job: Job, walk: Walk | None, journal: Journal, work: Path) -> Manifest:
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
