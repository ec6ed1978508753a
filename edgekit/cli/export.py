"""`edgekit export`: a checkpoint becomes a bundle that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edgekit.cli.terminal import json_option, output, print_json, stages
from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.kernels.opset import CacheType


@click.command(short_help="Turn a model into a bundle that runs.")
@click.argument("model")
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--target", help="portable, x86, arm, npu-qnn or npu-openvino; default: by the device.")
@click.option("-d", "--device", help="A device of edgekit devices, or a TOML file.")
@click.option("--context", type=int, help="Tokens of context to allow for; default: the model's, at most 32768.")
@click.option(
    "--rope-scaling", help="A longer context than the trained one: linear, ntk or yarn and a factor, as yarn:4."
)
@click.option(
    "--attention",
    type=click.Choice(["dense", "sparse", "adamas"]),
    default="dense",
    help="sparse: for long contexts; adamas: as that paper has it.",
)
@click.option(
    "--cache",
    type=click.Choice(["float16", "int8", "int4"]),
    default="float16",
    help="What keys and values are kept in: int8 takes half the memory, int4 a quarter and is less exact.",
)
@click.option(
    "--prefill",
    type=click.Choice(["exact", "sparse"]),
    default="exact",
    help="sparse: prompts, too, are read with a part of what lies far before.",
)
@click.option("--budget", type=int, help="Positions that sparse attention attends to exactly; default 256.")
@click.option("--dense-below", type=int, help="Contexts up to this length are attended exactly; default 1024.")
@click.option(
    "--activations",
    type=click.Choice(["8", "15", "mixed"]),
    default="15",
    help="Bits of activations in our operators; 8: fewer instructions, less exact; mixed: 8 where the model hardly"
    " moves, which takes a NumPy forward a layer to find.",
)
@click.option(
    "--factors",
    type=click.Choice(["auto", "keep"]),
    default="auto",
    help="auto: multiply out what is slower in factors on the device; keep: leave them, smaller and slower.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to fit sparse attention or an NPU's ranges to; default: our own.",
)
@click.option("--wheelhouse", is_flag=True, help="Put all that an Arm device installs into its bundle.")
@click.option("--force", is_flag=True, help="Replace the output folder.")
@click.option("--accept-drift", is_flag=True, help="Write the bundle even when it does not agree with the checkpoint.")
@json_option
def export(
    model: str,
    folder: Path,
    target: str | None,
    device: str | None,
    context: int | None,
    rope_scaling: str | None,
    attention: str,
    cache: CacheType,
    prefill: str,
    budget: int | None,
    dense_below: int | None,
    activations: str,
    factors: Literal["auto", "keep"],
    calibration: Path | None,
    wheelhouse: bool,
    force: bool,
    accept_drift: bool,
    as_json: bool,
) -> None:
    """Export MODEL, a compressed checkpoint or any model source, to a bundle.

    \b
    edgekit export small -o small.arm --target arm --device pi5
    """
    from edgekit.device import load_device
    from edgekit.evaluate.text import read_text
    from edgekit.export.encoder import export_encoder
    from edgekit.export.export import export as run
    from edgekit.export.npu_encoder import export_npu_encoder
    from edgekit.export.npu_export import export_npu
    from edgekit.export.sparse import PREFILL_BUDGET, SparseOptions
    from edgekit.export.targets import ACTIVATIONS, find_target, host_target, target_for
    from edgekit.model.encoder_config import is_encoder
    from edgekit.model.sources import open_model
    from edgekit.report import Report, print_report

    given = {"budget": budget, "dense_below": dense_below}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen = load_device(device) if device else None
    goal = find_target(target) if target else target_for(chosen) if chosen else find_target(host_target())
    if attention == "dense" and (options or (calibration and not goal.provider)):
        raise UserError("--budget, --dense-below and --calibration are for --attention sparse")
    if prefill == "sparse":
        if attention != "sparse":
            raise UserError("--prefill sparse is for --attention sparse")
        options["prefill_budget"] = PREFILL_BUDGET
    sparse: SparseOptions | None = None
    if attention != "dense":
        sparse = SparseOptions(**options) if attention == "sparse" else SparseOptions.as_published(**options)
    if wheelhouse and goal.arch != "aarch64":
        raise UserError(f"--wheelhouse is for Arm devices: the target is {goal.name}")
    if activations != "15" and not goal.native:
        raise UserError(f"--activations is for the targets of our operators, x86 and arm: the target is {goal.name}")
    text = read_text(calibration) if calibration else None
    with stages("opening the model", quiet=as_json) as tell:
        checkpoint = open_model(model, progress=tell)
        if is_encoder(checkpoint.config):
            if cache != "float16":
                raise UserError("--cache is for decoders: an encoder keeps nothing between texts")
            if context is not None:
                raise UserError("--context is for decoders: an encoder takes texts as long as it was trained for")
            if goal.provider:
                manifest = export_npu_encoder(
                    checkpoint,
                    folder,
                    target=goal,
                    device=chosen,
                    force=force,
                    accept_drift=accept_drift,
                    on_progress=tell,
                )
            else:
                manifest = export_encoder(
                    checkpoint, folder, target=goal, force=force, accept_drift=accept_drift, on_progress=tell
                )
        elif goal.provider:
            if sparse is not None or rope_scaling is not None or cache != "float16":
                raise UserError("--attention sparse, --cache and --rope-scaling are not for an NPU")
            manifest = export_npu(
                checkpoint,
                folder,
                target=goal,
                device=chosen,
                context=context,
                calibration=text,
                force=force,
                accept_drift=accept_drift,
                on_progress=tell,
            )
        else:
            manifest = run(
                checkpoint,
                folder,
                target=goal,
                device=chosen,
                context=context,
                rope_scaling=_scaling(rope_scaling),
                sparse=sparse,
                cache=cache,
                activations=ACTIVATIONS[activations],
                factors=factors,
                calibration=text,
                wheelhouse=wheelhouse,
                force=force,
                accept_drift=accept_drift,
                on_progress=tell,
            )
    if as_json:
        print_json(manifest)
    else:
        click.echo(f"{folder}: a bundle for {goal.name}")
        print_report(Report.load(folder / "report.json"), output())


def _scaling(text: str | None) -> tuple[str, float] | None:
    """A kind and a factor, written KIND:FACTOR."""
    if text is None:
        return None
    kind, _, factor = text.partition(":")
    try:
        return kind, float(factor)
    except ValueError:
        raise UserError(f"--rope-scaling must be a kind and a factor, such as yarn:4: got {text!r}") from None
