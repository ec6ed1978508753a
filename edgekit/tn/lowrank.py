"""Low rank: a matrix as the product of two thin ones, W ~ A B with A: (out, r) and B: (r, in).

It stores and multiplies r (out + in) numbers instead of out * in, so it saves both below r = out in / (out + in).
Truncated in the metric of what the matrix reads (`edgekit.tn.whitening`), the error is known before it is made:

    sum_t |(W - A B) x_t|^2 = sum_{k > r} s_k^2      exactly, s_k the singular values of W S,

and no matrix of rank r is better (Eckart and Young).

Plainly truncated, without the metric, |W - A B|_F^2 is the tail instead; on what a language model reads it is useless.

Neighbouring matrices that read alike can share B: stacked along their outputs they are one matrix, truncated in the sum
of their metrics. Source: Basis Sharing, Wang et al., arXiv 2410.03765; theirs is a Cholesky root, ours needs none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekit.errors import UserError
from edgekit.tn.whitening import Doubles, Spectrum, Whitening, cholesky, spectrum
from edgekit.weight import Dense, Factored, Floats


def truncated(
    W: Floats,
    gram: Doubles | None,
    rank: int,
    *,
    where: str,
    method: Whitening = "swift",
    found: Spectrum | None = None,
) -> Factored:
    """W: (out, in) as A B of this rank, best in the metric `gram` (in, in), or plainly when that is None.

    `found` is the spectrum of the two where it is known. Raises UserError: the rank is not from 1 to the smaller
    dimension; ModelError: numbers that are not finite.
    """
    check_rank(rank, W.shape, where=where)
    if method == "cholesky" and gram is not None:
        S = cholesky(gram).values
        left, values, right = np.linalg.svd(W.astype(np.float64) @ S, full_matrices=False)
        root = np.sqrt(values[:rank])
        return product(left[:, :rank] * root, np.linalg.solve(S.T, (root[:, None] * right[:rank]).T).T)
    basis = (found or spectrum(W, gram, where=where)).left[:, :rank]
    return product(basis, basis.T @ W.astype(np.float64))


def shared_basis(
    weights: Sequence[Floats], grams: Sequence[Doubles], rank: int, *, where: str
) -> tuple[list[Factored], list[float]]:
    """Matrices (out_k, in) over inputs of the Gram matrices (in, in), as A_k B with one B: and the error of each.

    The errors are sum_t |(W_k - A_k B) x_t|^2 with the inputs of matrix k itself. In the sum of the metrics, all of
    them together are the tail of the stacked matrix. Raises UserError: widths differ, or the rank is out of range.
    """
    if len({W.shape[1] for W in weights}) != 1:
        raise UserError(
            f"matrices that share a basis must read the same width: {where} have {[W.shape for W in weights]}"
        )
    stacked = np.concatenate(weights)
    whole = truncated(stacked, np.sum(grams, axis=0), rank, where=where)
    A, B = (factor.dense() for factor in whole.factors)
    ends = np.cumsum([len(W) for W in weights])
    parts = [product(A[end - len(W) : end], B) for W, end in zip(weights, ends, strict=True)]
    errors = []
    for W, gram, part in zip(weights, grams, parts, strict=True):
        difference = part.dense().astype(np.float64) - W
        errors.append(float(np.vdot(difference, difference @ gram)))
    return parts, errors


def product(A: Doubles | Floats, B: Doubles | Floats) -> Factored:
    """A B with A: (out, r) and B: (r, in), as it is stored."""
    factors = (Dense(np.ascontiguousarray(A, np.float32)), Dense(np.ascontiguousarray(B, np.float32)))
    return Factored(factors, ((A.shape[0], 1), (1, B.shape[1])))


# --- ranks ------------------------------------------------------------------------------------------------------------


def check_rank(rank: int, shape: tuple[int, ...], *, where: str) -> None:
    """Raises UserError when the rank is not from 1 to the smaller dimension."""
    if not 1 <= rank <= min(shape):
        raise UserError(f"a rank must be from 1 to the smaller dimension: {where} is {shape}, the rank {rank}")


def even_rank(shape: tuple[int, int]) -> int:
    """The largest rank at which two factors are smaller than the matrix."""
    rows, columns = shape
    return (rows * columns - 1) // (rows + columns)


def rank_for_share(shape: tuple[int, int], share: float, *, multiple: int = 1) -> int:
    """The rank whose factors hold at most `share` of the numbers, in whole multiples; 0 where none does."""
    rows, columns = shape
    return int(share * rows * columns / (rows + columns)) // multiple * multiple


def rank_for_bytes(shape: tuple[int, int], size_bytes: float, *, bits: float, multiple: int = 1) -> int:
    """The rank whose factors take at most so many bytes at `bits` bits a number, in whole multiples; 0 for none."""
    return int(8 * size_bytes / (bits * sum(shape))) // multiple * multiple


def rank_for_error(found: Spectrum, error: float, *, multiple: int = 1) -> int:
    """The smallest rank, in whole multiples, whose relative output error is at most `error`; all of it if need be."""
    squares = np.square(found.values)
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    rank = int(np.argmax(tails <= (error * found.norm) ** 2 + 1e-300))
    return min(len(found.values), max(1, -(-rank // multiple) * multiple))
