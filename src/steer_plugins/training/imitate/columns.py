"""The fit at one layer: what has to be added to a state, as a constant and as columns that read the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...steering.columns import LINEAR, Columns

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Tried penalties, in units of the mean variance along a direction of the states, times the number of tokens."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerFit:
    """What is added at a layer: ``constant`` float64 [n_embd], and columns (None: the constant alone).

    ``explained``: the share of the squared difference that it takes away on replies that were left out of it, 0 for nothing.
    """

    constant: Floats
    columns: Columns | None
    explained: float
    ridge: float = 0.0


def fit_layer(states: Floats, wanted: Floats, groups: npt.NDArray[np.int64], weights: Floats, rank: int) -> LayerFit:
    """The ridge regression of what a prompt adds on the state it is added to, reduced to ``rank`` columns.

    Args:
        states: [n, n_embd], as they are without the prompt (and with what the layers below add).
        wanted: [n, n_embd], the states with the prompt, less ``states``.
        groups: [n], the reply that a token belongs to; whole replies are left out to choose penalty and rank.
        weights: [n], of each token.
        rank: columns at most; 0 fits the constant alone.
    """
    share = weights / weights.sum()
    if rank == 0:
        return LayerFit(share @ wanted, None, _explained(wanted, share, np.broadcast_to(share @ wanted, wanted.shape)))
    folds = groups % 4
    best = (-np.inf, 0.0, 0)
    found: dict[tuple[float, int], list[float]] = {}
    for fold in range(4):
        kept, left = folds != fold, folds == fold
        if not kept.any() or not left.any():
            continue
        parts = _Regression(states[kept], wanted[kept], weights[kept])
        for ridge in RIDGES:
            for r, predicted in parts.predictions(ridge, rank, states[left]):
                found.setdefault((ridge, r), []).append(_explained(wanted[left], weights[left] / weights[left].sum(), predicted))
    for (ridge, r), values in found.items():
        value = float(np.mean(values))
        if value > best[0] + 1e-4 * (r - best[2]):  # a column more has to be worth it
            best = (value, ridge, r)
    explained, ridge, r = best
    whole = _Regression(states, wanted, weights)
    if r == 0:
        return LayerFit(whole.mean_wanted, None, explained)
    read, write = whole.factors(ridge, r)
    bias = -whole.mean @ read
    return LayerFit(whole.mean_wanted, Columns(read.T, write, np.ones(r), bias, LINEAR), explained, ridge)


def _explained(wanted: Floats, share: Floats, predicted: Floats) -> float:
    left = float(share @ np.sum((wanted - predicted) ** 2, axis=1))
    return 1.0 - left / max(float(share @ np.sum(wanted**2, axis=1)), 1e-30)


class _Regression:
    """One decomposition of the states, for all penalties and ranks."""

    def __init__(self, states: Floats, wanted: Floats, weights: Floats) -> None:
        share = weights / weights.sum()
        self.mean, self.mean_wanted = share @ states, share @ wanted
        root = np.sqrt(share)[:, None]
        x, y = root * (states - self.mean), root * (wanted - self.mean_wanted)
        if len(x) < x.shape[1]:  # fewer tokens than numbers in a state: the small side
            values, left = np.linalg.eigh(x @ x.T)
            keep = values > 1e-10 * values[-1]
            values, vectors = values[keep], x.T @ (left[:, keep] / np.sqrt(values[keep]))
        else:
            values, vectors = np.linalg.eigh(x.T @ x)
        self._values, self._vectors = np.maximum(values, 0.0), vectors  # [m], [n_embd, m]
        self._cross = vectors.T @ (x.T @ y)  # [m, n_embd]
        self._size = float(self._values.sum()) / x.shape[1]

    def factors(self, ridge: float, rank: int) -> tuple[Floats, Floats]:
        """(read [n_embd, rank], write [rank, n_embd]): what is wanted is nearly mean + (state - mean) read write."""
        damped = self._cross / (self._values + ridge * self._size)[:, None]
        write = _right_vectors(np.sqrt(self._values)[:, None] * damped, rank)
        return self._vectors @ (damped @ write.T), write

    def predictions(self, ridge: float, rank: int, states: Floats) -> Sequence[tuple[int, Floats]]:
        """(r, predicted [n, n_embd]) for 0 to ``rank`` columns."""
        read, write = self.factors(ridge, rank)
        z = (states - self.mean) @ read
        steps = [self.mean_wanted + np.zeros_like(states)]
        for r in range(rank):
            steps.append(steps[-1] + np.outer(z[:, r], write[r]))
        return list(enumerate(steps))


def _right_vectors(matrix: Floats, rank: int) -> Floats:
    """The first ``rank`` right singular vectors, as rows, by subspace iteration: far cheaper than all of them."""
    basis = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + 4))
    for _ in range(8):
        basis, _ = np.linalg.qr(matrix.T @ (matrix @ basis))
    _, _, rows = np.linalg.svd(matrix @ basis, full_matrices=False)
    first: Floats = (basis @ rows.T).T[:rank]
    return first
