"""`edgekit deploy`, `rollback`, `history` and `sign`: bundles in a store, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgekit.cli.terminal import json_option, print_json, stages
from edgekit.errors import UserError

_STORE = click.Path(path_type=Path, file_okay=False)
_store = click.option("--store", type=_STORE, required=True, help="The folder of releases.")
_health = click.option(
    "--health", help="A command that must end with 0 after the switch; $EDGEKIT_BUNDLE is the folder."
)
_seconds = click.option("--health-seconds", default=60.0, show_default=True, help="Longest time for that command.")


def _check(line: str | None, seconds: float) -> Callable[[Path], None] | None:
    from edgekit.deploy.health import command

    return command(line, seconds=seconds) if line is not None else None


@click.command(short_help="Put a bundle into a store and make it current.")
@click.argument("bundle", type=click.Path(path_type=Path))
@_store
@click.option("--trust", multiple=True, type=click.Path(path_type=Path), help="Public key: from now on, refuse others.")
@click.option("--keep", type=int, help="Afterwards remove all but the last N releases.")
@_health
@_seconds
@json_option
def deploy(
    bundle: Path,
    store: Path,
    trust: tuple[Path, ...],
    keep: int | None,
    health: str | None,
    health_seconds: float,
    as_json: bool,
) -> None:
    """Deploy BUNDLE: copy what is new, verify it, try it, switch to it, and go back when its health check fails.

    \b
    edgekit deploy small.arm --store models --health "curl -fsS localhost/health"
    """
    from edgekit.deploy.health import answers
    from edgekit.deploy.store import Store

    if keep is not None and keep < 1:
        raise UserError(f"--keep must be at least 1: got {keep}")
    found = Store(store)
    check = _check(health, health_seconds)
    for key in trust:
        found.trust(key)
    with stages("deploying", quiet=as_json) as tell:
        release = found.deploy(bundle, check=answers, health=check, watch=tell)
    gone = found.collect(keep=keep) if keep is not None else []
    if as_json:
        print_json({"release": release, "current": str(store / "current"), "collected": gone})
    else:
        click.echo(f"{store / 'current'} is now {bundle.resolve().name} ({release[:12]})")


@click.command(short_help="Make an earlier release current again.")
@click.argument("release", required=False)
@_store
@_health
@_seconds
@json_option
def rollback(release: str | None, store: Path, health: str | None, health_seconds: float, as_json: bool) -> None:
    """Go back to the release before, or to RELEASE, the beginning of an id of edgekit history.

    \b
    edgekit rollback --store /srv/models
    """
    from edgekit.deploy.health import answers
    from edgekit.deploy.store import Store

    with stages("rolling back", quiet=as_json) as tell:
        chosen = _existing(store, Store).rollback(
            release, check=answers, health=_check(health, health_seconds), watch=tell
        )
    if as_json:
        print_json({"release": chosen, "current": str(store / "current")})
    else:
        click.echo(f"{store / 'current'} is now {chosen[:12]}")


@click.command(short_help="What was deployed, when, and what is current.")
@_store
@json_option
def history(store: Path, as_json: bool) -> None:
    """List what happened in a store, oldest first; * marks what is current.

    \b
    edgekit history --store /srv/models
    """
    from edgekit.deploy.store import Store
    from edgekit.report import plain

    found = _existing(store, Store)
    events, current = found.history(), found.current()
    if as_json:
        print_json({"current": current.name if current else None, "events": [dataclasses.asdict(e) for e in events]})
        return
    for event in events:
        mark = "*" if current is not None and current.name == event.release else " "
        click.echo(plain(f"{mark} {event.at} {event.event} {event.release[:12]} {event.name} {event.note}"))


@click.command(short_help="Sign a bundle, or make a pair of keys.")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--key", type=click.Path(path_type=Path), required=True, help="The private key (PEM).")
@click.option("--new-key", is_flag=True, help="Make it, and KEY.pub beside it.")
def sign(bundle: Path | None, key: Path, new_key: bool) -> None:
    """Sign BUNDLE with ed25519: edgekit.json.sig beside its manifest, which has the digest of all the rest.

    \b
    edgekit sign --key release.pem --new-key
    edgekit sign small.arm --key release.pem
    """
    from edgekit.deploy import signing
    from edgekit.manifest import Manifest

    if bundle is None and not new_key:
        raise UserError("sign needs a bundle to sign, or --new-key")
    public = key.with_name(f"{key.name}.pub")
    if new_key:
        signing.new_key(key, public)
        click.echo(f"{public}: give this one to devices (edgekit deploy --trust); keep {key} to yourself")
    if bundle is not None:
        Manifest.load(bundle)
        signing.sign(bundle, key)
        click.echo(f"{bundle / signing.SIGNATURE}: signed")


def _existing(store: Path, kind: Callable[[Path], Any]) -> Any:
    if not (store / "history.jsonl").is_file():
        raise UserError(f"a store must hold releases: {store} has none; deploy one with edgekit deploy")
    return kind(store)
