"""From contrasts to directions: pairs and traits, what is read of them, and the methods that fit."""

from __future__ import annotations

from .base import POSITIONS, Contrast, ContrastData, FitOptions, FitResult, Method, Pair, Side, layers_to_read
from .mean_difference import MeanDifference
from .pairs import chat, hold_out, load_pairs, trait_data
from .reading import ReadingPlan, plan_reading, read_contrast

__all__ = [
    "POSITIONS",
    "Contrast",
    "ContrastData",
    "FitOptions",
    "FitResult",
    "MeanDifference",
    "Method",
    "Pair",
    "ReadingPlan",
    "Side",
    "chat",
    "hold_out",
    "layers_to_read",
    "load_pairs",
    "plan_reading",
    "read_contrast",
    "trait_data",
]
