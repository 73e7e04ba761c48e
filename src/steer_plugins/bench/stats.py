"""Small statistics of benchmarks: means with bootstrap intervals, paired differences, rank correlation. All seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval, over ``n`` values; all NaN-free, and None where there were no values."""

    mean: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def to_list(self) -> list[float | int | None]:
        """``[mean, low, high, n]``, rounded to four decimals."""
        return [None if x is None else round(x, 4) for x in (self.mean, self.low, self.high)] + [self.n]


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean and percentile bootstrap interval (Efron 1979) of independent values. One value is its own interval."""
    data = np.asarray(values, np.float64)
    if data.size == 0:
        return Estimate(None, None, None, 0)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, data.size, (DRAWS, data.size))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), int(data.size))


def median_of(values: Sequence[float], seed: int = 0) -> Estimate:
    """Median (as ``mean``) and percentile bootstrap interval of it: for timings, where one slow turn says nothing."""
    data = np.asarray(values, np.float64)
    if data.size == 0:
        return Estimate(None, None, None, 0)
    draws = np.median(np.random.default_rng(seed).choice(data, (DRAWS, data.size)), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(np.median(data)), float(low), float(high), int(data.size))


def median_change(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Estimate:
    """Median of ``b`` less median of ``a``, which were measured in different runs; as ``median_of``."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.size == 0 or second.size == 0:
        return Estimate(None, None, None, 0)
    rng = np.random.default_rng(seed)
    draws = [np.median(rng.choice(data, (DRAWS, data.size)), axis=1) for data in (first, second)]
    low, high = np.quantile(draws[1] - draws[0], [0.025, 0.975])
    return Estimate(float(np.median(second) - np.median(first)), float(low), float(high), int(min(first.size, second.size)))


def paired(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of ``a[i] - b[i]``: both were measured on the same prompt. Raises ValueError for unequal lengths."""
    return estimate([x - y for x, y in zip(a, b, strict=True)], seed)


def harmonic_mean(parts: Sequence[float]) -> float:
    """Of parts between 0 and 1; 0 as soon as one of them is 0 or less. So one broken part breaks the score (AxBench)."""
    if not parts or min(parts) <= 0.0:
        return 0.0
    return len(parts) / sum(1.0 / part for part in parts)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None when one side does not vary."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values against {len(y)}")
    a, b = _ranks(x), _ranks(y)
    if len(x) < 2 or a.std() == 0.0 or b.std() == 0.0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, np.float64)
    return np.array([(data < value).sum() + ((data == value).sum() - 1) / 2 for value in data])
