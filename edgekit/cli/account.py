"""`edgekit account`: energy, CO2 and cost of a thousand answers."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import click

from edgekit.cli.terminal import json_option, output
from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.assistant.costs import Logged
    from edgekit.report import Measurement


@click.command(short_help="Energy, CO2 and cost of a thousand answers.")
@click.argument("profile", required=False, type=click.Path(path_type=Path))
@click.option("--log", type=click.Path(path_type=Path), help="Conversations of edgekit serve, or their export.")
@click.option("--against", type=click.Path(path_type=Path), help="The profile of the uncompressed model.")
@click.option("--prompt-tokens", type=float, help="Tokens read an answer; default: the log's, else 200.")
@click.option("--answer-tokens", type=float, help="Tokens written an answer; default: the log's, else 100.")
@click.option("--answers", default=1000, show_default=True, help="How many answers.")
@click.option("--grid", type=float, help="Grams of CO2 that a kWh carries where the device is.")
@click.option("--price", type=float, help="What a kWh costs.")
@json_option
def account(
    profile: Path | None,
    log: Path | None,
    against: Path | None,
    prompt_tokens: float | None,
    answer_tokens: float | None,
    answers: int,
    grid: float | None,
    price: float | None,
    as_json: bool,
) -> None:
    """Account for answers by PROFILE, a report of edgekit profile that has joules, or by what a server logged.

    \b
    edgekit account after.json --against before.json --grid 380 --price 0.30
    edgekit account --log conversations.db --against before.json
    """
    from edgekit.account import Use
    from edgekit.account import account as run
    from edgekit.manifest import now
    from edgekit.report import Report, print_report

    if profile is None and log is None:
        raise UserError("account needs a profile, or --log FILE")
    ours = Report.load(profile) if profile else None
    logged, rows = _logged(log) if log else ([], ())
    if prompt_tokens is None:
        prompt_tokens = fmean(each.read_tokens for each in logged) if logged else 200.0
    if answer_tokens is None:
        answer_tokens = fmean(each.generated_tokens for each in logged) if logged else 100.0
    rows += run(
        ours,
        Use(prompt_tokens, answer_tokens, answers, grid, price),
        against=Report.load(against) if against else None,
        measured=[each.joules for each in logged if each.joules is not None],
    )
    report = Report(
        "account",
        rows,
        subject=ours.subject if ours else str(log),
        machine=ours.machine if ours else {},
        created=now(),
    )
    if as_json:
        click.echo(report.to_json())
    else:
        print_report(report, output())


def _logged(path: Path) -> tuple[list[Logged], tuple[Measurement, ...]]:
    """A log's answers, and the rows that say what they were."""
    from edgekit.assistant.costs import read_costs
    from edgekit.report import Measurement

    found = read_costs(path)
    metered, away = sum(each.joules is not None for each in found), sum(each.elsewhere for each in found)
    note = f"{metered} with joules; {away} handed over, whose energy elsewhere is not known"
    n = len(found)
    return found, (
        Measurement("answers in the log", float(n), "", note=note),
        Measurement("tokens read an answer", fmean(each.read_tokens for each in found), "", n=n, note="not cached"),
        Measurement("tokens written an answer", fmean(each.generated_tokens for each in found), "", n=n),
    )
