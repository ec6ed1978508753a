"""Measurements, the report that holds them, and how both are shown: JSON, CSV, Markdown, terminal."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgekit.errors import ModelError, UserError
from edgekit.folder import explain_write_errors, write_file
from edgekit.schema import parse

if TYPE_CHECKING:
    from rich.console import Console

How = Literal["measured", "estimated", "predicted"]

SCHEMA = 1
_LONGEST = 12  # rows of a table on a terminal


@dataclass(frozen=True)
class Measurement:
    """One number that says where it comes from.

    `value` is None when it could not be had, and `note` then says why. `n` counts the repetitions or items behind it;
    `spread` is the half-width of its 95% interval, in `unit`, where it has one.
    """

    name: str
    value: float | None
    unit: str
    how: How = "measured"
    n: int = 1
    spread: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A quantity over another one: memory over time, gaps over tokens. `x` and `y` have the same length."""

    x_label: str
    x_unit: str
    y_unit: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One line of a table; None where a number could not be had."""

    label: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Table:
    """Numbers that belong together. `label` heads the first column, `columns` (with their units) the others."""

    label: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What was measured in one run, on what, with what.

    `machine` holds the facts that must agree for two reports to be comparable (`Device.fingerprint`), `conditions`
    those that were only written down (clocks, temperatures, other load), `versions` the packages, `subject` what was
    measured (bundle name and digest), `samples` the raw numbers behind a measurement, by its name, `flags` what casts a
    doubt on the run (heat, drift, other programs), and `created` the time in UTC.

    Raises ModelError: two measurements of one name, samples without a measurement, a number that is not finite, a
    spread below zero, a series of two lengths, a row that does not fit its table.
    """

    title: str
    measurements: tuple[Measurement, ...]
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    subject: str = ""
    samples: dict[str, tuple[float, ...]] = field(default_factory=dict)
    created: str = ""
    conditions: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    series: dict[str, Series] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        names: set[str] = set()
        for row in self.measurements:
            if row.name in names:
                raise ModelError(f"measurements must have different names: {row.name!r} stands twice")
            names.add(row.name)
            _refuse_infinite(row.name, [number for number in (row.value, row.spread) if number is not None])
            if row.spread is not None and row.spread < 0:
                raise ModelError(f"a spread must not be below zero: {row.name!r} has {row.spread}")
        for name, numbers in self.samples.items():
            if name not in names:
                raise ModelError(f"samples must belong to a measurement: {name!r} is not one")
            _refuse_infinite(name, numbers)
        for name, series in self.series.items():
            if len(series.x) != len(series.y):
                raise ModelError(f"a series needs as many x as y: {name!r} has {len(series.x)} and {len(series.y)}")
            _refuse_infinite(name, [*series.x, *series.y])
        for name, table in self.tables.items():
            for line in table.rows:
                if len(line.values) != len(table.columns):
                    raise ModelError(
                        f"a row must fill its table's {len(table.columns)} columns: {line.label!r} of {name!r} has"
                        f" {len(line.values)}"
                    )
                _refuse_infinite(name, [number for number in line.values if number is not None])

    def value(self, name: str) -> float | None:
        """The value of the measurement called `name`; None where there is none."""
        return next((row.value for row in self.measurements if row.name == name), None)

    def to_json(self) -> str:
        """The whole report as JSON text; `from_json` gives an equal one."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, *, where: str = "the report") -> Report:
        """Read what `to_json` wrote. `where` names the file for messages.

        Raises ModelError: not JSON, not a report, or of a newer schema.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise ModelError(f"{where} must be JSON: {problem}; write it again") from problem
        schema = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(schema, int) or schema < 1:
            raise ModelError(f"{where} is not an edgekit report: it names no schema")
        if schema > SCHEMA:
            raise ModelError(f"{where} has schema {schema}, this edgekit reads up to {SCHEMA}; update edgekit")
        try:
            return parse(cls, data, where=where, error=ModelError)
        except OverflowError as problem:
            raise ModelError(f"{where} holds a number out of range: {problem}; write it again") from problem

    def save(self, path: Path) -> None:
        """Write the JSON, whole or not at all. Raises UserError or BudgetError as `explain_write_errors` does."""
        with explain_write_errors(path):
            write_file(path, self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a saved report. Raises UserError: no such file; ModelError: as `from_json`."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as problem:
            raise UserError(f"a report must be a readable file: {path} ({problem.strerror})") from problem
        except UnicodeDecodeError as problem:
            raise ModelError(f"{path} is not an edgekit report: {problem}") from problem
        return cls.from_json(text, where=str(path))

    def to_markdown(self) -> str:
        """A page: title, subject, one table, machine and versions."""
        lines = [f"# {plain(self.title)}", "", plain(f"{self.subject} {self.created}"), ""]
        lines += ["| measurement | value | unit | ± | n | how | note |", "|---|--:|---|--:|--:|---|---|"]
        for row in self.measurements:
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |")
        for name, table in self.tables.items():
            lines += ["", f"## {plain(name)}", ""]
            if table.note:
                lines += [plain(table.note), ""]
            heads = [plain(head).replace("|", "\\|") for head in (table.label, *table.columns)]
            lines += ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * len(table.columns)]
            for line in table.rows:
                texts = [plain(line.label).replace("|", "\\|"), *map(number, line.values)]
                lines.append("| " + " | ".join(texts) + " |")
        lines += [f"\n{plain(flag)}" for flag in self.flags]
        for label, facts in (("Machine", self.machine), ("Conditions", self.conditions), ("Versions", self.versions)):
            if facts:
                lines += ["", f"{label}: {plain(_facts(facts))}"]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """One line a measurement, its values with all their digits; empty where a number could not be had."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["subject", "measurement", "value", "unit", "spread", "n", "how", "note"])
        for row in self.measurements:
            value, spread = ("" if number is None else repr(number) for number in (row.value, row.spread))
            texts = [_harmless(text) for text in (self.subject, row.name)]
            writer.writerow([*texts, value, _harmless(row.unit), spread, row.n, row.how, _harmless(row.note)])
        return stream.getvalue()


def print_report(report: Report, console: Console) -> None:
    """Show the report on a terminal. Its text is printed as it is: neither markup nor control codes work."""
    from rich.table import Table
    from rich.text import Text

    def dim(*lines: str) -> None:
        for line in filter(None, lines):
            console.print(Text(plain(line), "dim"))

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for header in ("measurement", "value", "unit", "spread", "n", "how"):
        table.add_column(
            header, justify="right" if header in ("value", "n") else "left", no_wrap=header != "measurement"
        )
    notes = []
    for row in report.measurements:
        name, value, unit, spread, count, how, note = cells(row)
        quiet = (Text(cell, "dim") for cell in (f"± {spread}" if spread else "", count, how))
        table.add_row(Text(name), Text(value, "bold"), Text(unit), *quiet)
        notes += [f"{name}: {note}"] if note else []

    console.print(Text(plain(report.title), "bold"))
    dim(report.subject, _facts(report.machine), _facts(report.conditions))
    console.print()
    console.print(table)
    for name, numbers in report.tables.items():
        console.print()
        console.print(Text(plain(name), "bold"))
        dim(numbers.note)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(plain(numbers.label))
        for column in numbers.columns:
            table.add_column(plain(column), justify="right")
        for line in numbers.rows[:_LONGEST]:
            table.add_row(Text(plain(line.label)), *map(number, line.values))
        console.print(table)
        if len(numbers.rows) > _LONGEST:
            dim(f"and {len(numbers.rows) - _LONGEST} more, which the saved report holds")
    console.print()
    for flag in report.flags:
        console.print(Text(plain(f"doubt: {flag}"), "yellow"))
    dim(*notes, f"{_facts(report.versions)}  {report.created}".strip())


def cells(row: Measurement) -> tuple[str, str, str, str, str, str, str]:
    """Name, value, unit, spread, n, how and note of one measurement as text.

    A value that could not be had is n/a, and what would describe it is empty.
    """
    name, unit, note = plain(row.name), plain(row.unit), plain(row.note)
    if row.value is None:
        return name, "n/a", unit, "", "", "", note
    spread = "" if row.spread is None else digits(row.spread, row.spread)
    return name, digits(row.value, row.spread), unit, spread, str(row.n), row.how, note


def number(value: float | None) -> str:
    """`value` in four digits, or n/a."""
    return "n/a" if value is None else digits(value)


def digits(value: float, spread: float | None = None) -> str:
    """`value` with the digits it deserves: to the second digit of its spread, else four in all.

    At most seven decimals; all digits before the point. From 1e15 on, and below 1e-4, it is written as 1.234e-05.
    Source: JCGM 100:2008 (GUM), 7.2.6, for the rule of two digits.
    """
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.3e}"
    if spread:
        decimals = 1 - math.floor(math.log10(spread))
    elif value == int(value):
        decimals = 0
    else:
        decimals = 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(decimals, 0), 7)}f}"


def plain(text: str) -> str:
    """One line without control characters, so that a foreign report cannot steer the terminal or break a table."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable())


def _harmless(text: str) -> str:
    """Text for a cell that a spreadsheet does not take for a formula."""
    text = plain(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _facts(facts: dict[str, str]) -> str:
    return ", ".join(f"{key} {fact}" for key, fact in facts.items())


def _refuse_infinite(name: str, numbers: Iterable[float]) -> None:
    for number in numbers:
        if not math.isfinite(number):
            raise ModelError(f"a measurement must be finite: {name!r} has {number}; give None and a note instead")
