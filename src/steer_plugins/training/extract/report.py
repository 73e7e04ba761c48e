"""What a fit is worth, layer by layer: measured on pairs it has not seen and on resampled ones, never by steering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from .base import Contrast, FitOptions, FitResult, Method, fit_directions, folds, pole_mean

RESAMPLES = 12
"""Bootstrap resamples of the pairs."""

MIDDLE = (0.3, 0.75)
"""Parts of the depth between which a window is suggested: earlier layers read words, later ones choose the next token."""

NEAR_BEST = 0.9
"""A layer belongs to the suggested window as long as its score is at least this part of the best one's."""

MIN_WINDOW = 3
"""A suggested window has at least so many layers where those beside it ..."""

PASSABLE = 0.5
"""... score at least this part of the best one."""


@dataclass(frozen=True)
class LayerReport:
    """One layer in numbers.

    Attributes:
        norm: median length of a token's hidden state.
        distance: how far apart the means of the poles are along the direction, in norms.
        ordered: share of the held-out pairs whose positive side lies above the negative one; ties count half. None for
            fewer than two pairs.
        separation: mean step from the negative to the positive side of held-out pairs, in standard deviations of that
            step; None where it is undefined.
        below: cosine to the direction of the layer before (None if it has none); ``above``: of the layer after.
        stability: mean cosine to directions of bootstrap resamples of the pairs.
        accuracy: cross-validated share of examples told apart, from methods that classify.
        baseline: where the baseline lies between the poles: 0 at the negative, 1 at the positive one, of three-class data.
    """

    norm: float
    distance: float
    ordered: float | None
    separation: float | None
    below: float | None
    above: float | None
    stability: float | None
    accuracy: float | None = None
    baseline: float | None = None

    @property
    def score(self) -> float:
        """What windows are chosen by: how well unseen pairs are told apart, times how reproducible the direction is."""
        told = 0.5 if self.ordered is None else self.ordered
        # the nearer neighbour: the first layer of a good run has a bad one
        near = max(self.below or 0.0, self.above or 0.0)
        return max(0.0, 2 * told - 1) * max(0.0, self.stability or 0.0) * near


@dataclass(frozen=True)
class FitReport:
    """The report of all layers, and the suggested window (first and last layer, None if no layer tells pairs apart)."""

    layers: dict[int, LayerReport]
    window: tuple[int, int] | None
    n_folds: int
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values, rounded: what a vector's provenance keeps under ``report``."""
        return {
            "window": None if self.window is None else list(self.window),
            "held_out": f"{self.n_folds}-fold" if self.n_folds else None,
            "resamples": self.resamples,
            "layers": [
                {"layer": il, **{key: _rounded(value) for key, value in vars(one).items() if value is not None}}
                for il, one in sorted(self.layers.items())
            ],
        }


def report_fit(method: Method, contrast: Contrast, options: FitOptions, result: FitResult, n_layer: int) -> FitReport:
    """Measure a fit. No model is needed: the pairs are split, and drawn again, with ``options.seed``.

    Each pair is judged by directions that were fitted without it (cross-fitting), so that all pairs serve for both.
    """
    quiet = replace(options, folds=0)
    parts = folds(contrast.n_pairs, options.folds, options.seed) if contrast.n_pairs > 1 and options.folds > 1 else []
    steps: dict[int, list[npt.NDArray[np.float64]]] = {il: [] for il in result.directions}
    for part in parts:
        rest = np.setdiff1d(np.arange(contrast.n_pairs), part)
        for il, direction in _fitted(method, contrast.take(rest), quiet).items():
            if il in steps:
                difference = contrast.positive[il][part].astype(np.float64) - contrast.negative[il][part]
                steps[il].append(difference @ direction.astype(np.float64))
    cosines: dict[int, list[float]] = {il: [] for il in result.directions}
    rng = np.random.default_rng(options.seed)
    resamples = RESAMPLES if contrast.n_pairs > 1 else 0
    for _ in range(resamples):
        drawn = rng.integers(0, contrast.n_pairs, contrast.n_pairs)
        for il, direction in _fitted(method, contrast.take(drawn), quiet).items():
            if il in cosines:
                cosines[il].append(float(direction.astype(np.float64) @ result.directions[il]))
    layers = {
        il: _layer(contrast, result, il, np.concatenate(steps[il]) if steps[il] else np.zeros(0), cosines[il])
        for il in result.directions
    }
    return FitReport(layers, suggest_window(layers, n_layer), len(parts), resamples)


def suggest_window(layers: Mapping[int, LayerReport], n_layer: int) -> tuple[int, int] | None:
    """The layers around the best one in the middle of the model whose scores come near it.

    A window and not the best layer alone: neighbours hold nearly the same direction, and which one wins is chance.
    """
    low, high = MIDDLE
    middle = {il: one.score for il, one in layers.items() if low * n_layer <= il + 0.5 <= high * n_layer} or {
        il: one.score for il, one in layers.items()
    }
    best = max(middle, key=lambda il: middle[il], default=None)
    if best is None or middle[best] <= 0.0:
        return None
    first = last = best
    while middle.get(first - 1, 0.0) >= NEAR_BEST * middle[best]:
        first -= 1
    while middle.get(last + 1, 0.0) >= NEAR_BEST * middle[best]:
        last += 1
    while last - first + 1 < MIN_WINDOW:
        beside = max((first - 1, last + 1), key=lambda il: middle.get(il, 0.0))
        if middle.get(beside, 0.0) < PASSABLE * middle[best]:
            break
        first, last = min(first, beside), max(last, beside)
    return first, last


def _fitted(method: Method, contrast: Contrast, options: FitOptions) -> Mapping[int, npt.NDArray[np.float32]]:
    try:
        return fit_directions(method, contrast, options).directions
    except DataError:  # a resample of equal pairs
        return {}


def _layer(contrast: Contrast, result: FitResult, il: int, steps: npt.NDArray[np.float64], cosines: list[float]) -> LayerReport:
    direction = result.directions[il].astype(np.float64)
    below, above = (float(direction @ result.directions[k]) if k in result.directions else None for k in (il - 1, il + 1))
    spread = float(steps.std(ddof=1)) if steps.size > 1 else 0.0
    return LayerReport(
        norm=contrast.norms[il],
        distance=result.strengths.get(il, 0.0),
        ordered=float(((steps > 0) + 0.5 * (steps == 0)).mean()) if steps.size else None,
        separation=float(steps.mean()) / spread if spread > 0.0 else None,
        below=below,
        above=above,
        stability=sum(cosines) / len(cosines) if cosines else None,
        accuracy=result.accuracy.get(il),
        baseline=_baseline(contrast, il, direction),
    )


def _baseline(contrast: Contrast, il: int, direction: npt.NDArray[np.float64]) -> float | None:
    if contrast.baseline is None:
        return None
    low, high, middle = (
        float(pole_mean(side[il]) @ direction) for side in (contrast.negative, contrast.positive, contrast.baseline)
    )
    return (middle - low) / (high - low) if high != low else None


def _rounded(value: float) -> float:
    return round(value, 4)
