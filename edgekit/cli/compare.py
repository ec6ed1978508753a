"""`edgekit compare`: which of several profiles, or bundles, is faster, or whether one cannot tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.terminal import json_option, output, print_json, progress
from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.profile.compare import Verdict


@click.command(short_help="Say which of two profiles or bundles is faster, or cannot tell.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Compare also reports of different machines.")
@click.option("--blocks", default=12, show_default=True, help="Of bundles: how often their processes start anew.")
@click.option("--prompt", type=int, help="Of bundles: tokens of the prompt.  [default: 128]")
@click.option("--generate", type=int, help="Of bundles: tokens to generate.  [default: 16]")
@click.option("--threads", type=int, help="Of bundles; default: the cores that this machine has for it.")
@json_option
def compare(
    a: Path,
    b: Path,
    more: tuple[Path, ...],
    force: bool,
    blocks: int,
    prompt: int | None,
    generate: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare B (and more) with A: reports that edgekit profile saved, or bundles, which then take turns here.

    Reports of two runs differ also by what the machine did meanwhile; turns leave that out. Ratios are over A.

    \b
    edgekit compare before.json after.json
    """
    paths = (a, b, *more)
    folders = [path.is_dir() for path in paths]
    if any(folders) and not all(folders):
        raise UserError(f"compare takes reports or bundles, not both: got {', '.join(map(str, paths))}")
    if all(folders):
        from edgekit.profile.turns import take_turns

        with progress("taking turns", quiet=as_json) as advance:
            contest = take_turns(
                paths, prompt_tokens=prompt, generate_tokens=generate, threads=threads, blocks=blocks, on_block=advance
            )
        found = [contest.against(0, index) for index in range(1, len(paths))]
    else:
        from edgekit.profile.compare import compare as judge
        from edgekit.report import Report

        reports = [Report.load(path) for path in paths]
        found = [judge(reports[0], report, force=force) for report in reports[1:]]
    if as_json:
        rows = [(path, verdict) for path, verdicts in zip(paths[1:], found, strict=True) for verdict in verdicts]
        other = [{"b_is": str(path)} if more else {} for path, _ in rows]
        print_json([dataclasses.asdict(verdict) | who for (_, verdict), who in zip(rows, other, strict=True)])
        return
    for path, verdicts in zip(paths[1:], found, strict=True):
        _print(a, path, verdicts)


def _print(a: Path, b: Path, verdicts: Sequence[Verdict]) -> None:
    from rich.table import Table

    from edgekit.report import digits, plain

    table = Table(box=None, pad_edge=False)
    for heading in ("measurement", a.stem, b.stem, "unit", "ratio", "95%", "verdict"):
        words = heading in ("measurement", "unit", "verdict")
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "measurement")
    doubts: dict[str, list[str]] = {}
    some = any(row.ratio is not None for row in verdicts)
    for row in verdicts:
        if row.note:
            doubts.setdefault(row.note, []).append(row.name)
        if some and row.ratio is None:
            continue  # the line below the table names it
        values = ["n/a" if value is None else digits(value) for value in (row.a, row.b)]
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        interval = "" if row.low is None or row.high is None else f"{row.low:.3f}–{row.high:.3f}"
        table.add_row(plain(row.name), *values, plain(row.unit), ratio, interval, row.verdict)
    output().print(table)
    for note, names in doubts.items():
        click.echo(plain(f"cannot tell, {note}: {'; '.join(names)}"))
