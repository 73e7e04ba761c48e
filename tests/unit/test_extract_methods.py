"""The extraction methods on synthetic states: planted directions come back, and closed forms are met."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from steer_plugins.errors import DataError
from steer_plugins.plugins.manager import manager
from steer_plugins.training.extract import Contrast, FitOptions, builtin_methods, fit_directions
from steer_plugins.training.extract.base import folds
from steer_plugins.training.extract.classifiers import cross_validated, lda, logistic
from steer_plugins.training.extract.pca import first_component

METHODS = {method.name: method for method in builtin_methods()}
OPTIONS = FitOptions(layers=(0,))
WIDTH = 24


def unit(vector):
    return np.asarray(vector, float) / np.linalg.norm(vector)


def contrast(positive, negative, baseline=None, norm=1.0):
    return Contrast(
        {0: np.float32(positive)},
        {0: np.float32(negative)},
        {0: norm},
        None if baseline is None else {0: np.float32(baseline)},
    )


def planted(n=60, seed=0, width=WIDTH, steps=(0.5, 2.5), noise=0.05, common=5.0):
    """Pairs that share a random text of their own, and part along one direction by steps of different sizes."""
    rng = np.random.default_rng(seed)
    direction = unit(rng.standard_normal(width))
    texts = rng.standard_normal((n, width)) * 0.3 + common * unit(rng.standard_normal(width))
    size = rng.uniform(*steps, n)[:, None] / 2
    sides = [texts + sign * size * direction + noise * rng.standard_normal((n, width)) for sign in (1, -1)]
    return direction, contrast(*sides)


def fit(name, data, **changes):
    return fit_directions(METHODS[name], data, replace(OPTIONS, **changes))


def test_all_are_registered():
    assert set(METHODS) == {"mean_difference", "pca_diff", "pca_center", "logistic_probe", "lda"}
    assert set(METHODS) <= set(manager().registry("methods"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("width", [WIDTH, 200])
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_direction_comes_back(name, seed, width):
    direction, data = planted(seed=seed, width=width)
    result = fit(name, data)
    found = result.directions[0]
    assert found.dtype == np.float32 and np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    # whitening trades some of the direction for less of what varies within the poles
    assert found @ direction > (0.97 if width == WIDTH and name != "lda" else 0.8)
    assert result.strengths[0] > 1.0


@pytest.mark.parametrize("name", METHODS)
def test_swapped_poles_turn_the_direction_round(name):
    _, data = planted()
    turned = Contrast(data.negative, data.positive, data.norms)
    assert fit(name, data).directions[0] @ fit(name, turned).directions[0] == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_is_repeatable_bit_for_bit(name):
    _, data = planted(n=20)
    assert fit(name, data).directions[0].tobytes() == fit(name, data).directions[0].tobytes()


@pytest.mark.parametrize("name", METHODS)
def test_bad_states(name):
    with pytest.raises(DataError, match="read the same"):
        fit(name, contrast([[1, 2], [3, 4]], [[1, 2], [3, 4]]))
    with pytest.raises(DataError, match="layer 0 are not finite"):
        fit(name, contrast([[np.inf, 2]], [[1, 2]]))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"pca_diff"}))
def test_one_pair_is_enough(name):
    assert fit(name, contrast([[3, 4]], [[0, 0]])).directions[0] == pytest.approx([0.6, 0.8], abs=1e-6)


# ---- principal components ----


def test_components_are_those_of_the_covariance():
    rng = np.random.default_rng(1)
    for shape in ((30, 8), (8, 30)):
        rows = rng.standard_normal(shape) * rng.uniform(0.1, 3, shape[1])
        rows -= rows.mean(axis=0)
        _, vectors = np.linalg.eigh(np.cov(rows.T))
        assert abs(first_component(rows, 1.0) @ vectors[:, -1]) == pytest.approx(1, abs=1e-9)


def test_pca_diff_finds_what_varies_and_pca_center_what_differs():
    # every pair parts by 10 along x; along y the pairs part by -2, 0 or 2
    steps = np.array([[10, -2, 0], [10, 0, 0], [10, 2, 0]])
    data = contrast(steps, 0 * steps)
    assert abs(fit("pca_diff", data).directions[0]) == pytest.approx([0, 1, 0], abs=1e-6)
    assert fit("pca_center", data).directions[0] == pytest.approx([1, 0, 0], abs=1e-6)


def test_pca_diff_of_equal_differences():
    with pytest.raises(DataError, match="one and the same amount .* --method pca_center"):
        fit("pca_diff", contrast([[1, 0], [2, 1]], [[0, 0], [1, 1]]))


@pytest.mark.parametrize("name", ["pca_diff", "pca_center"])
def test_the_majority_of_the_pairs_gives_the_sign(name):
    # two small steps forward, one large one back: the mean points back, the majority forward
    steps = np.array([[1.0, 0], [2.0, 0], [-9.0, 0]])
    assert fit(name, contrast(steps, 0 * steps)).directions[0] == pytest.approx([1, 0], abs=1e-6)


def test_pairs_are_centred_on_the_baseline():
    # from the baseline only the positive side moves, along (1, 1); the middle of the pair is not the baseline
    positive, negative = np.array([[2.0, 2], [4, 4]]), np.zeros((2, 2))
    found = fit("pca_center", contrast(positive, negative, negative)).directions[0]
    assert found == pytest.approx(unit([1, 1]), abs=1e-6)


# ---- probe ----


def test_the_probe_is_at_a_minimum():
    _, data = planted(n=12)
    positive, negative = data.positive[0].astype(float), data.negative[0].astype(float)
    found = logistic(positive, negative)
    rows = np.concatenate([positive, negative])
    labels = np.repeat([1, -1], 12)
    size = np.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean())

    def loss(weights, bias):
        return np.logaddexp(0, -labels * (rows @ weights + bias)).mean() + 0.005 * (weights @ weights) * size**2

    best = loss(found.weights, found.bias)
    rng = np.random.default_rng(0)
    for _ in range(50):
        nudge = 1e-3 * rng.standard_normal(WIDTH) * np.abs(found.weights).max()
        # a shift of the weights moves every margin by about as much as the mean text: let the bias make up for it
        assert loss(found.weights + nudge, found.bias - nudge @ rows.mean(0)) > best
    assert loss(found.weights, found.bias + 0.01) > best < loss(found.weights, found.bias - 0.01)


def test_the_probe_in_one_dimension():
    # two points at +-1, already of unit size: the derivative of log(1 + exp(-w)) + p w²/2 is zero at w
    found = logistic(np.array([[1.0]]), np.array([[-1.0]]), penalty=0.3)
    w = float(found.weights[0])
    assert 1 / (1 + np.exp(w)) == pytest.approx(0.3 * w, rel=1e-9) and found.bias == pytest.approx(0, abs=1e-9)


def test_a_heavy_penalty_gives_the_mean_difference():
    _, data = planted(n=15, noise=0.5)
    found = logistic(data.positive[0].astype(float), data.negative[0].astype(float), penalty=1e6)
    assert unit(found.weights) @ fit("mean_difference", data).directions[0] == pytest.approx(1, abs=1e-6)


def test_separable_states_have_a_finite_probe():
    found = logistic(np.array([[100.0, 0], [101, 0]]), np.array([[0.0, 0], [1, 0]]))
    assert np.isfinite(found.weights).all() and found.accuracy(np.array([[100.0, 0]]), np.array([[0.0, 0]])) == 1.0


# ---- LDA ----


def test_lda_without_shrinkage_is_fisher_s_closed_form():
    rng = np.random.default_rng(2)
    mixing = rng.standard_normal((4, 4))
    positive, negative = rng.standard_normal((50, 4)) @ mixing + [3, 1, 0, 0], rng.standard_normal((50, 4)) @ mixing
    within = (np.cov(positive.T, bias=True) + np.cov(negative.T, bias=True)) / 2
    closed = np.linalg.solve(within, positive.mean(0) - negative.mean(0))
    found = lda(positive, negative, shrinkage=0.0)
    assert found.weights == pytest.approx(closed, rel=1e-6)
    assert found.weights @ (positive.mean(0) + negative.mean(0)) / 2 + found.bias == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("width", [4, 300])
def test_lda_with_shrinkage_is_the_inverse_of_the_shrunk_covariance(width):
    rng = np.random.default_rng(3)
    positive, negative = rng.standard_normal((20, width)) + 1, rng.standard_normal((20, width)) * 2
    within = (np.cov(positive.T, bias=True) + np.cov(negative.T, bias=True)) / 2
    shrunk = 0.7 * within + 0.3 * np.trace(within) / width * np.eye(width)
    closed = np.linalg.solve(shrunk, positive.mean(0) - negative.mean(0))
    assert lda(positive, negative, shrinkage=0.3).weights == pytest.approx(closed, rel=1e-6)


def test_whole_shrinkage_gives_the_mean_difference():
    _, data = planted(n=15, noise=0.5)
    found = lda(data.positive[0].astype(float), data.negative[0].astype(float), shrinkage=1.0)
    assert unit(found.weights) @ fit("mean_difference", data).directions[0] == pytest.approx(1, abs=1e-6)


def test_the_shrinkage_of_ledoit_and_wolf():
    # their formula, written out: distance to the scaled identity, and the mean squared error of the sample covariance
    from steer_plugins.training.extract.classifiers import _ledoit_wolf

    rng = np.random.default_rng(4)
    rows = rng.standard_normal((40, 10)) * rng.uniform(0.5, 2, 10)
    rows -= rows.mean(0)
    sample = rows.T @ rows / 40
    mu = np.trace(sample) / 10
    distance = ((sample - mu * np.eye(10)) ** 2).sum()
    noise = sum(((np.outer(row, row) - sample) ** 2).sum() for row in rows) / 40**2
    assert _ledoit_wolf(rows, np.linalg.eigvalsh(sample), mu) == pytest.approx(noise / distance, rel=1e-9)
    assert 0 < noise / distance < 1


def test_whitening_looks_past_a_loud_axis():
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((200, 3)) * [0.3, 10.0, 0.3]
    positive, negative = noise[:100] + [1, 0, 0], noise[100:]
    data = contrast(positive, negative)
    truth = np.array([1.0, 0, 0])
    assert fit("lda", data).directions[0] @ truth > 0.99
    assert fit("mean_difference", data).directions[0] @ truth < 0.97


# ---- cross-validation ----


@pytest.mark.parametrize("name", ["logistic_probe", "lda"])
def test_accuracy_is_measured_on_unseen_pairs(name):
    _, data = planted(n=30)
    assert fit(name, data).accuracy[0] > 0.9
    rng = np.random.default_rng(6)
    noise = contrast(rng.standard_normal((30, 200)), rng.standard_normal((30, 200)))
    # 60 states in 200 dimensions can always be told apart, unseen ones cannot
    assert 0.25 < fit(name, noise).accuracy[0] < 0.75
    assert logistic(noise.positive[0], noise.negative[0]).accuracy(noise.positive[0], noise.negative[0]) > 0.95


@pytest.mark.parametrize("name", ["logistic_probe", "lda"])
def test_accuracy_can_be_left_out(name):
    _, data = planted(n=10)
    assert fit(name, data, folds=0).accuracy == {}
    assert fit(name, contrast([[3, 4]], [[0, 0]])).accuracy == {}


def test_a_pair_lies_in_one_fold():
    seen = []

    def solve(positive, negative):
        assert (positive == negative).all()
        seen.append(set(positive[:, 0]))

    rows = np.arange(11.0)[:, None]
    assert cross_validated(solve, rows, rows, 5, seed=0) == 0.5
    assert len(seen) == 5 and all(len(part) in (8, 9) for part in seen)


def test_folds_are_parts():
    parts = folds(11, 5, seed=3)
    assert sorted(np.concatenate(parts)) == list(range(11))
    assert [p.tolist() for p in parts] == [p.tolist() for p in folds(11, 5, seed=3)]
    assert [p.tolist() for p in parts] != [p.tolist() for p in folds(11, 5, seed=4)]
    assert len(folds(3, 5, seed=0)) == 3


# ---- three classes, the neutral direction ----


def test_both_sides_of_the_baseline_count_alike():
    # the positive pole lies 10 away along x, the negative one 1 away along y
    data = contrast([[10, 0]], [[0, -1]], [[0, 0]])
    assert fit("mean_difference", data).directions[0] == pytest.approx(unit([1, 1]), abs=1e-6)
    assert fit("mean_difference", replace(data, baseline=None)).directions[0] == pytest.approx(unit([10, 1]), abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_neutral_direction_is_removed(name):
    _, data = planted()
    plain, without = fit(name, data), fit(name, data, remove_neutral=True)
    control = unit(data.negative[0].mean(axis=0))
    assert abs(plain.directions[0] @ control) > 1e-3
    assert without.directions[0] @ control == pytest.approx(0, abs=1e-6)
    assert np.linalg.norm(without.directions[0]) == pytest.approx(1, abs=1e-6)
    closed = unit(plain.directions[0] - (plain.directions[0] @ control) * control)
    assert without.directions[0] == pytest.approx(closed, abs=1e-6)
    assert without.notes["neutral_removed"]["0"] == pytest.approx(plain.directions[0] @ control, abs=1e-3)


def test_the_baseline_is_the_neutral_direction_where_there_is_one():
    data = contrast([[1, 1, 5]], [[-1, -1, 4]], [[0, 3, 0]])
    assert fit("mean_difference", data, remove_neutral=True).directions[0][1] == pytest.approx(0, abs=1e-6)


def test_nothing_left_without_the_neutral_direction():
    with pytest.raises(DataError, match="without --remove-neutral"):
        fit("mean_difference", contrast([[2, 0]], [[1, 0]]), remove_neutral=True)
