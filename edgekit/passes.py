"""A recipe with steps that work on a whole model: passes over the blocks, and trainings between them.

    compress (steps 1 to k) -> folder -> heal.distill -> folder -> compress (steps after it) -> the output

Each pass ends in a whole folder `.NAME.pass-N-KEY` beside the output, which is removed when the last one is published.
KEY is a digest of source, recipe, teacher and text, so that `resume` goes on from what belongs to this run and from
nothing else: from the last whole pass, and inside a pass from where `compress` or `heal` stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit.checkpoint import Checkpoint, open_checkpoint, refuse_overlap
from edgekit.errors import UserError
from edgekit.folder import digest, explain_write_errors, publish, refuse_existing
from edgekit.manifest import Manifest, record_files
from edgekit.recipe import Recipe

if TYPE_CHECKING:
    from edgekit.heal.step import Distill

RECIPE, HEAL = "recipe.toml", "heal.distill"
OnProgress = Callable[[str, int, int], None]  # what is done, so many of so many
Compress = Callable[[Checkpoint, Recipe, Path], object]


def in_passes(
    checkpoint: Checkpoint,
    recipe: Recipe,
    output: Path,
    *,
    compress: Compress,
    teacher: Checkpoint | None = None,
    resume: bool = False,
    force: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Manifest:
    """Write `checkpoint`, changed by `recipe`, to the new folder `output`, and return its manifest.

    `compress` runs a recipe of streaming steps. `teacher` goes before the ones that steps name. Raises as `compress`
    and `edgekit.heal.heal.heal` do; whatever is raised, the output stays as it was.
    """
    output = Path(os.path.abspath(output))
    with explain_write_errors(output):
        refuse_overlap(checkpoint, output)
        refuse_existing(output, force=force)
        passes = split(recipe)
        teachers = {step: teacher or _teacher(step, checkpoint) for step in passes if not isinstance(step, Recipe)}
        texts = {step: _texts(step, recipe) for step in teachers}
        key = _key(checkpoint, recipe, list(teachers.values()), [path for files in texts.values() for path in files])
        folders = [output.with_name(f".{output.name}.pass-{index}-{key}") for index in range(len(passes))]
        if not resume:
            _remove(output)
        current = checkpoint
        for part, folder in zip(passes, folders, strict=True):
            if not folder.exists():
                if isinstance(part, Recipe):
                    compress(current, part, folder)
                else:
                    _heal(current, teachers[part], folder, texts[part], part, resume, on_progress)
            current = open_checkpoint(folder)
        manifest = _whole(current, recipe, folders[-1])
        refuse_existing(output, force=force)  # it may have come meanwhile
        publish(folders[-1], output)
        _remove(output)
    return manifest


def split(recipe: Recipe) -> list[Recipe | Distill]:
    """The recipe as recipes of streaming steps and the steps between them."""
    passes: list[Recipe | Distill] = []
    for step in recipe.steps:
        if step.needs == "model":
            if step.name != HEAL:
                raise UserError(f"{step.name} works on a whole model: it is no step of a recipe")
            passes.append(cast("Distill", step))
        elif passes and isinstance(passes[-1], Recipe):
            passes[-1] = dataclasses.replace(passes[-1], steps=(*passes[-1].steps, step))
        else:
            passes.append(dataclasses.replace(recipe, steps=(step,)))
    return passes


def _teacher(step: Distill, source: Checkpoint) -> Checkpoint | None:
    if step.teacher:
        from edgekit.model.sources import open_model

        return open_model(step.teacher)
    return source if step.training().loss.needs_teacher or step.layer_steps else None


def _texts(step: Distill, recipe: Recipe) -> list[Path]:
    files = [Path(name) for name in step.data or recipe.calibration.files]
    if not files:
        raise UserError(f"{step.name} needs text: name files with data in its step, or pass --calibration")
    return files


def _key(checkpoint: Checkpoint, recipe: Recipe, teachers: list[Checkpoint | None], files: list[Path]) -> str:
    from edgekit.heal.heal import digest_of

    parts = [recipe.sha256, *map(digest_of, (checkpoint, *teachers))]
    for path in files:
        try:
            parts.append(digest(path))
        except OSError as problem:
            raise UserError(f"a file must be readable: {path} ({problem.strerror or problem})") from problem
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _heal(
    student: Checkpoint,
    teacher: Checkpoint | None,
    folder: Path,
    files: list[Path],
    step: Distill,
    resume: bool,
    on_progress: OnProgress,
) -> None:
    from edgekit.heal.heal import heal

    heal(
        student,
        teacher,
        folder,
        files,
        step.training_options,
        resume=resume,
        on_step=lambda state: on_progress("training", state.step, state.steps),
    )


def _whole(checkpoint: Checkpoint, recipe: Recipe, folder: Path) -> Manifest:
    """The last folder's manifest, as one of the whole recipe."""
    assert checkpoint.manifest is not None, "a pass writes one"
    (folder / RECIPE).write_text(recipe.resolved(), encoding="utf-8")
    manifest = dataclasses.replace(
        checkpoint.manifest,
        recipe=recipe.name,
        recipe_sha256=recipe.sha256,
        seed=recipe.seed,
        files={**checkpoint.manifest.files, **record_files(folder, {RECIPE})},
    )
    manifest.save(folder)
    return manifest


def _remove(output: Path) -> None:
    """All folders of passes of this output, and what stopped inside them."""
    for path in output.parent.glob(f".*{output.name}.pass-*"):
        if path.name.lstrip(".").startswith(f"{output.name}.pass-"):
            shutil.rmtree(path, ignore_errors=True)
