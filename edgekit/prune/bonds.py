"""The two bonds inside an attention head: fewer channels between v and o, fewer rotary pairs between q and k.

**Value and output.** A KV head makes u = V x of d channels; the query heads h that read it write O_h (a mixture of u).
Only the products O_h V matter, so with r channels, V' = R V and O_h' = O_h L, the least

    sum_h sum_t |O_h (1 - L R) V x_t|^2 = sum_{k > r} s_k^2,      s_k the singular values of A^(1/2) C^(1/2),

    A = sum_h O_h^T O_h,    C = sum_t u_t u_t^T = V G V^T,      R = U_r^T A^(1/2),   L = A^(-1/2) U_r

is known before anything is cut, and no other r channels are better: it is low rank of the stacked O_h V in the metric
of what v reads. R's rows are then made orthonormal, so the channels left are no larger than those before. A bias b of
v goes through R, and C has + T b b^T for it: as if V x and b were independent, which is as much as Gram matrices say.

**Query and key.** RoPE turns pairs (i, i + d/2) of a query and a key by one angle, so nothing but whole pairs can go,
the same in all heads of a layer, since they turn by one table. A pair adds q_i k_i cos + ... to a score; over all
distances its mean square is about |q_pair|^2 |k_pair|^2 / 2, and the pairs for which that is least, summed over heads,

    sum_h  sum_t |q_pair,t|^2 * sum_t |k_pair,t|^2

go. Scores are divided by the root of the channels, so q is scaled by sqrt(channels left / channels before).
Sources: the bond is that of a matrix product state, Schollwoeck, arXiv 1008.3477; truncating value and output together
as in SVD-LLM V2 and Palu, arXiv 2407.21118 (theirs per matrix). The choice of pairs is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.checkpoint import Block
from edgekit.errors import UserError
from edgekit.model.heads import PAIRS, Heads, heads_of_block
from edgekit.prune.elimination import regular
from edgekit.step import Inputs
from edgekit.weight import Dense, Floats

Doubles = NDArray[np.float64]
Q, K, V, O = (f"self_attn.{x}_proj" for x in "qkvo")  # noqa: E741
NOTHING = 1e-12  # of the largest eigenvalue: below it a direction is never read


@dataclass(frozen=True)
class Bond:
    """R: (r, d) and L: (d, r) of the module's text, what is lost, and all there was, both squared."""

    right: Doubles
    left: Doubles
    error: float
    power: float


def truncated_bond(outputs: Doubles, C: Doubles, rank: int) -> Bond:
    """outputs: (query heads, out, d) that read one value head, C: (d, d) of its values; `rank` channels, from 1 to d.

    Afterwards sum_h tr(O_h (1 - L R) C (1 - L R)^T O_h^T) = error, to rounding.
    """
    A = np.einsum("hoi,hoj->ij", outputs, outputs)
    root, inverse = _root(A)
    U, values, _ = np.linalg.svd(root @ _root(C)[0])
    basis, triangle = np.linalg.qr((U[:, :rank].T @ root).T)
    squares = np.square(values)
    return Bond(basis.T, inverse @ U[:, :rank] @ triangle.T, float(squares[rank:].sum()), float(squares.sum()))


def _root(M: Doubles) -> tuple[Doubles, Doubles]:
    """The symmetric root of a positive matrix, and its inverse where there is something to invert."""
    values, vectors = np.linalg.eigh((M + M.T) / 2)
    roots = np.sqrt(np.maximum(values, 0.0))
    seen = values > NOTHING * max(float(values[-1]), 0.0)
    inverses = np.divide(1.0, roots, out=np.zeros_like(roots), where=seen)
    return (vectors * roots) @ vectors.T, (vectors * inverses) @ vectors.T


@dataclass(frozen=True)
class BondCut:
    """Squared errors and sizes: of the bonds as foretold, and of o's outputs after the refit."""

    foretold: float
    of_products: float
    error: float
    power: float


def with_fewer_values(
    block: Block, inputs: Inputs, keep: int, head_dim: int, *, damping: float, follow: float
) -> tuple[Block, BondCut]:
    """The layer with `keep` channels in each value head, o refitted on what it then reads; `block` itself stays.

    Raises UserError: fewer calibration tokens than columns to fit; ModelError: activations that are not finite.
    """
    prefix, heads = f"model.{block.name}.", heads_of_block(block, head_dim)
    found = inputs.statistics(block, prefix + O)
    columns = heads.queries * keep
    if found.tokens < columns:
        raise UserError(
            f"a refit of {columns} columns needs as many calibration tokens, better ten times: {prefix}{O} saw"
            f" {found.tokens}; raise the recipe's samples or length"
        )
    W, makes = (block.matrices[prefix + leaf].dense().astype(np.float64) for leaf in (O, V))
    gram = inputs.statistics(block, prefix + V).gram
    group, d = heads.queries // heads.keys, heads.value_size
    outputs = W.reshape(len(W), heads.keys, group, d).transpose(1, 2, 0, 3)  # (KV heads, query heads, out, d)
    values = makes.reshape(heads.keys, d, -1)
    bias = block.vectors.get(prefix + V + ".bias", np.zeros(heads.keys * d)).astype(np.float64).reshape(heads.keys, d)
    read = values @ gram @ values.transpose(0, 2, 1) + found.tokens * bias[:, :, None] * bias[:, None, :]
    bonds = [truncated_bond(outputs[at], read[at], keep) for at in range(heads.keys)]
    T = np.zeros((columns, heads.queries * d))  # what o will read of what it read
    for head in range(heads.queries):
        T[head * keep : (head + 1) * keep, head * d : (head + 1) * d] = bonds[head // group].right
    G = regular(found.gram, damping, where=prefix + O)
    aim = W @ G if not follow or found.aim is None else W @ G + follow * (found.aim - W @ found.gram)
    refit = np.linalg.solve(T @ G @ T.T, T @ aim.T).T
    lost = W - refit @ T
    matrices, vectors = dict(block.matrices), dict(block.vectors)
    matrices[prefix + O] = Dense(np.ascontiguousarray(refit, np.float32))
    made = np.concatenate([bond.right @ part for bond, part in zip(bonds, values, strict=True)])
    matrices[prefix + V] = Dense(np.ascontiguousarray(made, np.float32))
    if prefix + V + ".bias" in vectors:
        parts = [bond.right @ part for bond, part in zip(bonds, bias, strict=True)]
        vectors[prefix + V + ".bias"] = np.concatenate(parts).astype(np.float32)
    cut = BondCut(
        sum(bond.error for bond in bonds),
        sum(bond.power for bond in bonds),
        max(0.0, float(np.vdot(lost @ found.gram, lost))),
        float(np.vdot(W @ found.gram, W)),
    )
    return Block(block.name, matrices, vectors), cut


def with_fewer_pairs(block: Block, inputs: Inputs, keep: int, head_dim: int) -> tuple[Block, float]:
    """The layer with `keep` rotary pairs, and the share of the scores' power that the others had."""
    prefix, heads = f"model.{block.name}.", heads_of_block(block, head_dim)
    gram = inputs.statistics(block, prefix + Q).gram
    tokens = inputs.statistics(block, prefix + Q).tokens
    group, pairs = heads.queries // heads.keys, len(heads.pairs)

    def power(leaf: str, count: int) -> Doubles:
        """Mean squares of each pair of each head, (count, pairs)."""
        W = block.matrices[prefix + leaf].dense().astype(np.float64)
        squares = np.einsum("ij,ij->i", W @ gram, W) / tokens
        if prefix + leaf + ".bias" in block.vectors:
            squares = squares + np.square(block.vectors[prefix + leaf + ".bias"].astype(np.float64))
        split: Doubles = squares.reshape(count, 2, pairs).sum(1)
        return split

    keys = np.repeat(power(K, heads.keys), group, axis=0)
    weights = (power(Q, heads.queries) * keys).sum(0)
    stay = np.sort(np.argsort(-weights, kind="stable")[:keep])
    gone = 1.0 - float(weights[stay].sum() / weights.sum()) if weights.sum() > 0 else 0.0
    return _with_pairs(block, prefix, heads, stay), gone


def _with_pairs(block: Block, prefix: str, heads: Heads, stay: NDArray[np.int64]) -> Block:
    matrices, vectors = dict(block.matrices), dict(block.vectors)
    rows = np.concatenate([stay, stay + len(heads.pairs)])
    scale = np.float32(np.sqrt(len(stay) / len(heads.pairs)))
    for leaf, count in ((Q, heads.queries), (K, heads.keys)):
        at = (np.arange(count)[:, None] * heads.key_size + rows).reshape(-1)
        factor = scale if leaf == Q else np.float32(1)
        kept: Floats = block.matrices[prefix + leaf].dense()[at] * factor
        matrices[prefix + leaf] = Dense(np.ascontiguousarray(kept))
        if prefix + leaf + ".bias" in vectors:
            vectors[prefix + leaf + ".bias"] = vectors[prefix + leaf + ".bias"][at] * factor
    vectors[prefix + PAIRS] = np.array(heads.pairs, np.float32)[stay]
    return Block(block.name, matrices, vectors)
