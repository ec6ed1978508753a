"""`edgekit account`: energy, CO2 and cost of a thousand answers."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli.terminal import json_option, output


@click.command(short_help="Energy, CO2 and cost of a thousand answers.")
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="The profile of the uncompressed model.")
@click.option("--prompt-tokens", default=200.0, show_default=True, help="Tokens read an answer.")
@click.option("--answer-tokens", default=100.0, show_default=True, help="Tokens written an answer.")
@click.option("--answers", default=1000, show_default=True, help="How many answers.")
@click.option("--grid", type=float, help="Grams of CO2 that a kWh carries where the device is.")
@click.option("--price", type=float, help="What a kWh costs.")
@json_option
def account(
    profile: Path,
    against: Path | None,
    prompt_tokens: float,
    answer_tokens: float,
    answers: int,
    grid: float | None,
    price: float | None,
    as_json: bool,
) -> None:
    """Account for answers by PROFILE, a report of edgekit profile that has joules.

    \b
    edgekit account after.json --against before.json --grid 380 --price 0.30
    """
    from edgekit.account import Use
    from edgekit.account import account as run
    from edgekit.manifest import now
    from edgekit.report import Report, print_report

    ours = Report.load(profile)
    use = Use(prompt_tokens, answer_tokens, answers, grid, price)
    rows = run(ours, use, against=Report.load(against) if against else None)
    report = Report("account", rows, subject=ours.subject, machine=ours.machine, created=now())
    if as_json:
        click.echo(report.to_json())
    else:
        print_report(report, output())
