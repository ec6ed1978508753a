"""What the healing runs train: states of SmolLM2-135M-Instruct, and the products that a plan chooses for a file's size.

The plan takes the number of layers and the grids of attention, down, gate and up, and table of least expected cost that
fit. What a choice costs after healing, in nats a token, is what earlier runs of docs/healing.md left, made additive: it
ranks choices, its sum predicts nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

from edgekit.heal.decoder import TABLE
from edgekit.heal.fake_quant import Levels

ORDER = (17, 16, 18, 14, 15, 13, 12, 26, 5)  # layers by how little the KL rises without them, found by `layers`
Part = Literal["attention", "down", "gate and up", "table"]
Form = tuple[int, int]  # bits, block

DECODER, TABLE_SIZE = 3_538_944, 28_311_552  # weights of a layer, of the table
SHARES: dict[Part, float] = {"attention": 0.25, "down": 0.25, "gate and up": 0.5}  # of a layer's weights
LAYER_BYTES, TABLE_BYTES = 25_344, 196_608  # steps of rows and norms of a layer, steps of the table
FRAME_MB = 0.3  # of an exported file beside weights: graph and alignment

LAYERS_COST = (0.022, 0.0012)  # times n, times n squared: 0.17 for six layers left out, 0.25 for eight
FORMS: dict[Form, float] = {(4, 32): -0.04, (3, 32): 0.0, (3, 64): 0.06}  # of all layers
TABLES: dict[Form, float] = {(5, 32): 0.005, (4, 32): 0.022, (4, 64): 0.03, (3, 32): 0.085, (3, 64): 0.11}


@dataclass(frozen=True)
class Run:
    """A state to train: layers left out, a grid a part (a part without one stays float), start and length."""

    name: str
    drop: tuple[int, ...] = ()
    grids: dict[Part, Levels] = field(default_factory=dict)
    start: str = ""
    table_trained: bool = False  # or only its scales
    seconds: float = 240
    rate: float = 1e-3
    batch: int = 32

    def grid(self, path: str) -> Levels | None:
        """The grid of a matrix by its module path."""
        return self.grids.get(part_of(path))


def part_of(path: str) -> Part:
    if path == TABLE:
        return "table"
    if path.endswith(("gate_proj", "up_proj")):
        return "gate and up"
    return "down" if path.endswith("down_proj") else "attention"


def everywhere(levels: Levels) -> dict[Part, Levels]:
    """The same grid for all linear matrices, none for the table."""
    return dict.fromkeys(SHARES, levels)


def size_mb(layers: int, forms: dict[Part, Form]) -> float:
    """Megabytes of the exported file: codes, a byte of scale and one of minimum a block, steps, norms, the frame."""

    def a_weight(form: Form) -> float:
        return form[0] / 8 + 2 / form[1]

    layer = DECODER * sum(share * a_weight(forms[part]) for part, share in SHARES.items())
    return (layers * (layer + LAYER_BYTES) + TABLE_SIZE * a_weight(forms["table"]) + TABLE_BYTES) / 1e6 + FRAME_MB


def plan(target_mb: float, **training: Any) -> Run:
    """The product of least expected cost whose file fits the size."""
    found = []
    for n, *chosen, table in itertools.product(range(len(ORDER) + 1), *([FORMS] * len(SHARES)), TABLES):
        forms: dict[Part, Form] = {**dict(zip(SHARES, chosen, strict=True)), "table": table}
        if size_mb(30 - n, forms) <= target_mb:
            cost = LAYERS_COST[0] * n + LAYERS_COST[1] * n**2 + TABLES[table]
            cost += sum(share * FORMS[forms[part]] for part, share in SHARES.items())
            found.append((cost, n, tuple(forms.items())))
    _, n, best = min(found)
    return Run(
        f"{target_mb:g}MB", drop=ORDER[:n], grids={part: small_scales(*form) for part, form in best},
        table_trained=True, **training,
    )  # fmt: skip


def small_scales(bits: int, block: int) -> Levels:
    """A grid with minima, both stored in 8 bits."""
    return Levels(bits, block, "minimum", "int8")


RUNS = {  # each within ten minutes of one H200, with what it starts from
    run.name: run
    for run in (
        Run("int3", grids=everywhere(small_scales(3, 32)), seconds=430, rate=8e-4),
        Run("int2", grids=everywhere(Levels(2, 32, "minimum")), rate=1.5e-3, seconds=300),
        Run("fifth", drop=ORDER[:6], table_trained=True),
        Run("fifth-int3", drop=ORDER[:6], grids=everywhere(small_scales(3, 32)), seconds=65),
        plan(65, start="int3", seconds=62, rate=3e-4),
        plan(60, start="int3", seconds=45, rate=6e-4),
        plan(53, start="int3", seconds=45, rate=8e-4),
        plan(45, start="fifth-int3", seconds=45, rate=8e-4),
    )
}
SHORT = Run("optimizers", grids=everywhere(Levels(3, 32, "zero")), rate=8e-4, batch=16)  # what comparisons train
