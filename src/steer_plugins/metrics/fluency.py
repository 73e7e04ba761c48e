"""Counters of fluency that need no model and no language: words, repetition, early ends.

They feed the guard of the calibration (a dose passes while its text is about as fluent as the plain one) and
the ``words`` column of the demo. All of them take plain text or token ids, never hidden states.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Iterable, Sequence

EARLY_END_TOKENS = 8
"""A generation that ends by itself with fewer tokens than this counts as an early end."""

# Han, kana and their extensions are written without spaces: there a character stands for a word, or else a page of
# Chinese would be one "word".
_UNSPACED = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHUNK = re.compile(rf"[{_UNSPACED}]|[^\s/\u2013\u2014{_UNSPACED}]+")
_EDGE = re.compile(r"^[\W_]+|[\W_]+$")
_DOTS = re.compile(r"\.{2,}|\u2026|--+")


def words(text: str) -> list[str]:
    """The words of ``text`` in order, as written, without the punctuation around them.

    Words are what spaces, slashes and long dashes separate; a chunk without a letter or digit is not a word; Han and
    kana characters count one by one. ``words("")`` is ``[]``.
    """
    found = []
    for chunk in _CHUNK.findall(_DOTS.sub(" ", text)):
        # A letter may carry marks that are not word characters (Hindi, Thai): only symbols are cut off the edges.
        word = _EDGE.sub(_symbols_only, chunk)
        if any(character.isalnum() for character in word):
            found.append(word)
    return found


def _symbols_only(match: re.Match[str]) -> str:
    edge = match.group()
    if match.start() == 0:
        return ""
    kept = 0
    while kept < len(edge) and _is_mark(edge[kept]):
        kept += 1
    return edge[:kept]


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def word_count(text: str) -> int:
    """The number of :func:`words` in ``text``."""
    return len(words(text))


def repeated_ngram_share(text_or_tokens: str | Sequence[Hashable], n: int = 4) -> float:
    """The share, 0 to 1, of n-grams that already occurred earlier in the same text.

    ``text_or_tokens`` is text (its words, case ignored) or a sequence of token ids. 0.0 when it is too short to
    hold an n-gram; a text that says one sentence over and over comes near 1.0. Raises ValueError for ``n`` < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if isinstance(text_or_tokens, str):
        items: Sequence[Hashable] = [word.casefold() for word in words(text_or_tokens)]
    else:
        items = text_or_tokens
    total = len(items) - n + 1
    if total <= 0:
        return 0.0
    distinct = {tuple(items[start : start + n]) for start in range(total)}
    return 1.0 - len(distinct) / total


def ended_early(finish_reason: str, n_tokens: int, *, fewest: int = EARLY_END_TOKENS) -> bool:
    """Whether a generation broke off: it stopped by itself (``finish_reason == "stop"``) with too few tokens.

    ``n_tokens`` is the number of generated tokens without the end-of-text token; fewer than ``fewest`` is early.
    A text cut by its token budget (``"length"``) or by the user (``"cancelled"``) never counts.
    """
    return finish_reason == "stop" and n_tokens < fewest


def early_end_share(endings: Iterable[tuple[str, int]], *, fewest: int = EARLY_END_TOKENS) -> float:
    """The share, 0 to 1, of :func:`ended_early` among ``(finish_reason, n_tokens)`` pairs; 0.0 for none."""
    flags = [ended_early(reason, count, fewest=fewest) for reason, count in endings]
    return sum(flags) / len(flags) if flags else 0.0
