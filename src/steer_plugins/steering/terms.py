"""What is wished for: terms (a vector, a strength, and where it acts), and the simple text form of one term."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import SpecError, VectorError
from .gate import SCOPES as GATED_SCOPES
from .gate import Decisions, Gate
from .schedule import Schedule
from .vector import BOUNDS, TERM_OPS, SteeringVector, layer_ranges, scope_range

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")

MIN_PROJECT, MAX_PROJECT = -1.0, 3.0
"""Strengths of project: at both ends a component becomes twice as long."""
MAX_DOSE = 1e15
"""Largest strength times scale, in units of the hidden state."""


@dataclass(frozen=True)
class Term:
    """One vector at one strength. Raises SpecError when it cannot be applied as written.

    ``strength``: any finite number; 1.0 is the calibrated full effect, 0 is off. ``layers``: inclusive window, None is
    all the vector's layers. ``op``, ``scope``: None is the vector's own. ``stream``: one residual stream of a
    hyper-connection model, None is all. ``schedule``: lets the strength decay while the reply grows, None keeps it.
    ``gate``: a condition on the prompt; the term acts only where it is open. ``level``: of the ops floor and cap, where the
    component is held, in units of the vector's scale; their strength, 0 to 1, says how firmly.
    """

    vector: SteeringVector
    strength: float = 1.0
    layers: tuple[int, int] | None = None
    op: str | None = None
    scope: str | None = None
    stream: int | None = None
    schedule: Schedule | None = None
    gate: Gate | None = None
    level: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.vector, SteeringVector):
            raise SpecError(f"a term needs a SteeringVector, not {self.vector!r:.60}")
        name = self.vector.name
        if isinstance(self.strength, bool) or not _is_number(self.strength):
            raise SpecError(f"the strength of {name!r} is {self.strength!r:.60}, which is not a number")
        if not math.isfinite(self.strength):
            raise SpecError(f"the strength of {name!r} is {self.strength}, which is not a finite number")
        object.__setattr__(self, "strength", float(self.strength))
        if self.op is not None and self.op not in TERM_OPS:
            raise SpecError(f"unknown op {self.op!r:.60} for {name!r}: use {', '.join(TERM_OPS)}")
        self._check_level()
        self._check_bounds()
        if self.scope is not None:
            try:
                scope_range(self.scope)
            except VectorError as error:
                raise SpecError(f"{error} (term {name!r})") from None
        if self.stream is not None and (not _is_layer(self.stream)):
            raise SpecError(f"the stream of {name!r} is {self.stream!r:.60}: streams are whole numbers from 0")
        if self.schedule is not None:
            if not isinstance(self.schedule, Schedule):
                raise SpecError(f"the schedule of {name!r} is {self.schedule!r:.60}, not a Schedule")
            if self.effective_scope == "prompt":
                raise SpecError(f"a schedule counts tokens of the response, so {name!r} cannot have one with scope prompt")
        if self.gate is not None:
            if not isinstance(self.gate, Gate):
                raise SpecError(f"the gate of {name!r} is {self.gate!r:.60}, not a Gate")
            if self.effective_scope not in GATED_SCOPES:
                what = f"{name!r} has a gate, which is decided at the end of the prompt"
                raise SpecError(f"{what}: its scope has to be response, thinking or answer, not {self.effective_scope}")
        if self.layers is not None:
            window = self.layers
            if not isinstance(window, Sequence) or len(window) != 2 or not all(map(_is_layer, window)):
                raise SpecError(f"the layers of {name!r} are {window!r:.60}: give the first and the last, from 0")
            lo, hi = int(window[0]), int(window[1])
            object.__setattr__(self, "layers", (lo, hi))
            if not any(lo <= layer <= hi for layer in self.vector.layers):
                has = layer_ranges(self.vector.layers)
                raise SpecError(f"the layers {lo}-{hi} of {name!r} hold none of its directions: it has {has}")

    def _check_level(self) -> None:
        name, op = self.vector.name, self.effective_op
        if op not in BOUNDS:
            if self.level is not None:
                raise SpecError(f"op {op} of {name!r} takes no level: floor and cap do")
            return
        if self.level is None:
            raise SpecError(f"op {op} of {name!r} needs a level, such as {name}%{op}:0.5")
        if isinstance(self.level, bool) or not _is_number(self.level) or not math.isfinite(self.level):
            raise SpecError(f"the level of {name!r} is {self.level!r:.60}, which is not a finite number")
        object.__setattr__(self, "level", float(self.level))
        if not 0.0 <= self.strength <= 1.0:
            allowed = f"{op} takes 0 to 1 (1 lets nothing past its level)"
            raise SpecError(f"the strength of {name!r} is {self.strength:g}: {allowed}")
        if any(key in self.vector.columns for key in self.vector.directions):
            raise SpecError(f"{name!r} is responsive, so it has no {op}: take a vector of plain directions")

    def _check_bounds(self) -> None:
        """What a float32 state can take. The engines check sums of terms, and what several layers make of them."""
        name, s = self.vector.name, self.strength
        gains = [abs(s) * float(np.abs(columns.gain).max()) for columns in self.vector.columns.values()]
        if max(gains, default=0.0) > MAX_DOSE:
            raise SpecError(f"strength {s:g} of {name!r} is too large: a gain of {MAX_DOSE:g} is the limit")
        if self.effective_op == "project":
            if not MIN_PROJECT <= s <= MAX_PROJECT:
                allowed = f"project takes {MIN_PROJECT:g} to {MAX_PROJECT:g} (1 removes the component, 2 reflects it)"
                raise SpecError(f"the strength of {name!r} is {s:g}: {allowed}")
            return
        what, size = ("strength", s) if self.level is None else ("level", self.level)
        if abs(size) * max(map(abs, self.vector.scales.values())) > MAX_DOSE:
            raise SpecError(f"{what} {size:g} of {name!r} is too large: a dose of {MAX_DOSE:g} is the limit")

    @property
    def effective_op(self) -> str:
        """The op that is applied: the term's, else the vector's."""
        return self.op or self.vector.op

    @property
    def effective_scope(self) -> str:
        """The scope that is applied: the term's, else the vector's."""
        return self.scope or self.vector.default_scope

    def keys(self) -> list[tuple[int, str]]:
        """The (layer, site) pairs the term acts on, sorted."""
        if self.layers is None:
            return list(self.vector.directions)
        lo, hi = self.layers
        return [key for key in self.vector.directions if lo <= key[0] <= hi]

    @property
    def is_zero(self) -> bool:
        """True if the term changes nothing: strength 0, or an add whose scales are all 0, without columns."""
        adds = self.effective_op in ("add", "renorm")
        idle = all(self.vector.scales[key] == 0.0 and key not in self.vector.columns for key in self.keys())
        return self.strength == 0.0 or (adds and idle)


@dataclass(frozen=True, init=False)
class Steering:
    """An immutable sequence of terms, all applied together. False when it changes nothing."""

    terms: tuple[Term, ...]

    def __init__(self, terms: Iterable[Term | SteeringVector] = ()) -> None:
        checked = tuple(Term(term) if isinstance(term, SteeringVector) else term for term in terms)
        for term in checked:
            if not isinstance(term, Term):
                raise SpecError(f"a steering is made of terms, not of {term!r:.60}")
        _check_renorm(checked)
        _check_levels(checked)
        object.__setattr__(self, "terms", checked)

    @classmethod
    def of(cls, steering: Any) -> Steering:
        """The Steering for None, a vector (strength 1), a term, a Steering, or a sequence of those."""
        if steering is None:
            return cls()
        if isinstance(steering, Steering):
            return steering
        if isinstance(steering, SteeringVector | Term):
            return cls((steering,))
        if isinstance(steering, Sequence) and not isinstance(steering, str | bytes):
            return cls(term for item in steering for term in cls.of(item).terms)
        raise SpecError(f"{steering!r:.60} is not a steering: give a SteeringVector, a Term, or a list of them")

    @property
    def gates(self) -> list[Gate]:
        """The gates of terms that would change something, each once."""
        return list({term.gate.key: term.gate for term in self.terms if term.gate is not None and not term.is_zero}.values())

    def decided(self, decisions: Decisions) -> Steering:
        """This steering after its gates were decided: terms with closed gates are gone, the others have no gate."""
        kept = []
        for term in self.terms:
            if term.gate is None:
                kept.append(term)
            elif not term.is_zero and decisions[term.gate.key]:
                kept.append(replace(term, gate=None))
        return Steering(kept)

    def on_the_prompt(self) -> Steering:
        """What acts on a prompt without its last token, as the steering of that shorter prompt, whose states a gate looks at."""
        kept = []
        for term in self.terms:
            if term.effective_scope not in GATED_SCOPES:
                term = replace(term, schedule=None)  # which counts tokens of the response
                kept.append(replace(term, scope="all") if term.effective_scope == "prompt" else term)
        return Steering(kept)

    def __add__(self, other: Any) -> Steering:
        return Steering(self.terms + Steering.of(other).terms)

    def __radd__(self, other: Any) -> Steering:
        return Steering(Steering.of(other).terms + self.terms)

    def __bool__(self) -> bool:
        return any(not term.is_zero for term in self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def __iter__(self) -> Iterator[Term]:
        return iter(self.terms)


def _check_renorm(terms: Sequence[Term]) -> None:
    """Where a term restores the length, no other op may act: what comes first would not be defined."""
    acting = [term for term in terms if term.strength != 0.0]
    for term in (t for t in acting if t.effective_op == "renorm"):
        for other in (t for t in acting if t.effective_op != "renorm"):
            shared = sorted(set(term.keys()) & set(other.keys()))
            apart = term.stream is not None and other.stream is not None and term.stream != other.stream
            if shared and not apart:
                layer, site = shared[0]
                raise SpecError(
                    f"{term.vector.name!r} restores the length at layer {layer} ({site}), where {other.vector.name!r} acts with "
                    f"op {other.effective_op}: give both renorm, or layers of their own"
                )


def _check_levels(terms: Sequence[Term]) -> None:
    """Two floors (or two caps) of one vector at one place mean no more than one of them: a slip, and refused as one."""
    held = [term for term in terms if term.level is not None and term.strength != 0.0]
    for i, one in enumerate(held):
        for other in held[:i]:
            same = one.effective_op == other.effective_op and one.vector.content_hash == other.vector.content_hash
            apart = one.stream is not None and other.stream is not None and one.stream != other.stream
            if same and one.level != other.level and not apart and set(one.keys()) & set(other.keys()):
                raise SpecError(
                    f"{one.vector.name!r} has the {one.effective_op}s {other.level:g} and {one.level:g} at the same layers: "
                    "give one, or layers of their own"
                )


def parse_term(text: str) -> tuple[str, float]:
    """Split ``NAME_OR_FILE:STRENGTH`` at its last colon; the strength is 1.0 when left out.

    A drive letter (``C:\\v.safetensors``) is not a strength. Raises SpecError with the position of what is wrong.
    """
    if not isinstance(text, str) or not text.strip():
        raise SpecError("an empty --steer names no vector: write NAME:STRENGTH, such as mood:0.8")
    head, colon, tail = text.rpartition(":")
    if not colon or (len(head) == 1 and head.isalpha() and tail[:1] in ("\\", "/")):
        return text, 1.0
    if not head:
        raise SpecError(f"{text!r} names no vector before the colon: write NAME:STRENGTH, such as mood:0.8")
    if not _NUMBER.fullmatch(tail):
        raise SpecError(f"{tail!r} is not a number ({_at(len(head) + 1, text)}): write NAME:STRENGTH, such as mood:0.8")
    strength = float(tail)
    if not math.isfinite(strength):
        raise SpecError(f"{tail!r} is not a finite number ({_at(len(head) + 1, text)})")
    return head, strength


def _at(index: int, text: str) -> str:
    """Where in what was typed; characters are counted from 1, as editors do."""
    return f"character {index + 1} of {text!r}"


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]  # anything numeric, numpy scalars included
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, str | bytes)


def _is_layer(value: object) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__") and operator.index(value) >= 0
