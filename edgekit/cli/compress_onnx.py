"""What `edgekit compress` does with a plain ONNX file."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.terminal import print_json, size
from edgekit.errors import UserError


def compress_file(
    model: str,
    target: Path | None,
    *,
    recipe: str,
    calibration: Path | None,
    force: bool,
    plain: bool,
    as_json: bool,
) -> None:
    """Quantise the file `model` to 8 bits, or decompose its convolutions, and print what came of it. `plain`: neither
    --dry-run nor --resume is set."""
    if recipe not in ("int8", "tucker"):
        raise UserError(f"an .onnx file takes the recipes int8 and tucker only: got {recipe!r}; pass -r int8")
    if not plain:
        raise UserError("an .onnx file is written at once: --dry-run and --resume are for models read by layers")
    if target is None:
        raise UserError("compress needs a folder to write: name it with -o")
    from edgekit.export.onnx_model import load_calibration, quantize_file

    samples = load_calibration(calibration) if calibration else None
    if recipe == "tucker":
        from edgekit.export.convolution import decompose_file

        manifest = decompose_file(Path(model), target, calibration=samples, force=force)
    else:
        manifest = quantize_file(Path(model), target, calibration=samples, force=force)
    if as_json:
        print_json(manifest)
        return
    step = manifest.steps[0]
    ratio = step.before_bytes / step.after_bytes
    click.echo(f"{target}: {size(step.before_bytes)} -> {size(step.after_bytes)} ({ratio:.1f}x smaller), {step.step}")
    for row in manifest.measurements[1:]:
        click.echo(f"  {row.name}: {row.value:.3g} over {row.n} {row.note}")
