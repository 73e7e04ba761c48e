"""Directions that tell the poles apart best: a regularised logistic probe and the whitened mean difference (LDA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .base import Array, Contrast, FitOptions, FitResult, fit_layers, folds, pole_mean

PENALTY = 0.01
"""Weight of the probe's squared length, where states are centred and have a mean squared length of 1."""

_NEWTON_STEPS = 50
_RANK = 1e-10
"""Singular values below this part of the largest are rounding (they come from a Gram matrix in float64)."""


@dataclass(frozen=True)
class Classifier:
    """``x @ weights + bias`` is positive for the positive pole. ``weights``: float64 [n_embd]."""

    weights: Array
    bias: float

    def accuracy(self, positive: Array, negative: Array) -> float:
        """Share of the examples on the right side; one that lies on the border counts half."""
        margins = np.concatenate([positive @ self.weights + self.bias, -(negative @ self.weights + self.bias)])
        return float(((margins > 0).sum() + 0.5 * (margins == 0).sum()) / margins.size)


class _Solver(Protocol):
    def __call__(self, positive: Array, negative: Array) -> Classifier | None: ...


def cross_validated(solve: _Solver, positive: Array, negative: Array, n_folds: int, seed: int) -> float | None:
    """Mean accuracy on pairs that the classifier has not seen; None for fewer than two pairs or folds.

    Both sides of a pair lie in one fold, so that no example is judged by its own twin.
    """
    n = positive.shape[0]
    if min(n, n_folds) < 2:
        return None
    correct = 0.0
    for fold in folds(n, n_folds, seed):
        rest = np.setdiff1d(np.arange(n), fold)
        classifier = solve(positive[rest], negative[rest])
        correct += fold.size * (0.5 if classifier is None else classifier.accuracy(positive[fold], negative[fold]))
    return correct / n


def logistic(positive: Array, negative: Array, penalty: float = PENALTY) -> Classifier | None:
    """The minimum of ``mean(log(1 + exp(-margin))) + penalty / 2 * |weights|²``, by Newton's method.

    States are first centred and brought to a mean squared length of 1, so that ``penalty`` means the same at each layer; the
    bias is free. The solution lies in the span of the examples, where it is looked for. None if all examples are equal.
    """
    rows = np.concatenate([positive, negative])
    labels = np.concatenate([np.ones(len(positive)), -np.ones(len(negative))])
    centre = rows.mean(axis=0)
    rows = rows - centre
    size = float(np.sqrt((rows**2).sum(axis=1).mean()))
    if size == 0.0:
        return None
    rows = rows / size
    inner, basis = _within_span(rows)
    design = np.concatenate([inner, np.ones((len(inner), 1))], axis=1)
    ridge = np.full(design.shape[1], penalty)
    ridge[-1] = 0.0
    weights = np.zeros(design.shape[1])

    def loss(w: Array) -> float:
        return float(np.logaddexp(0.0, -labels * (design @ w)).mean() + 0.5 * (ridge * w * w).sum())

    now = loss(weights)
    for _ in range(_NEWTON_STEPS):
        # sigmoid of the negative margin, without overflow
        wrong = np.exp(-np.logaddexp(0.0, labels * (design @ weights)))
        gradient = -(design.T @ (labels * wrong)) / len(labels) + ridge * weights
        curvature = (design.T * (wrong * (1.0 - wrong) / len(labels))) @ design + np.diag(ridge + 1e-12)
        step = np.linalg.solve(curvature, gradient)
        part = 1.0
        while part > 1e-6 and loss(weights - part * step) > now:
            part /= 2.0
        weights = weights - part * step
        before, now = now, loss(weights)
        if before - now <= 1e-12 * max(1.0, before):
            break
    outer = basis @ weights[:-1] / size
    return Classifier(outer, float(weights[-1] - outer @ centre))


def lda(positive: Array, negative: Array, shrinkage: float | None = None) -> Classifier | None:
    """Fisher's linear discriminant: the mean difference times the inverse of the shrunk within-class covariance.

    The covariance is ``(1 - g) * S + g * trace(S) / n_embd * I``; ``shrinkage`` is g, by default that of Ledoit and Wolf ("A
    well-conditioned estimator for large-dimensional covariance matrices", 2004). The border lies half-way between the means.
    None if the means are equal.
    """
    means = pole_mean(positive), pole_mean(negative)
    difference = means[0] - means[1]
    if not difference.any():
        return None
    rows = np.concatenate([positive - means[0], negative - means[1]])
    n, width = rows.shape
    inner, basis = _within_span(rows)
    variances = (inner**2).sum(axis=0) / n  # along the principal axes, as the basis is one of them
    target = float(variances.sum()) / width
    if target == 0.0:
        weights = difference
    else:
        g = _ledoit_wolf(rows, variances, target) if shrinkage is None else shrinkage
        within = basis.T @ difference
        inverse = within / ((1.0 - g) * variances + g * target)
        beside = difference - basis @ within
        if g > 0.0:
            weights = basis @ inverse + beside / (g * target)
        else:  # outside the span nothing is known without shrinkage
            weights = basis @ inverse
    return Classifier(weights, -float(weights @ (means[0] + means[1])) / 2)


def _ledoit_wolf(rows: Array, variances: Array, target: float) -> float:
    n, width = rows.shape
    squared = float((variances**2).sum())  # |S|² of Frobenius
    distance = squared - width * target**2
    if distance <= 0.0:
        return 1.0
    noise = (float(((rows**2).sum(axis=1) ** 2).sum()) / n - squared) / n
    # an estimate of exactly 0 would leave directions outside the span undefined
    return min(1.0, max(1e-6, noise / distance))


def _within_span(rows: Array) -> tuple[Array, Array]:
    """Coordinates [n, rank] along the principal axes of the rows' span, and the axes [n_embd, rank]."""
    n, width = rows.shape
    if n <= width:
        values, vectors = np.linalg.eigh(rows @ rows.T)
        kept = values > _RANK * max(float(values[-1]), 0.0)
        lengths = np.sqrt(values[kept])
        return vectors[:, kept] * lengths, rows.T @ (vectors[:, kept] / lengths)
    values, axes = np.linalg.eigh(rows.T @ rows)
    axes = axes[:, values > _RANK * max(float(values[-1]), 0.0)]
    return rows @ axes, axes


class LogisticProbe:
    """The normal of a logistic probe, with its cross-validated accuracy (Alain and Bengio, "Understanding intermediate
    layers using linear classifier probes", 2016). A baseline is not looked at."""

    name = "logistic_probe"

    def fit(self, contrast: Contrast, options: FitOptions) -> FitResult:
        """See :class:`~steer_plugins.training.extract.base.Method`."""
        return _fit(contrast, options, logistic)


class WhitenedDifference:
    """The mean difference, whitened by the shrunk covariance within the poles: the direction of linear discriminant
    analysis, with its cross-validated accuracy. (Marks and Tegmark, "The Geometry of Truth", 2023, apply it to language
    models.) A baseline is not looked at."""

    name = "lda"

    def fit(self, contrast: Contrast, options: FitOptions) -> FitResult:
        """See :class:`~steer_plugins.training.extract.base.Method`."""
        return _fit(contrast, options, lda)


def _fit(contrast: Contrast, options: FitOptions, solve: _Solver) -> FitResult:
    def one(positive: Array, negative: Array, baseline: Array | None) -> Array | None:
        classifier = solve(positive, negative)
        return None if classifier is None else classifier.weights

    result = fit_layers(contrast, one)
    for layer in result.directions if options.folds else ():
        positive, negative = contrast.positive[layer].astype(np.float64), contrast.negative[layer].astype(np.float64)
        accuracy = cross_validated(solve, positive, negative, options.folds, options.seed)
        if accuracy is not None:
            result.accuracy[layer] = accuracy
    return result
