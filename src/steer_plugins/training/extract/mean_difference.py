"""Mean difference: the direction from the mean of the negative examples to the mean of the positive ones."""

from __future__ import annotations

import numpy as np

from .base import Array, Contrast, FitOptions, FitResult, fit_layers, pole_mean


class MeanDifference:
    """``mean(positive) - mean(negative)`` at each layer, in float64, brought to unit length.

    Also known as DiffMean or contrastive activation addition (Rimsky et al., "Steering Llama 2 via Contrastive
    Activation Addition", 2023; Marks and Tegmark, "The Geometry of Truth", 2023).

    With a baseline, the unit directions from the negative pole to the baseline and from there to the positive pole are
    added up: the pole that lies farther away does not outweigh the other.
    """

    name = "mean_difference"

    def fit(self, contrast: Contrast, options: FitOptions) -> FitResult:
        """See :class:`~steer_plugins.training.extract.base.Method`. Layers at which both means are equal get no direction."""

        def one(positive: Array, negative: Array, baseline: Array | None) -> Array | None:
            up, down = pole_mean(positive), pole_mean(negative)
            if baseline is None:
                return _unless_rounding(up - down, positive - negative)
            middle = pole_mean(baseline)
            return _unit(up - middle) + _unit(middle - down)

        return fit_layers(contrast, one)


def _unless_rounding(mean: Array, differences: Array) -> Array | None:
    """The mean difference, or None where differences cancel and what is left is rounding."""
    size = float(np.sqrt((differences**2).sum(axis=1).mean()))
    return mean if float(np.linalg.norm(mean)) > 1e-12 * size else None


def _unit(vector: Array) -> Array:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 0.0 else vector
