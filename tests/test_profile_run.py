"""A whole profile of a tiny bundle: which rows, tables and series it has, and what stands behind them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_reference import tiny_checkpoint

from edgekit.errors import BudgetError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.profile import latency
from edgekit.profile import run as module
from edgekit.profile.compare import compare
from edgekit.profile.options import Options
from edgekit.profile.power import Source
from edgekit.profile.run import profile, profile_with_trace
from edgekit.profile.sensors import Found
from edgekit.report import Measurement, Report

SMALL: dict[str, Any] = {
    "prompt_tokens": 12, "generate_tokens": 9, "repetitions": 4, "threads": 1,
    "settle_s": 0.0, "idle_s": 0.0, "cold": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_checkpoint(), path, target=TARGETS["portable"])
    return path


@pytest.fixture(scope="module", autouse=True)
def awake() -> Iterator[None]:
    """A tiny model need not be warm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "WAKE_S", 0)
        yield


@pytest.fixture(scope="module")
def report(bundle: Path) -> Report:
    return profile(bundle, Options(**SMALL))


def rows(report: Report) -> dict[str, Measurement]:
    return {row.name: row for row in report.measurements}


REPEATED = {
    "pp12": "tok/s",
    "tg9": "tok/s",
    "time to first token": "ms",
    "time to first token: tokenise": "ms",
    "time to first token: prefill": "ms",
    "time to first token: sample": "ms",
    "gap between tokens": "ms",
    "machine: reading memory": "GB/s",
    "machine: computing": "Gop/s",
}


def test_the_rows_are_those_that_are_promised(report: Report) -> None:
    found = rows(report)
    units = {
        **REPEATED,
        **{f"gap between tokens, p{p}": "ms" for p in (50, 90, 99)},
        "drift of the gaps": "ratio",
        "load, cold": "ms",
        "load, warm": "ms",
        "energy per generated token": "J",
        "bytes read per token": "MB",
        "decode: ceiling by bandwidth": "tok/s",
        "decode: predicted": "tok/s",
        "decode: read rate": "GB/s",
        "size of graph and weights": "MB",
        "memory predicted": "MB",
        **dict.fromkeys(("peak PSS", "peak PSS, private", "peak PSS, file-backed", "peak RSS"), "MB"),
        **{f"page faults from storage, {stage}": "pages" for stage in ("loading", "warming up", "measuring")},
    }
    assert {name: row.unit for name, row in found.items()} == units
    for name, row in found.items():
        assert row.value is not None or row.note, name
        assert row.value is None or row.value >= 0, name
    assert found["memory predicted"].how == found["decode: predicted"].how == "predicted"


def test_without_a_sensor_energy_is_null_and_says_why(report: Report) -> None:
    row = rows(report)["energy per generated token"]
    if row.value is None:
        assert row.note.startswith("no sensor: jetson (")
    assert json.loads(report.to_json())["measurements"]


def test_each_row_counts_what_is_behind_it(report: Report) -> None:
    found = rows(report)
    assert set(report.samples) == set(REPEATED)
    for name in REPEATED:
        assert found[name].n == len(report.samples[name]) == 4
        assert found[name].spread is not None
        assert found[name].value == pytest.approx(np.median(report.samples[name]))
    assert found["gap between tokens, p99"].n == found["drift of the gaps"].n == 4 * 9
    gaps = report.series["gaps"].y
    assert found["gap between tokens, p90"].value == pytest.approx(np.percentile(gaps, 90))


def test_tables_tell_llama_bench_memory_roofline_and_layers(report: Report) -> None:
    bench = report.tables["llama-bench"]
    assert [row.label for row in bench.rows] == ["pp12", "tg9"]
    rates = report.samples["tg9"]
    assert bench.rows[1].values[3] == pytest.approx(np.mean(rates))
    assert bench.rows[1].values[4] == pytest.approx(np.std(rates, ddof=1))
    bytes_read = sum(row.values[0] or 0 for row in report.tables["roofline"].rows)
    assert bytes_read == pytest.approx(report.value("bytes read per token"))
    parts = {row.label: row.values for row in report.tables["memory"].rows}
    assert parts["all"][0] == pytest.approx(report.value("memory predicted"))
    assert [row.label for row in report.tables["layers in memory"].rows if row.label.startswith("layer")] == [
        "layer 0",
        "layer 1",
    ]
    assert {row.label for row in report.tables["layers"].rows} >= {"layer 0", "layer 1"}
    assert sum(row.values[3] or 0 for row in report.tables["operators"].rows) == pytest.approx(100)


def test_the_report_says_of_what_and_where_it_is(report: Report, bundle: Path) -> None:
    assert report.subject.startswith("tiny ")
    assert report.machine["threads"] == "1"
    assert report.conditions["context"] == "256"
    assert report.conditions["cache type"] == "float32"
    assert {"edgekit", "onnxruntime", "numpy"} <= report.versions.keys()
    size = sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert report.value("size of graph and weights") == size / 1e6


def test_reports_can_be_saved_and_compared(report: Report, bundle: Path, tmp_path: Path) -> None:
    report.save(tmp_path / "a.json")
    assert Report.load(tmp_path / "a.json") == report
    verdicts = {verdict.name: verdict for verdict in compare(report, profile(bundle, Options(**SMALL)))}
    assert all(verdicts[name].p_value is not None for name in report.samples)


def test_what_was_asked_for_beside_is_there(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    told: list[tuple[int, int]] = []
    options = Options(
        **SMALL
        | {"depths": (40, 0), "sweep_threads": (1,), "prompts": ("The fox", "A dog and a cat"), "repetitions": 2}
    )
    done = profile_with_trace(bundle, options, on_step=lambda *state: told.append(state))
    tables = done.report.tables
    assert [row.label for row in tables["context sweep"].rows] == ["0", "40"]
    assert [row.label for row in tables["texts"].rows] == ["1: The fox", "2: A dog and a cat"]
    assert [row.label for row in tables["thread sweep"].rows] == ["1"]
    assert (tmp_path / "threads.json").is_file()
    names = {event["name"] for event in json.loads(done.trace)["traceEvents"]}
    assert {"prefill", "decode", "layer 0", "layer 1"} <= names
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == len(told) - 1


def test_a_small_context_gets_a_small_prompt(bundle: Path) -> None:
    found = profile(bundle, Options(repetitions=1, context=32, settle_s=0, idle_s=0, operators=False, cold=False))
    assert {"pp16", "tg8"} <= rows(found).keys()
    assert rows(found)["pp16"].spread is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 256}, "below the context of 256 tokens: got 256 and 9; pass smaller ones"),
        ({"generate_tokens": 256}, "below the context of 256 tokens: got 12 and 256"),
        ({"context": 12}, "below the context of 12 tokens: got 12 and 9"),
        ({"context": 512}, "--context must be from 1"),
        ({"threads": 0}, "--threads must be at least 1: got 0"),
        ({"power": "csv:absent.csv", "operators": False}, "must be a readable CSV"),
        ({"power": "serial:/dev/null@fast"}, "needs a whole number: got 'fast'"),
    ],
)
def test_options_that_cannot_be(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        profile(bundle, Options(**{**SMALL, "repetitions": 1, **options}))


def test_too_little_memory_is_refused_before_anything_is_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.runtime.budget.available_bytes", lambda: 10**6)
    monkeypatch.setattr(module, "load", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(BudgetError, match="must fit in memory"):
        profile(bundle, Options(**SMALL))


def ticking(kind: str = "measured") -> Source:
    """A counter of 7 W, whose joules change at each reading."""
    return Source("fake", ("board",), "everything", lambda: (7 * time.perf_counter(),), kind=kind, wraps=(1e9,))  # type: ignore[arg-type]


def test_a_sensor_gives_gross_idle_and_net_energy(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_power", lambda wanted: Found(ticking(), ()))
    monkeypatch.setattr("edgekit.profile.power.LEAST_UPDATES", 0)
    options = Options(**SMALL | {"operators": False, "idle_s": 0.25, "grid_g_per_kwh": 300.0, "price_per_kwh": 0.4})
    found = rows(profile(bundle, options))
    assert found["power, decode"].value == pytest.approx(7, rel=0.01)
    assert found["power at rest"].value == pytest.approx(7, rel=0.01)
    gross, net = found["energy, decode: gross"].value, found["energy, decode: net"].value
    assert gross is not None
    assert net == pytest.approx(0, abs=0.02 * gross)
    each = found["energy per generated token"].value
    assert each == pytest.approx(gross / (4 * 9))
    assert "fake: board; everything" in found["energy, decode: gross"].note
    assert found["CO2 of 1,000 tokens"].value == pytest.approx(1000 * each / 3.6e6 * 300)
    assert found["cost of 1,000 tokens"].how == "estimated"


def test_an_estimate_is_marked_and_only_made_when_asked_for(bundle: Path) -> None:
    options = Options(**SMALL | {"operators": False, "estimate_w": (6.5, 2.5)})
    found = rows(profile(bundle, options))
    assert found["power, decode"].value == pytest.approx(6.5)
    assert found["power, decode"].how == found["energy per generated token"].how == "estimated"
    assert found["energy, decode: net"].value == pytest.approx((found["energy, decode: gross"].value or 0) * 4 / 6.5)
