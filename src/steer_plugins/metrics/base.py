"""What a trait score is: a named function of the text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A score of one text, from -1 (fully the ``negative`` pole) to 1 (fully the ``positive`` pole).

    It sees the text and nothing else: a score that looked at the vector or at hidden states would prove itself.
    Calling the metric is calling ``score``.
    """

    name: str
    description: str
    score: Callable[[str], float]
    positive: str
    negative: str

    def __call__(self, text: str) -> float:
        return self.score(text)
