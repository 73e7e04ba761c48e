"""Scores that come from the text alone: trait metrics in a registry, and counters of fluency.

A metric is any ``Callable[[str], float]`` under a name; the built-in ones are listed by :func:`builtin_metrics`
and are registered through the same plugin hook as anyone's.
"""

from __future__ import annotations

from .base import Metric, reply_tokens
from .caution import score_caution
from .creativity import score_creativity
from .debugging import score_debugging
from .fluency import EARLY_END_TOKENS, early_end_share, ended_early, repeated_ngram_share, word_count, words
from .formality import score_formality
from .mood import score_mood
from .succinctness import score_succinctness

__all__ = [
    "EARLY_END_TOKENS",
    "Metric",
    "builtin_metrics",
    "early_end_share",
    "ended_early",
    "repeated_ngram_share",
    "reply_tokens",
    "score_caution",
    "score_creativity",
    "score_debugging",
    "score_formality",
    "score_mood",
    "score_succinctness",
    "word_count",
    "words",
]


def builtin_metrics() -> dict[str, Metric]:
    """The metrics that come with the package, by name, in a new dict."""
    metrics = [
        Metric(
            name="mood",
            description="Cheerful against sombre words of English text, negation and intensity included.",
            score=score_mood,
            positive="cheerful",
            negative="sombre",
        ),
        Metric(
            name="succinctness",
            description="Length in words: 0 at 60 words, higher when shorter; filler phrases count extra.",
            score=score_succinctness,
            positive="terse",
            negative="expansive",
            tokens=128,
        ),
        Metric(
            name="creativity",
            description="Images, similes and things that come alive against the phrases of definitions, in English.",
            score=score_creativity,
            positive="imaginative",
            negative="plain",
        ),
        Metric(
            name="caution",
            description="Warnings, conditions and checks against encouragements, in English.",
            score=score_caution,
            positive="cautious",
            negative="bold",
        ),
        Metric(
            name="formality",
            description="Official phrases and long words against contractions, slang and exclamations, in English.",
            score=score_formality,
            positive="formal",
            negative="casual",
        ),
        Metric(
            name="debugging",
            description="Causes, checks, values and code against vague comfort, in English.",
            score=score_debugging,
            positive="debug-friendly",
            negative="vague",
        ),
    ]
    return {metric.name: metric for metric in metrics}
