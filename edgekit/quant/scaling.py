"""Scale the channels between two matrices: the function stays, what is hard to round moves.

Where a stage of a layer reads x, x_j / s_j is made before and column j of the reading matrices takes s_j. The division
is folded into what made x, so nothing is left to do when the model runs:

    attention_input   q, k, v      into the gain of the norm before them
    mlp_input         gate, up     into the gain of the norm before them
    gated             down         into the rows of up (the gate's rows go through silu and stay)
    mixed             o            into the rows and bias of v; heads that share a value share its scale

AWQ chooses s_j = a_j^alpha, a_j = mean |x_j|, with the alpha of 0, 1/20 ... 1 whose rounding changes the outputs least,

    sum over the readers W of   tr(E H E^T),   E = W - round(W diag(s)) diag(s)^-1

SmoothQuant chooses s_j = max |x_j|^alpha / max |W_:j|^(1 - alpha), alpha fixed, so that activations round well too.
Scales are divided by the root of their largest and smallest. The layer is scaled stage by stage in the order in which
it runs, each with what it reads after the scaling before.
Sources: Lin et al., AWQ, arXiv 2306.00978, section 3.2; Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.heads import PAIRS
from edgekit.model.stages import STAGES, Stage
from edgekit.quant.grid import Bits, BlockSize, Grid, Offset, Scales, round_to_grid
from edgekit.step import Changes, Fact, InputStatistics, MatrixOutline, Needs, Outline, Prediction, StepContext
from edgekit.weight import Dense, Floats

Doubles = NDArray[np.float64]
NORMS = {"attention_input": "input_layernorm", "mlp_input": "post_attention_layernorm"}
POWERS = np.linspace(0, 1, 21)
LEAST = 1e-4  # a scale is not below this, whatever the activations


@dataclass(frozen=True)
class Awq:
    """Scale for weights that a later step rounds: `bits`, `block`, `offset`, `scales` as that step will have them."""

    name: ClassVar[str] = "quant.awq"
    needs: ClassVar[Needs] = "activations"
    bits: Bits = 4
    block: BlockSize = 32
    offset: Offset = "zero"
    scales: Scales = "float16"

    def __post_init__(self) -> None:
        self.grid  # noqa: B018  it checks the options

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.block, self.offset, self.scales)

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        """The scaled block, float. Blocks that are no layers stay."""
        return scaled(block, context, lambda matrices, found: awq_scales(matrices, found, self.grid))

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        return _as_float(outline, seconds_a_weight=2e-6)


@dataclass(frozen=True)
class Smooth:
    """SmoothQuant: `alpha` of the difficulty moves from the activations to the weights."""

    name: ClassVar[str] = "quant.smooth"
    needs: ClassVar[Needs] = "activations"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha must be from 0 to 1: got {self.alpha}")

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        """The scaled block, float. Blocks that are no layers stay."""
        return scaled(block, context, lambda matrices, found: smooth_scales(matrices, found, self.alpha))

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        return _as_float(outline, seconds_a_weight=2e-9)


Chooser = Callable[[list[Floats], InputStatistics], Doubles]


def scaled(block: Block, context: StepContext, choose: Chooser) -> tuple[Block, Changes]:
    """The block with its stages scaled as `choose` says, from the matrices that read a stage and what they read."""
    if not block.name.startswith("layers."):
        return block, Changes(skipped=tuple(Skip(module, "is no linear of a layer") for module in block.matrices))
    inputs = context.inputs
    assert inputs is not None, "a layer has calibration inputs"
    prefix, changed, ranges = f"model.{block.name}.", 0, list[float]()
    block = Block(block.name, {m: Dense(w.dense()) for m, w in block.matrices.items()}, dict(block.vectors))
    pairs = block.vectors.get(prefix + PAIRS)
    key_size = context.decoder.head_dim if pairs is None else 2 * len(pairs)
    k_rows, v_rows = (block.matrices[f"{prefix}self_attn.{x}_proj"].shape[0] for x in "kv")
    value_size = v_rows * key_size // k_rows
    group = block.matrices[prefix + "self_attn.o_proj"].shape[1] // block.matrices[prefix + "self_attn.v_proj"].shape[0]
    for stage, leaves in STAGES.items():
        readers = [prefix + leaf for leaf in leaves]
        found = inputs.statistics(block, readers[0])
        scales = choose([block.matrices[reader].dense() for reader in readers], found)
        if stage == "mixed":
            scales = _shared(scales, group, value_size)
        scales = np.maximum(scales, LEAST)
        scales = scales / math.sqrt(scales.max() * scales.min())
        _fold(block, prefix, stage, scales.astype(np.float32), group, value_size)
        ranges.append(float(scales.max() / scales.min()))
        changed += len(readers)
    facts = {"largest_over_smallest_scale": Fact(max(ranges), "max")} if ranges else {}
    return block, Changes(changed, facts)


def awq_scales(matrices: list[Floats], found: InputStatistics, grid: Grid) -> Doubles:
    """s = mean|x|^alpha of least output error after rounding to `grid`, (in,)."""
    mean = np.maximum(found.mean_abs, LEAST * max(found.mean_abs.max(), 1e-30))
    best: Doubles = np.ones_like(mean)
    least = math.inf
    for power in POWERS:
        scales = mean**power
        scales = scales / math.sqrt(scales.max() * scales.min())
        error = sum(_rounding_error(W, scales.astype(np.float32), found.gram, grid) for W in matrices)
        if error < least:
            best, least = scales, error
    return best


def smooth_scales(matrices: list[Floats], found: InputStatistics, alpha: float) -> Doubles:
    """s = max|x|^alpha / max|W_:j|^(1 - alpha), (in,); 1 where either is 0."""
    weights = np.max([np.abs(W).max(axis=0) for W in matrices], axis=0).astype(np.float64)
    alive = (weights > 0) & (found.max_abs > 0)
    scales: Doubles = np.ones_like(weights)
    scales[alive] = found.max_abs[alive] ** alpha / weights[alive] ** (1 - alpha)
    return scales


def _rounding_error(W: Floats, scales: Floats, gram: Doubles, grid: Grid) -> float:
    error = W - round_to_grid(W * scales, grid, where="a scaled matrix").dense() / scales
    return float(np.einsum("ij,ij->", error @ gram.astype(np.float32), error))


def _shared(scales: Doubles, group: int, value_size: int) -> Doubles:
    """One scale for the `group` query heads that read the same value head: their geometric mean."""
    heads = np.log(np.maximum(scales, LEAST)).reshape(-1, group, value_size)
    found: Doubles = np.exp(np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape)).reshape(-1)
    return found


def _fold(block: Block, prefix: str, stage: Stage, s: Floats, group: int, value_size: int) -> None:
    """Multiply the readers' columns by s and divide what comes before, in place."""
    if stage in NORMS:
        norm = f"{prefix}{NORMS[stage]}.weight"
        block.vectors[norm] = block.vectors[norm] / s
    else:
        maker = prefix + ("mlp.up_proj" if stage == "gated" else "self_attn.v_proj")
        rows = s if stage == "gated" else s.reshape(-1, group, value_size)[:, 0].reshape(-1)
        block.matrices[maker] = Dense(block.matrices[maker].dense() / rows[:, None])
        if maker + ".bias" in block.vectors:
            block.vectors[maker + ".bias"] = block.vectors[maker + ".bias"] / rows
    for leaf in STAGES[stage]:
        block.matrices[prefix + leaf] = Dense(block.matrices[prefix + leaf].dense() * s)


def _as_float(outline: Outline, *, seconds_a_weight: float) -> Prediction:
    matrices = {
        module: MatrixOutline(matrix.shape, 4 * math.prod(matrix.shape), dense=True)
        for module, matrix in outline.matrices.items()
    }
    if not outline.name.startswith("layers."):
        return Prediction(outline, 0.0, 0)
    work = sum(math.prod(matrix.shape) for matrix in outline.matrices.values())
    largest = max((math.prod(matrix.shape) for matrix in outline.matrices.values()), default=0)
    return Prediction(Outline(outline.name, matrices, outline.vector_bytes), work * seconds_a_weight, 4 * 4 * largest)
