"""What removing, reflecting or amplifying a component does to a trait: a curve over the strengths of ``project``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.base import Engine, GenerateRequest, Generation
from ...steering.terms import Term
from ...steering.vector import SteeringVector
from .fluency import Fluency, Guard, measure_fluency
from .objective import Objective
from .plan import Level

STRENGTHS = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
"""-1 doubles the component, 1 removes it, 2 reflects it. DwarfStar 4 takes -2 as well; ``project`` ends at -1 here."""


@dataclass(frozen=True)
class ProjectionRow:
    """One strength: mean score over the objective's prompts or pairs, and the fluency of the replies."""

    strength: float
    score: float
    fluency: Fluency
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"strength": self.strength, "score": self.score, "passed": self.passed, **self.fluency.to_dict()}


@dataclass(frozen=True)
class Projection:
    """What was measured. Projecting is even in the direction, so the sign of ``effect`` is found, not chosen.

    Attributes:
        objective: its name.
        rows: by strength, 0 included.
        best: the strength that passed the fluency guard and moved the score furthest, either way; None where none passed.
        effect: how far it moved it, ``effect_se`` the standard error of that over prompts.
    """

    objective: str
    rows: tuple[ProjectionRow, ...]
    best: float | None
    effect: float
    effect_se: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = [row.to_dict() for row in self.rows]
        return {"objective": self.objective, "best": self.best, "effect": self.effect, "effect_se": self.effect_se, "rows": rows}


def measure_projection(
    engine: Engine,
    vector: SteeringVector,
    objective: Objective,
    level: Level,
    *,
    thinking: bool | None = False,
    guard: Guard = Guard(),  # noqa: B008
    advance: Callable[[int], None] = lambda tokens: None,
) -> Projection:
    """Generate with each of :data:`STRENGTHS` on ``level.n_search`` prompts, and without. Raises as engines do."""
    prompts = objective.prompts[: level.n_search]
    tokens = min(level.tokens[1], max(level.tokens[0], objective.reply_tokens))

    def measure(strength: float) -> tuple[np.ndarray, Fluency]:
        steering = Term(vector, strength) if strength else None
        requests = [GenerateRequest(p, steering=steering, max_tokens=tokens, thinking=thinking) for p in prompts]
        replies: list[Generation] = engine.generate_many(requests)
        said = [(prompt, reply.tokens) for prompt, reply in zip(prompts, replies, strict=True)]
        fluency = measure_fluency(replies, engine.logprobs(said, thinking=thinking))
        scores = np.array(objective.scores(engine, steering, replies, level.n_search), np.float64)
        advance(2 * sum(len(reply.tokens) for reply in replies) + objective.tokens(level.n_search))
        return scores, fluency

    plain_scores, plain = measure(0.0)
    rows, best, effect, effect_se = [ProjectionRow(0.0, float(plain_scores.mean()), plain, True)], None, 0.0, 0.0
    for strength in STRENGTHS:
        scores, fluency = measure(strength)
        passed = fluency.passes(plain, guard)
        rows.append(ProjectionRow(strength, float(scores.mean()), fluency, passed))
        change = scores - plain_scores
        if passed and (best is None or abs(change.mean()) > abs(effect)):
            best, effect = strength, float(change.mean())
            effect_se = float(change.std(ddof=1) / np.sqrt(len(change))) if len(change) > 1 else 0.0
    rows.sort(key=lambda row: row.strength)
    return Projection(objective.name, tuple(rows), best, effect, effect_se)
