"""Two homes, a hub between them, and vectors to share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steer_plugins.hub.hub import Hub
from steer_plugins.hub.publish import Folder, draft, own_key
from steer_plugins.hub.signing import SecretKey
from steer_plugins.steering.vector import ModelIdentity, SteeringVector
from steer_plugins.store.library import Library
from steer_plugins.store.vectorfile import write_vector

N = 8
MODEL = ModelIdentity("llama", 4, N, "a" * 64, "b" * 64, name="Tiny Llama")
OTHER = ModelIdentity("qwen2", 4, N, "a" * 64, "b" * 64, name="Tiny Qwen")

CALIBRATION: dict[str, Any] = {
    "level": "quick",
    "objective": {"kind": "metric", "name": "mood", "unit": "score", "of": "prompts"},
    "dose": 0.3,
    "effect": 1.5,
    "effect_se": 0.1,
    "n": 20,
    "max_tokens": 48,
    "plain": {"perplexity": 2.0},
    "rows": [{"stage": "curve", "strength": 1.0, "perplexity": 3.0}],
    "curve": [{"strength": s, "score": 0.75 * s, "score_se": 0.1} for s in (-1.0, 0.0, 1.0)],
    "samples": [{"strength": 1.0, "text": "What a day!"}],
}


def make(identity: ModelIdentity | None = MODEL, seed: int = 0) -> SteeringVector:
    return SteeringVector(
        "mood",
        {(1, "resid_post"): np.random.default_rng(seed).normal(size=N)},
        identity=identity,
        calibration=CALIBRATION,
        provenance={"method": "mean_difference", "source": {"trait": "mood"}},
    )


class World:
    """``there``: the hub's folder; ``key``: Ann's. :meth:`home` makes a user."""

    def __init__(self, root: Path) -> None:
        self.root, self.there = root, root / "there"
        self.key = own_key(root / "ann", make=True)

    def publish(
        self, vector: SteeringVector | None = None, name: str = "ann/mood", key: SecretKey | None = None, **said: Any
    ) -> dict[str, Any]:
        path = self.root / "v.safetensors"
        write_vector(vector or make(), path)
        days = said.pop("days", None)
        card = draft(name, {"vector": path}, licence="Apache-2.0", **{"description": "Happy or sad.", **said})
        return Folder(self.there, key or self.key).publish(card, {"vector": path}, days=days)

    def home(self, name: str = "bob") -> Hub:
        return Hub(Library(self.root / name / "vectors"))

    def reader(self, name: str = "bob") -> Hub:
        """Somebody who has added the hub."""
        hub = self.home(name)
        hub.add(str(self.there))
        return hub
