"""`edgekit devices`: the machines that edgekit knows, and this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgekit.cli.terminal import CommandGroup, json_option, output, print_json

if TYPE_CHECKING:
    from edgekit.device import Device


@click.group(
    cls=CommandGroup, invoke_without_command=True, short_help="List the machines that edgekit knows, and this one."
)
@json_option
@click.pass_context
def devices(context: click.Context, as_json: bool) -> None:
    """List the devices that edgekit knows; `host` is this machine.

    \b
    edgekit devices show pi5
    """
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from edgekit.device import known_devices, load_device
    from edgekit.host import host_device

    found = [*map(load_device, known_devices()), host_device()]
    if as_json:
        print_json(
            [
                {
                    "name": device.name,
                    "title": device.title,
                    "arch": device.arch,
                    "threads": device.threads,
                    "features": sorted(device.isa),
                }
                for device in found
            ]
        )
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "arch", "threads", "device"):
        table.add_column(heading, justify="right" if heading == "threads" else "left", no_wrap=heading != "device")
    for device in found:
        table.add_row(device.name, device.arch, str(device.threads or "?"), device.title)
    output().print(table)


@devices.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Print a device with the source of each number, as TOML.

    \b
    edgekit devices show pi5
    """
    from edgekit.device import load_device

    _print(load_device(name), as_json=as_json)


@devices.command()
@json_option
def detect(as_json: bool) -> None:
    """Print this machine as TOML, to be used with --device.

    \b
    edgekit devices detect > mine.toml
    """
    from edgekit.host import host_device

    _print(host_device(), as_json=as_json)


def _print(device: Device, *, as_json: bool) -> None:
    if as_json:
        print_json(device)
    else:
        click.echo(device.to_toml(), nl=False)
