"""A small logistic model: fitted by Newton's method, calibrated on answers that it did not see.

For standardised features x and labels y (1 is wrong), with s(t) = 1 / (1 + exp(-t)), the weights minimise

    sum_i -log p(y_i | x_i) + lambda/2 |w|^2,    p(1 | x) = s(w.x + b)

by Newton steps (iteratively reweighted least squares; Hastie, Tibshirani, Friedman 2009, section 4.4.1), the intercept
without penalty. Calibration is Platt's (1999), the scores coming from models that were fitted without the fold that
they score: p = s(a t + c) for t = w.x + b.

Different from scikit-learn's LogisticRegression: no other solvers, penalties or classes; same weights for C = 1/lambda.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UserError

Array = NDArray[np.float64]
FOLDS = 5
STEPS = 100


@dataclass(frozen=True)
class Logistic:
    """A fitted model. `mean`, `spread` and `weights` have a number for each of the named features."""

    features: tuple[str, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        sizes = {len(self.features), len(self.mean), len(self.spread), len(self.weights)}
        numbers = [*self.mean, *self.spread, *self.weights, self.intercept, self.scale, self.shift]
        if len(sizes) != 1 or not np.isfinite(numbers).all() or min(self.spread, default=1) <= 0:
            raise UserError(
                f"a model must have a finite mean, spread and weight for each of its {len(self.features)} features"
            )

    def probability(self, rows: Array) -> Array:
        """The calibrated probability of label 1 for rows (n, features), (n,)."""
        return sigmoid(self.scale * self.score(rows) + self.shift)

    def score(self, rows: Array) -> Array:
        """The score before calibration, (n,)."""
        standard = (rows - np.array(self.mean)) / np.array(self.spread)
        result: Array = standard @ np.array(self.weights) + self.intercept
        return result


def fit(
    features: tuple[str, ...], rows: Array, labels: Array, *, penalty: float = 1.0, seed: int = 0
) -> tuple[Logistic, Array]:
    """A calibrated model of rows (n, features) and labels (n,) of 0 and 1, and for each row the probability (n,) that
    models give which were fitted without its fold.

    Raises UserError: fewer than 10 rows of either label, or a feature that is not finite.
    """
    fewest = int(min(labels.sum(), (1 - labels).sum()))
    if fewest < 10:
        raise UserError(f"a router needs at least 10 right and 10 wrong answers: got {fewest} of one kind; label more")
    if not np.isfinite(rows).all():
        raise UserError("features must be finite: some of the labelled answers have others; label them again")
    raw = _fitted(features, rows, labels, penalty)
    fold = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    unseen = np.empty(len(rows))
    for held in range(FOLDS):
        part = fold == held
        if part.any():
            unseen[part] = _fitted(features, rows[~part], labels[~part], penalty).score(rows[part])
    scale, shift = _newton(unseen[:, None], labels, 1e-3)
    scale = max(float(scale), 1e-3)
    model = Logistic(features, raw.mean, raw.spread, raw.weights, raw.intercept, scale=scale, shift=float(shift))
    return model, sigmoid(scale * unseen + float(shift))


def sigmoid(score: Array) -> Array:
    result: Array = 0.5 * (1 + np.tanh(score / 2))
    return result


def _fitted(features: tuple[str, ...], rows: Array, labels: Array, penalty: float) -> Logistic:
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    spread = np.where(spread > 1e-9, spread, 1.0)
    *weights, intercept = _newton((rows - mean) / spread, labels, penalty)
    return Logistic(
        features, tuple(mean.tolist()), tuple(spread.tolist()), tuple(map(float, weights)), float(intercept)
    )


def _newton(rows: Array, labels: Array, penalty: float) -> Array:
    """Weights and, last, the intercept. Steps are halved until the loss falls, so that they cannot run away."""
    wide = np.column_stack([rows, np.ones(len(rows))])
    ridge = np.diag([penalty] * rows.shape[1] + [1e-9])

    def loss(w: Array) -> float:
        t = wide @ w
        return float(np.sum(np.logaddexp(0, t) - labels * t) + 0.5 * w @ ridge @ w)

    weights = np.zeros(wide.shape[1])
    for _ in range(STEPS):
        p = sigmoid(wide @ weights)
        gradient = wide.T @ (p - labels) + ridge @ weights
        curvature = (wide * (p * (1 - p))[:, None]).T @ wide + ridge
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(weights)), gradient)
        size = 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if float(np.abs(size * step).max()) < 1e-9:
            break
    return weights


@dataclass(frozen=True)
class Curve:
    """What handing over costs and brings: for each share of answers handed over, the ones with the highest predicted
    probability first, the share of the wrong ones among them, and the share of right ones among those kept."""

    shares: tuple[float, ...]
    caught: tuple[float, ...]
    right_here: tuple[float, ...]


def curve(probability: Array, labels: Array, shares: tuple[float, ...]) -> Curve:
    """The curve of predictions (n,) against labels (n,), 1 being wrong; of equal predictions, all in their order."""
    order = np.argsort(-probability, kind="stable")
    wrong = labels[order]
    counts = [round(share * len(wrong)) for share in shares]
    caught = [float(wrong[:n].sum() / max(wrong.sum(), 1)) for n in counts]
    right = [float(1 - wrong[n:].mean()) if n < len(wrong) else 1.0 for n in counts]
    return Curve(shares, tuple(caught), tuple(right))


def calibration_error(probability: Array, labels: Array, *, bins: int = 10) -> float:
    """The expected calibration error over `bins` groups of equally many predictions (Naeini et al. 2015)."""
    groups = np.array_split(np.argsort(probability, kind="stable"), min(bins, len(labels)))
    gaps = [len(g) * abs(float(probability[g].mean() - labels[g].mean())) for g in groups if len(g)]
    return sum(gaps) / len(labels)
