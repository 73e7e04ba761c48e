"""The one operation, in numpy: h <- h + V (c + g * V'h), and its length restored by op renorm.

For hosts that steer through Python hooks, and for tests.

Engines on llama.cpp compute it natively; this is the definition they are tested against. Scopes are not looked at
here: the caller applies the formula to the tokens that a term's scope covers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import SpecError
from .terms import Steering, Term


def coefficients(steering: Any, layer: int, site: str = "resid_post") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(V, c, g) of a steering at one layer and site: V float32 [n_embd, K] unit columns, c and g float64 [K].

    One column for each term that has a direction there and a strength other than 0, in the order of the terms.
    ``add``: c = strength * scale, g = 0. ``project``: c = 0, g = -strength (1 removes, 2 reflects).
    ``clamp``: c = strength * scale, g = -1. SpecError for ``renorm``, which these do not hold: see
    :func:`steer`. K may be 0 (then n_embd is 0 too if the steering has no terms).
    """
    if Steering.of(steering).gates:
        raise SpecError("a gate is decided on a prompt: decide it first (Steering.decided)")
    terms = [term for term in Steering.of(steering).terms if term.strength != 0.0 and (layer, site) in term.keys()]
    if not terms:
        n_embd = next((term.vector.n_embd for term in Steering.of(steering).terms), 0)
        return np.zeros((n_embd, 0), np.float32), np.zeros(0), np.zeros(0)
    if any(term.effective_op == "renorm" for term in terms):
        raise SpecError("op renorm is more than h + V (c + g * V'h): use formula.steer, or op add")
    widths = {term.vector.n_embd for term in terms}
    if len(widths) > 1:
        raise SpecError(f"the vectors of one steering differ in n_embd: {', '.join(map(str, sorted(widths)))}")
    columns = np.stack([term.vector.directions[layer, site] for term in terms], axis=1)
    pairs = np.array([_pair(term, layer, site) for term in terms])
    return columns, pairs[:, 0], pairs[:, 1]


def _pair(term: Term, layer: int, site: str) -> tuple[float, float]:
    dose = term.strength * term.vector.scales[layer, site]
    match term.effective_op:
        case "add":
            return dose, 0.0
        case "project":
            return 0.0, -term.strength
        case _:
            return dose, -1.0


def apply(h: np.ndarray, V: np.ndarray, c: np.ndarray, g: np.ndarray) -> np.ndarray:
    """h + V (c + g * V'h), in the dtype of ``h`` (float32 or float64).

    h: [..., n_embd]; V: [n_embd, K]; c, g: [K], or [..., K] for coefficients of each token. All columns see the same
    h: several projections along directions that are not orthogonal are not a projection. With K = 0, h comes back bit
    for bit.
    """
    h = np.asarray(h)
    if h.dtype not in (np.float32, np.float64):
        raise SpecError(f"the hidden state has dtype {h.dtype}, not float32 or float64")
    if V.shape[1] == 0:
        return h.copy()
    if h.shape[-1] != V.shape[0]:
        raise SpecError(f"the hidden state has n_embd {h.shape[-1]}, the directions {V.shape[0]}")
    V, c, g = (np.asarray(x, h.dtype) for x in (V, c, g))
    return h + (c + g * (h @ V)) @ V.T


def steer(h: np.ndarray, steering: Any, layer: int, site: str = "resid_post") -> np.ndarray:
    """``h`` [..., n_embd] with a steering applied to every token of it, as it would be at (layer, site).

    Terms with op ``renorm`` are added together as ``add`` has them, and each state then gets the length it had.
    """
    wanted = Steering.of(steering)
    here = [term for term in wanted.terms if term.strength != 0.0 and (layer, site) in term.keys()]
    if not any(term.effective_op == "renorm" for term in here):
        return apply(h, *coefficients(wanted, layer, site))
    moved = apply(h, *coefficients(Steering(replace(term, op="add") for term in here), layer, site))
    before, after = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (h, moved))
    return moved * np.divide(before, after, out=np.ones_like(after), where=after > 0)
