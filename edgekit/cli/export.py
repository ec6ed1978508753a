"""`edgekit export`: a checkpoint becomes a bundle that runs."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.terminal import json_option, output, print_json, stages


@click.command(short_help="Turn a model into a bundle that runs.")
@click.argument("model")
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--target", help="portable, x86 or arm; default: this machine's, or the device's.")
@click.option("-d", "--device", help="A device of edgekit devices, or a TOML file.")
@click.option("--context", type=int, help="Tokens of context to allow for; default: the model's, at most 32768.")
@click.option("--force", is_flag=True, help="Replace the output folder.")
@click.option("--accept-drift", is_flag=True, help="Write the bundle even when it does not agree with the checkpoint.")
@json_option
def export(
    model: str,
    folder: Path,
    target: str | None,
    device: str | None,
    context: int | None,
    force: bool,
    accept_drift: bool,
    as_json: bool,
) -> None:
    """Export MODEL, a compressed checkpoint or any model source, to a bundle.

    \b
    edgekit export small -o small.arm --target arm --device pi5
    """
    from edgekit.device import load_device
    from edgekit.export.export import export as run
    from edgekit.export.targets import find_target, host_target, target_for
    from edgekit.model.sources import open_model
    from edgekit.report import Report, print_report

    chosen = load_device(device) if device else None
    goal = find_target(target) if target else target_for(chosen) if chosen else find_target(host_target())
    with stages("opening the model", quiet=as_json) as tell:
        checkpoint = open_model(model, progress=tell)
        manifest = run(
            checkpoint,
            folder,
            target=goal,
            device=chosen,
            context=context,
            force=force,
            accept_drift=accept_drift,
            on_progress=tell,
        )
    if as_json:
        print_json(manifest)
    else:
        click.echo(f"{folder}: a bundle for {goal.name}")
        print_report(Report.load(folder / "report.json"), output())
