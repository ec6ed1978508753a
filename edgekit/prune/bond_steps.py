"""The steps `prune.values` and `prune.pairs`: heads of fewer channels (`edgekit.prune.bonds` has the algebra).

`remove` is the share of each head's channels that goes, the same in all layers that `layers` names (all by default);
what stays is a whole number of `multiple` channels. A layer keeps its heads and its width: q, k, v and o become
thinner, and with both steps at one share the cache too. Only edgekit can load the result.

The model's operators read one size a layer for queries, keys and values: where values are smaller than keys, export
pads them (`edgekit.export.values`), which saves o's columns and no cache; values larger than keys cannot be exported.
Models with a norm on queries and keys (Qwen3) keep their pairs, since the norm is over all of them: the record says so.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.heads import heads_of_block
from edgekit.prune.bonds import K, O, Q, V, with_fewer_pairs, with_fewer_values
from edgekit.step import Changes, Fact, MatrixOutline, Needs, Outline, Prediction, StepContext


@dataclass(frozen=True)
class _Thinner:
    name: ClassVar[str]
    remove: float = 0.25
    multiple: int = 16
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.remove < 1:
            raise UserError(f"remove must be a share above 0 and below 1: got {self.remove}")
        if self.multiple < 2 or self.multiple % 2:
            raise UserError(f"multiple must be even and at least 2: got {self.multiple}")
        if len(set(self.layers)) != len(self.layers) or min(self.layers, default=0) < 0:
            raise UserError(f"layers must be numbers of layers from 0 on, each once: got {list(self.layers)}")

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        """Raises UserError: a layer that the model lacks, or heads that are no larger than `multiple`."""
        beyond = [layer for layer in self.layers if layer >= checkpoint.decoder.layers]
        if beyond:
            raise UserError(f"layers must be from 0 to {checkpoint.decoder.layers - 1}: got {beyond[0]}")
        size = checkpoint.decoder.head_dim
        if self.kept(size) >= size:
            raise UserError(
                f"{self.name}: {self.remove} of {size} channels leaves them all in multiples of {self.multiple};"
                " remove more, or lower multiple"
            )
        return checkpoint

    def kept(self, size: int) -> int:
        """Channels of a head that stay, of `size`."""
        return min(size, max(self.multiple, self.multiple * round(size * (1 - self.remove) / self.multiple)))

    def _skip(self, name: str) -> str:
        if not name.startswith("layers."):
            return "is no linear of a layer"
        return (
            "" if not self.layers or int(name.removeprefix("layers.")) in self.layers else "no option names its layer"
        )


@dataclass(frozen=True)
class Values(_Thinner):
    """Channels between v and o. damping and follow: of o's refit, as in `prune.neurons`. The rest: see the module."""

    name: ClassVar[str] = "prune.values"
    damping: float = 1e-3
    follow: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 10 or not 0 <= self.follow <= 1:
            raise UserError(
                f"damping must be above 0 and at most 10, follow from 0 to 1: got {self.damping}, {self.follow}"
            )

    @property
    def needs(self) -> Needs:
        return "originals" if self.follow else "activations"

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        if reason := self._skip(block.name):
            return block, Changes(skipped=tuple(Skip(module, reason) for module in block.matrices))
        assert context.inputs is not None, "a layer has calibration inputs"
        size = heads_of_block(block, context.decoder.head_dim).value_size
        if self.kept(size) >= size:
            return block, Changes(skipped=(Skip(f"model.{block.name}.{V}", f"has {size} channels a head"),))
        now, cut = with_fewer_values(
            block,
            context.inputs,
            self.kept(size),
            context.decoder.head_dim,
            damping=self.damping,
            follow=self.follow,
        )
        facts = {
            "relative_error_of_bonds": Fact(_relative(cut.foretold, cut.of_products), "rms", cut.of_products),
            "relative_output_error": Fact(_relative(cut.error, cut.power), "rms", cut.power),
            "parameters_removed": Fact(_lost(block, now), "sum"),
        }
        return now, Changes(2, facts)

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        if self._skip(outline.name):
            return Prediction(outline, 0.0, 0)
        size = context.decoder.head_dim
        share = self.kept(size) / size
        matrices, prefix = dict(outline.matrices), f"model.{outline.name}."
        rows, read = matrices[prefix + V].shape
        out, columns = matrices[prefix + O].shape
        matrices[prefix + V] = _dense(round(rows * share), read)
        matrices[prefix + O] = _dense(out, round(columns * share))
        seconds = (8.0 * columns**3 + 4.0 * out * columns**2) / 2e9
        return Prediction(Outline(outline.name, matrices, outline.vector_bytes), seconds, 8 * 6 * columns**2)


@dataclass(frozen=True)
class Pairs(_Thinner):
    """Rotary pairs of queries and keys. Options: see the module."""

    name: ClassVar[str] = "prune.pairs"

    @property
    def needs(self) -> Needs:
        return "activations"

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        if reason := self._skip(block.name):
            return block, Changes(skipped=tuple(Skip(module, reason) for module in block.matrices))
        assert context.inputs is not None, "a layer has calibration inputs"
        prefix = f"model.{block.name}."
        if f"{prefix}self_attn.q_norm.weight" in block.vectors:
            return block, Changes(skipped=(Skip(prefix + Q, "has a norm over all its pairs"),))
        size = heads_of_block(block, context.decoder.head_dim).key_size
        if self.kept(size) >= size:
            return block, Changes(skipped=(Skip(prefix + Q, f"has {size} channels a head"),))
        now, gone = with_fewer_pairs(block, context.inputs, self.kept(size) // 2, context.decoder.head_dim)
        facts = {"share_of_scores_power_gone": Fact(gone, "mean"), "parameters_removed": Fact(_lost(block, now), "sum")}
        return now, Changes(2, facts)

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        """Exact but for models with norms on queries and keys, which an outline does not show."""
        if self._skip(outline.name):
            return Prediction(outline, 0.0, 0)
        size = context.decoder.head_dim
        matrices = dict(outline.matrices)
        for leaf in (Q, K):
            rows, read = matrices[f"model.{outline.name}.{leaf}"].shape
            matrices[f"model.{outline.name}.{leaf}"] = _dense(rows * self.kept(size) // size, read)
        outline = dataclasses.replace(
            outline, matrices=matrices, vector_bytes=outline.vector_bytes + 2 * self.kept(size)
        )
        return Prediction(outline, 0.01, 8 * 4 * max(math.prod(matrix.shape) for matrix in matrices.values()))


def _dense(rows: int, columns: int) -> MatrixOutline:
    return MatrixOutline((rows, columns), 4 * rows * columns, dense=True)


def _relative(error: float, power: float) -> float:
    return math.sqrt(error / power) if power else 0.0


def _lost(before: Block, after: Block) -> float:
    sizes = [sum(math.prod(weight.shape) for weight in block.matrices.values()) for block in (before, after)]
    return float(sizes[0] - sizes[1])
