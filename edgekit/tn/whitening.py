"""The metric of what a matrix reads, and singular values in it.

For y = W x with W: (out, in) and inputs x_t, the error of a replacement W' on all of them is

    sum_t |(W - W') x_t|^2 = tr((W - W') G (W - W')^T) = |(W - W') S|_F^2,      G = sum_t x_t x_t^T = S S^T

So the best W' of rank r is found by truncating the singular value decomposition of W S, whose discarded singular values
are the error, exactly. What remains is to come back from W S to W:

    cholesky   S lower triangular, W' = U_r s_r V_r^T S^-1. Where G is singular, 1e-6 of its mean diagonal is added,
               less its smallest eigenvalue where that is negative. Source: SVD-LLM, Wang et al., arXiv 2403.07378
    swift      no inverse: W' = U_r U_r^T W. Rank-deficient G is fine, and all ranks come from one decomposition.
               Source: Swift-SVD (as described; its code was not read)

Both are optimal where G is invertible, and give the same W'. swift is the default. U are eigenvectors of W G W^T, or,
where that is the smaller problem, U = M V / s with M = W Q L^(1/2), G = Q L Q^T, and V, s^2 of M^T M. Everything is
float64. Eigenvalues come from squared numbers: singular values below about 1e-8 of the largest are noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError
from edgekit.weight import Floats

Doubles = NDArray[np.float64]
Whitening = Literal["swift", "cholesky"]
JITTER = 1e-6  # of the mean diagonal, where a Gram matrix cannot be factored
NOTHING = 1e-12  # of the largest eigenvalue: below it a direction was never read


class StreamedGram:
    """G = sum_t x_t x_t^T of rows that come a few at a time, and how many came."""

    def __init__(self, width: int) -> None:
        self.gram: Doubles = np.zeros((width, width))
        self.tokens = 0

    def add(self, rows: Floats | Doubles) -> None:
        """rows: (tokens, width)."""
        exact = rows.astype(np.float64)
        self.gram += exact.T @ exact
        self.tokens += len(rows)


@dataclass(frozen=True)
class Root:
    """S: (in, in) lower triangular with S S^T = G + shift * 1; shift is 0 but for a G that is not positive definite."""

    values: Doubles
    shift: float


@dataclass(frozen=True)
class Spectrum:
    """The singular values of W S, descending, and the left singular vectors: (out, k), k = min(out, in)."""

    left: Doubles
    values: Doubles

    def tail(self, rank: int) -> float:
        """The error of the best matrix of this rank: sqrt(sum of squared values beyond it)."""
        return float(np.sqrt(np.square(self.values[rank:]).sum()))

    @property
    def norm(self) -> float:
        """|W S|_F, the size of all outputs."""
        return self.tail(0)


def checked(gram: Doubles, width: int, *, where: str) -> Doubles:
    """`gram` (width, width) as a metric, made symmetric to the last bit: sums in float32 are not quite.

    Raises ModelError: another shape, not finite, or far from symmetric.
    """
    if gram.shape != (width, width):
        raise ModelError(f"the metric of {where} must be ({width}, {width}): got {gram.shape}")
    if not np.isfinite(gram).all():
        raise ModelError(f"the inputs of {where} must be finite on the calibration text: they are not")
    if not np.allclose(gram, gram.T, rtol=0, atol=1e-4 * float(np.abs(gram).max(initial=0))):
        raise ModelError(f"the metric of {where} must be symmetric: it is not")
    return (gram + gram.T) / 2


def cholesky(gram: Doubles) -> Root:
    """The root of a Gram matrix: see the module for what happens to one that is singular."""
    try:
        return Root(np.linalg.cholesky(gram).astype(np.float64), 0.0)
    except np.linalg.LinAlgError:
        pass
    scale = float(gram.trace()) / len(gram) or 1.0
    shift = JITTER * scale + max(0.0, -float(np.linalg.eigvalsh(gram)[0]))
    return Root(np.linalg.cholesky(gram + shift * np.eye(len(gram))).astype(np.float64), shift)


def spectrum(W: Floats | Doubles, gram: Doubles | None, *, where: str) -> Spectrum:
    """The spectrum of W: (out, in) in the metric `gram` (in, in), plain without one. Raises ModelError: `checked`."""
    exact = W.astype(np.float64)
    if not np.isfinite(exact).all():
        raise ModelError(f"the weights of {where} must be finite: they are not")
    if gram is None:
        left, values, _ = np.linalg.svd(exact, full_matrices=False)
        return Spectrum(left, values)
    gram = checked(gram, W.shape[1], where=where)
    rows, columns = W.shape
    if rows <= columns:
        squares, left = np.linalg.eigh(exact @ gram @ exact.T)
        return Spectrum(left[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0.0)))
    power, directions = np.linalg.eigh(gram)
    M = exact @ (directions * np.sqrt(np.maximum(power, 0.0)))
    squares, right = np.linalg.eigh(M.T @ M)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    left = M @ right[:, ::-1]
    seen = values > np.sqrt(NOTHING) * values[:1]
    left[:, seen] /= values[seen]
    left, triangle = np.linalg.qr(np.where(seen, left, exact @ directions[:, ::-1]))  # what was never read comes last
    return Spectrum(left * np.where(triangle.diagonal() < 0, -1.0, 1.0), values)


def relative_error(W: Floats, other: Floats, gram: Doubles | None) -> tuple[float, float]:
    """(squared error, squared size) of the outputs when `other` takes the place of W; both (out, in)."""
    difference, exact = other.astype(np.float64) - W, W.astype(np.float64)

    def size(M: Doubles) -> float:
        return float(np.vdot(M, M if gram is None else M @ gram))

    return size(difference), size(exact)
