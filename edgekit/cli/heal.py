"""`edgekit heal`: train a compressed model for a while to agree with the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.terminal import json_option, print_json, remarks

if TYPE_CHECKING:
    from edgekit.heal.trainer import Progress


@click.command(short_help="Recover quality by a short training.")
@click.argument("model")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--teacher", help="The model to agree with, usually the one MODEL was made from.")
@click.option(
    "--data", "files", type=click.Path(path_type=Path), multiple=True, required=True,
    help="Text or chats: .txt or .jsonl, also .gz. May be given more than once.",
)  # fmt: skip
@click.option("--steps", type=int, default=200, show_default=True, help="Optimiser steps.")
@click.option("--batch", type=int, default=32, show_default=True, help="Windows a step.")
@click.option("--micro-batch", type=int, default=8, show_default=True, help="Windows at a time.")
@click.option("--length", type=int, default=1024, show_default=True, help="Tokens a window.")
@click.option(
    "--optimizer", type=click.Choice(["adamw", "muon", "mano", "mano-v2"]), default="adamw", show_default=True
)
@click.option("--learning-rate", type=float, default=8e-4, show_default=True)
@click.option("--loss", type=click.Choice(["kl", "kl_top", "hidden", "lm"]), default="kl", show_default=True)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of kl and kl_top.")
@click.option(
    "--train", type=click.Choice(["all", "multipliers", "grids", "adapters"]), default="all", show_default=True,
    help="What is trained.",
)  # fmt: skip
@click.option(
    "--multipliers", type=click.Choice(["none", "scalar", "minimal", "full"]), default="none", show_default=True
)
@click.option(
    "--bits", type=int, default=0, show_default=True, help="Train float matrices onto so many bits; 0: float."
)
@click.option("--embedding-bits", type=int, default=0, show_default=True, help="The same for table and head.")
@click.option("--layer-steps", type=int, default=0, show_default=True, help="Steps for each layer alone, before.")
@click.option("--layer-rate", type=float, default=3e-3, show_default=True, help="The learning rate of those steps.")
@click.option("--patience", type=int, default=0, help="Stop after so many measurements without a better one.")
@click.option(
    "--sharding", type=click.Choice(["ddp", "fsdp"]), default="ddp", show_default=True, help="Under torchrun."
)
@click.option("--recompute", is_flag=True, help="Recompute layers in the backward pass: slower, less memory.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--force", is_flag=True, help="Replace the output folder.")
@click.option("--offline", is_flag=True, help="Do not fetch anything.")
@json_option
def heal(
    model: str,
    target: Path,
    teacher: str | None,
    files: tuple[Path, ...],
    resume: bool,
    force: bool,
    offline: bool,
    as_json: bool,
    **chosen: object,
) -> None:
    """Heal MODEL, a compressed checkpoint, with the logits of its teacher.

    \b
    edgekit heal small -o healed --teacher smollm2-135m --data books.jsonl.gz
    """
    from edgekit.heal.heal import Options, recovered
    from edgekit.heal.heal import heal as run
    from edgekit.model.sources import open_model
    from edgekit.schema import parse

    options = parse(Options, dict(chosen), where="heal")

    with _bar(quiet=as_json) as (on_stage, on_step):
        student = open_model(model, offline=offline, progress=lambda line: remarks().print(line))
        original = None if teacher is None else open_model(teacher, offline=offline)
        result = run(
            student, original, target, files, options, resume=resume, force=force, on_stage=on_stage, on_step=on_step
        )
    if as_json:
        print_json(result)
        return
    back = recovered(result.before, result.after)
    click.echo(
        f"{target}: held-out loss {result.before:.4f} -> {result.after:.4f} ({back:.0f}% back) in {result.steps} steps,"
        f" {result.seconds:.0f} s"
    )


@contextmanager
def _bar(*, quiet: bool) -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None]]]:
    """A bar with loss, tokens a second and time left on stderr; gives what to call at a stage and after a step."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = remarks()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("healing", total=None)

        def on_step(state: Progress) -> None:
            minutes, seconds = divmod(round(state.seconds_left), 60)
            pace = f"{state.tokens_per_s:.0f} tok/s, {minutes}:{seconds:02} left"
            text = f"loss {state.loss:.4f}, best {state.best:.4f}, {pace}"
            bar.update(task, description=text, completed=state.step, total=state.steps)

        yield lambda stage: bar.update(task, description=stage), on_step
