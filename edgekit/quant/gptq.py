"""GPTQ: round a matrix column by column, and let the columns still to come make up for the error.

For y = W x with W: (out, in) and the Gram matrix H = sum_t x_t x_t^T, the error to make small is

    e(W') = tr((W - W') H (W - W')^T)

With H^-1 = U^T U, U upper triangular, columns are rounded in turn, and column j's error moves into those after it:

    d_j = (w_j - round(w_j)) / U_jj          w_k -= d_j U_jk    for k > j

Done for `batch` columns at a time: inside a batch column by column, then one product for all columns after it. That
changes the order of additions and nothing else; a test holds it equal to the plain loop (the update of a batch must be
bounded to the batch, else errors are corrected twice: facts of many implementations differ here).

Then, since every step is greedy, `descend` goes over the columns again: column j moves to the grid point nearest to

    w'_j + ((W - W') H)_j / H_jj

which never raises e. And `refit` gives the scales and minima that fit the codes best, a least squares problem of each
row in the metric H.

H is damped by a share of its mean diagonal. A column that calibration never saw (H_jj = 0) is rounded to nearest and
takes part in nothing. Scales belong to blocks of neighbouring columns and stay where they are whatever the order of
columns ("static groups").
Sources: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1 (ours factors H itself from its far end, so that nothing is
inverted twice); coordinate descent as in QuantEase, Behdin et al., arXiv 2309.01885.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError
from edgekit.quant.lattice import Lattice, nearest
from edgekit.weight import Bytes, Floats

Doubles = NDArray[np.float64]
Order = Literal["given", "activation"]
BATCH = 64


def damped(gram: Doubles, damping: float, *, where: str) -> Doubles:
    """H + damping * mean(diag H) * 1, with 1 on the diagonal of columns that nothing went through.

    Raises ModelError when H is not finite, or not positive definite even so.
    """
    H = np.array(gram, np.float64)
    if not np.isfinite(H).all():
        raise ModelError(f"the inputs of {where} must be finite on the calibration text: they are not")
    diagonal = H.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    H[dead, :] = H[:, dead] = 0.0
    H[np.diag_indices_from(H)] += np.where(dead, mean, damping * mean)
    return H


def inverse_factor(H: Doubles, *, where: str) -> Doubles:
    """The upper triangular U with U^T U = H^-1, for H: (n, n) symmetric positive definite."""
    try:
        lower = np.linalg.cholesky(H[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise ModelError(
            f"the Gram matrix of {where} must be positive definite: it is not; pass more calibration text or a larger"
            " damping"
        ) from None
    upper = lower[::-1, ::-1]  # H = R R^T with R upper triangular, so H^-1 = (R^-1)^T R^-1
    return _triangular_inverse(np.ascontiguousarray(upper))


def _triangular_inverse(R: Doubles) -> Doubles:
    """R^-1 of an upper triangular R: [A B; 0 C]^-1 = [A^-1, -A^-1 B C^-1; 0, C^-1], so nearly all work is products."""
    size = len(R)
    if size <= BATCH:
        return np.triu(np.linalg.inv(R))
    half = size // 2
    first, last = _triangular_inverse(R[:half, :half]), _triangular_inverse(R[half:, half:])
    whole = np.zeros_like(R)
    whole[:half, :half], whole[half:, half:] = first, last
    whole[:half, half:] = -first @ (R[:half, half:] @ last)
    return whole


@dataclass(frozen=True)
class Metric:
    """H of some inputs, damped, and what is worked out of it once for all matrices that read them."""

    H: Doubles
    order: Order = "given"
    where: str = "matrix"

    @cached_property
    def single(self) -> Floats:
        """H in float32, for the products that move errors on."""
        return self.H.astype(np.float32)

    @cached_property
    def turn(self) -> NDArray[np.int64]:
        """The columns in the order in which gptq takes them."""
        if self.order == "activation":
            return np.argsort(-self.H.diagonal(), kind="stable")
        return np.arange(len(self.H))

    @cached_property
    def factor(self) -> Floats:
        """U of the module's text, for the columns in that order."""
        return inverse_factor(self.H[np.ix_(self.turn, self.turn)], where=self.where).astype(np.float32)


def gptq(W: Floats, metric: Metric, lattice: Lattice, *, batch: int = BATCH) -> Bytes:
    """Codes (out, in) of W: (out, in) on `lattice` in the metric H: (in, in). See the module.

    The order "activation" takes columns of large H_jj first. `batch` changes nothing but the speed. Raises ModelError:
    H is not positive definite.
    """
    columns = W.shape[1]
    turn, U = metric.turn, metric.factor
    rest = np.ascontiguousarray(W.T[turn], dtype=np.float32)  # (in, out): a column of W is a row here
    codes = np.empty(rest.shape, np.uint8)
    points = _Points(lattice)
    for start in range(0, columns, batch):
        end = min(start + batch, columns)
        moves = np.empty((end - start, rest.shape[1]), np.float32)
        for j in range(start, end):
            codes[j], value = points.nearest(rest[j], turn[j])
            move = (rest[j] - value) / U[j, j]
            rest[j + 1 : end] -= U[j, j + 1 : end, None] * move
            moves[j - start] = move
        rest[end:] -= U[start:end, end:].T @ moves
    result = np.empty_like(codes)
    result[turn] = codes
    return np.ascontiguousarray(result.T)


def descend(W: Floats, metric: Metric, lattice: Lattice, codes: Bytes, *, passes: int, batch: int = BATCH) -> Bytes:
    """Codes that cost no more than `codes`: `passes` times over all columns, each to its best grid point."""
    columns = W.shape[1]
    H = metric.single
    points = _Points(lattice)
    values = np.ascontiguousarray(restored(codes, lattice).T)
    found = np.ascontiguousarray(codes.T)
    for _ in range(passes):
        pull = H @ (W.T - values)  # (in, out): H (W - W')^T, kept up to date batch by batch
        for start in range(0, columns, batch):
            end = min(start + batch, columns)
            moves = np.empty((end - start, values.shape[1]), np.float32)
            for j in range(start, end):
                found[j], value = points.nearest(values[j] + pull[j] / H[j, j], j)
                move = value - values[j]
                values[j] = value
                pull[j + 1 : end] -= H[j + 1 : end, j, None] * move
                moves[j - start] = move
            pull[end:] -= H[end:, start:end] @ moves
    return np.ascontiguousarray(found.T)


def refit(W: Floats, metric: Metric, codes: Bytes, lattice: Lattice) -> Lattice:
    """The stored scales, and minima where the grid has them, next to those that fit `codes` best in the metric H.

    Zero points stay. A row that storing would make worse than it was keeps its scales, so e is no larger.
    """
    grid = lattice.grid
    with_minima = grid.offset == "minimum"
    rows, columns = W.shape
    blocks = lattice.scale.shape[1]
    size = grid.block
    pad = ((0, 0), (0, blocks * size - columns))
    H = np.pad(metric.single, (pad[1], pad[1]))
    part = np.zeros((rows, blocks, 2 if with_minima else 1, size), np.float32)  # what each unknown is multiplied by
    part[:, :, 0] = in_blocks_of(codes, lattice) - (0 if with_minima else lattice.zero[:, :, None])
    if with_minima:
        part[:, :, 1] = 1
    flat = np.ascontiguousarray(part.swapaxes(1, 2)).reshape(rows, part.shape[2], -1)
    flat[..., columns:] = 0
    part = flat.reshape(rows, part.shape[2], blocks, size)  # (rows, unknowns, blocks, block)
    count = part.shape[1]
    system = np.empty((rows, blocks, count, blocks, count))
    for at in range(blocks):  # it is symmetric
        reach = part[:, :, at].reshape(-1, size) @ H[at * size : (at + 1) * size, at * size :]
        reach = reach.reshape(rows, count, blocks - at, size)
        system[:, at, :, at:] = found = np.einsum("rcbk,rdbk->rcbd", reach, part[:, :, at:], optimize=True)
        system[:, at:, :, at] = found.transpose(0, 2, 3, 1)
    target = (np.pad(W, pad) @ H).reshape(rows, blocks, size)
    right = np.einsum("rbk,rcbk->rbc", target, part, optimize=True).reshape(rows, -1)
    system = system.reshape(rows, blocks * count, -1)  # type: ignore[assignment]
    ridge = 1e-6 * np.einsum("rii->r", system) / system.shape[1] + 1e-30
    system[:, np.arange(system.shape[1]), np.arange(system.shape[1])] += ridge[:, None]
    held = np.stack([lattice.scale, lattice.minimum], axis=2)[..., :count].reshape(rows, -1)
    found = np.linalg.solve(system, (right + ridge[:, None] * held)[..., None])[..., 0]  # where codes say nothing, stay
    scale, *minimum = np.moveaxis(found.reshape(rows, blocks, count).astype(np.float32), 2, 0)
    new = nearest(
        grid,
        scale,
        zero=lattice.zero if grid.offset == "zero" else None,
        minimum=minimum[0] if minimum else None,
    )
    # A row's e is s^T A s - 2 b^T s and a constant: from s to t it grows by (t - s)^T (A (s + t) - 2 b).
    stored = np.stack([new.scale, new.minimum], axis=2)[..., :count].reshape(rows, -1)
    both = held + stored
    slope = (system @ both[..., None])[..., 0] - ridge[:, None] * both - 2 * right
    return _choose(np.einsum("ri,ri->r", stored - held, slope) > 0, lattice, new)


class _Points:
    """The grid points of one matrix, column by column."""

    def __init__(self, lattice: Lattice) -> None:
        self.block, self.top = lattice.grid.block, np.float32(lattice.grid.top)
        self.scale = np.ascontiguousarray(lattice.scale.T)
        self.offset = np.ascontiguousarray((lattice.minimum - lattice.scale * lattice.zero).T)
        self.divisor = np.where(self.scale == 0, np.float32(np.inf), self.scale)
        self.zero = np.ascontiguousarray(lattice.zero.T)

    def nearest(self, wanted: Floats, column: int) -> tuple[Floats, Floats]:
        """Codes and values nearest to a column, both (out,) float32."""
        at = column // self.block
        scale, offset = self.scale[at], self.offset[at]
        q = (wanted - offset) / self.divisor[at]
        np.rint(q, out=q)
        np.clip(q, 0, self.top, out=q)
        return q, scale * q + offset


def in_blocks_of(codes: Bytes, lattice: Lattice) -> Bytes:
    """Codes (out, in) as (out, blocks, block), padded with codes that stand for zero."""
    rows, columns = codes.shape
    blocks, size = lattice.scale.shape[1], lattice.grid.block
    padded = np.repeat(lattice.zero.astype(np.uint8)[:, -1:], blocks * size, axis=1)
    padded[:, :columns] = codes
    return padded.reshape(rows, blocks, size)


def restored(codes: Bytes, lattice: Lattice) -> Floats:
    """The weights that codes (out, in) stand for, (out, in) float32."""
    rows, columns = codes.shape
    return lattice.values(in_blocks_of(codes, lattice)).reshape(rows, -1)[:, :columns]


def output_error(W: Floats, rounded: Floats, H: Doubles) -> float:
    """e(rounded) = tr((W - W') H (W - W')^T)."""
    return float(_row_errors(W, rounded, H).sum())


def output_power(W: Floats, H: Doubles) -> float:
    """tr(W H W^T), what an error is held against; in float32, as nothing cancels."""
    return float(np.einsum("ij,ij->", W @ H.astype(np.float32), W))


def _row_errors(W: Floats, rounded: Floats, H: Doubles) -> Doubles:
    """In float64: what is left after compensation is small beside the terms that cancel."""
    difference = (W - rounded).astype(np.float64)
    errors: Doubles = np.einsum("ij,ij->i", difference @ H, difference)
    return errors


def _choose(first: NDArray[np.bool_], one: Lattice, other: Lattice) -> Lattice:
    """Rows of `one` where `first`, else of `other`."""

    def pick(a: NDArray[Any] | None, b: NDArray[Any] | None) -> Any:
        return None if a is None or b is None else np.where(first[:, None], a, b)

    return Lattice(
        one.grid,
        pick(one.scales, other.scales),
        zeros=pick(one.zeros, other.zeros),
        minima=pick(one.minima, other.minima),
        steps=pick(one.steps, other.steps),
    )
