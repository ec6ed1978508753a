"""`edgekit compare`: which of two profiles is faster, or whether one cannot tell."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.terminal import json_option, output, print_json


@click.command(short_help="Say which of two profiles is faster, or cannot tell.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Compare also reports of different machines.")
@json_option
def compare(a: Path, b: Path, force: bool, as_json: bool) -> None:
    """Compare report B with report A, as edgekit profile saved them. The ratio is B over A.

    \b
    edgekit compare before.json after.json
    """
    import dataclasses

    from rich.table import Table

    from edgekit.profile.compare import compare as judge
    from edgekit.report import Report, digits, plain

    verdicts = judge(Report.load(a), Report.load(b), force=force)
    if as_json:
        print_json([dataclasses.asdict(verdict) for verdict in verdicts])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("measurement", a.stem, b.stem, "unit", "ratio", "95%", "verdict"):
        words = heading in ("measurement", "unit", "verdict")
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "measurement")
    doubts: dict[str, list[str]] = {}
    for row in verdicts:
        values = ["n/a" if value is None else digits(value) for value in (row.a, row.b)]
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        interval = "" if row.low is None or row.high is None else f"{row.low:.3f}–{row.high:.3f}"
        table.add_row(plain(row.name), *values, plain(row.unit), ratio, interval, row.verdict)
        if row.note:
            doubts.setdefault(row.note, []).append(row.name)
    output().print(table)
    for note, names in doubts.items():
        click.echo(plain(f"cannot tell, {note}: {'; '.join(names)}"))
