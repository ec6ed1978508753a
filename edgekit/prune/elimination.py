"""Which columns of a matrix can go when the others may make up for them: order, error of every size, and the refit.

For y = W x, W: (out, n), with the Gram matrix G = sum_t x_t x_t^T, keep the columns S and choose new ones, V: (out, S)

    e(S) = min_V tr((W - V P_S) G (W - V P_S)^T),      V = W G_:S (G_SS)^-1                    (the refit)

Every dropped column is so replaced by its best linear combination of those that stay: V = W_S + W_D T with
T = G_DS (G_SS)^-1, an interpolative decomposition of the activations, since x_D ~ T x_S. Two ways to find S:

    interpolative   pivoted Cholesky of G: the next column kept is the one that those kept so far explain least
                    (column-pivoted QR of the activations themselves, without forming them)
    elimination     backwards: drop what costs least,  e(D + j) - e(D) = |v_j|^2 / (H_jj),  H = (G_SS)^-1, and update V
                    and H; `batch` columns at once, each chosen as if those before were gone, from a pool of the
                    cheapest; their joint cost  tr(V_B (H_BB)^-1 V_B^T)  is exact too

The first does not look at W and spreads over the activations' whole space; the second sees what the outputs lose.
After either, `errors[k]` is e for k columns kept, exactly (in exact arithmetic, and for the damped G).
Sources: interpolative decomposition: Cheng et al., SIAM J. Sci. Comput. 26(4), 2005, for pruning Chee et al., arXiv
2108.00065; backward elimination is Hassibi and Stork's optimal brain surgeon, for columns as in ZipLM, Kurtic et al.,
arXiv 2302.04089. We drop in batches and restate the error exactly for each.
Not supported: columns that must go together but lie in different matrices are given as `groups` of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ModelError, UserError

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]
Choice = Literal["elimination", "interpolative"]
CHOICES = get_args(Choice)


@dataclass(frozen=True)
class Ranking:
    """Groups of columns by when they go: `order[0]` first. `errors` maps the number of groups kept to e; `total` is
    tr(W G W^T), what dropping everything costs."""

    order: Indices
    errors: dict[int, float]
    total: float

    def kept(self, count: int) -> Indices:
        """The `count` groups that stay, sorted."""
        return np.sort(self.order[len(self.order) - count :])


def regular(G: Doubles, damping: float, *, where: str) -> Doubles:
    """G + damping * mean(diag G), and 1 on the diagonal where nothing went through: positive definite for damping > 0.

    Raises ModelError when G is not finite.
    """
    if not np.isfinite(G).all():
        raise ModelError(f"the inputs of {where} must be finite on the calibration text: they are not")
    diagonal = np.maximum(G.diagonal(), 0.0)
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if alive.any() else 1.0
    H = np.array(G, np.float64)
    H[np.diag_indices_from(H)] = diagonal + np.where(alive, damping * mean, mean)
    return H


def rank_columns(
    W: Doubles, G: Doubles, *, group: int = 1, least: int = 1, batch: int = 8, choice: Choice = "elimination"
) -> Ranking:
    """Rank the columns of W: (out, n) in groups of `group` neighbours, in the metric G: (n, n), positive definite.

    `least` groups are never ranked apart: elimination stops there. Raises UserError: n is no multiple of `group`, or
    fewer groups than `least`; ModelError: G is not positive definite.
    """
    n = W.shape[1]
    if n % group or not 1 <= least <= n // group:
        raise UserError(f"{n} columns must make groups of {group}, at least {least} of them")
    if choice == "interpolative":
        return _pivoted(W, G, group)
    return _eliminated(W, G, group, least, batch)


def refit(W: Doubles, G: Doubles, kept: Indices, cross: Doubles | None = None) -> Doubles:
    """V: (out, S), the least squares columns `kept` for the outputs y_t = W x_t, in the metric G (positive definite).

    `cross` (out, n), when given, is sum_t y_t x_t^T of the outputs wished for; without it W G.
    Raises ModelError: G_SS is not positive definite.
    """
    wanted = (W @ G[:, kept]) if cross is None else cross[:, kept]
    factor = _factor(G[np.ix_(kept, kept)])
    solved = np.linalg.solve(factor, wanted.T)
    result: Doubles = np.linalg.solve(factor.T, solved).T
    return result


def error_of(W: Doubles, G: Doubles, kept: Indices, V: Doubles) -> float:
    """tr((W - V P_S) G (W - V P_S)^T): the output error that V: (out, S) really has."""
    E = np.array(W, np.float64)
    E[:, kept] -= V
    return max(0.0, float(np.einsum("ij,ij->", E @ G, E)))


def _factor(G: Doubles) -> Doubles:
    try:
        return np.asarray(np.linalg.cholesky(G), np.float64)
    except np.linalg.LinAlgError:
        raise ModelError(
            "the Gram matrix must be positive definite: it is not; pass more calibration text or a larger damping"
        ) from None


def _inverse(G: Doubles) -> Doubles:
    lower = np.linalg.inv(_factor(G))
    found: Doubles = lower.T @ lower
    return found


def _eliminated(W: Doubles, G: Doubles, group: int, least: int, batch: int) -> Ranking:
    """Groups that are gone stay in V and H as zeros until they are an eighth: to copy H is dearer than to change it."""
    count = W.shape[1] // group
    V, H = np.array(W, np.float64), _inverse(G)
    room = np.empty_like(H)
    left, alive = np.arange(count), np.ones(count, bool)  # the groups of V and H, and whether they are still there
    total = float(np.einsum("ij,ij->", W @ G, W))
    error, errors, order = 0.0, {count: 0.0}, list[int]()
    for _ in range(count):
        here = int(alive.sum())
        if here <= least:
            break
        turn = _cheapest(V, H, group, min(batch, here - least), alive)
        columns = _columns(np.sort(turn), group)
        part = _inverse(H[np.ix_(columns, columns)])
        error += float(np.einsum("ij,ij->", V[:, columns] @ part, V[:, columns]))
        move = part @ H[columns]
        V -= V[:, columns] @ move
        H -= np.matmul(H[:, columns], move, out=room)
        order += left[turn].tolist()
        alive[turn] = False
        errors[here - len(turn)] = error
        if 8 * (here - len(turn)) < 7 * len(alive):
            stay = _columns(np.flatnonzero(alive), group)
            V, H = V[:, stay], H[np.ix_(stay, stay)]
            left, alive = left[alive], alive[alive]
            room = np.empty_like(H)
    last = np.argsort(_costs(V, H, group, alive), kind="stable")[: int(alive.sum())]
    return Ranking(np.array([*order, *left[last].tolist()], np.int64), errors, total)


def _cheapest(V: Doubles, H: Doubles, group: int, count: int, alive: Mask) -> Indices:
    """The `count` groups that cost least one after the other, among a few times as many that cost least alone."""
    pool = np.argsort(_costs(V, H, group, alive), kind="stable")[: min(4 * count, int(alive.sum()))]
    if count == 1:
        return pool[:1]
    columns = _columns(pool, group)
    v, h = V[:, columns], H[np.ix_(columns, columns)]
    free = np.ones(len(pool), bool)
    chosen = list[int]()
    for _ in range(count):
        best = int(np.argmin(_costs(v, h, group, free)))
        at = np.arange(best * group, (best + 1) * group)
        move = _inverse(h[np.ix_(at, at)]) @ h[at]
        v, h = v - v[:, at] @ move, h - h[:, at] @ move
        free[best] = False
        chosen.append(best)
    return np.asarray(pool[np.array(chosen)], np.int64)


def _costs(V: Doubles, H: Doubles, group: int, alive: Mask) -> Doubles:
    """What dropping each group alone would cost; inf for those that are gone."""
    costs = np.full(len(alive), np.inf)
    if group == 1:
        costs[alive] = np.einsum("ij,ij->j", V, V)[alive] / H.diagonal()[alive]
        return costs
    for index in np.flatnonzero(alive):
        at = np.arange(index * group, (index + 1) * group)
        costs[index] = np.einsum("ij,ij->", V[:, at] @ np.linalg.inv(H[np.ix_(at, at)]), V[:, at])
    return costs


def _pivoted(W: Doubles, G: Doubles, group: int) -> Ranking:
    """Block-pivoted Cholesky: the trace of a group's Schur complement says how little it is explained."""
    count = W.shape[1] // group
    rest = np.array(G, np.float64)
    gain = W @ rest  # (out, n): what the outputs still hold of each column
    error = total = float(np.einsum("ij,ij->", gain, W))
    chosen, errors = list[int](), {0: total}
    free = np.ones(count, bool)
    for done in range(1, count + 1):
        traces = np.where(free, rest.diagonal().reshape(count, group).sum(1), -np.inf)
        best = int(np.argmax(traces))
        at = np.arange(best * group, (best + 1) * group)
        inverse = _inverse(rest[np.ix_(at, at)])
        error -= float(np.einsum("ij,ij->", gain[:, at] @ inverse, gain[:, at]))
        column = rest[:, at].copy()
        gain -= gain[:, at] @ (inverse @ column.T)
        rest -= column @ (inverse @ column.T)
        chosen.append(best)
        free[best] = False
        errors[done] = max(0.0, error)
    errors[count] = 0.0
    return Ranking(np.array(chosen[::-1], np.int64), errors, total)


def _columns(groups: Indices, group: int) -> Indices:
    found: Indices = (groups[:, None] * group + np.arange(group)).reshape(-1)
    return found
