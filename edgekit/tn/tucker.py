"""Tucker: a tensor as a small core times a matrix along each mode, by HOSVD; of convolution kernels and stacked heads.

    T ~ C x_1 U_1 x_2 U_2 ... ,    U_k: (n_k, r_k) with orthonormal columns, C = T x_1 U_1^T x_2 U_2^T ...

U_k are the leading left singular vectors of T's unfolding along mode k (HOSVD); with `passes` each is then taken anew
for the tensor projected by all others (HOOI), which never raises the error. For HOSVD

    |T - T'|^2 <= sum_k tail_k^2,      tail_k of the unfolding along mode k; with one mode cut, equality

A convolution's kernel (out, in, h, w) is cut along its first two modes: a 1 x 1 convolution to fewer channels, the
small kernel, and a 1 x 1 convolution back (`edgekit.export.convolution`).

The rows of q, k and v are heads: W is a tensor (heads, head_dim, in). In the metric of what it reads
(`edgekit.tn.whitening`) its last mode is cut to c directions, W ~ L R, and then heads to a mixtures of heads:

    W[h d, :] ~ sum_a U[h, a] sum_c L[a d, c] R[c, :]          squared error of the outputs <= tail_c^2 + tail_a^2

stored as a chain of three sites (heads, 1), (head_dim, 1), (1, in), so it runs and is rounded as any MPO. Cutting
head_dim too would save nothing there: its matrix is absorbed by L.
Sources: De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. 21(4), 2000; for convolutions Kim et al., arXiv
1511.06530. tensorly's `tucker` and `partial_tucker` give the same; a test holds us to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.errors import ModelError, UserError
from edgekit.tn.whitening import Doubles, spectrum
from edgekit.weight import Dense, Factored, Floats


@dataclass(frozen=True)
class Tucker:
    """core: (r_1, ..., r_N); factors[k]: (n_k, r_k), for the first `len(factors)` modes; the others are whole."""

    core: Doubles
    factors: tuple[Doubles, ...]

    def dense(self) -> Doubles:
        found = self.core
        for mode, U in enumerate(self.factors):
            found = _along(found, U, mode)
        return found


def tucker(T: Floats | Doubles, ranks: Sequence[int], *, passes: int = 2, where: str = "tensor") -> Tucker:
    """T cut along its first `len(ranks)` modes. Raises UserError: a rank is not from 1 to its dimension; ModelError:
    numbers that are not finite."""
    if len(ranks) > T.ndim or any(not 1 <= r <= n for r, n in zip(ranks, T.shape, strict=False)):
        raise UserError(f"ranks must be from 1 to the dimensions: {where} is {T.shape}, its ranks {tuple(ranks)}")
    exact = T.astype(np.float64)
    if not np.isfinite(exact).all():
        raise ModelError(f"the weights of {where} must be finite: they are not")
    factors = [_leading(exact, mode)[0][:, :rank] for mode, rank in enumerate(ranks)]
    for _ in range(passes if len(ranks) > 1 else 0):
        for mode, rank in enumerate(ranks):
            factors[mode] = _leading(_projected(exact, factors, but=mode), mode)[0][:, :rank]
    return Tucker(_projected(exact, factors), tuple(factors))


def spectra(T: Floats | Doubles, modes: int) -> list[Doubles]:
    """The singular values of the unfoldings along the first `modes` modes, descending."""
    return [_leading(T.astype(np.float64), mode)[1] for mode in range(modes)]


def ranks_for_error(T: Floats | Doubles, modes: int, error: float) -> tuple[int, ...]:
    """Ranks of an HOSVD with |T - T'| <= error |T|: each mode may lose an equal part of the squared error."""
    allowed = (error * float(np.linalg.norm(T))) ** 2 / modes
    return tuple(_rank(values, allowed) for values in spectra(T, modes))


def stacked_heads(W: Floats, gram: Doubles | None, heads: int, share: float, *, where: str) -> Factored | None:
    """W: (heads * head_dim, in), in the metric `gram` (in, in), as the chain of the module of at most `share` of its
    numbers, with the mixtures and directions of the least bound; None where no chain is so small.

    Raises UserError: rows are no multiple of heads.
    """
    rows, columns = W.shape
    if heads < 1 or rows % heads:
        raise UserError(f"rows must be whole heads: {where} has {rows} for {heads}")
    width = rows // heads
    seen = spectrum(W, gram, where=where)
    best, choice = np.inf, (0, 0)
    for mixtures in range(1, heads + 1):
        most = int((share * W.size - heads * mixtures) // (mixtures * width + columns))
        directions = min(most, mixtures * width, len(seen.values))
        if directions < 1:
            continue
        outputs = (seen.left[:, :directions] * seen.values[:directions]).reshape(heads, width, directions)
        values = _leading(outputs, 0)[1]
        bound = seen.tail(directions) ** 2 + float(np.square(values[mixtures:]).sum())
        if bound < best - 1e-12 * seen.norm**2:  # of equals the fewest mixtures
            best, choice = bound, (mixtures, directions)
    if not np.isfinite(best):
        return None
    mixtures, directions = choice
    left = seen.left[:, :directions]
    U = _leading((left * seen.values[:directions]).reshape(heads, width, directions), 0)[0][:, :mixtures]
    L = np.tensordot(U.T, left.reshape(heads, width, directions), 1)  # (mixtures, head_dim, directions)
    factors = (U, L.reshape(mixtures * width, directions), left.T @ W.astype(np.float64))
    return Factored(
        tuple(Dense(np.ascontiguousarray(part, np.float32)) for part in factors),
        ((heads, 1), (width, 1), (1, columns)),
    )


def _leading(T: Doubles, mode: int) -> tuple[Doubles, Doubles]:
    """Left singular vectors and singular values of the unfolding along a mode."""
    flat = np.moveaxis(T, mode, 0).reshape(T.shape[mode], -1)
    left, values, _ = np.linalg.svd(flat, full_matrices=len(flat) > flat.shape[1])
    return left, np.pad(values, (0, len(flat) - len(values)))


def _along(T: Doubles, M: Doubles, mode: int) -> Doubles:
    """T x_mode M, M: (new, old)."""
    return np.moveaxis(np.tensordot(M, T, (1, mode)), 0, mode)


def _projected(T: Doubles, factors: Sequence[Doubles], *, but: int = -1) -> Doubles:
    for mode, U in enumerate(factors):
        if mode != but:
            T = _along(T, U.T, mode)
    return T


def _rank(values: Doubles, allowed: float) -> int:
    tails = np.append(np.cumsum(np.square(values)[::-1])[::-1], 0.0)
    return max(1, int(np.argmax(tails <= allowed + 1e-300)))
