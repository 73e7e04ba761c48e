"""Principal components: of the differences of pairs, and of pairs centred on their middle (repeng's two methods)."""

from __future__ import annotations

import numpy as np

from .base import Array, Contrast, FitOptions, FitResult, fit_layers, pole_mean

_NEAR_ZERO = 1e-9
"""Rows shorter than this part of the states' length are rounding."""


class PCADifference:
    """The first principal component of ``positive - negative`` over the pairs, at each layer; at least two pairs.

    The mean over the pairs is taken out first, as ``pca_diff`` of vgel's repeng (``ControlVector.train``) does through
    scikit-learn's PCA: what is found is how the difference *varies* from pair to pair. With a baseline, both
    ``positive - baseline`` and ``baseline - negative`` are rows. (Zou et al., "Representation Engineering", 2023.)
    """

    name = "pca_diff"

    def fit(self, contrast: Contrast, options: FitOptions) -> FitResult:
        """See :class:`~steer_plugins.training.extract.base.Method`."""

        def one(positive: Array, negative: Array, baseline: Array | None) -> Array | None:
            if baseline is None:
                rows = positive - negative
            else:
                rows = np.concatenate([positive - baseline, baseline - negative])
            scale = float(np.abs(rows).max(initial=0.0))
            return _oriented(first_component(rows - rows.mean(axis=0), scale), positive, negative)

        why = "the pairs differ by one and the same amount at every layer, so their differences have no main direction"
        return fit_layers(contrast, one, nothing=f"{why}: use --method pca_center or mean_difference")


class PCACentred:
    """The first principal component of both sides of each pair around the pair's middle (repeng's ``pca_center``).

    The rows of a pair are plus and minus half its difference, so the mean difference counts: this is the direction of
    the largest mean squared difference. With a baseline, pairs are centred on it instead.
    """

    name = "pca_center"

    def fit(self, contrast: Contrast, options: FitOptions) -> FitResult:
        """See :class:`~steer_plugins.training.extract.base.Method`."""

        def one(positive: Array, negative: Array, baseline: Array | None) -> Array | None:
            middle = (positive + negative) / 2 if baseline is None else baseline
            rows = np.concatenate([positive - middle, negative - middle])
            scale = float(np.abs(rows).max(initial=0.0))
            return _oriented(first_component(rows - rows.mean(axis=0), scale), positive, negative)

        return fit_layers(contrast, one)


def first_component(rows: Array, scale: float) -> Array | None:
    """Unit right singular vector of the largest singular value, float64 [n_embd]; None if the rows are all about 0.

    ``rows``: float64 [n, n_embd], centred. ``scale``: what is zero is judged by. The smaller Gram matrix is taken apart.
    """
    n, width = rows.shape
    if float(np.abs(rows).max(initial=0.0)) <= _NEAR_ZERO * scale:
        return None
    if n <= width:
        values, vectors = np.linalg.eigh(rows @ rows.T)
        found = vectors[:, -1] @ rows
    else:
        values, vectors = np.linalg.eigh(rows.T @ rows)
        found = vectors[:, -1]
    length = float(np.linalg.norm(found))
    return found / length if values[-1] > 0.0 and length > 0.0 else None


def _oriented(direction: Array | None, positive: Array, negative: Array) -> Array | None:
    """Along the majority of the pairs: so that more positive sides lie above their negative ones than below."""
    if direction is None:
        return None
    steps = (positive - negative) @ direction
    balance = int((steps > 0).sum()) - int((steps < 0).sum())
    if balance == 0:
        balance = 1 if pole_mean(steps[:, None])[0] >= 0.0 else -1
    return direction if balance > 0 else -direction
