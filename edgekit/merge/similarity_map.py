"""How alike the layers of a model are on a text, by MKA's measure and the plain ones beside it: tables and heat maps.

`edgekit inspect MODEL --similarity --calibration TEXT --map map.html` shows what `merge.layers` would go by. Many short
windows are taken: the nearest-neighbour estimates behind NPIB want samples, and each window is one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from edgekit.checkpoint import Checkpoint
from edgekit.heatmap import HeatMap, write_heat_maps
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
    maps = []
    for measure, table in tables.items():
        low, high = _range(table)
        layers = [str(layer) for layer in range(len(table))]
        maps.append(HeatMap(f"{measure}: {low:.3g} (light) to {high:.3g} (dark)", layers, layers, table, low, high))
    write_heat_maps(maps, path, title=title)


def _range(table: Doubles) -> tuple[float, float]:
    """Of what stands beside the diagonal: a layer is always like itself."""
    apart = [float(v) for i, line in enumerate(table) for j, v in enumerate(line) if i != j] or [0.0]
    return min(apart), max(max(apart), min(apart) + 1e-12)
