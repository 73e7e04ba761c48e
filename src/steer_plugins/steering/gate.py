"""Gates: a condition on the prompt that lets a term act or keeps it off, after CAST (arXiv 2409.05907).

A gate looks at the hidden states of a prompt at one layer. The cosine between their mean and a condition vector is its score;
the gate is open where the score is above (or below) a threshold. It is decided once for each reply, before the last token of
the prompt is computed, from the tokens before that one; position 0 is left out. The term then acts, or does not, from the
last prompt token on: as if it had been there without a gate, or not at all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SpecError
from .vector import SteeringVector

COMPARE = ("above", "below")
POSITIONS = ("mean", "last")
SCOPES = ("response", "thinking", "answer")
"""What a gated term may act on: all of it comes after the decision."""

MIN_PROMPT = 3
"""Tokens of a prompt that a gate can be decided on: position 0, one to look at, and the last one."""


@dataclass(frozen=True)
class Gate:
    """A condition on the prompt.

    Args:
        vector: the condition vector: one direction at one layer and site. Its op, scope and scale do not matter.
        threshold: a cosine, between -1 and 1.
        compare: open where the score is ``above`` the threshold, or ``below`` it; not where it is equal.
        positions: the ``mean`` of all tokens but position 0 and the last, or the ``last`` of them.

    Raises:
        SpecError: anything else.
    """

    vector: SteeringVector
    threshold: float
    compare: str = "above"
    positions: str = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.vector, SteeringVector):
            raise SpecError(f"a gate needs a SteeringVector, not {self.vector!r:.60}")
        name = self.vector.name
        if len(self.vector.directions) != 1:
            raise SpecError(f"the gate {name!r} has {len(self.vector.directions)} directions: a gate looks at one layer and site")
        if self.vector.columns:
            raise SpecError(f"the gate {name!r} has columns: a gate looks along a plain direction")
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or not math.isfinite(self.threshold) or not -1 <= self.threshold <= 1:
            raise SpecError(f"the threshold of the gate {name!r} is {self.threshold!r:.60}: a cosine lies between -1 and 1")
        object.__setattr__(self, "threshold", float(self.threshold) + 0.0)
        for what, known in (("compare", COMPARE), ("positions", POSITIONS)):
            if getattr(self, what) not in known:
                raise SpecError(f"the gate {name!r} has {what} {getattr(self, what)!r:.60}: use {' or '.join(known)}")

    @classmethod
    def of(cls, vector: SteeringVector) -> Gate:
        """The gate in a vector file: its provenance has the numbers under ``gate``.

        Raises:
            SpecError: the vector is not a gate, or its numbers are wrong.
        """
        data = (vector.provenance or {}).get("gate")
        if data is None:
            raise SpecError(f"{vector.name!r} is a vector, not a gate: fit a gate with steer train-gate")
        if not isinstance(data, dict) or set(data) != {"threshold", "compare", "positions"}:
            raise SpecError(f"the gate {vector.name!r} does not have just threshold, compare and positions: fit it again")
        return cls(vector, data["threshold"], data["compare"], data["positions"])

    def to_vector(self, **provenance: Any) -> SteeringVector:
        """The vector that stores this gate; ``provenance`` is added to its own."""
        numbers = {"threshold": self.threshold, "compare": self.compare, "positions": self.positions}
        return self.vector.replace(provenance={**provenance, "gate": numbers})

    @property
    def layer(self) -> int:
        """The block whose output is looked at (or what its site says), from 0."""
        return self.vector.layers[0]

    @property
    def site(self) -> str:
        """Where in the block."""
        return self.vector.sites[0]

    @property
    def key(self) -> tuple[str, float, str, str]:
        """What the gate does: two gates with the same key are the same."""
        return (self.vector.content_hash, self.threshold, self.compare, self.positions)

    @property
    def digest(self) -> str:
        """sha256 of :attr:`key`, hex."""
        return hashlib.sha256("\0".join(map(str, self.key)).encode()).hexdigest()

    def score(self, h: npt.NDArray[Any]) -> float:
        """Cosine between a hidden state [n_embd] and the condition vector; 0 for a state of zero."""
        return cosine(h, self.vector.directions[self.layer, self.site])

    def is_open(self, score: float) -> bool:
        """Whether the gate opens at a score."""
        return score > self.threshold if self.compare == "above" else score < self.threshold


def cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Cosine of two vectors of any float dtype, in float64; 0 if one of them is zero."""
    x, y = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else 0.0


Decisions = Mapping[tuple[str, float, str, str], bool]
"""Whether a gate, by its key, is open."""
