"""A policy: what a model must keep to before it may go out. A person writes it as TOML.

    [[rule]]
    measure = "accuracy worst case, *"       # names of the report's measurements; * and ? match
    at_least = -2.0                          # in the measurement's unit; at_most likewise
    use = "value"                            # or "worst": value less (at most: plus) its spread
    because = "what users would notice"      # may be left out

A rule that matches no measurement, or one without a value, is broken: what was not measured is not known to be good.
"""

from __future__ import annotations

import fnmatch
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekit.errors import UserError
from edgekit.report import Measurement, Report
from edgekit.schema import parse


@dataclass(frozen=True)
class Rule:
    """One line that a report must not cross."""

    measure: str
    at_least: float | None = None
    at_most: float | None = None
    use: Literal["value", "worst"] = "value"
    because: str = ""

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise UserError(f"a rule must say at_least or at_most: {self.measure!r} says neither")

    def broken_by(self, row: Measurement) -> str | None:
        """What is wrong with a measurement, None when it keeps to the rule."""
        why = f" ({self.because})" if self.because else ""
        if row.value is None:
            return f"{row.name}: it could not be measured: {row.note}{why}"
        if self.use == "worst" and row.spread is None:
            return f"{row.name}: the rule asks for its worst case, and it has no interval{why}"
        slack = row.spread or 0.0 if self.use == "worst" else 0.0
        word = "worst case " if self.use == "worst" else ""
        if self.at_least is not None and not row.value - slack >= self.at_least:
            return f"{row.name}: {word}{row.value - slack:.4g} {row.unit} is below {self.at_least:g}{why}"
        if self.at_most is not None and not row.value + slack <= self.at_most:
            return f"{row.name}: {word}{row.value + slack:.4g} {row.unit} is above {self.at_most:g}{why}"
        return None


@dataclass(frozen=True)
class Policy:
    """Rules that must all hold."""

    rule: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rule:
            raise UserError("a policy must have at least one [[rule]]")

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self.rule

    def broken(self, report: Report) -> list[str]:
        """One line for each breach, in the order of the rules; empty when the report keeps to all of them."""
        found = []
        for rule in self.rule:
            rows = [row for row in report.measurements if fnmatch.fnmatchcase(row.name, rule.measure)]
            if not rows:
                found.append(f"{rule.measure}: nothing of this name was measured")
            found += [line for row in rows if (line := rule.broken_by(row))]
        return found


def load_policy(path: Path) -> Policy:
    """Read a policy. Raises UserError: it cannot be read, or is none."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"a policy must be a readable TOML file: {path}: {problem}") from problem
    return parse(Policy, data, where=str(path))
