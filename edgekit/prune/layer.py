"""Make a layer narrower: which part of it goes, and the weights of what stays.

Two parts of a decoder layer can go without leaving a trace in its shape but smaller numbers:

    neurons   rows of gate and up, columns of down                                the units of the MLP
    heads     rows of q, k and v, columns of o: a KV head with the query heads that read it

Both end in one matrix that writes to the residual stream (down, o) and reads what the part made, so both are the same
problem: drop columns of the writer, refit the others (`edgekit.prune.elimination`), and cut the rows that made them.
The refit aims at the outputs that the writer gave before; with `follow` above 0 at

    y_t + follow * (W (x'_t - x_t) + r'_t - r_t)

x' and r' as the original model has them (see `edgekit.model.calibration`), so at making up for layers before it too.
After it the output error is known exactly, e / tr(W G W^T) on the calibration text; it is what `relative_error` says.
Not supported: a layer always keeps one KV head and one neuron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from edgekit.checkpoint import Block
from edgekit.errors import ModelError, UserError
from edgekit.model.heads import heads_of_block
from edgekit.prune.elimination import CHOICES, Choice, Doubles, Indices, error_of, rank_columns, refit, regular
from edgekit.step import Inputs, InputStatistics
from edgekit.weight import Dense, Floats, Weight

Part = Literal["neurons", "heads"]
PARTS: tuple[Part, ...] = get_args(Part)
WRITER: dict[Part, str] = {"neurons": "mlp.down_proj", "heads": "self_attn.o_proj"}
MAKERS: dict[Part, tuple[str, ...]] = {
    "neurons": ("mlp.gate_proj", "mlp.up_proj"),
    "heads": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
BATCH: dict[Part, int] = {"neurons": 8, "heads": 1}  # groups that are dropped at a time


@dataclass(frozen=True)
class Refit:
    """How columns are chosen and refitted: options of the same names of the steps."""

    choice: Choice = "elimination"
    damping: float = 1e-3
    follow: float = 0.0

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise UserError(f"choice must be one of {', '.join(CHOICES)}: got {self.choice!r}")
        if not 0 < self.damping <= 10:
            raise UserError(f"damping must be above 0 and at most 10: got {self.damping}")
        if not 0 <= self.follow <= 1:
            raise UserError(f"follow must be from 0 to 1: got {self.follow}")


@dataclass(frozen=True)
class Cut:
    """What cutting one part did: groups before and after, output error e on the calibration text and tr(W G W^T)."""

    before: int
    after: int
    error: float
    power: float


def groups_of(shapes: dict[str, tuple[int, int]], prefix: str, part: Part, head_dim: int) -> tuple[int, int]:
    """(groups, columns of the writer in a group) of one part, from the (out, in) of the matrices of a layer.

    Raises ModelError when the heads do not fit each other.
    """
    columns = shapes[prefix + WRITER[part]][1]
    if part == "neurons":
        return columns, 1
    groups = shapes[prefix + "self_attn.k_proj"][0] // head_dim
    if not groups or columns % (groups * head_dim):
        raise ModelError(f"query heads must be a multiple of key heads: {prefix} has {columns} columns for {groups}")
    return groups, columns // groups


def parameters_of_a_group(shapes: dict[str, tuple[int, int]], prefix: str, part: Part, head_dim: int) -> int:
    """Weights that go with one group."""
    groups, columns = groups_of(shapes, prefix, part, head_dim)
    made = sum(shapes[prefix + leaf][0] * shapes[prefix + leaf][1] for leaf in MAKERS[part]) // groups
    return made + columns * shapes[prefix + WRITER[part]][0]


def narrowed(
    block: Block, inputs: Inputs, part: Part, keep: int | Indices, how: Refit, head_dim: int
) -> tuple[Block, Cut]:
    """The layer with `keep` groups of `part`, a number or which; `block` itself stays.

    Raises UserError: fewer calibration tokens than columns to fit; ModelError: activations that are not finite.
    """
    if part == "heads" and not heads_of_block(block, head_dim).is_usual(head_dim):
        raise UserError(
            f"whole heads must go before prune.values and prune.pairs: those of {block.name} are thin already"
        )
    prefix = f"model.{block.name}."
    shapes = {module: weight.shape for module, weight in block.matrices.items()}
    count, width = groups_of(shapes, prefix, part, head_dim)
    writer = prefix + WRITER[part]
    found = inputs.statistics(block, writer)
    W = block.matrices[writer].dense().astype(np.float64)
    G = regular(found.gram, how.damping, where=writer)
    if isinstance(keep, int):
        ranked = rank_columns(W, G, group=width, least=keep, batch=BATCH[part], choice=how.choice)
        keep = ranked.kept(keep)
    columns = (keep[:, None] * width + np.arange(width)).reshape(-1)
    if found.tokens < len(columns):
        raise UserError(
            f"a refit of {len(columns)} columns needs as many calibration tokens, better ten times: {writer} saw"
            f" {found.tokens}; raise the recipe's samples or length"
        )
    V = refit(W, G, columns, _aim(W, G, found, how.follow))
    power = float(np.einsum("ij,ij->", W @ found.gram, W))
    cut = Cut(count, len(keep), error_of(W, found.gram, columns, V), power)
    return _cut(block, part, keep, count, V.astype(np.float32)), cut


def _aim(W: Doubles, G: Doubles, found: InputStatistics, follow: float) -> Doubles:
    """sum_t y_t x_t^T of the outputs to reach; damping pulls towards W itself."""
    aim = W @ G
    if follow and found.aim is not None:
        aim = aim + follow * (found.aim - W @ found.gram)
    return aim


def _cut(block: Block, part: Part, kept: Indices, count: int, V: Floats) -> Block:
    prefix = f"model.{block.name}."
    matrices: dict[str, Weight] = dict(block.matrices)
    vectors = dict(block.vectors)
    matrices[prefix + WRITER[part]] = Dense(np.ascontiguousarray(V))
    for leaf in MAKERS[part]:
        module = prefix + leaf
        rows = matrices[module].shape[0] // count
        stay = (kept[:, None] * rows + np.arange(rows)).reshape(-1)
        matrices[module] = Dense(np.ascontiguousarray(matrices[module].dense()[stay]))
        if module + ".bias" in vectors:
            vectors[module + ".bias"] = np.ascontiguousarray(vectors[module + ".bias"][stay])
    return Block(block.name, matrices, vectors)
