"""A step: one change that a recipe makes to a model, block by block.

The runner (`edgekit.compress`) calls a step in three ways, in this order:

    prepare(checkpoint) -> checkpoint    once, before anything is read: refuse, or change config and tensor names lazily
    predict(outline, context)            for --dry-run: what a block becomes, from shapes alone
    apply(block, context)                for each block in the order of the model: embedding, layers.0 ..., final

`apply` is a pure function of the step, the block and the context. A run can therefore be killed and resumed, and gives
the same bytes. What a step cannot treat it leaves alone and says so in `Changes.skipped`; it never prints.

`needs` says what a step must see, so that one runner can serve every family:

    weights        a block's weights are enough
    activations    calibration: `StepContext.inputs` tells what the matrices of the block read, when the blocks before
                   it are those already compressed; the runner runs the block after the last step to go on
    originals      the same, and what they read in the model as it stood before this step (one step of a recipe)
    model          merging, healing: the step works between two streams, from one finished folder to the next

A step that has `survey` is asked once, before the first block, and takes the place of what it returns: a plan for the
whole model, as options of its own. All steps then prepare anew, since a plan may take layers out.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Block, Checkpoint, RenamedReader
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.config import DecoderConfig
from edgekit.schema import nearest

if TYPE_CHECKING:
    from edgekit.calibrate import Survey

Needs = Literal["weights", "activations", "originals", "model"]

STEPS = {
    "heal.distill": "edgekit.heal.step:Distill",
    "merge.drop": "edgekit.merge.drop:Drop",
    "merge.layers": "edgekit.merge.layers:Merge",
    "prune.heads": "edgekit.prune.steps:Heads",
    "prune.neurons": "edgekit.prune.steps:Neurons",
    "prune.pairs": "edgekit.prune.bond_steps:Pairs",
    "prune.planned": "edgekit.prune.steps:Planned",
    "prune.values": "edgekit.prune.bond_steps:Values",
    "prune.weights": "edgekit.prune.weights:Weights",
    "quant.awq": "edgekit.quant.scaling:Awq",
    "quant.int2": "edgekit.quant.methods:Int2",
    "quant.int3": "edgekit.quant.methods:Int3",
    "quant.int4": "edgekit.quant.methods:Int4",
    "quant.int8": "edgekit.quant.methods:Int8",
    "quant.keep": "edgekit.quant.keep:Keep",
    "quant.mixed": "edgekit.quant.mixed:Mixed",
    "quant.rotate": "edgekit.quant.rotate:Rotate",
    "quant.smooth": "edgekit.quant.scaling:Smooth",
    "tn.lowrank": "edgekit.tn.steps:LowRank",
    "tn.mpo": "edgekit.tn.mpo_step:Mpo",
    "tn.tucker": "edgekit.tn.tucker_step:HeadsTucker",
}


@dataclass(frozen=True)
class Fact:
    """A number about one block that can be joined over blocks: summed, averaged by `weight`, or its maximum taken.

    `rms` joins relative errors: weighted by the squared norm, it gives the relative error of all blocks together.
    """

    value: float
    how: Literal["sum", "mean", "rms", "max"]
    weight: float = 1.0


@dataclass(frozen=True)
class Changes:
    """What a step did to one block: matrices changed, numbers about them, and what it left alone and why."""

    changed: int = 0
    facts: dict[str, Fact] = field(default_factory=dict)
    skipped: tuple[Skip, ...] = ()


def join_facts(blocks: Iterable[Mapping[str, Fact]]) -> dict[str, float]:
    """The facts of all blocks, each name joined as its facts say; a weight of 0 everywhere gives 0."""
    by_name: dict[str, list[Fact]] = {}
    for facts in blocks:
        for name, fact in facts.items():
            by_name.setdefault(name, []).append(fact)
    return {name: _join(facts) for name, facts in by_name.items()}


def _join(facts: Sequence[Fact]) -> float:
    how = facts[0].how
    assert all(fact.how == how for fact in facts), "a fact is joined in one way"
    if how == "max":
        return max(fact.value for fact in facts)
    if how == "sum":
        return math.fsum(fact.value for fact in facts)
    power = 2 if how == "rms" else 1
    weight = math.fsum(fact.weight for fact in facts)
    total = math.fsum(fact.weight * fact.value**power for fact in facts)
    return float((total / weight) ** (1 / power)) if weight else 0.0


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text a run calibrates on: files, how many windows, and tokens a window (0: 1024, or the context)."""

    files: tuple[str, ...] = ()
    samples: int = 16
    length: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"calibration must have at least one window: got {self.samples}")


@dataclass(frozen=True)
class CalibrationRecord:
    """The text that a run was calibrated on, for its manifest: file names, windows, tokens a window, their digest."""

    files: tuple[str, ...]
    samples: int
    length: int
    sha256: str


@dataclass(frozen=True)
class InputStatistics:
    """What a matrix reads on the calibration text, see `edgekit.model.calibration`; float64.

    `cross`, `drift` and, for what writes to the residual stream, `aim` are there for a step that asks for the original
    model's inputs too.
    """

    gram: NDArray[np.float64]
    mean_abs: NDArray[np.float64]
    max_abs: NDArray[np.float64]
    tokens: int
    cross: NDArray[np.float64] | None = None
    drift: NDArray[np.float64] | None = None
    aim: NDArray[np.float64] | None = None


class Inputs(Protocol):
    """The calibration inputs of one block."""

    def statistics(self, block: Block, module: str) -> InputStatistics:
        """What `module` reads when the matrices before it are those of `block`."""


@dataclass(frozen=True)
class StepContext:
    """What a step may know beside the block in its hands: the facts of the prepared model, and the recipe's seed.

    `inputs` is there for steps that need activations, but at the token table of an untied model.
    """

    decoder: DecoderConfig
    seed: int
    inputs: Inputs | None = None


@dataclass(frozen=True)
class MatrixOutline:
    """A matrix without its numbers: (out, in), bytes in its folder, and whether it is still float.

    A factored one has its `factors`, whose bytes are its own.
    """

    shape: tuple[int, int]
    size_bytes: int
    dense: bool
    factors: tuple[MatrixOutline, ...] = ()

    def with_factors(self, factors: tuple[MatrixOutline, ...]) -> MatrixOutline:
        """The same matrix, its factors stored in another way."""
        return MatrixOutline(self.shape, sum(factor.size_bytes for factor in factors), False, factors)


@dataclass(frozen=True)
class Outline:
    """A block without its numbers. `vector_bytes` counts norms and biases."""

    name: str
    matrices: dict[str, MatrixOutline]
    vector_bytes: int

    @property
    def size_bytes(self) -> int:
        """What `Block.size_bytes` is for the block itself."""
        return self.vector_bytes + sum(matrix.size_bytes for matrix in self.matrices.values())


@dataclass(frozen=True)
class Prediction:
    """What a step will make of a block: its outline after, seconds, and memory beside the block before and after."""

    outline: Outline
    seconds: float
    workspace_bytes: int


class Step(Protocol):
    """A frozen dataclass whose fields are the options, checked when it is built (UserError). See the module."""

    name: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """What the step must see; it may depend on the options."""

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """The model as the step wants its blocks cut, named and configured; `checkpoint` itself when nothing changes.

        Raises UserError or ModelError when the step does not suit the model.
        """

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        """The changed block; `block` itself stays as it is. Raises ModelError for weights that cannot be right."""

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        """What `apply` would do: the sizes are exact, the seconds come from timing a small piece of work."""


@runtime_checkable
class Surveyor(Protocol):
    """A step that plans for the whole model before the first block."""

    def survey(self, survey: Survey) -> Step:
        """The step with its plan among its options; the step itself when it has one. Raises as `Step.apply`."""


@runtime_checkable
class Remover(Protocol):
    """A step whose `prepare` takes layers out, or joins several in one."""

    def stands_for(self, name: str) -> tuple[str, ...]:
        """The layers, of the model before `prepare`, in whose place the prepared layer `name` is; the last of them is
        the one whose outputs it has to reach."""


def step_class(name: str, *, where: str) -> type[Step]:
    """The class of a step, imported now. Raises UserError for a name that `STEPS` lacks; `where` names the place."""
    if name not in STEPS:
        raise UserError(f"{where}: use must name a step: got {name!r}{nearest(name, STEPS)}")
    module, _, attribute = STEPS[name].partition(":")
    try:
        return cast(type[Step], getattr(importlib.import_module(module), attribute))
    except ModuleNotFoundError as problem:
        raise UserError(f"{where}: {name} needs {problem.name}: pip install 'edgekit[compress]'") from problem


def options(step: Step) -> dict[str, object]:
    """All options of a step, defaults filled in, as JSON and TOML know them (lists for tuples)."""
    values = dataclasses.asdict(cast(Any, step))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def outline_of(checkpoint: Checkpoint, name: str) -> Outline:
    """The outline of one of `checkpoint.blocks`, from shapes: no tensor is read."""
    modules, vectors = checkpoint.blocks[name]
    return Outline(
        name,
        {module: _matrix_outline(checkpoint, module) for module in modules},
        sum(4 * math.prod(checkpoint.tensors.shape(vector)) for vector in vectors),
    )


def _matrix_outline(checkpoint: Checkpoint, module: str) -> MatrixOutline:
    shape = checkpoint.shape(module)
    parts = checkpoint.parts(module)
    if len(parts) > 1:
        factors = tuple(_matrix_outline(checkpoint, part) for part in parts)
        return MatrixOutline(shape, 0, False).with_factors(factors)
    if module not in checkpoint.structure:
        return MatrixOutline(shape, 4 * shape[0] * shape[1], dense=True)
    names = set(checkpoint.tensors.names())
    size = 1 if f"{module}.steps" in names else 2  # scales and minima are bytes where rows have steps
    bytes_a_number = {"codes": 1, "scales": size, "zeros": 1, "minima": size, "steps": 2}
    tensors = {f"{module}.{part}": count for part, count in bytes_a_number.items()}
    sizes = [tensors[name] * math.prod(checkpoint.tensors.shape(name)) for name in names & set(tensors)]
    return MatrixOutline(shape, sum(sizes), dense=False)


def renamed(checkpoint: Checkpoint, names: Mapping[str, str], *, config: Mapping[str, Any]) -> Checkpoint:
    """A view of `checkpoint` for `Step.prepare`: the tensors `names` (seen -> stored) and another config.

    Nothing is read or copied. A stored tensor may be seen under two names (untying a head) or under none.
    """
    structure = {}
    for seen, stored in names.items():
        pair = seen.removesuffix(".codes"), stored.removesuffix(".codes")
        if seen.endswith(".codes"):
            structure[pair[0]] = checkpoint.structure[pair[1]]
        owner = stored.rpartition(".factors.")[0]
        if owner in checkpoint.structure:
            structure[seen.rpartition(".factors.")[0]] = checkpoint.structure[owner]
    reader = RenamedReader(checkpoint.tensors, names)
    return dataclasses.replace(checkpoint, tensors=reader, structure=structure, config=dict(config))
