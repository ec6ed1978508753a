"""The step `tn.mpo`: matrices become chains of small tensors (`edgekit.tn.mpo`), refined on what they really read.

`keep` is the share of a matrix's numbers that its cores may have, or `error` the relative error of the matrix itself
before it is refined. A matrix with a prime dimension has no sites; it becomes low rank in the metric instead, of the
same share, and the record says so. A chain saves numbers and mostly no time: export contracts it where it would be
slower (`edgekit.export.contract`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.stages import in_order, stage_of
from edgekit.step import Changes, MatrixOutline, Needs, Outline, Prediction, StepContext
from edgekit.tn.chosen import error_facts, is_named, refuse_strays
from edgekit.tn.lowrank import rank_for_error, rank_for_share, truncated
from edgekit.tn.mpo import (
    Sites,
    bonds_for_error,
    bonds_for_share,
    count_numbers,
    decomposed,
    refined,
    site_shapes,
)
from edgekit.tn.whitening import Doubles, relative_error, spectrum
from edgekit.weight import Dense, Factored, Floats, Weight

NO_SITES = "a dimension has too few prime factors for its sites: made low rank instead"


@dataclass(frozen=True)
class Mpo:
    """See the module. sites: of each chain. refine: passes of least squares in the metric; 0 needs no text."""

    name: ClassVar[str] = "tn.mpo"
    keep: float = 0.0
    error: float = 0.0
    sites: int = 2
    refine: int = 1
    modules: tuple[str, ...] = ("model.layers.*",)

    def __post_init__(self) -> None:
        if bool(self.keep) == bool(self.error):
            raise UserError("tn.mpo needs one of keep and error")
        if not (0 <= self.keep <= 1 and 0 <= self.error <= 1):
            raise UserError(f"keep and error must be from 0 to 1: got {self.keep}, {self.error}")
        if not 2 <= self.sites <= 6 or not 0 <= self.refine <= 20:
            raise UserError(f"sites must be from 2 to 6 and refine from 0 to 20: got {self.sites}, {self.refine}")

    @property
    def needs(self) -> Needs:
        return "activations" if self.refine else "weights"

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        refuse_strays(self.name, self.modules, checkpoint)
        return checkpoint

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        now = Block(block.name, dict(block.matrices), block.vectors)
        errors: list[tuple[float, float]] = []
        skipped: list[Skip] = []
        for module in in_order(block.matrices):
            weight = block.matrices[module]
            if reason := self._refusal(module, weight):
                skipped.append(Skip(module, reason))
                continue
            gram = context.inputs.statistics(now, module).gram if self.refine and context.inputs else None
            W = weight.dense()
            sites = site_shapes(W.shape, self.sites)
            made = self._low_rank(W, gram, module) if sites is None else self._chain(W, gram, sites, module)
            if made is None or sum(math.prod(factor.shape) for factor in made.factors) >= W.size:
                skipped.append(Skip(module, "its cores would not be smaller than the matrix"))
                continue
            if sites is None:
                skipped.append(Skip(module, NO_SITES))
            errors.append(relative_error(W, made.dense(), gram))
            now.matrices[module] = made
        return now, Changes(len(errors), error_facts(errors, of_outputs=bool(self.refine)), tuple(skipped))

    def _refusal(self, module: str, weight: Weight | MatrixOutline) -> str:
        if stage_of(module) is None or not is_named(module, self.modules):
            return "no pattern of modules names it"
        dense = weight.dense if isinstance(weight, MatrixOutline) else isinstance(weight, Dense)
        return "" if dense else "is quantised or factored already"

    def _chain(self, W: Floats, gram: Doubles | None, sites: Sites, module: str) -> Factored | None:
        bonds = bonds_for_share(sites, self.keep) if self.keep else bonds_for_error(W, sites, self.error)
        if bonds is None:
            return None
        found = decomposed(W, sites, bonds, where=module)
        return found if gram is None else refined(found, W, gram, passes=self.refine)

    def _low_rank(self, W: Floats, gram: Doubles | None, module: str) -> Factored | None:
        seen = spectrum(W, gram, where=module)
        rank = rank_for_share(W.shape, self.keep) if self.keep else rank_for_error(seen, self.error)
        return truncated(W, gram, rank, where=module, found=seen) if rank else None

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        """Exact but for `error`, whose bonds only the weights tell: there the matrices count as they are."""
        matrices, seconds, workspace = {}, 0.0, 0
        for module, matrix in outline.matrices.items():
            if not self._refusal(module, matrix):
                rows, columns = matrix.shape
                seconds += 20.0 * (1 + self.refine) * min(rows, columns) ** 3 / 1e10
                workspace = max(workspace, 8 * 12 * rows * columns)
                if self.keep:
                    matrix = self._predicted(matrix)
            matrices[module] = matrix
        return Prediction(Outline(outline.name, matrices, outline.vector_bytes), seconds, workspace)

    def _predicted(self, matrix: MatrixOutline) -> MatrixOutline:
        rows, columns = matrix.shape
        sites = site_shapes(matrix.shape, self.sites)
        if sites is None:
            rank = rank_for_share(matrix.shape, self.keep)
            shapes = [(rows, rank), (rank, columns)] if rank else []
        else:
            bonds = bonds_for_share(sites, self.keep)
            if bonds is None or count_numbers(sites, bonds) >= rows * columns:
                return matrix
            ends = (1, *bonds, 1)
            shapes = [(c * o, i * d) for c, d, (o, i) in zip(ends[:-1], ends[1:], sites, strict=True)]
        if not shapes or sum(a * b for a, b in shapes) >= rows * columns:
            return matrix
        return matrix.with_factors(tuple(MatrixOutline(shape, 4 * shape[0] * shape[1], dense=True) for shape in shapes))
