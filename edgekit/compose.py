"""Structure and bits together: what a model loses by each part, measured once, and recipes composed from that.

One backward pass (`edgekit.quant.sensitivity`) gives for every decoder layer, in nats a token,

    drop       what taking the layer out costs: both matrices that write to the stream become zero
    widths     what every number of KV heads and of neurons costs after the refit (`edgekit.prune`)
    ranks      what every rank of every matrix costs (`edgekit.tn.plan`)
    formats    what every grid of every matrix costs (`edgekit.quant.mixed`)

`composed` turns four numbers (layers that go, share pruned of what stays, share that factors leave of that, size) into
a recipe: the layers that cost least go, the widths, the ranks and the bits are those of least cost within each budget.
Costs of widths, ranks and bits of a matrix are taken as independent, and small; large ones are underestimated, so sums
rank recipes of one kind and little else. Candidates are therefore measured before one is taken (`edgekit.search`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgekit.checkpoint import Checkpoint
from edgekit.device import Device
from edgekit.errors import BudgetError
from edgekit.merge.drop import Drop
from edgekit.prune.layer import MAKERS, WRITER, Part
from edgekit.prune.steps import Planned, widths_of
from edgekit.quant.grid import Grid
from edgekit.quant.knapsack import choose
from edgekit.quant.mixed import Mixed
from edgekit.recipe import Recipe
from edgekit.step import CalibrationOptions, Step
from edgekit.tn.cost import cost_of_rank
from edgekit.tn.plan import Budget, candidates, losses
from edgekit.tn.steps import LowRank

Shape = tuple[int, int]
PRUNING = Planned()
MIXED = Mixed(target_mb=1.0, keep=False)  # of which the formats are taken
MULTIPLE = 32  # of ranks


@dataclass(frozen=True)
class Sensitivity:
    """Costs in nats a token. Keys are `LAYER PART` for widths, modules of the whole model else."""

    drops: tuple[float, ...]
    widths: dict[str, list[tuple[int, int, float]]]  # groups kept, parameters, cost
    ranks: dict[str, list[tuple[int, float]]]  # rank (0: whole), cost
    formats: dict[str, list[tuple[str, float]]]  # line of `quant.mixed`, cost
    shapes: dict[str, Shape]
    vectors: tuple[int, ...]  # bytes of each layer's norms and biases, and at the end those of no layer
    model: str  # digest of the source
    text: str  # digest of the calibration windows

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        data = json.loads(path.read_text(encoding="utf-8"))
        for table in ("widths", "ranks", "formats", "shapes"):
            data[table] = {
                key: tuple(value) if table == "shapes" else [tuple(row) for row in value]
                for key, value in data[table].items()
            }
        return cls(**{**data, "drops": tuple(data["drops"]), "vectors": tuple(data["vectors"])})


def measure(
    checkpoint: Checkpoint,
    text: CalibrationOptions,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
    mixed: Mixed = MIXED,
    compute: str = "cpu",
) -> Sensitivity:
    """The sensitivity of a model of floats; its layers run on the torch device `compute`.

    Raises UserError: the text is missing or too short, or there is no such device.
    """
    from edgekit.calibrate import Survey
    from edgekit.model.calibration import Room
    from edgekit.model.torch_view import torch_device
    from edgekit.model.windows import token_windows
    from edgekit.quant.sensitivity import curvatures

    windows = token_windows(checkpoint, text, seed=0)
    drops: dict[int, float] = {}
    widths: dict[str, list[tuple[int, int, float]]] = {}
    ranks: dict[str, list[tuple[int, float]]] = {}
    formats: dict[str, list[tuple[str, float]]] = {}
    shapes: dict[str, Shape] = {}
    vectors: dict[int, int] = {}
    others = 0
    budget = Budget(1.0, "share", 4.5, None)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        room = Room(Path(folder), psutil.virtual_memory().available // 2, torch_device(compute))
        names = tuple(checkpoint.blocks)
        survey = Survey(checkpoint.decoder, windows, room, names, checkpoint.read_block, report)
        for block, found, squares in curvatures(survey, seed=0):
            held = sum(values.nbytes for values in block.vectors.values())
            others += 0 if block.name.startswith("layers.") else held
            for module, curvature in found.items():
                weight = block.matrices[module]
                shapes[module] = weight.shape
                options = mixed.options_for(weight, module, curvature, squares[module])
                formats[module] = [(line, cost) for line, _, cost in options]
                if block.name.startswith("layers."):
                    wanted = candidates(weight.shape, MULTIPLE, budget)
                    choices = losses(weight.dense(), curvature, wanted, where=module)
                    ranks[module] = [(choice.rank, choice.loss) for choice in choices]
            if block.name.startswith("layers."):
                layer = int(block.name.removeprefix("layers."))
                writers = [f"model.{block.name}.{leaf}" for leaf in WRITER.values()]
                vectors[layer] = held
                drops[layer] = sum(found[writer].loss(-block.matrices[writer].dense()) for writer in writers)
                for part, rows in widths_of(block, found, PRUNING, checkpoint.decoder.head_dim).items():
                    widths[f"{layer} {part}"] = rows
    layers = sorted(drops)
    return Sensitivity(
        tuple(drops[layer] for layer in layers),
        widths,
        ranks,
        formats,
        shapes,
        (*(vectors[layer] for layer in layers), others),
        checkpoint.source.digest,
        windows.record.sha256,
    )


def measured_once(
    checkpoint: Checkpoint,
    text: CalibrationOptions,
    path: Path,
    *,
    compute: str = "cpu",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """`measure`, kept in the file `path` for the next call with the same model and text."""
    from edgekit.model.windows import token_windows

    if path.exists():
        found = Sensitivity.load(path)
        now = token_windows(checkpoint, text, seed=0).record.sha256
        if (found.model, found.text) == (checkpoint.source.digest, now):
            return found
    found = measure(checkpoint, text, report=report, compute=compute)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    return found


@dataclass(frozen=True)
class Composition:
    """layers: how many go. prune: share of what stays that heads and neurons lose. rank: share of the numbers that
    factors leave, 1 for no factors. size_mb: of codes and vectors."""

    layers: int = 0
    prune: float = 0.0
    rank: float = 1.0
    size_mb: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.layers} layer{'s' * (self.layers > 1)} dropped"] if self.layers else []
        parts += [f"{100 * self.prune:.0f} % pruned"] if self.prune else []
        parts += [f"factors keep {100 * self.rank:.0f} %"] if self.rank < 1 else []
        return f"{', '.join(parts) or 'bits alone'}, within {self.size_mb:.3g} MB"


@dataclass(frozen=True)
class Candidate:
    """A composition's recipe steps, and what is predicted: bytes, nats a token, milliseconds a token on the device."""

    composition: Composition
    steps: tuple[Step, ...]
    size_bytes: int
    loss: float
    latency_ms: float

    def recipe(self, name: str, text: CalibrationOptions) -> Recipe:
        return Recipe(name, str(self.composition), self.steps, calibration=text)


def composed(found: Sensitivity, wanted: Composition, device: Device | None = None) -> Candidate:
    """The candidate. Raises BudgetError: the size or a share cannot be reached."""
    if not 0 <= wanted.layers < len(found.drops):
        raise BudgetError(f"a layer must stay: {wanted.layers} of {len(found.drops)} are to go")
    order = sorted(range(len(found.drops) - 1), key=lambda layer: found.drops[layer])
    gone = sorted(order[: wanted.layers])
    model = _Model(found, [layer for layer in range(len(found.drops)) if layer not in gone])
    loss = math.fsum(found.drops[layer] for layer in gone)
    steps: list[Step] = [Drop(layers=tuple(gone))] if gone else []
    if wanted.prune:
        plan, cost = model.prune(wanted.prune)
        follow = 0.0 if gone else PRUNING.follow  # one step of a recipe may look at the original: a seam needs it more
        steps.append(Planned(remove=wanted.prune, plan=plan, follow=follow))
        loss += cost
    if wanted.rank < 1:
        plan, cost = model.factor(wanted.rank)
        steps += [LowRank(plan=plan, multiple=MULTIPLE)] if plan else []
        loss += cost
    plan, size_bytes, cost = model.round(wanted.size_mb)
    steps.append(dataclasses.replace(MIXED, target_mb=wanted.size_mb, plan=plan))
    return Candidate(wanted, tuple(steps), size_bytes, loss + cost, model.latency_ms(device))


class _Model:
    """The shapes of a model while it is composed. Plans name its layers as they are numbered without those gone."""

    def __init__(self, found: Sensitivity, stay: list[int]) -> None:
        self.found, self.stay = found, stay
        self.number = {layer: index for index, layer in enumerate(stay)}
        self.shapes = {m: shape for m, shape in found.shapes.items() if layer_of(m) in (None, *stay)}
        self.ranks: dict[str, int] = {}
        self.grids: dict[str, Grid] = {}

    def prune(self, share: float) -> tuple[tuple[str, ...], float]:
        """The plan of `prune.planned` for a share of the decoder's numbers, and its cost."""
        keys = [(layer, part) for layer in self.stay for part in PRUNING.parts]
        rows = [self.found.widths[f"{layer} {part}"] for layer, part in keys]
        whole = sum(map(max, ([size for _, size, _ in row] for row in rows)))
        total = sum(rows_ * columns for m, (rows_, columns) in self.shapes.items() if layer_of(m) is not None)
        chosen = choose(
            [[size for _, size, _ in row] for row in rows],
            [[cost for _, _, cost in row] for row in rows],
            int(whole - share * total),
        )
        plan, loss = [], 0.0
        for (layer, part), row, at in zip(keys, rows, chosen, strict=True):
            width, _, cost = row[at]
            plan.append(f"layers.{self.number[layer]} {part} {width}")
            loss += cost
            self._narrow(f"model.layers.{layer}.", part, width / row[-1][0])
        return tuple(sorted(plan)), loss

    def _narrow(self, prefix: str, part: Part, share: float) -> None:
        for leaf in MAKERS[part]:
            rows, columns = self.shapes[prefix + leaf]
            self.shapes[prefix + leaf] = round(rows * share), columns
        rows, columns = self.shapes[prefix + WRITER[part]]
        self.shapes[prefix + WRITER[part]] = rows, round(columns * share)

    def factor(self, share: float) -> tuple[tuple[str, ...], float]:
        """The plan of `tn.lowrank` for a share of the decoder's numbers, and its cost."""
        modules = [module for module in self.shapes if layer_of(module) is not None]
        options = []
        for module in modules:
            rows, columns = self.shapes[module]
            sizes = [(rank, rank * (rows + columns) if rank else rows * columns, cost)
                     for rank, cost in self.found.ranks[module]]  # fmt: skip
            options.append([row for row in sizes if row[1] <= rows * columns])
        total = sum(math.prod(self.shapes[module]) for module in modules)
        sizes_, costs = ([[row[at] for row in rows] for rows in options] for at in (1, 2))
        chosen = choose(sizes_, costs, int(share * total))  # type: ignore[arg-type]
        picked = {module: rows[at] for module, rows, at in zip(modules, options, chosen, strict=True)}
        self.ranks = {module: rank for module, (rank, _, _) in picked.items() if rank}
        plan = tuple(sorted(f"{self._name(module)} {rank}" for module, rank in self.ranks.items()))
        return plan, sum(cost for _, _, cost in picked.values())

    def round(self, size_mb: float) -> tuple[tuple[str, ...], int, float]:
        """The plan of `quant.mixed` for a size, the bytes that it takes, and its cost."""
        vectors = self.found.vectors[-1] + sum(self.found.vectors[layer] for layer in self.stay)
        modules = list(self.shapes)
        sizes, costs = [], []
        for module in modules:
            share = sum(map(math.prod, self._parts(module))) / math.prod(self.found.shapes[module])
            rows = [(_grid(line), share * cost) for line, cost in self.found.formats[module]]
            sizes.append([sum(grid.size_bytes(part) for part in self._parts(module)) for grid, _ in rows])
            costs.append([cost for _, cost in rows])
        chosen = choose(sizes, costs, int(size_mb * 1e6) - vectors)
        plan = []
        for module, at in zip(modules, chosen, strict=True):
            line = self.found.formats[module][at][0]
            self.grids[module] = _grid(line)
            plan.append(f"{self._name(module)} {line}")
        size = vectors + sum(row[at] for row, at in zip(sizes, chosen, strict=True))
        return tuple(sorted(plan)), size, sum(row[at] for row, at in zip(costs, chosen, strict=True))

    def latency_ms(self, device: Device | None) -> float:
        """The products of one token, by `edgekit.tn.cost`; a tied table is read once, as the head."""
        seconds = 0.0
        for module, shape in self.shapes.items():
            parts = self._parts(module)
            bits = 8 * sum(map(self.grids[module].size_bytes, parts)) / sum(map(math.prod, parts))
            seconds += cost_of_rank(shape, self.ranks.get(module, 0), bits=bits, device=device).seconds
        return 1e3 * seconds

    def _parts(self, module: str) -> list[Shape]:
        rows, columns = self.shapes[module]
        rank = self.ranks.get(module, 0)
        return [(rows, rank), (rank, columns)] if rank else [(rows, columns)]

    def _name(self, module: str) -> str:
        layer = layer_of(module)
        return module if layer is None else module.replace(f".{layer}.", f".{self.number[layer]}.", 1)


def layer_of(module: str) -> int | None:
    """The layer of a module, or None for the token table and the head."""
    return int(module.split(".")[2]) if module.startswith("model.layers.") else None


@functools.lru_cache(maxsize=256)
def _grid(line: str) -> Grid:
    grid = dataclasses.replace(MIXED, plan=(f"m {line}",)).formats["m"]
    assert grid is not None, "a model of floats has no codes to keep"
    return grid
