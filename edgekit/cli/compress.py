"""`edgekit compress`: a recipe turns a model into a smaller checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.terminal import json_option, print_json, progress, remarks, size
from edgekit.errors import UserError


@click.command(short_help="Make a model smaller by a recipe.")
@click.argument("model")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), help="The folder to write.")
@click.option("-r", "--recipe", default="int4", show_default=True, help="A built-in recipe, or a TOML file.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--force", is_flag=True, help="Replace the output folder.")
@click.option("--dry-run", is_flag=True, help="Print the recipe, predicted size, memory and time; touch nothing.")
@click.option("--offline", is_flag=True, help="Do not fetch anything.")
@json_option
def compress(
    model: str,
    target: Path | None,
    recipe: str,
    resume: bool,
    force: bool,
    dry_run: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Compress MODEL: a built-in name, a Hub id, a folder or a .gguf file.

    \b
    edgekit compress smollm2-135m -o small -r int4
    """
    from edgekit.compress import compress as run
    from edgekit.compress import plan
    from edgekit.model.sources import open_model
    from edgekit.recipe import load_recipe

    if target is None and not dry_run:
        raise UserError("compress needs a folder to write: name it with -o, or pass --dry-run")
    steps = load_recipe(recipe)
    checkpoint = open_model(model, offline=offline, progress=lambda line: remarks().print(line))
    if dry_run:
        forecast = plan(checkpoint, steps)
        if as_json:
            print_json(forecast)
        else:
            click.echo(forecast.to_text())
        return
    assert target is not None
    with progress("compressing", quiet=as_json) as advance:
        manifest = run(
            checkpoint,
            steps,
            target,
            resume=resume,
            force=force,
            on_progress=lambda state: advance(state.done, state.total),
        )
    if as_json:
        print_json(manifest)
        return
    record = manifest.steps
    before, after = record[0].before_bytes, record[-1].after_bytes
    click.echo(
        f"{target}: {size(before)} as float32 -> {size(after)} ({before / after:.1f}x smaller), recipe {steps.name}"
    )
    for step in record:
        facts = "".join(f", {name.replace('_', ' ')} {value:.3g}" for name, value in step.facts.items())
        skipped = f", {len(step.skipped)} skipped" if step.skipped else ""
        click.echo(f"  {step.step}: {step.changed} matrices{skipped} in {step.seconds:.1f} s{facts}")
