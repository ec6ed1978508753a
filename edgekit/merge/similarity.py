"""How alike layers are: MKA's measure on a diffusion map, and the plain ones beside it.

For one layer, rows H_i (samples, hidden) of pooled states become

    K_ij = exp(-sqrt(|H_i - H_j| / 8))                     the kernel, with the released code's bandwidth
    K' = K / (p p^T)^1/2,   p = K 1                        alpha = 1/2 takes out half of the sampling density
    A = K' / (v v^T),       v = (K' 1)^1/2
    Phi = (u_1 / u_0, u_2 / u_0)                           u_0, u_1 ... left singular vectors of A
    ranks of each column of Phi, in [0, 1)

and two layers have the similarity NPIB = I(Phi_l; Phi_m) / sqrt(|H(Phi_l) H(Phi_m)|), I and H by nearest neighbours:

    I    mean over pairs of columns of  psi(n) + psi(k) - mean(psi(n_x + 1) + psi(n_y + 1))      (Kraskov, k = 5)
    H    -mean log(k / (n rho_k^d)),  rho_k the distance to the k-th neighbour, k = min(50, n - 1)

H so defined has no constant of the unit ball: it is a relative value that may be negative; its size normalises.
Sources: Liu et al., MKA, arXiv 2406.16330, section 3, with the constants of its released code; diffusion maps: Coifman
and Lafon, 2006; I: Kraskov et al., arXiv cond-mat/0305641. We pool each window to its mean state, where the released
code compares token positions of one prompt. Controls: cosine, and exp(-distance / mean distance) of the Euclidean and
Mahalanobis distances between the layers' states of the same sample.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UserError

Doubles = NDArray[np.float64]
Measure = Literal["npib", "cosine", "euclidean", "mahalanobis"]
MEASURES = get_args(Measure)
SIGMA = 8.0
NEIGHBOURS, FAR = 5, 50
FEWEST = 8  # samples


def similarities(states: list[Doubles], measure: Measure = "npib") -> Doubles:
    """(layers, layers), symmetric, from each layer's pooled states (samples, hidden).

    Raises UserError: another measure, or fewer than `FEWEST` samples.
    """
    if measure not in MEASURES:
        raise UserError(f"measure must be one of {', '.join(MEASURES)}: got {measure!r}")
    if min(len(rows) for rows in states) < FEWEST:
        raise UserError(f"layers are compared on {FEWEST} or more windows: got {min(map(len, states))}; raise samples")
    count = len(states)
    found = np.eye(count)
    maps = [ranks(diffusion_map(rows)) for rows in states] if measure == "npib" else []
    metric = _precision(np.concatenate(states)) if measure == "mahalanobis" else np.eye(states[0].shape[1])
    distances = np.zeros((count, count))
    for i in range(count):
        for j in range(i + 1, count):
            if measure == "npib":
                found[i, j] = npib(maps[i], maps[j])
            elif measure == "cosine":
                norms = np.linalg.norm(states[i], axis=1) * np.linalg.norm(states[j], axis=1)
                found[i, j] = float(np.mean((states[i] * states[j]).sum(1) / np.maximum(norms, 1e-300)))
            else:
                gap = states[i] - states[j]
                distances[i, j] = float(np.sqrt(np.maximum(np.einsum("ni,ni->n", gap @ metric, gap), 0)).mean())
            found[j, i] = found[i, j]
    if measure in ("euclidean", "mahalanobis"):
        distances += distances.T
        scale = distances[np.triu_indices(count, 1)].mean() if count > 1 else 1.0
        found = np.exp(-distances / (scale or 1.0))
    return found


def kernel(rows: Doubles) -> Doubles:
    """A of the module's text, (samples, samples)."""
    distance = np.array([np.linalg.norm(rows - row, axis=1) for row in rows])
    K = np.exp(-np.sqrt(distance / SIGMA))
    p = K.sum(0)
    K = K / np.sqrt(np.outer(p, p))
    v = np.sqrt(K.sum(0))
    return np.asarray(K / np.outer(v, v), np.float64)


def diffusion_map(rows: Doubles, dimensions: int = 2) -> Doubles:
    """Phi: (samples, dimensions). Signs of its columns are those that make their largest entry positive."""
    left = np.linalg.svd(kernel(rows))[0]
    Phi = left[:, 1 : dimensions + 1] / left[:, :1]
    largest = Phi[np.abs(Phi).argmax(0), np.arange(dimensions)]
    return np.asarray(Phi * np.where(largest < 0, -1.0, 1.0), np.float64)


def ranks(values: Doubles) -> Doubles:
    """Each column's ranks over n, in [0, 1)."""
    order = values.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
    return np.asarray(order / len(values), np.float64)


def mutual_information(x: Doubles, y: Doubles, k: int = NEIGHBOURS) -> float:
    """I(x; y) in nats of two samples (n,), by Kraskov's first estimator; not below 0."""
    n = len(x)
    dx, dy = (np.abs(values[:, None] - values) for values in (x, y))
    both = np.maximum(dx, dy)
    radius = np.nextafter(np.sort(both, axis=1)[:, k], 0)  # the point itself stands first
    nx, ny = ((d <= radius[:, None]).sum(1) for d in (dx, dy))  # with itself: n_x + 1
    counts = np.array([_digamma(index + 1) for index in range(n)])
    return max(0.0, _digamma(n) + _digamma(k) - float((counts[nx - 1] + counts[ny - 1]).mean()))


def entropy(values: Doubles) -> float:
    """H of (n, d), see the module; points that coincide count as a distance of 1e-12."""
    n, d = values.shape
    k = min(FAR, n - 1)
    distance = np.sqrt(np.square(values[:, None] - values).sum(-1))
    rho = np.maximum(np.sort(distance, axis=1)[:, k], 1e-12)
    return float(-np.log(k / (n * rho**d)).mean())


def npib(one: Doubles, other: Doubles) -> float:
    """I / sqrt(|H H|) of two maps (n, d); 0 where an entropy is 0."""
    pairs = [mutual_information(a, b) for a in one.T for b in other.T]
    scale = float(np.sqrt(abs(entropy(one) * entropy(other))))
    return float(np.mean(pairs) / scale) if scale > 0 else 0.0


def _precision(rows: Doubles) -> Doubles:
    covariance = np.cov(rows, rowvar=False)
    ridge = 1e-3 * np.trace(covariance) / len(covariance) + 1e-30
    return np.asarray(np.linalg.inv(covariance + ridge * np.eye(len(covariance))), np.float64)


def _digamma(n: float) -> float:
    """psi(n) of a positive integer: H_(n-1) - gamma, by its asymptotic series from 6 on."""
    value, x = 0.0, float(n)
    while x < 10:
        value, x = value - 1 / x, x + 1
    square = 1 / (x * x)
    return (
        value + float(np.log(x)) - 0.5 / x - square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
    )
