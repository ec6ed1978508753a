"""Plots as SVG text: lines, histogram, bars, roofline. Colours are classes, so that the page's style sets them.

Each function returns one `<svg>` with a title and a description for screen readers, whose text is escaped; numbers only
come in as floats. Axes begin at zero but where they are logarithmic. Empty data gives an empty text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgekit.report import plain

WIDTH, HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 16, 40
_BINS = 40

Points = Sequence[tuple[float, float]]
_NOTHING = 1e-12  # no measured quantity is as small: such values are drawn as zero


@dataclass(frozen=True)
class Line:
    """A curve; `filled` paints what lies under it. `kind` is the class of its colour: a, b, c."""

    name: str
    points: Points
    kind: str = "a"
    filled: bool = False


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels; `ticks` in values."""

    low: float
    high: float
    begin: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)


def lines(curves: Sequence[Line], *, x_label: str, y_label: str, title: str) -> str:
    """Curves over one pair of axes."""
    points = [point for curve in curves for point in curve.points]
    if len(points) < 2:
        return ""
    x, y = _axes((min(at for at, _ in points), max(at for at, _ in points)), max(value for _, value in points))
    if len({at for at, _ in points}) < 9 and all(len(curve.points) < 9 for curve in curves):
        x = replace(x, ticks=tuple(sorted({at for at, _ in points})))
    parts = []
    for curve in curves:
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in curve.points)
        if curve.filled and len(curve.points) > 1:
            first, last = x(curve.points[0][0]), x(curve.points[-1][0])
            parts.append(
                f'<polygon class="fill {curve.kind}" points="{first:.1f},{y(0):.1f} {path} {last:.1f},{y(0):.1f}"/>'
            )
        parts.append(f'<polyline class="line {curve.kind}" points="{path}"/>')
        if len(curve.points) < 12:
            parts += [f'<circle class="dot {curve.kind}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3.5"/>'
                      for at, value in curve.points]  # fmt: skip
    named = [curve for curve in curves if len(curves) > 1]
    parts += _legend([(curve.name, curve.kind) for curve in named])
    return _svg(title, _grid(x, y, x_label, y_label) + "".join(parts))


def histogram(values: Sequence[float], *, marks: Sequence[tuple[str, float]], x_label: str, title: str) -> str:
    """How often each value occurs, up to a little over the last mark; the bar at the right end holds all above."""
    if len(values) < 2:
        return ""
    low = float(min(values))
    high = max([value for _, value in marks] + [float(np.median(values))]) * 1.15
    low, high = max(0.0, low - (high - low) * 0.08), max(high, low * 1.01 + 1e-9)
    counts, edges = np.histogram(np.clip(values, low, high), bins=_BINS, range=(low, high))
    x, y = _axes((low, high), float(counts.max()))
    parts = []
    for count, start, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            parts.append(_rect(x(start) + 0.5, y(count), x(end) - x(start) - 1, y(0) - y(count), "a"))
    placed: list[float] = []
    for name, value in marks:
        level = sum(1 for other in placed if abs(other - x(value)) < 34)
        placed.append(x(value))
        parts.append(f'<line class="mark" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_TOP}" y2="{y(0):.1f}"/>')
        parts.append(_text(x(value) + 4, _TOP + 10 + 13 * level, name, "note"))
    return _svg(title, _grid(x, y, x_label, "tokens") + "".join(parts))


def columns(rows: Sequence[tuple[str, float]], *, x_label: str, y_label: str, title: str) -> str:
    """One upright bar a row, in order, as for the layers of a model; every so many carry their name."""
    if not rows:
        return ""
    x, y = _axes((0, len(rows)), max(value for _, value in rows), ticks=False)
    every = -(-len(rows) // 16)
    step = x(1) - x(0)
    parts = []
    for index, (name, value) in enumerate(rows):
        parts.append(
            _rect(x(index) + step * 0.1, y(value), step * 0.8, y(0) - y(value), "a", f"{name}: {_short(value)}")
        )
        if index % every == 0:
            parts.append(_text(x(index + 0.5), y(0) + 15, name.removeprefix("layer "), "tick middle"))
    return _svg(title, _grid(x, y, x_label, y_label) + "".join(parts))


def bars(rows: Sequence[tuple[str, Sequence[float | None]]], *, names: Sequence[str], unit: str, title: str) -> str:
    """Lying bars with their names; several numbers a row stand below each other in different colours."""
    most = max((value or 0.0 for _, values in rows for value in values), default=0.0)
    if not rows or most <= 0:
        return ""
    thick, gap, left = 11, 10, 190
    each = thick * len(names) + gap
    top = 8 if len(names) < 2 else 24
    height = top + each * len(rows)
    parts = _legend(list(zip(names, "ab", strict=False)), at=left) if len(names) > 1 else []
    for index, (name, values) in enumerate(rows):
        begin = top + index * each
        label = name if len(name) <= 30 else name[:29] + "…"
        parts.append(_text(left - 8, begin + thick * len(names) / 2 + 4, label, "label end"))
        for kind, value, at in zip("ab", values, range(len(values)), strict=False):
            y = begin + at * thick
            if value is None:
                parts.append(_text(left + 4, y + thick - 2, "n/a", "note"))
                continue
            wide = (WIDTH - left - 70) * value / most
            parts.append(_rect(left, y, max(wide, 0.6), thick - 2, kind))
            parts.append(_text(left + wide + 5, y + thick - 3, f"{_short(value)} {unit}", "note"))
    return _svg(title, "".join(parts), height=height)


def roofline(*, bandwidth_gbs: float, compute_gops: float, dots: Sequence[tuple[str, float, float]], title: str) -> str:
    """The roof: operations a second over operations a byte, both logarithmic. `dots` are (name, x, y)."""
    smallest = min((bandwidth_gbs, compute_gops, *(min(x, y) for _, x, y in dots)), default=0.0)
    if not dots or smallest < _NOTHING:
        return ""
    ridge = compute_gops / bandwidth_gbs
    low = 10 ** math.floor(math.log10(min([ridge, *(x for _, x, _ in dots)]) / 2))
    high = 10 ** math.ceil(math.log10(max([ridge, *(x for _, x, _ in dots)]) * 2))
    bottom = 10 ** math.floor(math.log10(min([bandwidth_gbs * low, *(y for _, _, y in dots)])))
    top = 10 ** math.ceil(math.log10(max([compute_gops, *(y for _, _, y in dots)]) * 1.2))
    x = _Axis(low, high, _LEFT, WIDTH - _RIGHT, _decades(low, high), log=True)
    y = _Axis(bottom, top, HEIGHT - _BOTTOM, _TOP, _decades(bottom, top), log=True)
    corners = ((low, bandwidth_gbs * low), (ridge, compute_gops), (high, compute_gops))
    roof = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in corners)
    floor = f"{x(high):.1f},{y(bottom):.1f} {x(low):.1f},{y(bottom):.1f}"
    parts = [f'<polygon class="fill a" points="{roof} {floor}"/>', f'<polyline class="line a" points="{roof}"/>']
    parts.append(_text(_LEFT, _TOP - 4, f"memory: {_short(bandwidth_gbs)} GB/s", "note"))
    parts.append(_text(x(high) - 4, y(compute_gops) - 6, f"arithmetic seen: {_short(compute_gops)} Gop/s", "note end"))
    for name, at, value in dots:
        side = "end" if at > ridge else ""
        parts.append(f'<circle class="dot b" cx="{x(at):.1f}" cy="{y(value):.1f}" r="5"/>')
        parts.append(_text(x(at) + (-9 if side else 9), y(value) + 16, name, f"label {side}"))
    grid = _grid(x, y, "operations a byte", "Gop/s")
    return _svg(title, grid + "".join(parts))


def _axes(span: tuple[float, float], most: float, *, ticks: bool = True) -> tuple[_Axis, _Axis]:
    low, high = span
    high = high if high > low else low + 1
    most = most if most > 0 else 1.0
    x = _Axis(low, high, _LEFT, WIDTH - _RIGHT, _nice(low, high) if ticks else ())
    marks = _nice(0, most * 1.06)
    return x, _Axis(0, max(most * 1.06, marks[-1]), HEIGHT - _BOTTOM, _TOP, marks)


def _nice(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Round numbers within [low, high], about `count` of them."""
    raw = (high - low) / count
    if raw < _NOTHING:
        return (low,)
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return tuple(step * index for index in range(first, first + int((high - first * step) / step + 1e-9) + 1)) or (low,)


def _decades(low: float, high: float) -> tuple[float, ...]:
    return tuple(10.0**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1))


def _grid(x: _Axis, y: _Axis, x_label: str, y_label: str) -> str:
    parts = []
    for tick in y.ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(_LEFT - 7, y(tick) + 4, _short(tick), "tick end"))
    for tick in x.ticks:
        parts.append(_text(x(tick), HEIGHT - _BOTTOM + 16, _short(tick), "tick middle"))
    bottom = y(y.low)
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_label, "name middle"))
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    rotated = f'<text class="name middle" transform="translate(13 {middle:.0f}) rotate(-90)">{_safe(y_label)}</text>'
    return "".join([*parts, rotated])


def _legend(names: Sequence[tuple[str, str]], *, at: float = _LEFT + 10) -> list[str]:
    parts = []
    for name, kind in names:
        parts.append(_rect(at, 5, 10, 10, kind))
        parts.append(_text(at + 15, 14, name, "note"))
        at += 32 + 6.6 * len(name)
    return parts


def _rect(x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> str:
    title = f"<title>{_safe(tip)}</title>" if tip else ""
    return (
        f'<rect class="bar {kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
        f' rx="1.5">{title}</rect>'
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{_safe(text)}</text>'


def _svg(title: str, content: str, *, height: float = HEIGHT) -> str:
    name = _safe(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}"><title>{name}</title>{content}</svg>'
    )


def _short(value: float) -> str:
    """A number for an axis: 1200 -> 1,200, 0.30000000000000004 -> 0.3."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _safe(text: str) -> str:
    return html.escape(plain(text), quote=True)
