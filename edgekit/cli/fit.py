"""`edgekit fit`: will it fit on that device, how fast, and what would fit."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.terminal import json_option, output, print_json


@click.command(short_help="Predict memory and speed on a device.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-d", "--device", "name", required=True, help="A device of edgekit devices, a TOML file, or host.")
@click.option("--context", type=int, help="Tokens of context; default: the model's.")
@click.option("--ram", type=float, help="GB of memory that the device has; default: the most it is sold with.")
@click.option("--bits", type=float, default=4.5, show_default=True, help="Bits a weight, for a config.json.")
@click.option("--head-bits", type=float, help="Bits a weight of the output head, for a config.json.")
@json_option
def fit(
    bundle: Path,
    name: str,
    context: int | None,
    ram: float | None,
    bits: float,
    head_bits: float | None,
    as_json: bool,
) -> None:
    """Predict whether BUNDLE fits on a device and how fast it decodes; a model's config.json will do in its place.

    \b
    edgekit fit small.arm --device pi4
    """
    from edgekit.device import load_device
    from edgekit.host import host_device
    from edgekit.manifest import now, versions
    from edgekit.report import Report, print_report
    from edgekit.runtime.fit import bundle_footprint, config_footprint
    from edgekit.runtime.fit import fit as predict

    device = host_device() if name == "host" else load_device(name)
    if bundle.suffix == ".json":
        footprint = config_footprint(bundle, bits=bits, head_bits=head_bits)
    else:
        footprint = bundle_footprint(bundle)
    found = predict(footprint, device, context=context, ram_gb=ram)
    found.refuse_if_too_large()
    report = Report(
        title="fit",
        subject=footprint.name,
        measurements=found.rows(),
        machine=device.fingerprint(),
        versions=versions(),
        created=now(),
    )
    if as_json:
        print_json(report)
    else:
        print_report(report, output())
