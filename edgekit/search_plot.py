"""The Pareto front of a search, drawn: every composition as a dot of size and predicted loss, in one page of HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import UserError

LEFT, RIGHT, TOP, BOTTOM = 70.0, 700.0, 20.0, 380.0
STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "svg{width:100%}text{fill:#555;font-size:12px}line{stroke:#ddd}circle{fill:#7a8bb8;fill-opacity:.6}"
    "polyline{fill:none;stroke:#c33;stroke-width:2}circle.best{fill:#c33;fill-opacity:1}"
    "td,th{padding:2px 12px 2px 0;text-align:left}td.n{text-align:right}"
)


@dataclass(frozen=True)
class Dot:
    """A composition: megabytes, predicted loss in nats a token, and its words."""

    size_mb: float
    loss: float
    said: str


def write_front(dots: Sequence[Dot], best: Sequence[Dot], path: Path, *, title: str) -> None:
    """Draw all `dots`, and `best` as a line and a table below. Raises UserError: another ending than .html, no dots."""
    if path.suffix != ".html":
        raise UserError(f"a plot is written to an .html file: got {path}")
    if not dots:
        raise UserError("a plot needs at least one composition that was tried: there is none")
    xs, ys = _ticks([dot.size_mb for dot in dots]), _ticks([dot.loss for dot in dots])

    def place(dot: Dot) -> tuple[float, float]:
        across = (dot.size_mb - xs[0]) / (xs[-1] - xs[0])
        up = (dot.loss - ys[0]) / (ys[-1] - ys[0])
        return LEFT + (RIGHT - LEFT) * across, BOTTOM - (BOTTOM - TOP) * up

    def circle(dot: Dot, more: str) -> str:
        x, y = place(dot)
        said = html.escape(f"{dot.said}: {dot.size_mb:.3g} MB, {dot.loss:.3f} nats")
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" {more}><title>{said}</title></circle>'

    parts = []
    for value in xs:
        x, _ = place(Dot(value, ys[0], ""))
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for value in ys:
        _, y = place(Dot(xs[0], value, ""))
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    front = sorted(best, key=lambda dot: dot.size_mb)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, front))
    parts += [circle(dot, 'r="3"') for dot in dots]
    parts += [f'<polyline points="{line}"/>', *(circle(dot, 'r="4" class="best"') for dot in front)]
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">size, MB</text>')
    middle = (TOP + BOTTOM) / 2
    turned = f'x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})"'
    parts.append(f"<text {turned}>predicted loss, nats a token</text>")
    rows = "".join(
        f'<tr><td class="n">{dot.size_mb:.3g} MB</td><td class="n">{dot.loss:.3f} nats</td>'
        f"<td>{html.escape(dot.said)}</td></tr>"
        for dot in front
    )
    head = f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">{head}
<h1>{html.escape(title)}</h1><p>Each dot is one composition that was tried; the red ones, from the table below, lose
least for their size. Losses are predicted: they rank compositions of one kind, and understate what structure costs.</p>
<svg viewBox="0 0 720 430">{"".join(parts)}</svg>
<table><tr><th>size</th><th>predicted loss</th><th>composition</th></tr>{rows}</table>"""
    path.write_text(page, encoding="utf-8")


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, evenly spaced, that hold all values between the first and the last of them."""
    low, high = min(values), max(values)
    span = (high - low) or max(abs(high), 1.0)
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(index * step, 10) for index in range(first, last + 1)]
