"""How cheerful or sombre an English text is, from a lexicon of our own."""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import mood_lexicon as lexicon

# A neutral weight for every so many words: two cheerful words make a sentence cheerful and leave a page neutral.
_WORDS_PER_NEUTRAL = 40
# The same word again within so many words adds nothing: a model stuck in a loop says it once.
_ECHO = 30
_REACH = 3
_FLIP = -0.75

_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|[.,;:!?()\n\"\u2014\u2026]|[^\w\s]")
_BREAKS = frozenset('.,;:!?()\n"\u2014\u2026')


def score_mood(text: str) -> float:
    """The mood of ``text``, -1 (sombre) to 1 (cheerful); 0.0 for empty text or text without a word of the lexicon.

    ``(P - N) / (P + N + 1 + words / 40)``, where P and N are the summed weights of cheerful and sombre words. Forms of
    a word are found through its endings; a word that follows a negation in the same clause (at most three words on,
    auxiliaries not counted) counts, a little weaker, for the other pole; "very" raises and "slightly" lowers a
    weight; a repetition within 30 words adds nothing. The last two terms of the divisor keep a single word from
    deciding, and make the score depend on how dense the words are and hardly on how long the text is.

    The method is that of lexicon sentiment scorers (Taboada et al., "Lexicon-based methods for sentiment analysis",
    2011: negation shift, intensifiers); words and weights are our own.
    """
    cheerful = sombre = 0.0
    tokens = [token.casefold() for token in _TOKEN.findall(text.replace("\u2019", "'").replace("-", " "))]
    count = sum(token[0].isalpha() for token in tokens)
    for weight in _weights(tokens):
        if weight > 0:
            cheerful += weight
        else:
            sombre -= weight
    return (cheerful - sombre) / (cheerful + sombre + 1 + count / _WORDS_PER_NEUTRAL)


def _weights(tokens: list[str]) -> Iterator[float]:
    """The signed weight of each emotional word or phrase in ``tokens`` (words and punctuation, in lower case)."""
    seen: dict[str, int] = {}
    at = 0
    while at < len(tokens):
        phrase, weight = _phrase(tokens, at)
        length = len(phrase) if phrase else 1
        key = " ".join(phrase) if phrase else ""
        if not phrase:
            key, weight = _lookup(tokens[at])
        if weight and not (tokens[at] in lexicon.DEGREES and _lookup(next(iter(tokens[at + 1 : at + 2]), ""))[1]):
            weight *= _context(tokens, at)
            # The sign is part of the key: "not happy, happy" is two statements.
            echo = f"{key}{'+' if weight > 0 else '-'}"
            if at - seen.get(echo, -_ECHO) >= _ECHO:
                seen[echo] = at
                yield weight
        at += length


def _phrase(tokens: list[str], at: int) -> tuple[tuple[str, ...], float]:
    """The longest phrase of the lexicon that starts at ``at``, with its weight; an empty one if there is none."""
    for phrase, weight in lexicon.PHRASES.get(tokens[at], ()):
        if tuple(tokens[at : at + len(phrase)]) == phrase:
            return phrase, weight
    return (), 0.0


def _lookup(word: str) -> tuple[str, float]:
    """The lexicon's form of ``word`` and its weight, or ``("", 0.0)``."""
    for form in _forms(word):
        form = lexicon.IRREGULAR.get(form, form)
        if form in lexicon.WEIGHTS:
            return form, lexicon.WEIGHTS[form]
    return "", 0.0


def _forms(word: str) -> Iterator[str]:
    """``word``, then what it may be an inflection of."""
    if word.endswith("'s"):
        word = word[:-2]
    yield word
    if word in lexicon.NO_STEM:
        return
    for suffix in ("ness", "ing", "est", "ed", "er", "ly", "es", "s"):
        stem = word[: -len(suffix)]
        if not word.endswith(suffix) or len(stem) < 3:
            continue
        yield stem
        if suffix == "ly":
            yield stem + "le"  # terribly
            yield stem + "l"  # fully
        if suffix not in ("s", "ness"):
            yield stem + "e"  # smiling
            if stem[-1] == stem[-2]:
                yield stem[:-1]  # sobbing
        if stem.endswith("i"):
            yield stem[:-1] + "y"  # happier, cries


def _context(tokens: list[str], at: int) -> float:
    """The factor that the words before ``at`` in the same clause put on its weight."""
    factor = 1.0
    before: list[str] = []
    reach = _REACH
    for token in reversed(tokens[max(0, at - 2 * _REACH) : at]):
        if not reach or token in _BREAKS or token in lexicon.CLAUSE_STARTS:
            break
        before.append(token)
        reach -= token not in lexicon.FUNCTION_WORDS
    if before:
        factor *= lexicon.DEGREES.get(before[0], 1.0)
    for distance, token in enumerate(before):
        if token not in lexicon.NEGATIONS and not token.endswith("n't"):
            continue
        after = before[distance - 1] if distance else ""
        if after in lexicon.NOT_NEGATED_BY:  # not only
            continue
        # "Never been so happy" and "couldn't be happier" praise.
        if token in lexicon.SUPERLATIVE_NEGATIONS and (
            tokens[at].endswith("er") or any(word in lexicon.SUPERLATIVE_MARKS for word in before[:distance])
        ):
            continue
        factor *= _FLIP
    return factor
