"""What a trait score is: a named function of the text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A score of one text, from -1 (fully the ``negative`` pole) to 1 (fully the ``positive`` pole).

    It sees the text and nothing else: a score that looked at the vector or at hidden states would prove itself.
    Calling the metric is calling ``score``. ``tokens``: how long replies have to be allowed to become so that the score can
    tell all of them apart. A few sentences show most; a score of length sees nothing in replies that are all cut at the
    same place.
    """

    name: str
    description: str
    score: Callable[[str], float]
    positive: str
    negative: str
    tokens: int = 32

    def __call__(self, text: str) -> float:
        return self.score(text)


def reply_tokens(metric: Callable[[str], float], usual: int) -> int:
    """The longest reply to ask for where a metric scores it: ``usual``, or more where the metric says that it needs more."""
    return max(usual, getattr(metric, "tokens", 0))
