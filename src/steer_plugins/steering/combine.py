"""Several vectors at once: which of them point the same way, how far they move the state in all, and what can be done.

Calibration says how much of one vector a text bears. Correlated directions add up to more than either was measured at, and
projections along directions that are not orthogonal do not make a projection.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SpecError
from .terms import Steering, Term
from .vector import SteeringVector

CORRELATED = 0.5
"""Mean cosine, in size, from which on a pair is named."""

REMAINDER = 0.05
"""What orthogonalising has to leave of a direction; less is noise of the fit."""

_ADDS = ("add", "renorm")

Floats = npt.NDArray[np.float64]


class CorrelatedWarning(UserWarning):
    """Two vectors of one steering point along each other; the message is :attr:`Correlation.sentence`."""


@dataclass(frozen=True)
class Correlation:
    """Two terms whose vectors point along each other where both act.

    ``cosine``: mean over the places (layer and site) that they share, of which there are ``places``.
    """

    one: Term
    other: Term
    cosine: float
    places: int

    @property
    def sentence(self) -> str:
        """What is the matter, and the way out."""
        pair = f"{self.one.vector.name!r} and {self.other.vector.name!r}"
        together = self.cosine * self.one.strength * self.other.strength > 0
        adds = self.one.effective_op in _ADDS and self.other.effective_op in _ADDS
        effect = "act on one and the same component" if not adds else "add up" if together else "work against each other"
        where = f"{self.places} layer{'s' if self.places > 1 else ''}"
        return f"{pair} have a cosine of {self.cosine:.2f} at {where}, so they {effect}: orthogonalise them, or use less of both"


def combine(steering: Any, *, orthogonal: bool = False, max_dose: float | None = None) -> Steering:
    """Several vectors prepared to act together; takes whatever :meth:`Steering.of` takes.

    Args:
        orthogonal: make each vector orthogonal to the earlier ones, see :func:`orthogonalise`.
        max_dose: scale the strengths down to this :func:`dose`, see :func:`cap_dose`; None leaves them alone.

    Warns:
        CorrelatedWarning: for each pair of vectors that (still) point along each other.

    Raises:
        SpecError: as :func:`orthogonalise` and :func:`cap_dose`.
    """
    wanted = orthogonalise(steering) if orthogonal else Steering.of(steering)
    for found in correlations(wanted):
        warnings.warn(found.sentence, CorrelatedWarning, stacklevel=2)
    return wanted if max_dose is None else cap_dose(wanted, max_dose)


def correlations(steering: Any, least: float = CORRELATED) -> list[Correlation]:
    """Pairs of terms with different vectors whose mean cosine is at least ``least`` in absolute value, the strongest first."""
    found = []
    for one, other in combinations([t for t in Steering.of(steering) if not t.is_zero], 2):
        places = _shared(one, other)
        if not places or one.vector.content_hash == other.vector.content_hash:
            continue
        cosine = float(np.mean([_unit(one, p) @ _unit(other, p) for p in places]))
        if abs(cosine) >= least:
            found.append(Correlation(one, other, cosine, len(places)))
    return sorted(found, key=lambda c: -abs(c.cosine))


def orthogonalise(steering: Any) -> Steering:
    """The steering with each vector made orthogonal to the earlier ones, where both act.

    The first term stays as it is, so the order says what counts most. What is removed is not
    made up for: the scale shrinks with the direction. Terms with one and the same vector are left alike. Strengths, ops and
    scopes are kept, calibrations are not: they were measured with other directions.

    Raises:
        SpecError: a vector lies (to 5 % of its length) along the ones before it.
    """
    done: list[tuple[Term, Term]] = []  # as given, and freed
    for term in Steering.of(steering):
        others = [free for given, free in done if not given.is_zero and given.vector.content_hash != term.vector.content_hash]
        done.append((term, term if term.is_zero or not others else replace(term, vector=_freed(term, others))))
    return Steering(free for _, free in done)


def _freed(term: Term, others: Sequence[Term]) -> SteeringVector:
    directions = {place: v.astype(np.float64) for place, v in term.vector.directions.items()}
    scales = dict(term.vector.scales)
    if term.vector.columns and any(_shared(term, o) for o in others):
        raise SpecError(f"{term.vector.name!r} is responsive, so it cannot be orthogonalised: name it first, or leave it out")
    changed = False
    for place in term.keys():
        basis = [_unit(o, place) for o in others if place in _shared(term, o)]
        if not basis:
            continue
        rest = _without(directions[place], basis)
        length = float(np.linalg.norm(rest))
        if length < REMAINDER:
            names = " and ".join(repr(o.vector.name) for o in others if place in _shared(term, o))
            raise SpecError(
                f"{term.vector.name!r} lies along {names} at layer {place[0]}, so nothing is left of it: leave one out"
            )
        directions[place] = rest / length
        scales[place] *= length
        changed = True
    if not changed:
        return term.vector
    names_before = sorted({o.vector.name for o in others})
    provenance = {**(term.vector.provenance or {}), "orthogonalised_against": names_before}
    return term.vector.replace(directions=directions, scales=scales, provenance=provenance, calibration=None)


def _without(h: Floats, directions: Sequence[Floats]) -> Floats:
    """``h`` [n_embd] less its component in the span of unit ``directions``, of which some may be alike."""
    # left singular vectors, not QR: of directions that are alike QR makes one that none of them has
    u, s, _ = np.linalg.svd(np.stack(directions, axis=1), full_matrices=False)
    q = u[:, s > 1e-6]
    rest = h - q @ (q.T @ h)
    less: Floats = rest - q @ (q.T @ rest)  # once more: rounding
    return less


def dose(steering: Any) -> float:
    """How far all adding terms together move the state, in units of strength: 1.0 is one vector's full effect.

    At each place the length of what is added there, in units of the largest full dose of a vector there; summed over the places,
    and divided by that sum for the vector that has most. One vector at strength s has |s|, two equal ones at s 2|s|, two that
    are orthogonal √2 |s|, two at different layers, of as many each, 2|s|. Scopes, schedules and gates are not looked at: it is
    the most that can act at once. Terms with project, clamp, floor or cap have no dose,
    and neither has what a responsive vector reads.
    """
    terms = [t for t in Steering.of(steering) if t.effective_op in _ADDS and not t.is_zero]
    total, full = 0.0, [0.0] * len(terms)
    for place in sorted({p for t in terms for p in t.keys()}):
        here = [(i, t) for i, t in enumerate(terms) if place in t.keys()]
        unit = max(abs(t.vector.scales[place]) for _, t in here)
        if unit == 0.0:
            continue
        streams = {t.stream for _, t in here} - {None}
        moved = max(
            float(np.linalg.norm(sum(_step(t, place) for _, t in here if t.stream is None or t.stream == s)))
            for s in (streams or {None})
        )
        total += moved / unit
        for i, t in here:
            full[i] += abs(t.vector.scales[place]) / unit
    most = max(full, default=0.0)
    return total / most if most else 0.0


def cap_dose(steering: Any, most: float) -> Steering:
    """The steering with the strengths of all adding terms scaled down together, so that :func:`dose` is ``most`` at most.

    Raises:
        SpecError: ``most`` is not a positive number.
    """
    if isinstance(most, bool) or not (isinstance(most, int | float) and 0 < most < float("inf")):
        raise SpecError(f"the largest dose is {most!r:.40}: give a positive number, such as 1")
    wanted = Steering.of(steering)
    total = dose(wanted)
    if total <= most:
        return wanted
    return Steering(replace(t, strength=t.strength * most / total) if t.effective_op in _ADDS else t for t in wanted)


def _shared(one: Term, other: Term) -> list[tuple[int, str]]:
    """Places where both terms act; none when they name different streams."""
    if one.stream is not None and other.stream is not None and one.stream != other.stream:
        return []
    return sorted(set(one.keys()) & set(other.keys()))


def _unit(term: Term, place: tuple[int, str]) -> Floats:
    return term.vector.directions[place].astype(np.float64)


def _step(term: Term, place: tuple[int, str]) -> Floats:
    return term.strength * term.vector.scales[place] * _unit(term, place)
