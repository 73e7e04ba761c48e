"""What a model, or an agent that calls tools for it, may set: which vectors, and how strongly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import SpecError
from ..steering.grammar import TermSpec, is_file_name

MAX_STRENGTH = 1.0
"""The default for each vector: its calibrated full effect."""


@dataclass
class Bounds:
    """Limits of one session. They are asked with names of terms, before any vector is looked up.

    Attributes:
        default: largest strength, either way, of a vector without a limit of its own.
        limits: name -> largest strength. None: all vectors that the library has for the model; otherwise no others may be set.
        fitted: names of vectors that the session fitted itself, which may always be set.
    """

    default: float = MAX_STRENGTH
    limits: dict[str, float] | None = None
    fitted: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, texts: Sequence[str], default: float = MAX_STRENGTH) -> Bounds:
        """From ``NAME`` or ``NAME:LARGEST`` each; no text allows all vectors. Raises SpecError."""
        from ..steering.terms import parse_term

        limits: dict[str, float] = {}
        for text in texts:
            name, limit = parse_term(text)
            if is_file_name(name):
                raise SpecError(f"{name!r} is a file: allow vectors by the names they have in the library")
            if limit <= 0.0:
                raise SpecError(f"the largest strength of {name!r} is {limit:g}: give one above 0")
            limits[name] = limit if ":" in text else default
        return cls(default, limits or None)

    def limit(self, name: str) -> float | None:
        """The largest strength of a vector, None where it may not be set."""
        if self.limits is not None and name in self.limits:
            return self.limits[name]
        return self.default if self.limits is None or name in self.fitted else None

    def check(self, terms: Iterable[TermSpec]) -> None:
        """Raise SpecError for terms that are not allowed. The strengths of several terms with one vector add up."""
        totals: dict[str, float] = {}
        for term in terms:
            name = term.vector
            for key in ("op", "gate", "stream"):
                if getattr(term, key) is not None:
                    raise SpecError(f"the {key} of {name!r} cannot be set here: give its strength, layers, scope or schedule")
            limit = self.limit(name)
            if limit is None:
                raise SpecError(f"{name!r} may not be set here: {', '.join(self.names()) or 'no vector'} may be")
            totals[name] = math.fsum((totals.get(name, 0.0), abs(term.strength)))
            if totals[name] > limit * (1 + 1e-9):
                raise SpecError(f"strength {totals[name]:g} of {name!r} is too large: from {-limit:g} to {limit:g} may be set")

    def names(self) -> list[str]:
        """The vectors that may be set, where they are listed."""
        return sorted({*(self.limits or ()), *self.fitted})
