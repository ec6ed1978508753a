"""`edgekit devices`: the machines that edgekit knows, and this one."""

from __future__ import annotations

import click

from edgekit.cli.terminal import json_option, output, print_json


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def devices(context: click.Context, as_json: bool) -> None:
    """List known devices; `show NAME` prints one as TOML, `detect` this machine.

    \b
    edgekit devices show pi5
    """
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from edgekit.device import known_devices, load_device
    from edgekit.host import host_device

    found = [load_device(name) for name in known_devices()]
    if as_json:
        print_json([{"name": device.name, "title": device.title, "arch": device.arch} for device in found])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "device", "arch", "threads", "features"):
        table.add_column(heading)
    for device in [*found, host_device()]:
        table.add_row(device.name, device.title, device.arch, str(device.threads or "?"), " ".join(sorted(device.isa)))
    output().print(table)


@devices.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a device with the source of each number, as TOML."""
    from edgekit.device import load_device

    click.echo(load_device(name).to_toml(), nl=False)


@devices.command()
def detect() -> None:
    """Print this machine as TOML: `edgekit devices detect > mine.toml`."""
    from edgekit.host import host_device

    click.echo(host_device().to_toml(), nl=False)
