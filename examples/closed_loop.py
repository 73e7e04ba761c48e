"""A closed loop: read how far a reply leans along a vector, and set the strength of its next token from that.

    python examples/closed_loop.py mood 0.3 "Describe a walk in the forest"

A thermostat, not a push: where the text already leans far enough the strength goes to zero, and it comes back when the
text drifts away. Both callbacks run outside the compute graph, so a strength that changes with every token rebuilds nothing.
"""

from __future__ import annotations

import sys

import numpy as np

from steer_plugins import AddTokens, GenerateRequest, Library, LocalEngine, ReadRows, SteeringVector


class Thermostat:
    """Holds the projection of the hidden state on a vector near a target.

    Args:
        vector: what to steer with; it is watched at one of its own layers.
        target: wanted projection, in units of the vector's dose at strength 1.
        gain: change of strength for one unit of error.
        limit: largest strength, either way.
    """

    def __init__(self, vector: SteeringVector, target: float, *, gain: float = 0.2, limit: float = 1.0) -> None:
        self.vector = vector
        self.target = target
        self.gain = gain
        self.limit = limit
        self.strength = 0.0
        self.history: list[tuple[float, float]] = []  # (projection that was read, strength that was set from it)
        # the last steered layer sees what all the others did
        self.layer, self.site = max(vector.directions)
        self._direction = vector.directions[self.layer, self.site]
        self._unit = abs(vector.scales[self.layer, self.site])

    def read(self, rows: ReadRows) -> None:
        """Read callback: the newest token decides."""
        projection = float(rows.values[-1] @ self._direction) / self._unit
        error = self.target - projection
        self.strength = float(np.clip(self.strength + self.gain * error, -self.limit, self.limit))
        self.history.append((projection, self.strength))

    def add(self, tokens: AddTokens) -> None:
        """Add callback: prompt tokens are left alone, each sampled one gets the strength of the moment."""
        if len(tokens.positions) == 1:
            tokens.c[:, 0] = self.strength


def run(engine: LocalEngine, vector: SteeringVector, target: float, prompt: str, max_tokens: int = 80) -> Thermostat:
    """Generate under the thermostat, printing as it goes; returns it with its history."""
    thermostat = Thermostat(vector, target)
    engine.on_read(thermostat.read, layers=[thermostat.layer], site=thermostat.site)
    engine.on_add(thermostat.add, [vector])
    try:
        request = GenerateRequest(prompt=[{"role": "user", "content": prompt}], max_tokens=max_tokens)
        for piece in engine.stream(request):
            print(piece, end="", flush=True)
        print()
    finally:
        engine.on_read(None)
        engine.on_add(None)
    return thermostat


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    with LocalEngine() as local:
        named = Library().get(sys.argv[1], local.info.identity)
        done = run(local, named, float(sys.argv[2]), sys.argv[3])
        print("projection, strength:", [(round(p, 2), round(s, 2)) for p, s in done.history])
