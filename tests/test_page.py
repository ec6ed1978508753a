"""The HTML page and its plots: well formed, closed in itself, safe against foreign text, and drawn by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.profile import plots
from edgekit.profile.page import page
from edgekit.report import Measurement, Report, Row, Series, Table


def sample() -> Report:
    """A report with everything that can be drawn."""
    rows = {
        "pp512": (2000.0, "tok/s"), "tg128": (300.0, "tok/s"), "time to first token": (260.0, "ms"),
        **{f"gap between tokens, p{p}": (3.0 + p / 100, "ms") for p in (50, 90, 99)},
        "machine: reading memory": (40.0, "GB/s"), "bytes read per token": (95.0, "MB"), "peak PSS": (190.0, "MB"),
        "decode: predicted": (310.0, "tok/s"), "energy per generated token": (0.02, "J"), "load, cold": (300.0, "ms"),
    }  # fmt: skip
    times = tuple(index / 10 for index in range(50))
    layers = tuple(Row(f"layer {index}", (5.0, 3.0, 0.1 + index / 100, 3.3)) for index in range(30))
    return Report(
        "profile", tuple(Measurement(name, value, unit) for name, (value, unit) in rows.items()),
        machine={"device": "board", "ram": "8 GB", "threads": "4"}, subject="small.arm 0123456789ab",
        created="2026-01-02T03:04:05Z", flags=("the gaps drifted",), conditions={"kernel": "Linux"},
        series={
            "gaps": Series("token", "", "ms", times, tuple(3 + at % 0.7 for at in times)),
            "memory, PSS": Series("time", "s", "MB", times, tuple(100 + at for at in times)),
            "memory, private": Series("time", "s", "MB", times, tuple(50 + at for at in times)),
            "power": Series("time", "s", "W", times, tuple(3 + at % 2 for at in times)),
        },
        tables={
            "llama-bench": Table("test", ("size, MiB", "params, M", "threads", "t/s", "± t/s"),
                                 (Row("pp512", (92, 134, 4, 2000, 10)), Row("tg128", (92, 134, 4, 300, 3)))),
            "layers": Table("layer", ("nodes", "prefill, ms", "decode, ms/token", "share of decode, %"), layers),
            "operators": Table("operator", ("nodes", "prefill, ms", "decode, ms/token", "share of decode, %"),
                               (Row("MatMul", (5, 2, 1.0, 80)), Row("Add", (5, 2, 0.2, 20)))),
            "memory": Table("part", ("predicted, MB", "measured, MB"),
                            (Row("weights", (95.0, 94.0)), Row("code", (None, 20.0)))),
            "context sweep": Table("tokens in the cache", ("pp16", "tg16"),
                                   (Row("0", (900, 300)), Row("4096", (500, 100)))),
            "thread sweep": Table("threads", ("prefill", "decode"), (Row("1", (500, 200)), Row("4", (2000, 300)))),
        },
    )  # fmt: skip


TITLES = (
    "Time between tokens", "Memory over time", "Power over time", "Roofline", "Layers, one token", "What memory is for",
    "Operators, one token", "Speed over context", "Speed over threads",
)  # fmt: skip


def drawings(text: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_every_plot_is_drawn_within_its_frame() -> None:
    text = page(sample())
    assert re.findall(r'<section class="card"><h2>(.*?)</h2>', text) == list(TITLES)
    found = drawings(text)
    assert len(found) == len(TITLES)
    for svg in found:
        width, height = (float(number) for number in svg.attrib["viewBox"].split()[2:])
        marks = [e for e in svg.iter() if e.tag in ("rect", "polyline", "polygon", "circle")]
        assert marks
        for element in svg.iter():
            for key, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.attrib.get(key, 0)) <= most
            for pair in element.attrib.get("points", "").split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height


def test_the_page_asks_for_nothing_outside() -> None:
    text = page(sample())
    assert "<script" not in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\(|https?:""", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_what_a_report_lacks_is_left_out_and_its_reason_stands() -> None:
    bare = Report("profile", (Measurement("energy per generated token", None, "J", note="no sensor: none at all"),))
    text = page(bare)
    assert drawings(text) == []
    assert "n/a &middot; no sensor: none at all" in text


HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def test_foreign_text_stays_text() -> None:
    report = sample()
    rows = tuple(replace(row, note=HOSTILE, unit=HOSTILE) for row in report.measurements)
    tables = {name + HOSTILE: replace(table, label=HOSTILE, note=HOSTILE) for name, table in report.tables.items()}
    layers = Table(HOSTILE, ("a", "b", "c"), (Row(HOSTILE, (1.0, 2.0, 3.0)),))
    text = page(
        replace(
            report, measurements=rows, tables=tables | {"layers": layers, "operators": layers}, subject=HOSTILE,
            title=HOSTILE, machine={HOSTILE: HOSTILE}, flags=(HOSTILE,), created=HOSTILE, conditions={HOSTILE: HOSTILE},
        )
    )  # fmt: skip
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("</style>") == 1
    drawings(text)


numbers = st.floats(0, 1e9, allow_nan=False) | st.just(0.0)


@given(points=st.lists(st.tuples(numbers, numbers), max_size=20), values=st.lists(numbers, max_size=30))
def test_any_numbers_can_be_drawn(points: list[tuple[float, float]], values: list[float]) -> None:
    named = [(f"n{index}", value) for index, value in enumerate(values)]
    texts = [
        plots.lines([plots.Line("a", points, filled=True)], x_label="x", y_label="y", title="t"),
        plots.histogram(values, marks=named[:2], x_label="x", title="t"),
        plots.columns(named, x_label="x", y_label="y", title="t"),
        plots.bars([(name, [value, None]) for name, value in named], names=("p", "m"), unit="MB", title="t"),
        plots.roofline(bandwidth_gbs=values[0], compute_gops=values[-1], dots=[("d", *p) for p in points], title="t")
        if values
        else "",
    ]
    for text in texts:
        if text:
            ET.fromstring(text)
            assert "nan" not in text
            assert "inf" not in text


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_it_without_complaint(dark: bool, tmp_path: Path) -> None:
    """A script that only this test adds asks each plot for its size; the browser's log and its net log are read."""
    probe = (
        "<script>document.documentElement.dataset.boxes = [...document.querySelectorAll('svg')].map(s => "
        "Math.min(s.getBBox().width, s.getBBox().height, s.getBoundingClientRect().height) > 20).join();"
        "document.documentElement.dataset.ground = getComputedStyle(document.body).backgroundColor;</script>"
    )
    text = page(sample()).replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{probe}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path}/user", f"--log-net-log={tmp_path}/net.json",
             "--disable-background-networking", "--dump-dom"]  # fmt: skip
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        ["chromium", *flags, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120
    )
    boxes = re.search(r'data-boxes="([^"]*)"', done.stdout)
    assert boxes is not None, done.stderr[-2000:]
    assert boxes[1].split(",") == ["true"] * len(TITLES)
    ground = re.search(r'data-ground="rgb\((\d+)', done.stdout)
    assert ground is not None
    assert (int(ground[1]) < 100) == dark
    assert "CONSOLE" not in done.stderr
    asked = set(re.findall(r'"url":"(https?:[^"]*)"', (tmp_path / "net.json").read_text()))
    assert {url for url in asked if "page" in url or "localhost" in url} == set()
    assert not re.search(r"Refused to|violates", done.stderr)
