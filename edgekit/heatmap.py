"""Heat maps of small tables, as a picture (.png) or as a page that needs nothing else (.html)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UserError

LIGHTEST, DARKEST = 95, 35  # per cent of lightness


@dataclass(frozen=True)
class HeatMap:
    """values: (rows, columns), NaN where there is nothing to show; light at `low`, dark at `high`. `shown`: the values
    are written into their cells as per cent."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: NDArray[np.float64]
    low: float
    high: float
    shown: bool = False


def write_heat_maps(maps: Sequence[HeatMap], path: Path, *, title: str) -> None:
    """Write them to a .png (needs matplotlib) or a self-contained .html. Raises UserError."""
    if path.suffix == ".html":
        path.write_text(_page(maps, title), encoding="utf-8")
    elif path.suffix == ".png":
        _picture(maps, path, title)
    else:
        raise UserError(f"a map is written to a .png or a .html file: got {path}")


def _page(maps: Sequence[HeatMap], title: str) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for one in maps:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in one.columns)
        parts.append(f"<h2>{html.escape(one.title)}</h2><table><tr><th></th>{head}</tr>")
        for row, line in zip(one.rows, one.values, strict=True):
            cells = "".join(_cell(one, row, column, value) for column, value in zip(one.columns, line, strict=True))
            parts.append(f"<tr><th>{html.escape(row)}</th>{cells}</tr>")
        parts.append("</table>")
    style = "body{font:13px system-ui,sans-serif}td,th{min-width:12px;height:14px;padding:1px 4px;text-align:right}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    return f"<!doctype html>{head}<title>{html.escape(title)}</title><style>{style}</style>{''.join(parts)}"


def _cell(one: HeatMap, row: str, column: str, value: float) -> str:
    if math.isnan(value):
        return "<td></td>"
    share = min(1.0, max(0.0, (value - one.low) / ((one.high - one.low) or 1.0)))
    light = LIGHTEST - (LIGHTEST - DARKEST) * share
    ink = ";color:#fff" if light < 60 else ""
    text = f"{100 * value:.0f}" if one.shown else ""
    where = html.escape(f"{row}, {column}: {value:.3g}")
    return f'<td style="background:hsl(215 70% {light:.0f}%){ink}" title="{where}">{text}</td>'


def _picture(maps: Sequence[HeatMap], path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as problem:
        raise UserError("a .png needs matplotlib: pip install matplotlib, or write a .html") from problem
    across = 1 if len(maps) < 3 else 2
    down = -(-len(maps) // across)
    figure = Figure(figsize=(11, (3 if across == 1 else 5) * down), layout="constrained")
    figure.suptitle(title)
    for place, one in enumerate(maps, 1):
        axes = figure.add_subplot(down, across, place)
        image = axes.imshow(one.values, aspect="auto", vmin=one.low, vmax=one.high, cmap="Blues")
        axes.set_title(one.title)
        axes.set_yticks(range(len(one.rows)), one.rows)
        axes.set_xticks(range(len(one.columns)), one.columns)
        axes.tick_params(labelsize=7)
        figure.colorbar(image, ax=axes)
    figure.savefig(path)
