"""How alike the layers of a model are on a text, by MKA's measure and the plain ones beside it: tables and heat maps.

`edgekit inspect MODEL --similarity --calibration TEXT --map map.html` shows what `merge.layers` would go by. Many short
windows are taken: the nearest-neighbour estimates behind NPIB want samples, and each window is one.
"""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from edgekit.checkpoint import Checkpoint
from edgekit.errors import UserError
from edgekit.merge.similarity import MEASURES, Doubles, Measure, similarities
from edgekit.step import CalibrationOptions

SAMPLES, LENGTH = 64, 128  # windows, and tokens of each
Tables = Mapping[Measure, Doubles]


def survey_similarity(
    checkpoint: Checkpoint,
    files: tuple[str, ...],
    *,
    samples: int = SAMPLES,
    length: int = LENGTH,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Tables:
    """(layers, layers) of each measure, from the layers' pooled outputs. Raises UserError: text missing or short."""
    from edgekit.calibrate import Survey
    from edgekit.merge.layers import pooled_states
    from edgekit.model.calibration import Room
    from edgekit.model.windows import token_windows

    windows = token_windows(checkpoint, CalibrationOptions(files, samples, length), seed=0)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        room = Room(Path(folder), psutil.virtual_memory().available // 2)
        names = tuple(checkpoint.blocks)
        states = pooled_states(Survey(checkpoint.decoder, windows, room, names, checkpoint.read_block, report))
    return {measure: similarities(states, measure) for measure in MEASURES}


def write_similarity_map(tables: Tables, path: Path, *, title: str) -> None:
    """Write all heat maps to a .png (needs matplotlib) or a self-contained .html. Raises UserError."""
    if path.suffix == ".html":
        path.write_text(_page(tables, title), encoding="utf-8")
    elif path.suffix == ".png":
        _picture(tables, path, title)
    else:
        raise UserError(f"a map is written to a .png or a .html file: got {path}")


def _page(tables: Tables, title: str) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for measure, table in tables.items():
        low, high = _range(table)
        parts.append(f"<h2>{measure}: {low:.3g} (light) to {high:.3g} (dark)</h2><table>")
        for i, line in enumerate(table):
            cells = "".join(
                f'<td style="background:hsl(215 70% {95 - 60 * min(1, max(0, (v - low) / (high - low))):.0f}%)"'
                f' title="{i}, {j}: {v:.3g}"></td>'
                for j, v in enumerate(line)
            )
            parts.append(f"<tr><th>{i}</th>{cells}</tr>")
        parts.append("</table>")
    style = "body{font:12px system-ui,sans-serif}td{width:12px;height:12px;padding:0}table{border-spacing:1px}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    return f"<!doctype html>{head}<title>{html.escape(title)}</title><style>{style}</style>{''.join(parts)}"


def _range(table: Doubles) -> tuple[float, float]:
    """Of what stands beside the diagonal: a layer is always like itself."""
    apart = [float(v) for i, line in enumerate(table) for j, v in enumerate(line) if i != j] or [0.0]
    return min(apart), max(max(apart), min(apart) + 1e-12)


def _picture(tables: Tables, path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as problem:
        raise UserError("a .png needs matplotlib: pip install matplotlib, or write a .html") from problem
    figure = Figure(figsize=(11, 10), layout="constrained")
    figure.suptitle(title)
    for place, (measure, table) in enumerate(tables.items(), 1):
        axes = figure.add_subplot(2, 2, place)
        low, high = _range(table)
        image = axes.imshow(table, vmin=low, vmax=high, cmap="Blues")
        axes.set_title(measure)
        axes.set_xlabel("layer")
        figure.colorbar(image, ax=axes)
    figure.savefig(path)
