"""``steer hub verify`` with a model: the dose curve of a card is run again, with the card's own prompts, and compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.base import Engine, GenerateRequest
from ..errors import SteerError
from ..steering.terms import Term
from ..steering.vector import SteeringVector
from ..store.pulled import Item
from ..training.calibrate import level_of
from ..training.train import Training, TrainOptions
from ..training.traits import Trait, bundled_traits, load_trait
from .hub import Hub
from .safety import betrays, measured, refusal_cosine

TOLERANCE = 2.0
"""Standard errors, of card and measurement together, that the effects may differ by; and a tenth of the card's effect."""


@dataclass
class Measured:
    """What was measured of one item. ``rows``: strength, the card's score, the score here. ``why``: no curve could be run."""

    label: str
    effect: float | None = None
    effect_se: float = 0.0
    said: float | None = None
    rows: list[tuple[float, float, float]] = field(default_factory=list)
    safety: dict[str, float | None] = field(default_factory=dict)
    why: str | None = None
    agrees: bool = True
    warning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(self.__dict__)

    def lines(self) -> list[str]:
        """For people."""
        if self.why is not None:
            return [f"{self.label}: files and signature hold; {self.why}"]
        verdict = "agrees with its card" if self.agrees else "DOES NOT AGREE with its card"
        out = [f"{self.label}: {verdict}: effect {self.effect:.3g} ± {self.effect_se:.2g}, the card says {self.said:.3g}"]
        out += [f"  {strength:+.2f}: {here:8.3f} (card {said:.3f})" for strength, said, here in self.rows]
        out += [f"  {name}: {value:+.3f}" for name, value in self.safety.items() if value is not None]
        return out + ([f"  warning: {self.warning}"] if self.warning else [])


def measure_items(hub: Hub, cards: list[tuple[Item, dict[str, Any]]], model: str) -> list[Measured]:
    """Measure each item's vector on a model's file. Raises SteerError where the model does not fit."""
    from ..engine.local import LocalEngine

    reports = []
    with LocalEngine(Path(model), n_parallel=12) as engine:
        for item, card in cards:
            if item.kind != "vector":
                reports.append(Measured(item.label, why=f"a {item.kind} has no curve to run"))
                continue
            vector = hub.pulled.read(item)
            vector.check_fits(engine.info.identity)
            report = measure_curve(engine, vector, card, _trait(hub, item, vector))
            report.safety = {**measured(engine, vector), "refusal_cosine": refusal_cosine(hub.library, vector)}
            report.warning = betrays(card, report.safety)
            reports.append(report)
    return reports


def _trait(hub: Hub, item: Item, vector: SteeringVector) -> Trait | None:
    """The trait that came with the vector, or the package's own of that name."""
    if "trait" in item.files:
        return load_trait(hub.pulled.checked(item.files["trait"], item.name))
    source = (vector.provenance or {}).get("source")
    name = source.get("trait") if isinstance(source, dict) else None
    return load_trait(name) if name in bundled_traits() else None


def measure_curve(engine: Engine, vector: SteeringVector, card: dict[str, Any], trait: Trait | None) -> Measured:
    """The card's dose curve, run again on the trait's held-out prompts as the calibration did, and whether the two agree.

    They agree where the effects from -1 to 1 have one sign and differ by at most two standard errors and a tenth of the card's.
    """
    label = f"{card['name']}@{card['version']}"
    said, record = card["calibration"], vector.calibration or {}
    if said is None or trait is None:
        what = "the card has no dose curve" if said is None else "its trait did not come with it"
        return Measured(label, why=f"its effect cannot be measured, since {what}")
    try:
        level = level_of(record["level"])
        assert level is not None
        options = TrainOptions(calibrate=level.name, scope=vector.default_scope)
        objective = Training(engine, vector.name, trait, options).objective()
        max_tokens = min(int(record["max_tokens"]), 512)
    except (AssertionError, KeyError, TypeError, ValueError, SteerError) as error:
        return Measured(label, why=f"its effect cannot be measured here ({str(error) or 'another tool calibrated it'})")
    n, scores = level.n_search, {}
    for point in said["curve"]:
        strength = point["strength"]
        steering = Term(vector, strength) if strength else None
        requests = [
            GenerateRequest(prompt, steering=steering, max_tokens=max_tokens, thinking=False) for prompt in objective.prompts[:n]
        ]
        scores[strength] = objective.scores(engine, steering, engine.generate_many(requests), n)
    ends = sorted(scores)
    steps = np.subtract(scores[ends[-1]], scores[ends[0]])
    effect, error_here = float(steps.mean()), float(np.std(steps, ddof=1) / np.sqrt(len(steps))) if len(steps) > 1 else 0.0
    points = {point["strength"]: point["score"] for point in said["curve"]}
    stated = points[ends[-1]] - points[ends[0]]
    allowed = TOLERANCE * float(np.hypot(error_here, said["effect_se"] or 0.0)) + 0.1 * abs(stated)
    agrees = abs(effect - stated) <= allowed and effect * stated > 0
    rows = [(s, points[s], float(np.mean(scores[s]))) for s in ends]
    return Measured(label, effect, error_here, stated, rows, agrees=agrees)
