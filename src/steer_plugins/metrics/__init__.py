"""Scores that come from the text alone: trait metrics in a registry, and counters of fluency.

A metric is any ``Callable[[str], float]`` under a name; the built-in ones are listed by :func:`builtin_metrics`
and are registered through the same plugin hook as anyone's.
"""

from __future__ import annotations

from .base import Metric
from .fluency import EARLY_END_TOKENS, early_end_share, ended_early, repeated_ngram_share, word_count, words
from .mood import score_mood
from .succinctness import score_succinctness

__all__ = [
    "EARLY_END_TOKENS",
    "Metric",
    "builtin_metrics",
    "early_end_share",
    "ended_early",
    "repeated_ngram_share",
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
        ),
    ]
    return {metric.name: metric for metric in metrics}
