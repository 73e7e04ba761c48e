"""How much ``steer bench control`` runs, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CURVE = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Plan:
    """How much to run. ``prompts``: of each family, half of them to choose the strength; ``strengths``: those to choose from,
    on at most ``choose_prompts`` of that half.

    ``curve``: strengths of the dose-response curve; ``curve_prompts``: prompts of each point but those at full strength, which
    take the whole scored half. ``sampled``: seeded sampling beside greedy runs, on at most ``sampled_prompts``.
    ``conversations`` of ``turns`` turns; ``choices`` and ``neutral``: questions for side effects. ``pairs``: examples for the
    vector with shuffled labels, None for all.
    """

    prompts: int = 60
    strengths: tuple[float, ...] = (0.5, 0.75, 1.0)
    choose_prompts: int = 10
    curve: tuple[float, ...] = CURVE
    curve_prompts: int = 16
    sampled: bool = True
    sampled_prompts: int = 16
    temperature: float = 0.7
    conversations: int = 4
    turns: int = 5
    choices: int = 40
    neutral: int = 16
    pairs: int | None = None
    seed: int = 0
    run_code: bool = False


QUICK = Plan(
    prompts=8,
    strengths=(0.5, 1.0),
    choose_prompts=4,
    sampled_prompts=2,
    curve=(-1.0, -0.66, -0.33, 0.0, 0.33, 0.66, 1.0),
    curve_prompts=3,
    conversations=1,
    turns=3,
    choices=10,
    neutral=4,
    pairs=10,
)
"""For a look, and for CI: the numbers mean little."""


@dataclass
class Results:
    """What a run found: ``rows``, one for each reply and question, and ``summary``; JSON values only."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
