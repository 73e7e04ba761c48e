"""One diverging scale for all surfaces: blue below, orange above, which colour-blind readers tell apart."""

from __future__ import annotations

RGB = tuple[int, int, int]

NEGATIVE: RGB = (42, 111, 219)
POSITIVE: RGB = (230, 120, 0)
STRONGEST = 0.68
"""How much of the colour is mixed into the background at the end of the scale: text stays readable on it."""


def amount(value: float, limit: float) -> float:
    """How much colour a value gets, 0 to :data:`STRONGEST`, linear up to ``limit`` strengths."""
    return STRONGEST * min(1.0, abs(value) / limit)


def mixed(value: float, limit: float, background: RGB = (255, 255, 255)) -> RGB:
    """The colour of a value on an opaque background."""
    colour, share = POSITIVE if value > 0 else NEGATIVE, amount(value, limit)
    r, g, b = (round(share * c + (1 - share) * back) for c, back in zip(colour, background, strict=True))
    return r, g, b
