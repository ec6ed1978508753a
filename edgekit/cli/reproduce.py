"""`edgekit reproduce` and `recompress`: build a bundle again, from its own source or a newer one."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import click

from edgekit.cli.terminal import json_option, print_json, stages
from edgekit.errors import UserError

_recipe = click.option("-r", "--recipe", help="The recipe's file, where the manifest's name is not a built-in one.")
_calibration = click.option("--calibration", multiple=True, type=click.Path(path_type=Path), help="Its text.")


@click.command(short_help="Build a bundle again and compare the bytes.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", help="Where the source model is now; default: the manifest's name for it.")
@_recipe
@_calibration
@json_option
def reproduce(
    bundle: Path, source: str | None, recipe: str | None, calibration: tuple[Path, ...], as_json: bool
) -> None:
    """Rebuild BUNDLE from its manifest in a fresh folder; exit status 1 when a file is not the same.

    \b
    edgekit reproduce small.x86
    """
    from edgekit.reproduce import reproduce as run

    with stages("rebuilding", quiet=as_json) as tell:
        found = run(bundle, source=source, recipe=recipe, calibration=calibration, on_progress=tell)
    if as_json:
        print_json(dataclasses.asdict(found) | {"identical": found.identical})
    else:
        for name in found.different:
            click.echo(f"differs: {name}")
        for name in found.versions:
            click.echo(f"version: {name}")
        click.echo(f"{len(found.same)} files are the same, {len(found.different)} differ; recorded times aside")
    if not found.identical:
        raise SystemExit(1)


@click.command(short_help="Run a bundle's recipe on a newer source; deploy when the policy holds.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", required=True, help="The newer model.")
@click.option("-o", "--output", "folder", required=True, type=click.Path(path_type=Path), help="The new bundle.")
@click.option("--policy", required=True, type=click.Path(path_type=Path), help="Rules that it must hold (TOML).")
@click.option("--text", type=click.Path(path_type=Path), help="As for edgekit eval.")
@click.option("--choices", multiple=True, type=click.Path(path_type=Path), help="As for edgekit eval.")
@click.option("--limit", type=int, help="As for edgekit eval.")
@click.option("--safety", is_flag=True, help="As for edgekit eval.")
@click.option("--store", type=click.Path(path_type=Path), help="Deploy it there; without, only write it.")
@click.option("--key", type=click.Path(path_type=Path), help="Sign it with this private key.")
@_recipe
@_calibration
@click.pass_context
def recompress(
    context: click.Context,
    bundle: Path,
    source: str,
    folder: Path,
    policy: Path,
    text: Path | None,
    choices: tuple[Path, ...],
    limit: int | None,
    safety: bool,
    store: Path | None,
    key: Path | None,
    recipe: str | None,
    calibration: tuple[Path, ...],
) -> None:
    """Do to a newer model what was done for BUNDLE, and compare: it passes when the policy holds.

    \b
    edgekit recompress small.arm --source newer -o newer.arm --policy policy.toml
    """
    from edgekit.bundle import Bundle
    from edgekit.cli.eval import evaluate
    from edgekit.evaluate.policy import load_policy
    from edgekit.folder import refuse_existing
    from edgekit.reproduce import rebuild

    load_policy(policy)
    if text is None and not choices and not safety:
        raise UserError("recompress needs something to evaluate on: pass --text FILE, --choices FILE or --safety")
    refuse_existing(folder, force=False)
    with stages("rebuilding") as tell:
        made = Bundle.open(bundle)
        rebuild(made, folder, source=source, recipe=recipe, calibration=calibration, on_progress=tell)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
        report = Path(work) / "eval.json"
        context.invoke(  # ends with status 1 when a rule is broken
            evaluate,
            target=str(bundle),
            other=str(folder),
            text=text,
            choices=choices,
            limit=limit,
            safety=safety,
            policy=policy,
            saved=report,
        )
        from edgekit.card import write_card
        from edgekit.report import Report

        write_card(folder, reports=[Report.load(report)])
    if key is not None:
        from edgekit.deploy.signing import sign

        sign(folder, key)
    if store is not None:
        from edgekit.deploy.health import answers
        from edgekit.deploy.store import Store

        release = Store(store).deploy(folder, check=answers)
        click.echo(f"{store / 'current'} is now {folder.resolve().name} ({release[:12]})")
