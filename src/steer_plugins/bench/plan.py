"""How much ``steer bench control`` runs, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CURVE = (-1.0, -0.66, -0.33, 0.0, 0.33, 0.66, 1.0)


@dataclass(frozen=True)
class ControlPlan:
    """How much to run.

    Attributes:
        prompts: of each family, half of them to choose the strength and half of them to be scored; at most ``score_prompts``
            of these are.
        strengths: those to choose from, on at most ``choose_prompts`` of their half. With a prompt, which does a part of the
            work, ``with_prompt`` times these.
        curve: strengths of the dose-response curve, each on ``curve_prompts`` of those scored, but full strength on all.
        control_prompts: prompts of the arms that should do nothing.
        random_prompts: prompts on which random vectors are compared with full strength.
        sampled: seeded sampling at ``temperature`` beside greedy runs, on at most ``sampled_prompts``.
        conversations: of ``turns`` turns each.
        choices: multiple-choice questions; ``neutral``: requests for the divergence from the plain model.
        pairs: examples for the vector with shuffled labels, None for all.
        max_tokens: cuts replies that families and metrics allow to become longer.
    """

    prompts: int = 60
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    with_prompt: float = 0.5
    choose_prompts: int = 8
    score_prompts: int = 26
    curve: tuple[float, ...] = CURVE
    curve_prompts: int = 14
    control_prompts: int = 6
    random_prompts: int = 26
    sampled: bool = True
    sampled_prompts: int = 4
    temperature: float = 0.7
    conversations: int = 2
    turns: int = 4
    choices: int = 12
    neutral: int = 10
    pairs: int | None = 60
    max_tokens: int | None = None
    seed: int = 0
    run_code: bool = False


QUICK = ControlPlan(
    prompts=4,
    strengths=(0.5, 1.0),
    choose_prompts=1,
    curve_prompts=1,
    control_prompts=1,
    random_prompts=1,
    sampled_prompts=1,
    conversations=1,
    turns=2,
    choices=3,
    neutral=2,
    pairs=8,
    max_tokens=40,
)
"""For a look, and for CI: the numbers mean little."""


@dataclass
class Results:
    """What a run found: ``rows``, one for each reply and question, and ``summary``; JSON values only."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
