"""`edgekit compress`: a recipe turns a model into a smaller checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import click

from edgekit.cli.compress_onnx import compress_file
from edgekit.cli.terminal import json_option, print_json, progress, remarks, size
from edgekit.errors import UserError

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(kB|MB|GB)", re.IGNORECASE)


def megabytes(text: str) -> float:
    """A size such as 70MB or 1.1GB, in megabytes. Raises UserError for anything else."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"--target-size must be a number with kB, MB or GB, such as 70MB: got {text!r}")
    return float(match[1]) * {"kb": 1e-3, "mb": 1.0, "gb": 1e3}[match[2].lower()]


@click.command(short_help="Make a model smaller by a recipe.")
@click.argument("model")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), help="The folder to write.")
@click.option("-r", "--recipe", help="A built-in recipe, or a TOML file.  [default: int4; a search with a size]")
@click.option("--target-size", metavar="SIZE", help="Search for the recipe of this size, or choose its bits: 70MB.")
@click.option("-d", "--device", help="The device whose latency the search predicts.")
@click.option("--target-latency-ms", type=float, default=0.0, help="The most a token's products may take there.")
@click.option("--trials", type=int, default=100, show_default=True, help="How many compositions a search tries.")
@click.option("--jobs", type=int, default=1, show_default=True, help="Processes that search beside each other.")
@click.option("--storage", help="A file or database URL that keeps the search; several machines may share one.")
@click.option("--confirm", type=int, default=2, show_default=True, help="How many finalists to build and measure.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the search's Pareto front to an .html file.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Text for methods that need some: .txt, .jsonl, also .gz; may be given again. For .onnx files an .npz.",
)
@click.option("--compute", default="cpu", show_default=True, help="Where torch runs the calibration text: cpu, cuda.")
@click.option("--teacher", help="The model that a step heal.distill learns from.  [default: the recipe's, or MODEL]")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--force", is_flag=True, help="Replace the output folder.")
@click.option("--dry-run", is_flag=True, help="Print the recipe, predicted size, memory and time; touch nothing.")
@click.option("--offline", is_flag=True, help="Do not fetch anything.")
@json_option
def compress(
    model: str,
    target: Path | None,
    recipe: str | None,
    target_size: str | None,
    device: str | None,
    target_latency_ms: float,
    trials: int,
    jobs: int,
    storage: str | None,
    confirm: int,
    plot: Path | None,
    calibration: tuple[Path, ...],
    compute: str,
    teacher: str | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Compress MODEL: a built-in name, a Hub id, a folder, a .gguf or an .onnx file.

    \b
    edgekit compress smollm2-135m -o small -r int4

    Methods that look at what the weights are multiplied with (gptq, awq) and --target-size take --calibration text.
    A size alone searches over dropped layers, pruned heads and neurons, factors and bits; with -r mixed, bits only.
    """
    from edgekit.compress import compress as run
    from edgekit.forecast import plan
    from edgekit.model.sources import open_model
    from edgekit.recipe import calibrated_on, load_recipe, within

    if model.lower().endswith(".onnx"):
        if target_size or teacher or len(calibration) > 1:
            raise UserError("an .onnx file takes one --calibration file, no --target-size and no --teacher")
        compress_file(
            model,
            target,
            recipe=recipe or "int4",
            calibration=next(iter(calibration), None),
            force=force,
            plain=not (dry_run or resume),
            as_json=as_json,
        )
        return
    if target is None and not dry_run:
        raise UserError("compress needs a folder to write: name it with -o, or pass --dry-run")
    if target_size and recipe is None:
        try:
            from edgekit.cli.compress_search import Work, compress_by_search
            from edgekit.search import Goal

            compress_by_search(
                open_model(model, offline=offline, progress=lambda line: remarks().print(line)),
                target,
                Goal(megabytes(target_size), device or "", target_latency_ms),
                calibration,
                Work(trials, jobs, storage, confirm, plot, compute, force=force, dry_run=dry_run),
                as_json=as_json,
            )
        except ModuleNotFoundError as problem:
            raise UserError(
                f"a search needs {problem.name}: pip install 'edgekit[compress]', or name a recipe with -r"
            ) from problem
        return
    if device or target_latency_ms:
        raise UserError("--device and --target-latency-ms belong to a search: pass --target-size and no recipe")
    steps = calibrated_on(load_recipe(recipe or "int4"), calibration)
    if target_size:
        steps = within(steps, megabytes(target_size))
    checkpoint = open_model(model, offline=offline, progress=lambda line: remarks().print(line))
    if dry_run:
        with progress("surveying", quiet=as_json) as advance:
            forecast = plan(
                checkpoint, steps, compute=compute, on_progress=lambda state: advance(state.done, state.total)
            )
        if as_json:
            print_json(forecast)
        else:
            click.echo(forecast.to_text())
        return
    assert target is not None
    original = None if teacher is None else open_model(teacher, offline=offline)
    with progress("compressing", quiet=as_json) as advance:
        manifest = run(
            checkpoint,
            steps,
            target,
            resume=resume,
            force=force,
            teacher=original,
            compute=compute,
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
