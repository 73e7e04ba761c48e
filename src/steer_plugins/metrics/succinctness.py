"""How terse a text is, from its length in words."""

from __future__ import annotations

import math
import re

from .fluency import word_count

NEUTRAL_WORDS = 60
"""The length in words at which the score is 0: a short paragraph."""

FILLER_COST = 2
"""What one filler phrase adds to the length, in words."""

# Phrases that lengthen an answer without telling anything, and the connectives that announce more of it.
_FILLERS = (
    "additionally|all in all|all things considered|as a matter of fact|as a result|as mentioned|as previously stated|"
    "as we all know|as you may know|at the end of the day|at this point in time|basically|by the way|consequently|"
    "due to the fact that|essentially|first and foremost|firstly|for all intents and purposes|for example|"
    "for instance|for the most part|furthermore|generally speaking|however|i believe that|i hope this helps|"
    "i would like to|i would say that|in a manner of speaking|in addition|in conclusion|in fact|in general|"
    "in many ways|in order to|in other words|in summary|in terms of|in this case|it goes without saying|"
    "it is important to note that|it is worth noting that|it should be noted that|kind of|lastly|last but not least|"
    "let us begin|moreover|more or less|needless to say|nevertheless|of course|on the one hand|on the other hand|"
    "overall|secondly|sort of|that being said|that is to say|the fact that|therefore|thirdly|thus|to begin with|"
    "to put it simply|to sum up|to summarize|ultimately|what this means is|when it comes to|with regard to|"
    "with respect to|you know"
)
_FILLER = re.compile(rf"\b(?:{_FILLERS})\b")
_SPACES = re.compile(r"\s+")


def score_succinctness(text: str) -> float:
    """The succinctness of ``text``, -1 (expansive) to 1 (terse), in any language that :func:`~.fluency.words` counts.

    ``tanh(log2(60 / length) / 2)``, where ``length`` is the number of words plus two for each English filler or
    connective phrase ("in other words", "furthermore"). Strictly falling with length: 15 words give 0.76, 60 give 0,
    240 give -0.76. A text without words counts as one word, the terse end: whether an empty answer is an acceptable
    one is for the early-end guard to say (:func:`~.fluency.ended_early`).
    """
    length = word_count(text) + FILLER_COST * len(_FILLER.findall(_SPACES.sub(" ", text).casefold()))
    return math.tanh(math.log2(NEUTRAL_WORDS / max(length, 1)) / 2)
