"""The step `prune.weights`: single weights set to zero. It is here to compare with; zeros save nothing in our bundles.

Which weights of y = W x go, from the Gram matrix G = sum_t x_t x_t^T of what W: (out, in) reads:

    magnitude   those of least |W_ij| in their row                                                    no text
    wanda       those of least |W_ij| G_jj^1/2 in their row; the others stay as they are
    sparsegpt   block by block of columns those of least (W_ij / U_jj)^2, U^T U = (G + damping)^-1; each column that
                loses weights moves its error into the columns after it, w_k -= (w_j / U_jj) U_jk, as GPTQ does

With `pattern` "n:m" m neighbours of a row keep n. `remove` is then 1 - n/m and not read.
Sources: Sun et al., Wanda, arXiv 2306.11695; Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1. Ours
chooses the block's weights in each row apart, where theirs compares all rows of a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Block, Checkpoint
from edgekit.errors import UserError
from edgekit.manifest import Skip
from edgekit.model.stages import in_order, stage_of
from edgekit.quant.gptq import damped, inverse_factor
from edgekit.step import Changes, Fact, MatrixOutline, Needs, Outline, Prediction, StepContext
from edgekit.weight import Dense, Floats, Weight

Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]
Choice = Literal["magnitude", "wanda", "sparsegpt"]
COLUMNS = 128  # of SparseGPT's blocks
PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Weights:
    """See the module. modules: patterns of module paths."""

    name: ClassVar[str] = "prune.weights"
    choice: Choice = "wanda"
    remove: float = 0.5
    pattern: str = ""
    damping: float = 0.01
    modules: tuple[str, ...] = ("model.layers.*",)

    def __post_init__(self) -> None:
        if self.choice not in get_args(Choice):
            raise UserError(f"choice must be one of {', '.join(get_args(Choice))}: got {self.choice!r}")
        if not 0 < self.remove < 1:
            raise UserError(f"remove must be a share above 0 and below 1: got {self.remove}")
        if not 0 < self.damping <= 10:
            raise UserError(f"damping must be above 0 and at most 10: got {self.damping}")
        self.of  # noqa: B018  it checks the pattern

    @property
    def of(self) -> tuple[int, int]:
        """(n, m) of the pattern; (0, 0) without one. Raises UserError: it is none."""
        if not self.pattern:
            return 0, 0
        match = PATTERN.fullmatch(self.pattern)
        n, m = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 0 < n < m <= COLUMNS or COLUMNS % m:
            raise UserError(f"pattern must be n:m with n below m, such as 2:4, m a power of 2: got {self.pattern!r}")
        return n, m

    @property
    def needs(self) -> Needs:
        return "weights" if self.choice == "magnitude" else "activations"

    def prepare(self, checkpoint: Checkpoint) -> Checkpoint:
        modules = [module for matrices, _ in checkpoint.blocks.values() for module in matrices]
        for pattern in self.modules:
            if not any(fnmatchcase(module, pattern) for module in modules):
                raise UserError(f"prune.weights: each pattern of modules must match one: {pattern!r} matches none")
        return checkpoint

    def apply(self, block: Block, context: StepContext) -> tuple[Block, Changes]:
        now = Block(block.name, dict(block.matrices), block.vectors)
        skipped: list[Skip] = []
        changed, gone, error, power = 0, 0, 0.0, 0.0
        for module in in_order(block.matrices):
            if reason := self._refusal(module, block.matrices[module]):
                skipped.append(Skip(module, reason))
                continue
            W = block.matrices[module].dense()
            inputs = context.inputs if self.choice != "magnitude" else None
            G = np.eye(W.shape[1]) if inputs is None else inputs.statistics(now, module).gram
            thin = self.thinned(W, G, where=module)
            now.matrices[module] = Dense(thin)
            moved = thin.astype(np.float64) - W
            error += float(np.vdot(moved, moved @ G))
            power += float(np.vdot(W.astype(np.float64), W @ G))
            changed, gone = changed + 1, gone + int((thin == 0).sum())
        facts = {"zeros": Fact(float(gone), "sum")} if changed else {}
        if changed:
            name = "relative_error" if self.choice == "magnitude" else "relative_output_error"
            facts[name] = Fact(math.sqrt(error / power) if power else 0.0, "rms", power)
        return now, Changes(changed, facts, tuple(skipped))

    def thinned(self, W: Floats, G: Doubles, *, where: str) -> Floats:
        """W: (out, in) with zeros in it, in the metric G: (in, in). Raises ModelError: G is not finite."""
        if self.choice == "sparsegpt":
            return sparsegpt(W, damped(G, self.damping, where=where), self._least, where=where)
        scores = np.abs(W).astype(np.float64)
        if self.choice == "wanda":
            scores *= np.sqrt(np.maximum(G.diagonal(), 0.0))
        return np.where(self._least(scores), np.float32(0), W)

    def _least(self, scores: Doubles) -> Mask:
        """What goes of (rows, columns): the lowest scores of each row, or of each m neighbours."""
        n, m = self.of
        rows, columns = scores.shape
        if m and columns % m == 0:
            return lowest(scores.reshape(rows, -1, m), m - n).reshape(rows, columns)
        return lowest(scores, round(self.remove * columns))

    def _refusal(self, module: str, weight: Weight | MatrixOutline) -> str:
        if stage_of(module) is None or not any(fnmatchcase(module, pattern) for pattern in self.modules):
            return "no pattern of modules names it"
        if not (weight.dense if isinstance(weight, MatrixOutline) else isinstance(weight, Dense)):
            return "is quantised or factored already"
        if self.pattern and weight.shape[1] % self.of[1]:
            return f"its {weight.shape[1]} columns are no multiple of {self.of[1]}"
        return ""

    def predict(self, outline: Outline, context: StepContext) -> Prediction:
        """Nothing gets smaller."""
        asked = [matrix.shape for module, matrix in outline.matrices.items() if not self._refusal(module, matrix)]
        work = sum(2.0 * rows * columns**2 + 4.0 * columns**3 for rows, columns in asked)
        largest = max((24 * columns**2 + 12 * rows * columns for rows, columns in asked), default=0)
        return Prediction(outline, work / 1e10 if self.choice == "sparsegpt" else work / 1e13, largest)


def lowest(scores: Doubles, count: int) -> Mask:
    """True at the `count` lowest of the last axis; of equal ones the first."""
    order = np.argsort(scores, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def sparsegpt(
    W: Floats, H: Doubles, least: Callable[[Doubles], Mask], *, where: str = "matrix", batch: int = COLUMNS
) -> Floats:
    """W: (out, in) thinned in the metric H: (in, in), damped already; `least` maps scores (out, n) to what goes."""
    U = inverse_factor(H, where=where)
    rest = W.astype(np.float64)
    for start in range(0, W.shape[1], batch):
        end = min(start + batch, W.shape[1])
        diagonal = U.diagonal()[start:end]
        gone = least(np.square(rest[:, start:end] / diagonal))
        moves = np.zeros((len(W), end - start))
        for j in range(start, end):
            move = np.where(gone[:, j - start], rest[:, j], 0.0) / U[j, j]
            rest[:, j] = np.where(gone[:, j - start], 0.0, rest[:, j])
            rest[:, j + 1 : end] -= move[:, None] * U[j, j + 1 : end]
            moves[:, j - start] = move
        rest[:, end:] -= moves @ U[start:end, end:]
    return rest.astype(np.float32)
