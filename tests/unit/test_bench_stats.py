"""Statistics of benchmarks, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from steer_plugins.bench.stats import estimate, harmonic_mean, paired, spearman


def test_estimate() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0], seed=3)
    assert found.mean == 2.5 and found.n == 4 and found.low is not None and found.high is not None
    assert 1.0 <= found.low < 2.5 < found.high <= 4.0
    assert estimate([1.0, 2.0, 3.0, 4.0], seed=3) == found and found.to_list()[0] == 2.5
    assert estimate([]).to_list() == [None, None, None, 0]
    assert estimate([0.3]).to_list() == [0.3, 0.3, 0.3, 1]


def test_the_interval_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    found = estimate(values.tolist())
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_intervals_cover() -> None:
    """Of 200 samples of a known mean, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    found = [estimate(rng.normal(1.0, 1.0, 40).tolist(), seed) for seed in range(200)]
    inside = sum(f.low <= 1.0 <= f.high for f in found if f.low is not None and f.high is not None)
    assert 180 <= inside <= 199


def test_paired_differences_forget_what_prompts_share() -> None:
    prompts = np.random.default_rng(2).normal(0, 10, 50)
    found = paired((prompts + 0.5).tolist(), prompts.tolist())
    assert found.to_list() == [0.5, 0.5, 0.5, 50] and found.excludes_zero
    assert not paired([1.0, -1.0], [0.0, 0.0]).excludes_zero
    assert not estimate([]).excludes_zero
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 2.0])


def test_harmonic_mean() -> None:
    assert harmonic_mean([1.0, 0.5]) == pytest.approx(2 / 3)
    assert harmonic_mean([0.9, 0.9, 0.0]) == 0.0 and harmonic_mean([]) == 0.0
    assert harmonic_mean([0.4, 0.4, 0.4]) == pytest.approx(0.4)


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 25, 900]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    # ties share their mean rank: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman([1, 2], [5, 5]) is None
    with pytest.raises(ValueError):
        spearman([1], [1, 2])
