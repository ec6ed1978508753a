import csv
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from edgekit.errors import ModelError, UserError
from edgekit.report import Measurement, Report, Row, Series, Table, cells, digits, plain, print_report

ROWS = (
    Measurement("pp512", 432.123, "tok/s", n=10, spread=2.345),
    Measurement("tg128", 172.3456, "tok/s", n=10, spread=0.41),
    Measurement("energy", None, "J/token", n=0, note="no sensor: power_supply is empty"),
    Measurement("ceiling", 650.0, "tok/s", how="predicted"),
)
REPORT = Report(
    "small on arm",
    ROWS,
    machine={"cores": "4 x cortex-a76"},
    versions={"edgekit": "0.1.0"},
    subject="small.arm 3f9a1c",
    samples={"pp512": (430.0, 432.123, 433.0)},
    created="2026-01-02T03:04:05Z",
)


def shown(report: Report, width: int = 100) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width))
    return stream.getvalue()


finite = st.floats(allow_nan=False, allow_infinity=False)
measurements = st.lists(
    st.builds(
        Measurement,
        st.text(),
        st.none() | finite,
        st.text(),
        st.sampled_from(["measured", "estimated", "predicted"]),
        st.integers(0, 10**6),
        st.none() | st.floats(0, 1e300),
        st.text(),
    ),
    unique_by=lambda row: row.name,
    max_size=4,
)


@given(
    rows=measurements, words=st.dictionaries(st.text(), st.text(), max_size=3), numbers=st.lists(finite), data=st.data()
)
def test_json_round_trip_and_every_rendering_works(rows, words, numbers, data):
    samples = {data.draw(st.sampled_from(rows)).name: tuple(numbers)} if rows else {}
    report = Report(data.draw(st.text()), tuple(rows), words, words, data.draw(st.text()), samples, "now")
    assert Report.from_json(report.to_json()) == report
    assert report.to_markdown().startswith("# ")
    assert shown(report)


def test_save_and_load(tmp_path):
    path = tmp_path / "report.json"
    REPORT.save(path)
    assert Report.load(path) == REPORT
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_the_json_is_plain_and_carries_its_schema():
    data = json.loads(REPORT.to_json())
    assert data["schema"] == 1
    assert data["measurements"][2]["value"] is None
    assert data["samples"] == {"pp512": [430.0, 432.123, 433.0]}


def edited(**changes: object) -> str:
    return json.dumps(json.loads(REPORT.to_json()) | changes)


ROW = {"name": "x", "value": 1.0, "unit": "s"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        (REPORT.to_json()[:-40], "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "not an edgekit report"),
        ('{"model": "x"}', "not an edgekit report"),
        (edited(schema=0), "not an edgekit report"),
        (edited(schema="1"), "not an edgekit report"),
        (edited(schema=2), "schema 2, this edgekit reads up to 1; update"),
        (edited(titel="x"), "did you mean 'title'"),
        (edited(title=3), "title must be a string"),
        (edited(measurements=[ROW, ROW]), "'x' stands twice"),
        (edited(measurements=[ROW | {"how": "guessed"}]), "must be one of measured, estimated, predicted"),
        (edited(measurements=[ROW | {"value": True}]), "must be a number"),
        (edited(measurements=[ROW | {"value": math.nan}]), "must be finite"),
        (edited(measurements=[ROW | {"spread": math.inf}]), "must be finite"),
        (edited(measurements=[ROW | {"spread": -1.0}]), "below zero"),
        (edited(samples={"pp512": [math.inf]}), "must be finite"),
        (edited(samples={"pp512": [10**400]}), "out of range"),
        (edited(samples={"other": [1.0]}), "'other' is not one"),
    ],
)
def test_a_broken_foreign_or_newer_report_is_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        Report.load(path)
    assert "a.json" in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="not an edgekit report"):
        Report.load(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_missing_file_is_the_users_error(tmp_path, name):
    with pytest.raises(UserError, match="readable file"):
        Report.load(tmp_path / name)


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="writable"):
        REPORT.save(tmp_path / "file" / "report.json")


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (432.123, None, "432.1"),
        (432.123, 2.345, "432.1"),
        (432.123, 23.0, "432"),
        (432.123, 0.041, "432.123"),
        (0.081234, 0.0011, "0.0812"),
        (0.081234, None, "0.08123"),
        (98201234.0, None, "98,201,234"),
        (98201234.5, None, "98,201,234"),
        (650.0, None, "650"),
        (0.0, None, "0"),
        (0.0, 0.5, "0.00"),
        (-1.5, None, "-1.500"),
        (1.2e-5, None, "1.200e-05"),
        (1.23e-4, None, "0.0001230"),
        (1e300, None, "1.000e+300"),
        (3.0, 0.0, "3"),
        (3.14159, 1e-12, "3.1415900"),
    ],
)
def test_digits(value, spread, text):
    assert digits(value, spread) == text


@given(value=st.floats(-1e300, 1e300), spread=st.none() | st.floats(0, 1e300))
def test_digits_drop_no_more_than_the_spread_allows(value, spread):
    back = float(digits(value, spread).replace(",", ""))
    assert abs(back - value) <= max(0.6e-3 * abs(value), 0.06 * (spread or 0))


def test_a_value_that_could_not_be_had_is_na_with_its_reason():
    assert cells(ROWS[2]) == ("energy", "n/a", "J/token", "", "", "", "no sensor: power_supply is empty")
    text = shown(REPORT)
    (row,) = [line for line in text.splitlines() if line.startswith("energy ")]
    assert row.split() == ["energy", "n/a", "J/token"]
    assert "energy: no sensor: power_supply is empty" in text


def test_the_terminal_table_is_aligned():
    lines = shown(REPORT).splitlines()
    head = next(line for line in lines if line.startswith("measurement"))
    rows = [line for line in lines if line.startswith(("pp512", "tg128", "ceiling"))]
    assert rows[0].split() == ["pp512", "432.1", "tok/s", "±", "2.3", "10", "measured"]
    assert {line.index("tok/s") for line in rows} == {head.index("unit")}
    assert [line[: head.index("unit") - 2][-1] for line in rows] == ["1", "5", "0"]
    assert rows[2].split() == ["ceiling", "650", "tok/s", "1", "predicted"]


def test_the_terminal_shows_what_the_numbers_belong_to():
    text = shown(REPORT)
    for part in ("small on arm", "small.arm 3f9a1c", "4 x cortex-a76", "edgekit 0.1.0", "2026-01-02T03:04:05Z"):
        assert part in text


def test_no_colour_in_a_pipe():
    assert "\x1b" not in shown(REPORT)


def test_text_of_a_foreign_report_neither_steers_the_terminal_nor_breaks_the_table():
    hostile = "[bold]a[/bold]\x1b[31m|\nb\x9b\u202e"
    row = dataclasses.replace(ROWS[2], name=hostile, unit=hostile, note=hostile)
    report = dataclasses.replace(REPORT, title=hostile, measurements=(row,), samples={}, machine={hostile: hostile})
    text = shown(report)
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    assert "[bold]a[/bold]" in text
    (line,) = [line for line in report.to_markdown().splitlines() if "n/a" in line]
    assert line.replace("\\|", "").count("|") == 8


def test_plain_keeps_words_and_one_line():
    assert plain(" a\tµs\n±  b\x07 ") == "a µs ± b"


def test_markdown_has_a_row_for_each_measurement():
    text = REPORT.to_markdown()
    assert "| pp512 | 432.1 | tok/s | 2.3 | 10 | measured |  |" in text
    assert "| energy | n/a | J/token |  |  |  | no sensor: power_supply is empty |" in text
    assert "Machine: cores 4 x cortex-a76" in text


def test_importing_the_report_does_not_import_rich():
    code = "import sys, edgekit.report; sys.exit('rich' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# --- series, tables, CSV ----------------------------------------------------------------------------------------------

FULL = dataclasses.replace(
    REPORT,
    series={"memory": Series("time", "s", "MB", (0.0, 1.0), (5.0, 6.5))},
    tables={
        "sweep": Table("threads", ("prefill", "decode"), (Row("1", (10.0, 2.0)), Row("2 | x", (19.0, None))), "a note")
    },
    conditions={"kernel": "Linux 6"},
    flags=("the machine was busy",),
)


def test_series_and_tables_go_through_json_and_every_rendering():
    assert Report.from_json(FULL.to_json()) == FULL
    text = FULL.to_markdown()
    assert "## sweep\n\na note\n\n| threads | prefill | decode |\n|---|--:|--:|" in text
    assert "| 2 \\| x | 19 | n/a |" in text
    assert "the machine was busy" in text
    text = shown(FULL)
    assert "doubt: the machine was busy" in text
    assert re.search(r"^2 \| x +19 +n/a", text, re.MULTILINE)
    assert FULL.value("pp512") == 432.123
    assert FULL.value("energy") is FULL.value("absent") is None


def test_a_long_table_is_cut_on_a_terminal_and_nowhere_else():
    long = Table("layer", ("ms",), tuple(Row(f"layer {index}", (1.0,)) for index in range(30)))
    report = dataclasses.replace(FULL, tables={"layers": long})
    assert "and 18 more, which the saved report holds" in shown(report)
    assert report.to_markdown().count("| layer ") == 31


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"series": {"m": Series("t", "s", "MB", (0.0,), ())}}, "as many x as y: 'm' has 1 and 0"),
        ({"series": {"m": Series("t", "s", "MB", (0.0,), (math.nan,))}}, "must be finite"),
        ({"tables": {"t": Table("a", ("b",), (Row("r", ()),))}}, "its table's 1 columns: 'r' of 't' has 0"),
        ({"tables": {"t": Table("a", ("b",), (Row("r", (math.inf,)),))}}, "must be finite"),
    ],
)
def test_series_and_tables_that_cannot_be(changes, message):
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(FULL, **changes)


def test_csv_has_all_digits_and_no_formulas():
    rows = (
        dataclasses.replace(ROWS[0], value=1 / 3, note='a, "b"\nc'),
        ROWS[2],
        dataclasses.replace(ROWS[1], name="=1+1", unit="@x", note="-cmd"),
    )
    lines = list(csv.reader(io.StringIO(dataclasses.replace(REPORT, measurements=rows, samples={}).to_csv())))
    assert lines[0] == ["subject", "measurement", "value", "unit", "spread", "n", "how", "note"]
    assert float(lines[1][2]) == 1 / 3
    assert lines[1][7] == 'a, "b" c'
    assert lines[2][2] == ""
    assert [lines[3][index] for index in (1, 3, 7)] == ["'=1+1", "'@x", "'-cmd"]
