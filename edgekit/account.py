"""Energy, CO2 and cost of a thousand answers, from profiles and logs, against the uncompressed model.

    joules = answers * (prompt tokens * J a prompt token + generated tokens * J a generated token)
    CO2 = joules / 3.6e6 * grid intensity,   cost = joules / 3.6e6 * price of a kWh

Where a server's log has the joules of its answers, their mean takes the place of the first line. Grid intensity and
price are what the user says; nothing is assumed. What has no joules gives none, and says why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgekit.errors import UserError
from edgekit.report import How, Measurement, Report

GENERATED = "energy per generated token"
PROMPT = "energy per token of the prompt"
JOULES_A_KWH = 3.6e6


@dataclass(frozen=True)
class Use:
    """What an answer takes, and what a kWh carries and costs; None where nobody said."""

    prompt_tokens: float
    generated_tokens: float
    answers: int = 1000
    grid_g_per_kwh: float | None = None
    price_per_kwh: float | None = None

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.generated_tokens) < 0 or self.answers < 1:
            raise UserError(
                f"tokens must be at least 0 and answers at least 1: got {self.prompt_tokens:g},"
                f" {self.generated_tokens:g} and {self.answers}"
            )
        for value in (self.grid_g_per_kwh, self.price_per_kwh):
            if value is not None and not value >= 0:
                raise UserError(f"what a kWh carries or costs must be at least 0: got {value}")


def account(
    profile: Report | None, use: Use, *, against: Report | None = None, measured: Sequence[float] = ()
) -> tuple[Measurement, ...]:
    """The rows for `profile`, and with `against`, the profile of the uncompressed model, what is saved.

    `measured` are the joules of single answers; where there are some, `profile` is not needed. Raises UserError: there
    is neither.
    """
    if profile is None and not measured:
        raise UserError("an account needs joules: pass a profile, or a log of answers that a sensor measured")
    ours = _mean(measured, use) if measured else _energy(profile, use)  # type: ignore[arg-type]
    rows = _rows("", ours, use)
    if against is not None:
        theirs = _energy(against, use)
        rows += _rows(", uncompressed", theirs, use)
        if ours.value is not None and theirs.value:
            share = 100 * (1 - ours.value / theirs.value)
            rows.append(Measurement("energy saved", share, "%", _worse(ours.how, theirs.how)))
        else:
            rows.append(Measurement("energy saved", None, "%", note="one of the two has no joules"))
    return tuple(rows)


def _mean(joules: Sequence[float], use: Use) -> Measurement:
    half = 1.96 * statistics.stdev(joules) / math.sqrt(len(joules)) if len(joules) > 1 else None
    return Measurement(
        f"energy, {use.answers} answers",
        use.answers * statistics.fmean(joules),
        "J",
        "measured",
        n=len(joules),
        spread=None if half is None else use.answers * half,
        note="mean of the answers that a sensor measured; all that it covers, not the model alone",
    )


def _energy(profile: Report, use: Use) -> Measurement:
    name = f"energy, {use.answers} answers"
    rows = {row.name: row for row in profile.measurements}
    total, how = 0.0, "measured"
    for label, tokens in ((PROMPT, use.prompt_tokens), (GENERATED, use.generated_tokens)):
        if not tokens:
            continue
        row = rows.get(label)
        if row is None or row.value is None:
            why = row.note if row is not None else rows[GENERATED].note if GENERATED in rows else ""
            return Measurement(name, None, "J", note=f"{profile.subject} has no {label}: {why or 'not measured'}")
        total += use.answers * tokens * row.value
        how = _worse(how, row.how)
    note = f"{use.prompt_tokens:g} tokens read and {use.generated_tokens:g} written an answer, {profile.subject}"
    return Measurement(name, total, "J", _worse(how, "estimated"), n=use.answers, note=note)


def _rows(label: str, energy: Measurement, use: Use) -> list[Measurement]:
    facts = (("CO2", use.grid_g_per_kwh, "g"), ("cost", use.price_per_kwh, ""))
    rows = [replace(energy, name=energy.name + label)]
    for name, rate, unit in facts:
        if rate is not None:
            value = None if energy.value is None else energy.value / JOULES_A_KWH * rate
            note = energy.note if value is None else f"{rate:g} a kWh, as given"
            rows.append(Measurement(f"{name}, {use.answers} answers{label}", value, unit, "estimated", note=note))
    return rows


def _worse(a: str, b: str) -> How:
    """The less certain of two."""
    order: tuple[How, ...] = ("measured", "estimated", "predicted")
    return order[max(order.index(a), order.index(b))]
