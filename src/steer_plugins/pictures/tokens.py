"""Tokens as people can read them: line breaks, control characters and halves of characters made visible."""

from __future__ import annotations

import re
import unicodedata

NEWLINE, TAB = "\N{RETURN SYMBOL}", "\N{RIGHTWARDS ARROW TO BAR}"
_SIGNS = {"\n": NEWLINE, "\t": TAB}
# Cc, Cf: control and format characters (right-to-left overrides among them); Cs, Co, Cn: no character at all;
# Zl, Zp: line breaks that are not \n.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def legible(piece: bytes) -> str:
    """The text of one token. Spaces stay; ``\\n`` is ⏎, a tab ⇥, other invisible characters ``<U+200B>``, bytes that are
    no whole character ``<E2 80>``, and a token without any text ``<>``."""
    if not piece:
        return "<>"
    text = piece.decode(errors="surrogateescape")  # a byte that is no text becomes U+DC00 + byte
    parts = re.split(r"([\udc80-\udcff]+)", text)
    return "".join(_bytes(part) if i % 2 else "".join(map(_sign, part)) for i, part in enumerate(parts))


def _bytes(part: str) -> str:
    return f"<{' '.join(f'{ord(c) - 0xDC00:02X}' for c in part)}>"


def _sign(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    return f"<U+{ord(character):04X}>" if unicodedata.category(character) in _INVISIBLE else character
