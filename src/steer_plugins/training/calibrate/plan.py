"""What a calibration tries: layer windows, doses, how many prompts and how long texts."""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = ("none", "quick", "full")

FIRST_DOSE = 0.3
"""Where a search starts, in median norms, summed over the window's layers. Small models take about that much."""


@dataclass(frozen=True)
class Level:
    """How thorough a calibration is.

    Attributes:
        name: ``quick`` or ``full``.
        windows: candidate layer windows as (centre, width), parts of the model's depth.
        ratio: from one dose of the ladder to the next.
        n_search: prompts of a trial; ``n_confirm``: prompts on which the winner has to pass.
        tokens: shortest and longest texts of the sweep; between them what the objective says that it needs.
        curve: strengths at which the winner is measured.
        scopes: scopes that are tried.
        n_random: random vectors of the same layers and doses to compare with.
    """

    name: str
    windows: tuple[tuple[float, float], ...]
    ratio: float
    n_search: int
    n_confirm: int
    tokens: tuple[int, int]
    curve: tuple[float, ...]
    scopes: tuple[str, ...]
    n_random: int

    def dose(self, rung: float) -> float:
        """The dose of a rung of the ladder, or between two."""
        return float(FIRST_DOSE * self.ratio**rung)

    @property
    def rungs(self) -> range:
        """Rungs from about a tenth of the first dose to ten times it."""
        n = 0
        while self.ratio**n < 10.0:
            n += 1
        return range(-n, n + 1)


QUICK = Level(
    name="quick",
    windows=((0.57, 0.2), (0.68, 0.2), (0.5, 0.2)),
    ratio=1.35,
    n_search=8,
    n_confirm=20,
    tokens=(48, 96),
    curve=(-1.0, -0.5, 0.0, 0.5, 1.0),
    scopes=("response",),
    n_random=0,
)

FULL = Level(
    name="full",
    windows=tuple((centre, width) for width in (0.2, 0.4) for centre in (0.35, 0.45, 0.55, 0.65)),
    ratio=1.2,
    n_search=12,
    n_confirm=20,
    tokens=(64, 160),
    curve=(-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0),
    scopes=("response", "all"),
    n_random=3,
)

UNCALIBRATED = (0.5, 0.2)
"""The window of a vector that is not calibrated, at FIRST_DOSE."""


def level_of(name: str) -> Level | None:
    """The level of that name; None for ``none``."""
    return {"none": None, "quick": QUICK, "full": FULL}[name]


def window_of(centre: float, width: float, layers: list[int]) -> tuple[int, int]:
    """First and last layer of a window of the depth, at least one layer, within ``layers`` (sorted, the fitted ones)."""
    n = layers[-1] + 2  # the last layer of the model is not fitted
    count = max(1, round(width * n))
    first = round(centre * n - count / 2)
    first = max(layers[0], min(first, layers[-1] - count + 1))
    return first, min(first + count - 1, layers[-1])


def windows_of(level: Level, layers: list[int]) -> list[tuple[int, int]]:
    """The level's windows in layers; small models have fewer than the level names."""
    return list(dict.fromkeys(window_of(centre, width, layers) for centre, width in level.windows))
