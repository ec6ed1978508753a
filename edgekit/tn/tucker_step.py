"""The step `tn.tucker`: the heads of q, k and v as mixtures of fewer heads, over fewer directions of what they read.

`keep` is the share of a matrix's numbers that its factors may have; how it is divided between mixtures and directions
is chosen for each matrix by the error (`edgekit.tn.tucker`). The output projection reads heads instead of making them,
and MLPs have none: they are left alone, and the record says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.heads import refuse_thin_heads
from edgekit.model.stages import in_order
from edgekit.step import Changes, Needs, Outline, Prediction, StepContext
from edgekit.tn.chosen import error_facts, is_named, refuse_strays
from edgekit.tn.tucker import stacked_heads
from edgekit.tn.whitening import relative_error
from edgekit.weight import Dense

LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class HeadsTucker:
    """See the module. whiten: false truncates plainly, for comparison. modules: patterns of module paths."""

    name: ClassVar[str] = "tn.tucker"
    keep: float = 0.8
    whiten: bool = True
    modules: tuple[str, ...] = ("model.layers.*",)

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise UserError(f"keep must be a share above 0 and below 1: got {self.keep}")

    @property
    def needs(self) -> Needs:
        return "activations" if self.whiten else "weights"

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        refuse_thin_heads(checkpoint, self.name)
        refuse_strays(self.name, self.modules, checkpoint)
        return checkpoint

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        now = Block(block.name, dict(block.matrices), block.vectors)
        errors: list[tuple[float, float]] = []
        skipped: list[Skip] = []
        for module in in_order(block.matrices):
            weight = block.matrices[module]
            if not module.endswith(LEAVES) or not is_named(module, self.modules):
                skipped.append(Skip(module, "makes no heads, or no pattern of modules names it"))
                continue
            if not isinstance(weight, Dense):
                skipped.append(Skip(module, "is quantised or factored already"))
                continue
            gram = context.inputs.statistics(now, module).gram if self.whiten and context.inputs else None
            heads = weight.shape[0] // context.decoder.head_dim
            made = stacked_heads(weight.values, gram, heads, self.keep, where=module)
            if made is None:
                skipped.append(Skip(module, f"keep {self.keep} leaves it no factors"))
                continue
            errors.append(relative_error(weight.values, made.dense(), gram))
            now.matrices[module] = made
        return now, Changes(len(errors), error_facts(errors, of_outputs=bool(self.whiten)), tuple(skipped))

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        """An upper bound: how many numbers a matrix will have, only its spectrum tells."""
        asked = [matrix.shape for module, matrix in outline.matrices.items() if module.endswith(LEAVES)]
        work = sum(10.0 * min(shape) ** 3 + 40.0 * min(shape) * math.prod(shape) for shape in asked)
        return Prediction(outline, work / 1e10, max((64 * math.prod(shape) for shape in asked), default=0))
