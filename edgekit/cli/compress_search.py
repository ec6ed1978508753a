"""What `edgekit compress --target-size` does without a recipe: search, build the finalists, keep the best."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.checkpoint import Checkpoint
from edgekit.cli.terminal import print_json, progress, size, stages
from edgekit.errors import UserError
from edgekit.folder import refuse_existing
from edgekit.step import CalibrationOptions

if TYPE_CHECKING:
    from edgekit.search import Goal

SAMPLES = 16


@dataclass(frozen=True)
class Work:
    """The options of a search that are about work and not about the goal."""

    trials: int
    jobs: int
    storage: str | None
    confirm: int
    plot: Path | None
    compute: str
    force: bool
    dry_run: bool


def compress_by_search(
    checkpoint: Checkpoint,
    target: Path | None,
    goal: Goal,
    calibration: tuple[Path, ...],
    work: Work,
    *,
    as_json: bool,
) -> None:
    """Search and write the best to `target`; with `dry_run` print the front. What is half done lies in TARGET.search,
    where a later call goes on."""
    from edgekit.compose import measured_once
    from edgekit.search import confirmed, contenders, search, write_plot

    if work.confirm < 1:
        raise UserError(f"--confirm must be at least 1: got {work.confirm}")
    if target is not None and not work.dry_run:
        refuse_existing(target, force=work.force)
    place = Path(f"{os.path.abspath(target)}.search") if target else Path("edgekit.search").absolute()
    text = CalibrationOptions(tuple(map(str, calibration)), SAMPLES)
    with progress("measuring", quiet=as_json) as advance:
        found = measured_once(checkpoint, text, place / "sensitivity.json", compute=work.compute, report=advance)
    storage = work.storage or str(place / "study.journal")
    with progress("searching", quiet=as_json) as advance:
        best = search(found, goal, storage, trials=work.trials, jobs=work.jobs, report=advance)
    if work.plot is not None:
        write_plot(storage, found, best, goal, work.plot)
    if work.dry_run or target is None:
        rows = [dataclasses.asdict(one) | {"steps": [step.name for step in one.steps]} for one in best]
        if as_json:
            print_json({"front": rows})
        else:
            for one in best:
                late = f", {one.latency_ms:.1f} ms" if goal.device else ""
                click.echo(f"{one.composition}: {size(one.size_bytes)}{late}, predicted loss {one.loss:.3f} nats")
        return
    finalists = contenders(best, found, goal, work.confirm)
    with stages("building", quiet=as_json) as tell:
        built = confirmed(
            checkpoint,
            finalists,
            text,
            place,
            compute=work.compute,
            report=lambda stage, done, total: tell(f"{stage}: block {done} of {total}" if total else stage),
        )
    refuse_existing(target, force=work.force)
    if target.exists():
        shutil.rmtree(target)
    built[0].folder.rename(target)
    shutil.rmtree(place)
    if as_json:
        print_json({"finalists": [{"composition": dataclasses.asdict(one.candidate.composition), "kl": one.kl,
                                   "size_bytes": one.candidate.size_bytes} for one in built]})  # fmt: skip
        return
    click.echo(f"{target}: {built[0].candidate.composition}")
    for done in built:
        mark = "taken" if done is built[0] else "built too"
        click.echo(
            f"  {mark}: {done.candidate.composition}: {size(done.candidate.size_bytes)},"
            f" KL to the source {done.kl:.4f} nats a token on unseen text"
        )
