"""Energy, CO2 and cost of a thousand answers, from profiles, against the uncompressed model.

    joules = answers * (prompt tokens * J a prompt token + generated tokens * J a generated token)
    CO2 = joules / 3.6e6 * grid intensity,   cost = joules / 3.6e6 * price of a kWh

Grid intensity and price are what the user says; nothing is assumed. A profile without joules gives none, and says why.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def account(profile: Report, use: Use, *, against: Report | None = None) -> tuple[Measurement, ...]:
    """The rows for `profile`, and with `against`, the profile of the uncompressed model, what is saved."""
    ours = _energy(profile, use)
    rows = _rows("", ours, use)
    if against is not None:
        theirs = _energy(against, use)
        rows += _rows(", uncompressed", theirs, use)
        if ours.value is not None and theirs.value:
            share = 100 * (1 - ours.value / theirs.value)
            rows.append(Measurement("energy saved", share, "%", _worse(ours.how, theirs.how)))
        else:
            rows.append(Measurement("energy saved", None, "%", note="one of the profiles has no joules"))
    return tuple(rows)


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
    rows = [Measurement(energy.name + label, energy.value, "J", energy.how, energy.n, note=energy.note)]
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
