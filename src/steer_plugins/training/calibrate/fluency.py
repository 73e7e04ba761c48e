"""The fluency guard: steered texts, measured under the unsteered model, must be about as fluent as plain ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engine.base import Generation
from ...metrics import early_end_share, repeated_ngram_share, word_count


@dataclass(frozen=True)
class Guard:
    """How much worse than plain texts steered ones may be.

    ``perplexity_ratio``: below the 1.5 that strength 1 is meant to stay under, since on 20 prompts a ratio has a standard error
    of about 0.05, and so has the one that is found on others. ``repeats``, ``early_ends``: what is added to the plain share of
    repeated 4-grams and of replies that break off.
    """

    perplexity_ratio: float = 1.35
    repeats: float = 0.15
    early_ends: float = 0.1


@dataclass(frozen=True)
class Fluency:
    """A set of texts in numbers: perplexity under the unsteered model (:func:`mean_perplexity`; None when not measured), mean
    share of repeated 4-grams of tokens, share of early ends, mean number of words."""

    n: int
    perplexity: float | None
    repeats: float
    early_ends: float
    words: float

    def passes(self, plain: Fluency, guard: Guard) -> bool:
        """True if these texts are as fluent as ``guard`` wants; never without a perplexity."""
        if self.perplexity is None or plain.perplexity is None:
            return False
        return self.cheap_passes(plain, guard) and self.perplexity <= guard.perplexity_ratio * plain.perplexity

    def cheap_passes(self, plain: Fluency, guard: Guard) -> bool:
        """The part of the guard that needs no model."""
        return self.repeats <= plain.repeats + guard.repeats and self.early_ends <= plain.early_ends + guard.early_ends

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def perplexity(logprobs: npt.NDArray[np.float64]) -> float | None:
    """``exp`` of the mean negative log probability of a text's tokens; None for an empty text."""
    return float(np.exp(-logprobs.mean())) if logprobs.size else None


def mean_perplexity(values: Iterable[float | None]) -> float | None:
    """The geometric mean of the perplexities of texts, None of none; texts without a perplexity are left out.

    On the same prompts the ratio of two of them is that of the pairs, so what one prompt has more than another cancels. (By
    bootstrap on 16 prompts of three traits, the standard error of a ratio of medians was 1.3 to 1.7 times as large.)
    """
    known = [math.log(value) for value in values if value is not None]
    return math.exp(statistics.fmean(known)) if known else None


def measure_fluency(replies: Sequence[Generation], logprobs: Sequence[npt.NDArray[np.float64]] | None = None) -> Fluency:
    """The fluency of replies; ``logprobs``: of their tokens under the unsteered model."""
    n = len(replies)
    return Fluency(
        n=n,
        perplexity=None if logprobs is None else mean_perplexity(map(perplexity, logprobs)),
        repeats=sum(repeated_ngram_share(reply.tokens) for reply in replies) / max(1, n),
        early_ends=early_end_share((reply.finish_reason, len(reply.tokens)) for reply in replies),
        words=sum(word_count(reply.text) for reply in replies) / max(1, n),
    )
