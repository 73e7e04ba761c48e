"""A balance of two lists of phrases: what most trait scores are made of."""

from __future__ import annotations

import re

from .fluency import word_count

_APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'", "`": "'"})


class Lexicon:
    """Two lists of English phrases, one for each pole, separated by ``|``; ``*`` at the end of a word stands for any ending.

    Where phrases overlap, the one that begins first counts, and of two that begin together the longer: "no risk" is not a
    risk. A phrase counts once in a text, so that a model stuck in a loop says it once.
    """

    def __init__(self, positive: str, negative: str, *, neutral_words: int = 30) -> None:
        self._positive, self._negative = _pattern(positive), _pattern(negative)
        self._neutral_words = neutral_words

    def hits(self, text: str) -> tuple[set[str], set[str]]:
        """The different phrases of each pole in ``text``, in small letters."""
        text = text.translate(_APOSTROPHES).casefold()
        found = [
            (m.start(), -m.end(), m[0], side) for side, p in enumerate((self._positive, self._negative)) for m in p.finditer(text)
        ]
        sides: tuple[set[str], set[str]] = (set(), set())
        free = 0
        for start, end, phrase, side in sorted(found):
            if start >= free:
                free = -end
                sides[side].add(" ".join(phrase.split()))
        return sides

    def balance(self, text: str, positive: float = 0.0, negative: float = 0.0) -> float:
        """``(p - n) / (p + n + words / neutral_words + 0.5)``, between -1 and 1.

        ``p`` and ``n`` are the phrases of each pole and what the caller counted besides. A text without any scores 0; two
        phrases colour a sentence and leave a page pale.
        """
        up, down = self.hits(text)
        p, n = len(up) + positive, len(down) + negative
        return (p - n) / (p + n + word_count(text) / self._neutral_words + 0.5)


def _pattern(phrases: str) -> re.Pattern[str]:
    # longest first: of alternatives the first that fits is taken
    parts = sorted((" ".join(p.split()) for p in phrases.split("|") if p.strip()), key=len, reverse=True)
    escaped = (re.escape(part).replace(r"\*", r"\w*").replace(r"\ ", r"\s+") for part in parts)
    return re.compile(rf"(?<![\w'])(?:{'|'.join(escaped)})(?![\w])")
