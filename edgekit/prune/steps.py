"""The steps `prune.neurons`, `prune.heads` and `prune.planned`: layers of fewer neurons and heads, dense as before.

What stays is an ordinary model that any later step quantises. With `spread` "even" every layer loses the same share.
With "planned" a survey of the whole model (`edgekit.quant.sensitivity`: one forward and one backward pass) says what
each width of each layer would cost in KL to the model as it was,

    cost_l(k) = 1/2 e_l(k)     e of `edgekit.prune.elimination`, with W's rows scaled by the root of r and G the
                               token-weighted Gram matrix of that layer's curvature

and a dynamic program takes the widths of least total cost within the budget. The costs rank; their sum is too small,
since it takes layers as independent. The plan becomes the option `plan`, `BLOCK PART WIDTH` a line, so a recipe that
has one needs no survey:    layers.12 neurons 1056

Then each layer is cut in turn (`edgekit.prune.layer`), o before down, on what the layers before it really give. Which
neurons go is decided there and not in the survey: that was better (SmolLM2-135M at 20 %: 21.76 for 21.87).
A layer that loses something is float afterwards. transformers can load the folder as long as all layers have the same
widths, which are then those of config.json; else only edgekit can.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.heads import refuse_thin_heads
from edgekit.prune.elimination import Choice, rank_columns, regular
from edgekit.prune.layer import BATCH, MAKERS, PARTS, WRITER, Cut, Part, Refit, groups_of, narrowed
from edgekit.prune.layer import parameters_of_a_group as parameters
from edgekit.quant.knapsack import choose
from edgekit.step import Changes, Fact, MatrixOutline, Needs, Outline, Prediction, StepContext

if TYPE_CHECKING:
    from edgekit.calibrate import Survey
    from edgekit.quant.sensitivity import Curvature

Spread = Literal["planned", "even"]
Shapes = dict[str, tuple[int, int]]
LEAST = 4  # a plan leaves at least one fourth of a layer's neurons
CONFIG: dict[Part, str] = {"neurons": "intermediate_size", "heads": "num_key_value_heads"}


@dataclass(frozen=True)
class Structured:
    """remove: share of the parameters of the parts (`prune.planned`: of all decoder layers) that goes. spread: see the
    module. multiple: neurons of a layer come in multiples of it, as blocks of codes want. The rest: `Refit`.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[Part, ...]]
    remove: float = 0.2
    spread: Spread = "planned"
    multiple: int = 32
    choice: Choice = "elimination"
    damping: float = 1e-3
    follow: float = 0.3
    plan: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.remove < 1:
            raise UserError(f"remove must be a share above 0 and below 1: got {self.remove}")
        if self.spread not in get_args(Spread):
            raise UserError(f"spread must be one of {', '.join(get_args(Spread))}: got {self.spread!r}")
        if self.multiple < 1:
            raise UserError(f"multiple must be 1 or more: got {self.multiple}")
        self._refit  # noqa: B018  it checks the options
        stray = sorted({part for _, part in self.widths} - set(self.parts))
        if stray:
            raise UserError(f"{self.name} works on {' and '.join(self.parts)}: its plan names {stray[0]}")

    @property
    def needs(self) -> Needs:
        return "originals" if self.follow else "activations"

    @property
    def _refit(self) -> Refit:
        return Refit(self.choice, self.damping, self.follow)

    @property
    def widths(self) -> Mapping[tuple[str, str], int]:
        """(block, part) -> groups that stay. Raises UserError for a line of the plan that cannot be read."""
        return _parsed(self.plan)

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """The model with the widths in its config that all layers will have, where they will be the same."""
        if "heads" in self.parts:
            refuse_thin_heads(checkpoint, self.name)
        if self.spread == "planned" and not self.plan:
            return checkpoint
        after: dict[Part, set[int]] = {part: set() for part in self.parts}
        head_dim, heads = checkpoint.decoder.head_dim, 1
        for name, (modules, _) in checkpoint.blocks.items():
            if name.startswith("layers."):
                shapes = {module: checkpoint.shape(module) for module in modules}
                for part in self.parts:
                    after[part].add(self._keeps(shapes, name, part, head_dim))
                if "heads" in self.parts:
                    heads = groups_of(shapes, f"model.{name}.", "heads", head_dim)[1] // head_dim
        config = dict(checkpoint.config)
        config["head_dim"] = head_dim
        for part, widths in after.items():
            if len(widths) == 1:
                config[CONFIG[part]] = min(widths)
                if part == "heads":
                    config["num_attention_heads"] = min(widths) * heads
        stray = sorted({block for block, _ in self.widths} - set(checkpoint.blocks))
        if stray:
            raise UserError(f"{self.name}: each line of plan must name a layer of the model: it lacks {stray[0]}")
        return dataclasses.replace(checkpoint, config=config)

    def survey(self, survey: Survey) -> Structured:
        """The step with its plan. Raises UserError: so much cannot be removed."""
        if self.plan or self.spread == "even":
            return self
        return self.planned(costs(survey, self))

    def planned(self, table: CostTable) -> Structured:
        """The step with the best plan for what it removes."""
        sizes = [[size for _, size, _ in options] for options in table.options.values()]
        prices = [[cost for _, _, cost in options] for options in table.options.values()]
        budget = int(sum(map(max, sizes)) - self.remove * table.parameters)
        least = sum(map(min, sizes))
        if budget < least:
            most = (sum(map(max, sizes)) - least) / table.parameters
            raise UserError(f"{self.name} can remove at most {most:.1%} of what it works on here: got {self.remove}")
        chosen = choose(sizes, prices, budget)
        lines = [
            f"{block} {part} {options[at][0]}"
            for ((block, part), options), at in zip(table.options.items(), chosen, strict=True)
        ]
        return dataclasses.replace(self, plan=tuple(sorted(lines)))

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        """The narrower layer. Blocks that are no layers stay."""
        if not block.name.startswith("layers."):
            return block, Changes(skipped=tuple(Skip(module, "is no linear of a layer") for module in block.matrices))
        assert context.inputs is not None, "a layer has calibration inputs"
        cuts: list[Cut] = []
        skipped: list[Skip] = []
        now, changed = block, set[str]()
        prefix, head_dim = f"model.{block.name}.", context.decoder.head_dim
        for part in self.parts:
            shapes = {module: weight.shape for module, weight in now.matrices.items()}
            keep = self._keeps(shapes, block.name, part, head_dim)
            if keep == groups_of(shapes, prefix, part, head_dim)[0]:
                skipped.append(Skip(prefix + WRITER[part], f"keeps all its {part}"))
                continue
            now, cut = narrowed(now, context.inputs, part, keep, self._refit, head_dim)
            cuts.append(cut)
            changed |= {prefix + leaf for leaf in (*MAKERS[part], WRITER[part])}
        return now, Changes(len(changed), _facts(block, now, cuts), tuple(skipped))

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        if not outline.name.startswith("layers."):
            return Prediction(outline, 0.0, 0)
        prefix, head_dim = f"model.{outline.name}.", context.decoder.head_dim
        matrices, seconds, largest = dict(outline.matrices), 0.0, 0
        for part in self.parts:
            shapes = {module: matrix.shape for module, matrix in matrices.items()}
            count, width = groups_of(shapes, prefix, part, head_dim)
            keep = self._keeps(shapes, outline.name, part, head_dim)
            if keep == count:
                continue
            rows, columns = shapes[prefix + WRITER[part]]
            for leaf in MAKERS[part]:
                made, read = shapes[prefix + leaf]
                matrices[prefix + leaf] = _dense((made * keep // count, read))
            matrices[prefix + WRITER[part]] = _dense((rows, keep * width))
            seconds += (4.0 * columns**3 * (count - keep) / count + rows * columns**2) / 2e9
            largest = max(largest, 5 * 8 * columns**2 + 3 * 8 * rows * columns)
        return Prediction(Outline(outline.name, matrices, outline.vector_bytes), seconds, largest)

    def _keeps(self, shapes: Shapes, block: str, part: Part, head_dim: int) -> int:
        """How many groups of a part stay in a layer."""
        count, _ = groups_of(shapes, f"model.{block}.", part, head_dim)
        if self.plan:
            return min(count, self.widths.get((block, part), count))
        multiple = self.multiple if part == "neurons" else 1
        return max(1, min(count, multiple * round(count * (1 - self.remove) / multiple)))


@dataclass(frozen=True)
class Neurons(Structured):
    """MLP neurons. Options: `Structured`."""

    name: ClassVar[str] = "prune.neurons"
    parts: ClassVar[tuple[Part, ...]] = ("neurons",)


@dataclass(frozen=True)
class Heads(Structured):
    """KV heads with the query heads that read them. Options: `Structured`."""

    name: ClassVar[str] = "prune.heads"
    parts: ClassVar[tuple[Part, ...]] = ("heads",)


@dataclass(frozen=True)
class Planned(Structured):
    """Heads and neurons against each other. Options: `Structured`."""

    name: ClassVar[str] = "prune.planned"
    parts: ClassVar[tuple[Part, ...]] = ("heads", "neurons")


@dataclass(frozen=True)
class CostTable:
    """(block, part) -> (groups kept, parameters, cost in nats a token) of each width; `parameters` is what a share is
    a share of."""

    options: Mapping[tuple[str, Part], list[tuple[int, int, float]]]
    parameters: int


def costs(survey: Survey, step: Structured) -> CostTable:
    """What every width of every layer takes and costs; it depends on the step's parts, multiple, choice and damping."""
    from edgekit.quant.sensitivity import curvatures

    options: dict[tuple[str, Part], list[tuple[int, int, float]]] = {}
    total = 0
    for block, found, _ in curvatures(survey, seed=0):
        if not block.name.startswith("layers."):
            continue
        for part, rows in widths_of(block, found, step, survey.decoder.head_dim).items():
            options[block.name, part] = rows
            total += 0 if step.parts == PLANNED else rows[-1][1]
        if step.parts == PLANNED:
            total += sum(math.prod(weight.shape) for weight in block.matrices.values())
    return CostTable(options, total)


def widths_of(
    block: Block, found: Mapping[str, Curvature], step: Structured, head_dim: int
) -> dict[Part, list[tuple[int, int, float]]]:
    """The widths of one layer, ascending to all of it, as in `CostTable`, from the curvature of its matrices."""
    prefix = f"model.{block.name}."
    shapes = {module: weight.shape for module, weight in block.matrices.items()}
    options: dict[Part, list[tuple[int, int, float]]] = {}
    for part in step.parts:
        writer = prefix + WRITER[part]
        count, width = groups_of(shapes, prefix, part, head_dim)
        multiple = step.multiple if part == "neurons" else 1
        least = min(count, multiple * math.ceil(count / LEAST / multiple)) if part == "neurons" else 1
        curvature = found[writer]
        W = block.matrices[writer].dense().astype(np.float64) * np.sqrt(curvature.outputs)[:, None]
        G = regular(curvature.inputs, step.damping, where=writer)
        ranked = rank_columns(W, G, group=width, least=least, batch=BATCH[part], choice=step.choice)
        each = parameters(shapes, prefix, part, head_dim)
        kept = sorted({k for k in ranked.errors if least <= k and (k % multiple == 0 or k == count)})
        options[part] = [(k, k * each, 0.5 * ranked.errors[k]) for k in kept]
    return options


PLANNED = Planned.parts
assert set(PLANNED) == set(PARTS)


def _dense(shape: tuple[int, int]) -> MatrixOutline:
    return MatrixOutline(shape, 4 * shape[0] * shape[1], dense=True)


def _facts(before: Block, after: Block, cuts: list[Cut]) -> dict[str, Fact]:
    weights = [sum(math.prod(w.shape) for w in block.matrices.values()) for block in (before, after)]
    facts = {"parameters_removed": Fact(float(weights[0] - weights[1]), "sum")}
    for cut in cuts:
        relative = math.sqrt(cut.error / cut.power) if cut.power else 0.0
        facts["worst_relative_output_error"] = Fact(
            max(relative, facts["worst_relative_output_error"].value if len(facts) > 1 else 0.0), "max"
        )
    if cuts:
        error, power = math.fsum(cut.error for cut in cuts), math.fsum(cut.power for cut in cuts)
        facts["relative_output_error"] = Fact(math.sqrt(error / power) if power else 0.0, "rms", power)
    return facts


@functools.lru_cache(maxsize=8)
def _parsed(plan: tuple[str, ...]) -> Mapping[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for line in plan:
        block, part, width = line.split(" ") if line.count(" ") == 2 else ("", "", "")
        if part not in PARTS or not width.isdigit() or int(width) < 1 or (block, part) in found:
            raise UserError(
                f"a line of plan must be BLOCK PART WIDTH, such as 'layers.0 neurons 1024', each once: got {line!r}"
            )
        found[block, part] = int(width)
    return found
