"""Tokens as people can read them: line breaks, control characters and parts of characters made visible."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Sequence

NEWLINE, TAB = "\N{RETURN SYMBOL}", "\N{RIGHTWARDS ARROW TO BAR}"
UNFINISHED = "\N{MIDLINE HORIZONTAL ELLIPSIS}"
_SIGNS = {"\n": NEWLINE, "\t": TAB}
# Cc, Cf: control and format characters (right-to-left overrides among them); Cs, Co, Cn: no character at all;
# Zl, Zp: line breaks that are not \n.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def legible(pieces: Sequence[bytes]) -> list[str]:
    """The text of each token. Spaces stay; ``\\n`` is ⏎, a tab ⇥, other invisible characters ``<U+200B>``.

    A character that several tokens make up stands at the last of them, the others are ``⋯``. Bytes that are not text are
    ``<E2 80>``, and a token without any is ``<>``.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    texts = []
    for i, piece in enumerate(pieces):
        text = _visible(decoder.decode(piece, final=i == len(pieces) - 1))
        waiting = bool(decoder.getstate()[0]) and bool(piece)
        texts.append(text + UNFINISHED if waiting else text or "<>")
    return texts


def _visible(text: str) -> str:
    # surrogateescape turns a byte that is not text into U+DC00 + byte
    parts = re.split(r"([\udc80-\udcff]+)", text)
    return "".join(_bytes(part) if i % 2 else "".join(map(_sign, part)) for i, part in enumerate(parts))


def _bytes(part: str) -> str:
    return f"<{' '.join(f'{ord(c) - 0xDC00:02X}' for c in part)}>"


def _sign(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    return f"<U+{ord(character):04X}>" if unicodedata.category(character) in _INVISIBLE else character
