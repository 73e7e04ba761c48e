"""Mean difference: the direction from the mean of the negative examples to the mean of the positive ones."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .base import Contrast, FitOptions, FitResult

_NEAR_ZERO = 1e-7
"""A difference shorter than this part of the median norm is rounding, not a direction."""


class MeanDifference:
    """``mean(positive) - mean(negative)`` at each layer, in float64, brought to unit length.

    Also known as DiffMean or contrastive activation addition (Rimsky et al., "Steering Llama 2 via Contrastive
    Activation Addition", 2023; Marks and Tegmark, "The Geometry of Truth", 2023).
    """

    name = "mean_difference"

    def fit(self, contrast: Contrast, options: FitOptions) -> FitResult:
        """See :class:`~steer_plugins.extract.base.Method`. Layers at which both means are equal get no direction."""
        directions, strengths = {}, {}
        for layer in contrast.layers:
            positive = contrast.positive[layer].mean(axis=0, dtype=np.float64)
            negative = contrast.negative[layer].mean(axis=0, dtype=np.float64)
            difference = positive - negative
            length = float(np.linalg.norm(difference))
            if not np.isfinite(length):
                raise DataError(f"The model's hidden states at layer {layer} are not finite: it cannot be fitted to.")
            if length <= _NEAR_ZERO * contrast.norms[layer]:
                continue
            directions[layer] = (difference / length).astype(np.float32)
            strengths[layer] = length / contrast.norms[layer]
        if not directions:
            raise DataError(
                "The positive and the negative examples read the same at every layer: give examples that differ "
                "where they are read, or read elsewhere with --positions."
            )
        return FitResult(directions, strengths)
