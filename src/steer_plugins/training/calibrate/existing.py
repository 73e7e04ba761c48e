"""What strength 1 means for a vector that was not trained here: imported, combined, or a feature of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...engine.base import Engine, Generation, Prompt
from ...errors import VectorError
from ...steering.terms import Term
from ...steering.vector import SteeringVector
from ..controls import random_columns
from .objective import Objective
from .plan import Level
from .sweep import Advance, Calibrated, Fitted, Sweep


class Proportions(Fitted):
    """A vector whose layers keep their doses relative to each other; only their common factor is searched for."""

    def __init__(self, vector: SteeringVector, norms: dict[int, float]) -> None:
        """``norms``: median length of the hidden state at each of its layers."""
        super().__init__(vector.name, {il: vector.directions[il, site] for il, site in vector.directions}, norms)
        object.__setattr__(self, "_vector", vector)

    def vector(self, window: tuple[int, int], dose: float, scope: str) -> SteeringVector:
        """The vector scaled so that strength 1.0 adds ``dose`` median norms in all. The window is all its layers."""
        given: SteeringVector = self._vector  # type: ignore[attr-defined]
        total = sum(scale / self.norms[il] for (il, _), scale in given.scales.items())
        scales = {key: scale * dose / total for key, scale in given.scales.items()}
        columns = {key: value.scaled(dose / total) for key, value in given.columns.items()}
        return given.replace(scales=scales, columns=columns, default_scope=scope, calibration=None)

    def random(self, seed: int) -> Fitted:
        """Random directions with the same doses."""
        given: SteeringVector = self._vector  # type: ignore[attr-defined]
        rng = np.random.default_rng(seed)
        noise = {key: rng.standard_normal(given.n_embd) for key in given.directions}
        units = {key: (row / np.linalg.norm(row)).astype(np.float32) for key, row in noise.items()}
        columns = {key: random_columns(rng, value) for key, value in given.columns.items()}
        return Proportions(given.replace(directions=units, columns=columns), dict(self.norms))


class DoseObjective(Objective):
    """Nothing but the dose: where nobody says what a vector is for, strength 1 is the largest dose that stays fluent."""

    kind = "dose"
    name = "dose"
    unit = "strengths"
    of = "prompts"

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = list(prompts)

    def scores(self, engine: Engine, steering: Any, replies: Sequence[Generation], n: int) -> list[float]:
        """The signed length of what the steering adds, for each reply."""
        if not isinstance(steering, Term):
            return [0.0] * len(replies)
        return [steering.strength * sum(steering.vector.scales.values())] * len(replies)


def median_norms(engine: Engine, vector: SteeringVector, prompts: Sequence[Prompt]) -> dict[int, float]:
    """Median length of the last prompt token's hidden state at each layer of a vector."""
    found = engine.read(list(prompts), layers=vector.layers, positions="last")
    return {il: float(np.median([np.linalg.norm(one.values[il]) for one in found])) for il in vector.layers}


def calibrate_vector(
    engine: Engine,
    vector: SteeringVector,
    objective: Objective,
    level: Level,
    *,
    scope: str | None = None,
    thinking: bool | None = False,
    advance: Advance | None = None,
    report: Callable[[str, int], None] | None = None,
) -> Calibrated:
    """Find the dose of a vector at which the objective moves most while the text stays fluent, and call it strength 1.

    Args:
        objective: a metric of texts, the log probability of answers, or :class:`DoseObjective`.
        scope: where it acts; the vector's own by default.

    Returns:
        The vector with new scales and the record of the sweep; its layers keep their proportions.

    Raises:
        VectorError: an op or site that has no dose (``project``), or a vector of another model.
        DataError: no dose passes the guard.
    """
    vector.check_fits(engine.info.identity)
    if vector.op != "add":
        raise VectorError(
            f"{vector.name!r} does not add but uses {vector.op}, whose strength is not a dose: calibrate vectors that add"
        )
    if vector.columns and not any(vector.scales.values()):
        raise VectorError(f"{vector.name!r} adds only what it reads of the state, which has no dose to calibrate")
    if vector.sites != ["resid_post"] or vector.is_zero:
        raise VectorError(f"{vector.name!r} acts at {', '.join(vector.sites)}: vectors at resid_post can be calibrated")
    norms = median_norms(engine, vector, objective.prompts[: level.n_confirm])
    sweep = Sweep(engine, Proportions(vector, norms), objective, level, thinking=thinking, advance=advance)
    found = sweep.run([(vector.layers[0], vector.layers[-1])], [scope or vector.default_scope])
    made = found.vector.replace(identity=engine.info.identity, calibration=found.record)
    return Calibrated(made, found.record)
