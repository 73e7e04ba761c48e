"""What ``steer bench speed`` and ``steer bench server`` find: a value for each turn of each arm, medians and ratios of them.

The arms of a measure take turns in random order. A ratio is taken within a round, so that a slow spell of the machine hits
both of its sides, and the median of these ratios is reported with a 95 % bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .stats import median_change, median_of


@dataclass(frozen=True)
class Measure:
    """One thing that is timed. ``unit``: ``s`` or something per second; ``base``: the arm that ratios are to."""

    name: str
    unit: str
    base: str
    about: str


def name_by_processor(measure: str) -> str:
    """What a measure is called when processor time is taken instead of the clock's."""
    return f"{measure}, processor"


@dataclass
class Costs:
    """A run. ``rows``: JSON values, one for each turn of an arm: kind, round, measure, arm and value.

    ``arms``: what each arm is, by name; ``plan``: what was run; ``notes``: what was left out, and why, in sentences.
    """

    measures: tuple[Measure, ...]
    arms: dict[str, str]
    plan: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, round_: int, measure: str, arm: str, value: float) -> None:
        """One turn of an arm."""
        self.rows.append({"kind": "time", "round": round_, "measure": measure, "arm": arm, "value": value})

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """JSON values: of each measure unit, base and arms, with the median value and ``[median, low, high, n]`` of ratios."""
        found = {}
        for measure in self.measures:
            arms = {arm: [r["value"] for r in self.rows if (r["measure"], r["arm"]) == (measure.name, arm)] for arm in self.arms}
            ratios = {arm: ratios_of(self.rows, measure.name, arm, measure.base, measure.unit) for arm in self.arms}
            if not any(arms.values()):
                continue
            found[measure.name] = {
                "unit": measure.unit,
                "base": measure.base,
                "about": measure.about,
                "arms": {
                    arm: {"value": median_of(values, seed).mean, "ratio": median_of(ratios[arm], seed).to_list()}
                    for arm, values in arms.items()
                    if values
                },
            }
        return {"measures": found, "arms": self.arms, "notes": self.notes}


def ratios_of(rows: Sequence[dict[str, Any]], measure: str, arm: str, base: str, unit: str) -> list[float]:
    """Speed of ``arm`` over that of ``base`` in each round that has both; more is faster whatever the unit.

    Raises DataError for rows that are none of a benchmark's.
    """
    try:
        mine, other = (
            {r["round"]: float(r["value"]) for r in rows if (r["measure"], r["arm"]) == (measure, one)} for one in (arm, base)
        )
        both = sorted(mine.keys() & other.keys())
        return [other[r] / mine[r] if unit == "s" else mine[r] / other[r] for r in both]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise DataError("a report holds a time without its round, measure, arm or value") from None


SUMMARY = ("measure", "arm", "median", "unit", "speed ratio", "95 %", "ratio to")


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The summary table as text, a row for each measure and arm."""
    rows: list[tuple[str, ...]] = []
    for name, measure in summary["measures"].items():
        for arm, found in measure["arms"].items():
            ratio, low, high, _ = found["ratio"]
            numbers = f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"
            rows.append((name, arm, figures(found["value"]), measure["unit"], *numbers, measure["base"]))
    return rows


def figures(value: float) -> str:
    """A time or a speed with three digits, and no exponent."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


COMPARISON = ("measure", "arm", "unit", "A", "B", "ratio A", "ratio B", "B - A", "95 %")


def compare(a: Any, b: Any, seed: int = 0) -> list[tuple[Any, ...]]:
    """Medians and ratios of the arms that both reports have, under :data:`COMPARISON`. Raises DataError for none.

    The runs are different ones, so their ratios are not paired; those of two machines can be compared, their speeds cannot.
    """
    rows: list[tuple[Any, ...]] = []
    try:
        for name, first in a.summary["measures"].items():
            second = b.summary["measures"].get(name, {"arms": {}})
            for arm in (arm for arm in first["arms"] if arm in second["arms"]):
                old, new = (ratios_of(r.rows, name, arm, m["base"], m["unit"]) for r, m in ((a, first), (b, second)))
                change = median_change(old, new, seed)
                span = "" if change.low is None else f"{change.low:+.3f} to {change.high:+.3f}"
                values = [float(m["arms"][arm]["value"]) for m in (first, second)]
                ratios = [median_of(r, seed).mean for r in (old, new)]
                rows.append((name, arm, first["unit"], *values, *ratios, change.mean, span))
    except (KeyError, TypeError, AttributeError):
        raise DataError("a report's summary is not one that steer bench writes") from None
    if not rows:
        raise DataError("the two reports have no measure and arm in common, so there is nothing to compare")
    return rows
