"""The summary of a control report as text: what the reports, their pages and the command line show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SUMMARY = ("trait", "tasks", "plain", "best prompt", "steer", "both", "random", "steer - prompt", "both - prompt")
"""Columns of the summary: mean scores of greedy replies, and differences with their 95 % intervals."""


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The summary table as text, a row for each trait and family."""
    rows = []
    for trait, part in summary["traits"].items():
        for family, found in part["families"].items():
            name = f"{trait} ({part['pole']})"
            if found["floor"]:
                rows.append((name, family, *["floor"] * (len(SUMMARY) - 2)))
                continue
            versus = found["versus"]["greedy"]
            means = {arm: number(values["greedy"]["score"][0]) for arm, values in found["arms"].items()}
            arms = [means[arm] for arm in ("plain", versus["best prompt"], "steer", "both", "random")]
            rows.append((name, family, *arms, *(interval(versus[f"{arm} - prompt"], sign=True) for arm in ("steer", "both"))))
    return rows


def number(value: float | None, *, sign: bool = False, digits: int = 2) -> str:
    """A number for people; a dash for none."""
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # no minus before a zero
    text = f"{rounded:+.{digits}f}" if sign and rounded else f"{rounded:.{digits}f}"
    return text.replace("-", "−")


def interval(estimate: Sequence[float | None], *, sign: bool = False) -> str:
    """``mean (low to high)`` of an estimate's list."""
    mean, low, high = (number(x, sign=sign) for x in estimate[:3])
    return mean if estimate[1] is None else f"{mean} ({low} to {high})"
