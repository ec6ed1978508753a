"""What all benchmarks share: where the data is, checks against bounds, one JSON object or a table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgekit.host import host_device
from edgekit.manifest import now, versions
from edgekit.profile.stats import measured
from edgekit.report import Measurement

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-genai", "onnx", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Check:
    """A bound that a figure must keep: `value` at least or at most `bound`."""

    name: str
    value: float
    bound: float
    kind: Literal["at least", "at most"]

    @property
    def ok(self) -> bool:
        return self.value >= self.bound if self.kind == "at least" else self.value <= self.bound


@dataclass
class Benchmark:
    """Collects measurements and checks; `finish` prints them and ends the process, with 1 when a check is not ok."""

    name: str
    measurements: list[Measurement] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def samples(self, name: str, values: list[float], *, unit: str, note: str = "") -> float:
        """Record repeated values; returns their median."""
        row = measured(name, values, unit=unit, note=note)
        self.measurements.append(row)
        assert row.value is not None
        return row.value

    def value(
        self, name: str, value: float, unit: str, *, n: int = 1, spread: float | None = None, note: str = ""
    ) -> None:
        self.measurements.append(Measurement(name, value, unit, n=n, spread=spread, note=note))

    def at_least(self, name: str, value: float, bound: float) -> None:
        self.checks.append(Check(name, value, bound, "at least"))

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.checks.append(Check(name, value, bound, "at most"))

    def finish(self, *, as_json: bool) -> None:
        if as_json:
            print(json.dumps(self.to_dict(), indent=1))
        else:
            print(self.to_markdown())
        sys.exit(0 if all(check.ok for check in self.checks) else 1)

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "date": now(),
            "machine": host_device().fingerprint(),
            "versions": versions(*PACKAGES),
            "measurements": [dataclasses.asdict(row) for row in self.measurements],
            "checks": [{**dataclasses.asdict(check), "ok": check.ok} for check in self.checks],
        }

    def to_markdown(self) -> str:
        facts = ", ".join(f"{k} {v}" for k, v in versions(*PACKAGES).items())
        lines = [f"# {self.name}", "", now(), "", ", ".join(host_device().fingerprint().values()), "", facts, ""]
        lines += ["| measurement | value | unit | ± | n | note |", "|---|--:|---|--:|--:|---|"]
        for row in self.measurements:
            spread = "" if row.spread is None else f"{row.spread:.3g}"
            value = "n/a" if row.value is None else f"{row.value:.5g}"
            lines.append(f"| {row.name} | {value} | {row.unit} | {spread} | {row.n} | {row.note} |")
        lines += ["", "| check | value | bound | ok |", "|---|--:|--:|---|"]
        for check in self.checks:
            verdict = "yes" if check.ok else "**no**"
            lines.append(f"| {check.name} | {check.value:.4g} | {check.kind} {check.bound:g} | {verdict} |")
        return "\n".join(lines)


def arguments(description: str, *, sections: Sequence[str] = (), work: bool = False) -> argparse.Namespace:
    """--json and --quick; --only where a benchmark has sections, all by default; --work keeps what it makes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, under ten minutes")
    if sections:
        listed = ", ".join(sections)
        parser.add_argument(
            "--only", nargs="+", choices=sections, default=list(sections), metavar="SECTION", help=listed
        )
    if work:
        parser.add_argument("--work", metavar="FOLDER", help="keep models there, and use those that are there")
    return parser.parse_args()


def data(name: str) -> Path:
    """A file of the evaluation data, below EDGEKIT_DATA. Exits with 2 and a reason where it is absent."""
    root = Path(os.environ.get("EDGEKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / name).is_file():
        print(f"{root / name} is missing: set EDGEKIT_DATA to the folder of evaluation data", file=sys.stderr)
        sys.exit(2)
    return root / name
