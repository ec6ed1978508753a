"""The step `merge.drop`: take whole layers out. Those that say least go, or those that are named.

ShortGPT's influence of a layer that makes y_t of the residual stream x_t is how far it turns it,

    influence = 1 - mean_t  x_t . y_t / (|x_t| |y_t|)

and the layers of least influence go; the last layer always stays. It is measured once, on the whole model.
With `repair` the two matrices of the next layer that write to the stream (o, down) are refitted by least squares, so
that the stream behind it is again what it was behind it in the original, and those of `reach` layers behind it for what
is still missing: the seam costs no multiplication when the model runs. W' = W + repair * (aim - W G) (G + damping)^-1,
with G and aim of `edgekit.model.calibration`.

Sources: Men et al., ShortGPT, arXiv 2403.03853, section 2.3; seams: Chen et al., LinearPatch, arXiv 2505.24680, who put
a matrix H diag(s) H^T on the stream itself. Such a matrix cannot be folded into a Llama's neighbours exactly (RMSNorm
commutes with rotations and scalars only, and the stream passes them by), so we fit what the neighbours can reach.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import UserError
from edgekit.prune.elimination import regular
from edgekit.step import Changes, Fact, Needs, Outline, Prediction, StepContext, renamed
from edgekit.weight import Dense, Floats

if TYPE_CHECKING:
    from edgekit.calibrate import Survey

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Drop:
    """count: how many layers go, those of least influence. layers: or which, by number. repair: 0 leaves the seams as
    they are, 1 refits fully. reach: how many layers behind the one at a seam are refitted too."""

    name: ClassVar[str] = "merge.drop"
    count: int = 0
    layers: tuple[int, ...] = ()
    repair: float = 1.0
    damping: float = 0.01
    reach: int = 1

    def __post_init__(self) -> None:
        if (self.count and self.layers) or self.count < 0:
            raise UserError(f"{self.name} needs count or layers, one of them: got {self.count} and {list(self.layers)}")
        if len(set(self.layers)) != len(self.layers) or min(self.layers, default=0) < 0:
            raise UserError(f"layers must be numbers of layers from 0 on, each once: got {list(self.layers)}")
        if not 0 <= self.repair <= 1:
            raise UserError(f"repair must be from 0 to 1: got {self.repair}")
        if not 0 < self.damping <= 10:
            raise UserError(f"damping must be above 0 and at most 10: got {self.damping}")
        if self.reach < 0:
            raise UserError(f"reach must be 0 or more layers: got {self.reach}")

    @property
    def needs(self) -> Needs:
        if self.repair:
            return "originals"
        return "activations" if self.count else "weights"

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """The model without the layers; as it is while they are not known."""
        total = checkpoint.decoder.layers
        if not self.count and not self.layers:
            raise UserError(f"{self.name} needs to know how many layers: set count, or name them with layers")
        if max(len(self.layers), self.count) >= total:
            raise UserError(
                f"{self.name} must leave a layer: the model has {total}, {max(len(self.layers), self.count)} are to go"
            )
        beyond = [layer for layer in self.layers if layer >= total]
        if beyond:
            raise UserError(f"layers must be from 0 to {total - 1}: got {beyond[0]}")
        return without(checkpoint, self.layers) if self.layers else checkpoint

    def survey(self, survey: Survey) -> Drop:
        """The step with the layers of least influence."""
        if self.layers:
            return self
        found = influences(survey)
        order = np.argsort(found[:-1], kind="stable")[: self.count]
        return dataclasses.replace(self, count=0, layers=tuple(sorted(int(layer) for layer in order)))

    def stands_for(self, name: str) -> tuple[str, ...]:
        """The layers between the one before `name` and itself, and it."""
        index, behind = int(name.removeprefix("layers.")), 0
        gone = list[str]()
        original = 0
        while True:
            if original in self.layers:
                gone.append(f"layers.{original}")
            elif behind == index:
                return (*gone, f"layers.{original}")
            else:
                behind += 1
                gone.clear()
            original += 1

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        """The layers behind a seam, refitted; others as they are."""
        if not self._refits(block.name):
            return block, Changes()
        assert context.inputs is not None, "a layer has calibration inputs"
        now, errors = Block(block.name, dict(block.matrices), block.vectors), list[tuple[float, float]]()
        for leaf in WRITERS:
            module = f"model.{block.name}.{leaf}"
            found = context.inputs.statistics(now, module)
            assert found.aim is not None, "the step needs originals"
            W = now.matrices[module].dense().astype(np.float64)
            missed = found.aim - W @ found.gram
            move = np.linalg.solve(regular(found.gram, self.damping, where=module), missed.T).T
            now.matrices[module] = Dense((W + self.repair * move).astype(np.float32))
            errors.append((float(np.linalg.norm(self.repair * move)), float(np.linalg.norm(W))))
        size = float(np.sqrt(sum(move**2 for move, _ in errors) / max(sum(W**2 for _, W in errors), 1e-300)))
        return now, Changes(len(errors), {"relative_change_at_seams": Fact(size, "max")})

    def _refits(self, name: str) -> bool:
        """Whether a layer is at a seam, or within reach behind one."""
        if not name.startswith("layers.") or not self.repair:
            return False
        index = int(name.removeprefix("layers."))
        near = range(max(0, index - self.reach), index + 1)
        return any(len(self.stands_for(f"layers.{layer}")) > 1 for layer in near)

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        if not self._refits(outline.name):
            return Prediction(outline, 0.0, 0)
        matrices = dict(outline.matrices)
        for leaf in WRITERS:
            module = f"model.{outline.name}.{leaf}"
            rows, columns = matrices[module].shape
            matrices[module] = dataclasses.replace(matrices[module], size_bytes=4 * rows * columns, dense=True)
        widest = max(matrices[f"model.{outline.name}.{leaf}"].shape[1] for leaf in WRITERS)
        outline = Outline(outline.name, matrices, outline.vector_bytes)
        return Prediction(outline, 2.0 * widest**3 / 2e10, 4 * 8 * widest**2)


def without(checkpoint: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    """A view of the model without `layers`, the others numbered anew; nothing is read."""
    total = checkpoint.decoder.layers
    stay = [layer for layer in range(total) if layer not in layers]
    number = {layer: index for index, layer in enumerate(stay)}
    names = {}
    for name in checkpoint.tensors.names():
        match = LAYER.match(name)
        if match is None:
            names[name] = name
        elif int(match[1]) in number:
            names[LAYER.sub(f"model.layers.{number[int(match[1])]}.", name)] = name
    config = {**checkpoint.config, "num_hidden_layers": len(stay)}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = [config["layer_types"][layer] for layer in stay]
    return renamed(checkpoint, names, config=config)


def influences(survey: Survey) -> list[float]:
    """ShortGPT's influence of each layer on the calibration text."""
    from edgekit.model.calibration import Stream

    stream = Stream(survey.windows, survey.decoder, survey.room)
    stream.begin(survey.block("embedding").matrices["model.embed_tokens"])
    names = [name for name in survey.names if name.startswith("layers.")]
    found = []
    for index, name in enumerate(names):
        assert stream.states is not None, "begin comes first"
        before = np.array(stream.states)
        stream.advance(stream.inputs(), survey.block(name))
        found.append(influence(before, stream.states))
        survey.report(index + 1, len(names))
    return found


def influence(before: Floats, after: Floats) -> float:
    """1 - mean cosine of states (..., hidden); a state of zero turns by nothing."""
    norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    products = np.einsum("...i,...i->...", before, after)
    return float(1 - np.where(norms > 0, products / np.where(norms > 0, norms, 1), 1).mean())
