"""`edgekit card`: write a bundle's model card anew."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write a bundle's model card anew, with more measurements.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--add", multiple=True, type=click.Path(path_type=Path), help="A report of edgekit eval or profile.")
def card(bundle: Path, add: tuple[Path, ...]) -> None:
    """Write MODEL_CARD.md of BUNDLE from its manifest, and what reports measured into both. Sign it again afterwards.

    \b
    edgekit card small.x86 --add eval.json --add profile.json
    """
    from edgekit.card import CARD, write_card
    from edgekit.report import Report

    write_card(bundle, reports=[Report.load(path) for path in add])
    click.echo(bundle / CARD)
