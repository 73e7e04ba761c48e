"""What strength 1.0 means: the largest dose whose text still passes the fluency guard, found by a sweep."""

from __future__ import annotations

from .existing import DoseObjective, Proportions, calibrate_vector
from .fluency import Fluency, Guard, mean_perplexity, measure_fluency, perplexity
from .objective import ContrastObjective, Objective, TextObjective
from .plan import FULL, LEVELS, QUICK, UNCALIBRATED, Level, level_of, window_of, windows_of
from .projection import Projection, measure_projection
from .sweep import Calibrated, Fitted, Sweep, rises

__all__ = [
    "FULL",
    "LEVELS",
    "QUICK",
    "UNCALIBRATED",
    "Calibrated",
    "ContrastObjective",
    "DoseObjective",
    "Fitted",
    "Fluency",
    "Guard",
    "Level",
    "Objective",
    "Projection",
    "Proportions",
    "Sweep",
    "TextObjective",
    "calibrate_vector",
    "level_of",
    "mean_perplexity",
    "measure_fluency",
    "measure_projection",
    "perplexity",
    "rises",
    "window_of",
    "windows_of",
]
