"""The one operation, in numpy: h <- h + V (c + g * phi(W'h + b)), and its length restored by op renorm.

For hosts that steer through Python hooks or callbacks, and for tests.

Engines on llama.cpp compute it natively; this is the definition they are tested against. Scopes are not looked at
here: the caller applies the formula to the tokens that a term's scope covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SpecError
from .columns import LINEAR
from .terms import Steering, Term


@dataclass(frozen=True, eq=False)
class Edit:
    """What one steering does at one layer and site, to every token that it covers.

    All rows see the same h, the one before the edit. Several of them along directions that are not orthogonal are no projection.

    Attributes:
        write, read: float32 [K, n_embd], unit rows.
        c: float64 [K], what is added along a written row whatever the state is.
        g: float64 [K], how much is added of what a row reads; 0: it reads nothing.
        bias: float64 [K], added to what is read.
        knee: float64 [K]; what is read counts above it only. ``-inf``: it always counts.
        term: int64 [K], which of the acting terms a row belongs to.
        restore: give the state the length it had.
    """

    write: np.ndarray
    read: np.ndarray
    c: np.ndarray
    g: np.ndarray
    bias: np.ndarray
    knee: np.ndarray
    term: np.ndarray
    restore: bool = False

    @property
    def linear(self) -> bool:
        """True if all that reads the state is a direction that is written too, without bias or knee: V, c and g say it all."""
        reads = self.g != 0.0
        plain = (self.bias[reads] == 0.0).all() and (self.knee[reads] == LINEAR).all()
        return bool(plain and np.array_equal(self.read[reads], self.write[reads]))

    def apply(self, h: np.ndarray) -> np.ndarray:
        """``h`` [..., n_embd] after the edit, in its dtype (float32 or float64). Without rows it comes back bit for bit.

        Raises:
            SpecError: another dtype, or another n_embd.
        """
        h = np.asarray(h)
        if h.dtype not in (np.float32, np.float64):
            raise SpecError(f"the hidden state has dtype {h.dtype}, not float32 or float64")
        if not len(self.write):
            return h.copy()
        if h.shape[-1] != self.write.shape[1]:
            raise SpecError(f"the hidden state has n_embd {h.shape[-1]}, the directions {self.write.shape[1]}")
        write, read, c, g, bias, knee = (
            np.asarray(x, h.dtype) for x in (self.write, self.read, self.c, self.g, self.bias, self.knee)
        )
        z = h @ read.T + bias
        moved: np.ndarray = h + (c + g * np.where(z > knee, z, h.dtype.type(0))) @ write
        if not self.restore:
            return moved
        before, after = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (h, moved))
        restored: np.ndarray = moved * np.divide(before, after, out=np.ones_like(after), where=after > 0)
        return restored


def edit(steering: Any, layer: int, site: str = "resid_post") -> Edit:
    """What a steering does at one layer and site; K is 0 where it does nothing.

    Raises:
        SpecError: a gate is not decided, or the vectors differ in n_embd.
    """
    wanted = Steering.of(steering)
    if wanted.gates:
        raise SpecError("a gate is decided on a prompt: decide it first (Steering.decided)")
    here = [term for term in wanted.terms if term.strength != 0.0 and (layer, site) in term.keys()]
    widths = {term.vector.n_embd for term in here}
    if len(widths) > 1:
        raise SpecError(f"the vectors of one steering differ in n_embd: {', '.join(map(str, sorted(widths)))}")
    by_term = [_rows(term, (layer, site)) for term in here]
    rows = [row for some in by_term for row in some]
    n_embd = next((term.vector.n_embd for term in here or wanted.terms), 0)
    write, read = (np.stack([row[i] for row in rows]) if rows else np.zeros((0, n_embd), np.float32) for i in (0, 1))
    c, g, bias, knee = np.array([row[2:] for row in rows]).reshape(-1, 4).T
    owner = np.repeat(np.arange(len(here)), [len(some) for some in by_term])
    return Edit(write, read, c, g, bias, knee, owner, any(term.effective_op == "renorm" for term in here))


_Row = tuple[np.ndarray, np.ndarray, float, float, float, float]


def _rows(term: Term, place: tuple[int, str]) -> list[_Row]:
    """(write, read, c, g, bias, knee) of each row of one term; its direction comes first."""
    v, scale = term.vector.directions[place], term.vector.scales[place]
    columns = term.vector.columns.get(place)

    def of_columns(strength: float) -> list[_Row]:
        if columns is None:
            return []
        each = zip(columns.write, columns.read, columns.gain, columns.bias, columns.knee, strict=True)
        return [(w, r, 0.0, strength * gain, bias, knee) for w, r, gain, bias, knee in each]

    dose = term.strength * scale
    match term.effective_op:
        case "add" | "renorm":
            return [(v, v, dose, 0.0, 0.0, LINEAR), *of_columns(term.strength)]
        case "project":
            return of_columns(term.strength) or [(v, v, 0.0, -term.strength, 0.0, LINEAR)]
        case "clamp" if columns is not None:
            return [(v, v, dose, 0.0, 0.0, LINEAR), *of_columns(1.0)]
        case "clamp":
            return [(v, v, dose, -1.0, 0.0, LINEAR)]
    assert term.level is not None
    level = term.level * scale
    if (term.effective_op == "floor") == (scale >= 0.0):  # below 0, the component is measured the other way round
        return [(v, -v, 0.0, term.strength, level, 0.0)]
    return [(v, v, 0.0, -term.strength, -level, 0.0)]


def coefficients(steering: Any, layer: int, site: str = "resid_post") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(V, c, g) of a steering at one layer and site: V float32 [n_embd, K] unit columns, c and g float64 [K].

    One column for each term that has a direction there and a strength other than 0, in the order of the terms.
    ``add``: c = strength * scale, g = 0. ``project``: c = 0, g = -strength (1 removes, 2 reflects).
    ``clamp``: c = strength * scale, g = -1. K may be 0 (then n_embd is 0 too if the steering has no terms).

    Raises:
        SpecError: op renorm, floor or cap, or a responsive vector, which these three do not hold: see :func:`edit`.
    """
    found = edit(steering, layer, site)
    if found.restore:
        raise SpecError("op renorm is more than h + V (c + g * V'h): use formula.steer, or op add")
    if not found.linear:
        raise SpecError("a floor, a cap or a responsive vector is more than h + V (c + g * V'h): use formula.edit")
    return found.write.T, found.c, found.g


def apply(h: np.ndarray, V: np.ndarray, c: np.ndarray, g: np.ndarray) -> np.ndarray:
    """h + V (c + g * V'h), in the dtype of ``h`` (float32 or float64).

    h: [..., n_embd]; V: [n_embd, K]; c, g: [K], or [..., K] for coefficients of each token. With K = 0, h comes back bit for bit.
    """
    K = V.shape[1]
    return Edit(V.T, V.T, c, g, np.zeros(K), np.full(K, LINEAR), np.arange(K)).apply(h)


def steer(h: np.ndarray, steering: Any, layer: int, site: str = "resid_post") -> np.ndarray:
    """``h`` [..., n_embd] with a steering applied to every token of it, as it would be at (layer, site).

    Terms with op ``renorm`` are added together as ``add`` has them, and each state then gets the length it had.
    """
    return edit(steering, layer, site).apply(h)
