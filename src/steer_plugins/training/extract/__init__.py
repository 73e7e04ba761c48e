"""From contrasts to directions: pairs and traits, what is read of them, and the methods that fit."""

from __future__ import annotations

from .base import (
    POSITIONS,
    Contrast,
    ContrastData,
    FitOptions,
    FitResult,
    Method,
    Pair,
    Side,
    fit_directions,
    fit_layers,
    layers_to_read,
)
from .classifiers import LogisticProbe, WhitenedDifference
from .mean_difference import MeanDifference
from .pairs import chat, hold_out, load_pairs, pairs_of, trait_data
from .pca import PCACentred, PCADifference
from .reading import ReadingPlan, plan_reading, read_contrast
from .report import FitReport, LayerReport, report_fit, suggest_window

__all__ = [
    "POSITIONS",
    "Contrast",
    "ContrastData",
    "FitOptions",
    "FitReport",
    "FitResult",
    "LayerReport",
    "LogisticProbe",
    "MeanDifference",
    "Method",
    "PCACentred",
    "PCADifference",
    "Pair",
    "ReadingPlan",
    "Side",
    "WhitenedDifference",
    "builtin_methods",
    "chat",
    "fit_directions",
    "fit_layers",
    "hold_out",
    "layers_to_read",
    "load_pairs",
    "pairs_of",
    "plan_reading",
    "read_contrast",
    "report_fit",
    "suggest_window",
    "trait_data",
]


def builtin_methods() -> list[Method]:
    """The extraction methods that come with the package."""
    return [MeanDifference(), PCADifference(), PCACentred(), LogisticProbe(), WhitenedDifference()]
