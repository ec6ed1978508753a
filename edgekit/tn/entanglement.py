"""How strongly the two sides of a cut through a matrix depend on each other: the guide for where to cut.

Cut between rows and columns (the bond of low rank), or between the first and the second half of the sites (the bond of
a matrix product operator), a matrix has Schmidt values s_k: its singular values across the cut. With p_k = s_k^2 / sum,

    entropy S = - sum_k p_k ln p_k       effective rank exp(S)       rank99: values that hold 99 % of the squared norm

A low effective rank against the dimension means that the cut costs little. With calibration text the values are those
of the outputs (`edgekit.tn.whitening`), which is what truncation will really lose; for the second cut there is no such
metric, so it is always of the weights alone. Source: Schmidt spectra as in Schollwoeck, arXiv 1008.3477, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import ModelError, UserError
from edgekit.heatmap import HeatMap, write_heat_maps
from edgekit.model.stages import LINEARS, in_order, stage_of
from edgekit.step import CalibrationOptions, Inputs
from edgekit.tn.mpo import schmidt_values, site_shapes
from edgekit.tn.whitening import Doubles, spectrum

Cut = Literal["rows", "sites"]
HELD = 0.99  # of the squared norm, for rank99


@dataclass(frozen=True)
class Entanglement:
    """Of one matrix across one cut. `dimension` is the number of Schmidt values."""

    module: str
    cut: Cut
    dimension: int
    entropy: float
    effective_rank: float
    rank99: int

    @property
    def share(self) -> float:
        """Effective rank over the dimension: near 1, nothing can be cut."""
        return self.effective_rank / self.dimension


def entanglement(values: Doubles, *, module: str, cut: Cut) -> Entanglement:
    """From Schmidt values (k,), descending. Raises ModelError: they are all zero or not finite."""
    squares = np.square(values)
    total = float(squares.sum())
    if not 0 < total < math.inf:
        raise ModelError(f"a matrix must be finite and not zero to have a spectrum: {module} is not")
    p = squares / total
    entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum())
    rank = int(np.argmax(np.cumsum(p) >= HELD - 1e-12)) + 1
    return Entanglement(module, cut, len(p), entropy, math.exp(entropy), rank)


def survey_entanglement(
    checkpoint: Checkpoint,
    text: CalibrationOptions | None = None,
    *,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[Entanglement]:
    """Every linear of every decoder layer across both cuts, with `text` in the metric of what it reads.

    Raises UserError: the text is missing or too short.
    """
    found = []
    layers = sum(name.startswith("layers.") for name in checkpoint.blocks)
    for done, (block, grams) in enumerate(_layers(checkpoint, text), 1):
        for module in in_order(block.matrices):
            if stage_of(module) is None:
                continue
            W = block.matrices[module].dense()
            seen = spectrum(W, grams(module), where=module)
            found.append(entanglement(seen.values, module=module, cut="rows"))
            if (sites := site_shapes(W.shape, 2)) is not None:
                found.append(entanglement(schmidt_values(W, sites, 1), module=module, cut="sites"))
        on_block(done, layers)
    return found


def _layers(
    checkpoint: Checkpoint, text: CalibrationOptions | None
) -> Iterator[tuple[Block, Callable[[str], Doubles | None]]]:
    """Each decoder layer, and what is known of its matrices' inputs."""
    names = [name for name in checkpoint.blocks if name.startswith("layers.")]
    if text is None:
        for name in names:
            yield checkpoint.read_block(name), lambda module: None
        return
    import tempfile

    import psutil

    try:
        from edgekit.model.calibration import Room, Stream
        from edgekit.model.windows import token_windows
    except ModuleNotFoundError as problem:
        raise UserError(f"--calibration needs {problem.name}: pip install 'edgekit[compress]'") from problem

    windows = token_windows(checkpoint, text, seed=0)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        stream = Stream(windows, checkpoint.decoder, Room(Path(folder), psutil.virtual_memory().available // 2))
        stream.begin(checkpoint.weight("model.embed_tokens"))
        for name in names:
            block, inputs = checkpoint.read_block(name), stream.inputs()
            yield block, partial(_gram, inputs, block)
            stream.advance(inputs, block)


def _gram(inputs: Inputs, block: Block, module: str) -> Doubles:
    return inputs.statistics(block, module).gram


# --- the heat map -----------------------------------------------------------------------------------------------------


def heat(rows: Sequence[Entanglement], cut: Cut) -> tuple[list[str], list[str], Doubles]:
    """(linears, layers, effective rank over dimension (linears, layers), NaN where there is none)."""
    shares = {row.module: row.share for row in rows if row.cut == cut}
    layers = sorted({module.split(".")[2] for module in shares}, key=int)
    values = [[shares.get(f"model.layers.{layer}.{leaf}", math.nan) for layer in layers] for leaf in LINEARS]
    return list(LINEARS), layers, np.array(values, np.float64)


def write_map(rows: Sequence[Entanglement], path: Path, *, title: str) -> None:
    """Write the heat maps of both cuts to a .png (needs matplotlib) or a self-contained .html. Raises UserError."""
    maps = []
    for cut in get_args(Cut):
        leaves, layers, values = heat(rows, cut)
        name = f"cut between {cut}: effective rank over dimension, per cent"
        maps.append(HeatMap(name, leaves, layers, values, 0.0, 1.0, shown=True))
    write_heat_maps(maps, path, title=title)
