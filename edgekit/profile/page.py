"""A report as one HTML page: no scripts, nothing fetched, its plots are SVG inside it. Light, dark and paper.

What a report lacks (power without a sensor, a sweep that nobody asked for) has no plot; its reason stands in the text.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from edgekit.profile import plots
from edgekit.report import Measurement, Report, Series, Table, cells, number, plain

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# What is shown large: the beginnings of names, and what to call them.
_TILES = (
    ("pp", "prefill"), ("tg", "decode"), ("time to first token", "first token"),
    ("peak PSS", "peak memory"), ("energy per generated token", "energy per token"), ("load, cold", "cold start"),
)  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f5f1; --card: #fff; --ink: #1d2430; --dim: #667085; --rule: #e4e2da;
  --a: #2f6fde; --b: #e0772a; --c: #2a9d72; --doubt: #8a5a00; --doubt-ground: #fff4da; }
@media (prefers-color-scheme: dark) { :root { --ground: #12151b; --card: #1b2029; --ink: #e8eaf0; --dim: #98a2b3;
  --rule: #2c3340; --a: #6ea2ff; --b: #ffa25e; --c: #5fd0a4; --doubt: #ffd479; --doubt-ground: #3a2f14; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1220px; margin: 0 auto; padding: 36px 24px 60px; }
h1 { font-size: 30px; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 15px; margin: 0 0 10px; }
header p { margin: 4px 0; color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px; margin: 26px 0 20px; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.tile { padding: 14px 18px; }
.tile b { display: block; font-size: 25px; letter-spacing: -0.02em; font-weight: 650; white-space: nowrap; }
.tile b small { font-size: 14px; font-weight: 500; color: var(--dim); }
.tile span { color: var(--dim); font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
.card { padding: 16px 20px 14px; overflow-x: auto; break-inside: avoid; }
.card p { margin: 6px 0 0; color: var(--dim); font-size: 13px; }
.wide { margin-top: 16px; }
.doubt { background: var(--doubt-ground); color: var(--doubt); border-radius: 8px; padding: 8px 14px; margin: 8px 0; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--dim); }
svg .label { fill: var(--ink); } svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
.grid { stroke: var(--rule); } .axis { stroke: var(--dim); } .mark { stroke: var(--b); stroke-dasharray: 3 3; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .fill { opacity: 0.14; stroke: none; }
.a { --hue: var(--a); } .b { --hue: var(--b); } .c { --hue: var(--c); }
.line { stroke: var(--hue); } .fill, .bar, .dot { fill: var(--hue); }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: right; font-weight: 500; color: var(--dim); border-bottom: 1px solid var(--rule);
  padding: 4px 10px 6px; }
td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; white-space: normal; }
tr:last-child td { border-bottom: 0; }
td.text { color: var(--dim); font-size: 12.5px; }
details summary { cursor: pointer; font-weight: 600; }
footer { color: var(--dim); font-size: 12.5px; margin-top: 24px; overflow-wrap: anywhere; }
@media print { :root { color-scheme: light; --ground: #fff; --card: #fff; --ink: #000; --dim: #444; --rule: #ccc;
  --a: #2f6fde; --b: #c55f14; --c: #1f7d5a; --doubt: #5c3c00; --doubt-ground: #fff; }
  main { padding: 0; max-width: none; } .cards { grid-template-columns: 1fr 1fr; } .tile b { font-size: 19px; }
  * { print-color-adjust: exact; } }
"""


def page(report: Report) -> str:
    """The whole page as text."""
    doubts = "".join(f'<p class="doubt">Doubt: {_safe(flag)}.</p>' for flag in report.flags)
    drawn = "".join(_cards(report))
    tables = "".join(_table(name, table) for name, table in report.tables.items())
    facts = "".join(
        f"<p>{label}: {_safe(', '.join(f'{key} {fact}' for key, fact in values.items()))}</p>"
        for label, values in (("Conditions", report.conditions), ("Versions", report.versions))
        if values
    )
    name = _safe(f"{report.title}: {report.subject}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,"><title>{name}</title>
<style>{_STYLE}</style></head><body><main>
<header><h1>{_safe(report.subject.rpartition(" ")[0] or report.subject)}</h1>
<p>{_safe(", ".join(report.machine.get(key, "") for key in ("device", "ram")))}, \
{_safe(report.machine.get("threads", "?"))} threads &middot; {_safe(report.created)}</p></header>
<div class="tiles">{"".join(_tiles(report.measurements))}</div>
{doubts}<div class="cards">{drawn}</div>
{_measurements(report.measurements)}{tables}
<footer><p>Machine: {_safe(", ".join(f"{key} {fact}" for key, fact in report.machine.items()))}</p>{facts}</footer>
</main></body></html>
"""


def _tiles(measurements: Sequence[Measurement]) -> Iterator[str]:
    for begin, name in _TILES:
        row = next((row for row in measurements if row.name.startswith(begin)), None)
        if row is None:
            continue
        _, value, unit, spread, _, _, _ = cells(row)
        under = f"{name} &middot; {_safe(row.name)}" if begin in ("pp", "tg") else name
        tail = f" ± {_safe(spread)}" if spread else ""
        shown = f"{_safe(value)} <small>{_safe(unit)}</small>" if row.value is not None else "n/a"
        yield f'<div class="tile"><b>{shown}</b><span>{under}{tail}</span></div>'


def _cards(report: Report) -> Iterator[str]:
    drawings = (
        ("Time between tokens", _gaps(report), "Of all tokens of all repetitions."),
        ("Memory over time", _memory(report), "Loading, warming up, then one reading after each repetition."),
        ("Power over time", _power(report), ""),
        ("Roofline", _roofline(report), _note(report, "decode: predicted")),
        ("Layers, one token", _layers(report, 2, "ms"), "With profiling on, which slows small nodes down."),
        ("What memory is for", _account(report), ""),
        ("Operators, one token", _operators(report), ""),
        ("Speed over context", _sweep(report, "context sweep", (1,), "tokens in the cache"), ""),
        ("Speed over threads", _sweep(report, "thread sweep", (0, 1), "threads"), ""),
    )
    for title, drawing, note in drawings:
        if drawing:
            under = f"<p>{_safe(note)}</p>" if note else ""
            yield f'<section class="card"><h2>{_safe(title)}</h2>{drawing}{under}</section>'
    reason = _note(report, "energy per generated token")
    if "power" not in report.series and reason:
        yield f'<section class="card"><h2>Power over time</h2><p>n/a &middot; {_safe(reason)}</p></section>'


def _gaps(report: Report) -> str:
    series = report.series.get("gaps")
    found = ((p, report.value(f"gap between tokens, {p}")) for p in ("p50", "p90", "p99"))
    marks = [(name, value) for name, value in found if value is not None]
    values = series.y if series else ()
    return plots.histogram(values, marks=marks, x_label="gap between tokens, ms", title="Histogram of gaps")


def _memory(report: Report) -> str:
    curves = [
        plots.Line(name, _points(report.series[key]), kind, filled=True)
        for name, key, kind in (("PSS", "memory, PSS", "a"), ("private", "memory, private", "b"))
        if key in report.series
    ]
    return plots.lines(curves, x_label="seconds", y_label="MB", title="Memory over time")


def _power(report: Report) -> str:
    series = report.series.get("power")
    if series is None:
        return ""
    return plots.lines([plots.Line("power", _points(series), "c", filled=True)], x_label="seconds", y_label="W",
                       title="Power over time")  # fmt: skip


def _roofline(report: Report) -> str:
    bench = report.tables.get("llama-bench")
    size, bandwidth = report.value("bytes read per token"), report.value("machine: reading memory")
    if bench is None or not size or not bandwidth or len(bench.rows) < 2:
        return ""
    params = bench.rows[0].values[1] or 0.0
    rates = {row.label: row.values[3] or 0.0 for row in bench.rows}
    dots = []
    for name, rate in rates.items():
        batch = int(name[2:]) if name.startswith("pp") and name[2:].isdecimal() else 1
        dots.append((f"{name}: {number(rate)} tok/s", 2 * params * batch / size, 2 * params * rate / 1e3))
    roof = max(gops for _, _, gops in dots)
    return plots.roofline(bandwidth_gbs=bandwidth, compute_gops=roof, dots=dots, title="Roofline")


def _layers(report: Report, column: int, unit: str) -> str:
    table = report.tables.get("layers")
    rows = [(row.label, row.values[column] or 0.0) for row in table.rows] if table else []
    layers = [row for row in rows if row[0].startswith("layer ")]
    return plots.columns(layers or rows, x_label="layer", y_label=unit, title="Time of each layer")


def _operators(report: Report) -> str:
    table = report.tables.get("operators")
    rows = [(row.label, [row.values[2]]) for row in table.rows[:8]] if table else []
    return plots.bars(rows, names=("ms",), unit="ms", title="Time of each operator")


def _account(report: Report) -> str:
    table = report.tables.get("memory")
    rows = [(row.label, list(row.values[:2])) for row in table.rows] if table else []
    return plots.bars(rows, names=("predicted", "measured"), unit="MB", title="What memory is for")


def _sweep(report: Report, name: str, which: Sequence[int], x_label: str) -> str:
    table = report.tables.get(name)
    if table is None or not all(row.label.isdecimal() for row in table.rows):
        return ""
    curves = [
        plots.Line(table.columns[index], [(float(row.label), row.values[index] or 0.0) for row in table.rows], kind)
        for index, kind in zip(which, "ab", strict=False)
    ]
    return plots.lines(curves, x_label=x_label, y_label="tok/s", title=name)


def _points(series: Series) -> list[tuple[float, float]]:
    return list(zip(series.x, series.y, strict=True))


def _note(report: Report, name: str) -> str:
    return next((row.note for row in report.measurements if row.name == name), "")


def _measurements(measurements: Sequence[Measurement]) -> str:
    lines = []
    for row in measurements:
        name, value, unit, spread, count, how, note = map(_safe, cells(row))
        around = f"± {spread}" if spread else ""
        lines.append(
            f"<tr><td>{name}</td><td><b>{value}</b></td><td>{unit}</td><td>{around}</td><td>{count}</td>"
            f'<td>{how}</td><td class="text">{note}</td></tr>'
        )
    heads = "".join(f"<th>{head}</th>" for head in ("measurement", "value", "unit", "", "n", "how"))
    table = f'<table><thead><tr>{heads}<th class="text">note</th></tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<section class="card wide"><h2>Measurements</h2>{table}</section>'


def _table(name: str, table: Table) -> str:
    heads = "".join(f"<th>{_safe(head)}</th>" for head in (table.label, *table.columns))
    lines = "".join(
        f"<tr><td>{_safe(row.label)}</td>{''.join(f'<td>{_safe(number(v))}</td>' for v in row.values)}</tr>"
        for row in table.rows
    )
    note = f"<p>{_safe(table.note)}</p>" if table.note else ""
    body = f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>{note}"
    if len(table.rows) > 12:
        body = f"<details><summary>{len(table.rows)} rows</summary>{body}</details>"
    return f'<section class="card wide"><h2>{_safe(name)}</h2>{body}</section>'


def _safe(text: str) -> str:
    return html.escape(plain(text), quote=True)
