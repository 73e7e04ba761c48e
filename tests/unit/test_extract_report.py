"""The report on a fit: numbers that can be worked out, and the window it suggests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from steer_plugins.training.extract import Contrast, FitOptions, MeanDifference, builtin_methods
from steer_plugins.training.extract.base import fit_directions
from steer_plugins.training.extract.report import RESAMPLES, LayerReport, report_fit, suggest_window

OPTIONS = FitOptions(layers=(4, 5, 6))
WIDTH = 12


def made(n=20, signal=(4.0, 4.0, 0.0), seed=0):
    """Layers 4 and 5 hold one direction, layer 6 (by default) only noise."""
    rng = np.random.default_rng(seed)
    axis = np.eye(WIDTH)[0]
    positive, negative = {}, {}
    for il, size in zip((4, 5, 6), signal, strict=True):
        texts = rng.standard_normal((n, WIDTH))
        positive[il] = np.float32(texts + size * axis + 0.5 * rng.standard_normal((n, WIDTH)))
        negative[il] = np.float32(texts)
    return Contrast(positive, negative, {4: 2.0, 5: 3.0, 6: 4.0})


def report(contrast, method=None, n_layer=10, **changes):
    method, options = method or MeanDifference(), replace(OPTIONS, **changes)
    return report_fit(method, contrast, options, fit_directions(method, contrast, options), n_layer)


@pytest.mark.parametrize("method", builtin_methods(), ids=lambda method: method.name)
def test_layers_with_a_signal_are_told_from_noise(method):
    contrast = made(40)
    if method.name == "pca_diff":  # finds what varies
        rng = np.random.default_rng(1)
        for il in (4, 5):
            contrast.positive[il][:, 0] += np.float32(rng.uniform(-3, 3, 40))
    layers = report(contrast, method).layers
    for il in (4, 5):
        assert layers[il].ordered > 0.9 and layers[il].stability > 0.8
        assert layers[il].separation > 1.5
    assert layers[6].ordered < 0.8 and layers[6].stability < 0.9
    assert layers[4].above == layers[5].below > 0.8 > layers[5].above == layers[6].below
    assert layers[4].below is None and layers[6].above is None


def test_numbers_of_a_layer():
    contrast = made()
    found = report(contrast)
    result = fit_directions(MeanDifference(), contrast, OPTIONS)
    one = found.layers[5]
    assert one.norm == 3.0 and one.distance == pytest.approx(result.strengths[5])
    assert (one.below, one.above) == pytest.approx([result.directions[5] @ result.directions[il] for il in (4, 6)], abs=1e-6)
    assert found.n_folds == 5 and found.resamples == RESAMPLES


def test_pairs_are_judged_by_directions_that_have_not_seen_them():
    # as many dimensions as that: each fit tells the pairs it has seen apart, and unseen ones no better than chance
    rng = np.random.default_rng(2)
    positive, negative = (np.float32(rng.standard_normal((30, 2000))) for _ in range(2))
    contrast = Contrast({0: positive}, {0: negative}, {0: 1.0})
    direction = fit_directions(MeanDifference(), contrast, OPTIONS).directions[0]
    assert ((positive - negative) @ direction > 0).all()
    assert 0.2 < report(contrast).layers[0].ordered < 0.8


def test_held_out_steps_without_noise():
    # steps of 1, 2, 3, 4 and 5 along x: the mean over the standard deviation
    positive = np.zeros((5, 2), np.float32)
    positive[:, 0] = np.arange(1, 6)
    one = report(Contrast({0: positive}, {0: 0 * positive}, {0: 1.0})).layers[0]
    assert one.ordered == 1.0 and one.separation == pytest.approx(3 / np.std([1, 2, 3, 4, 5], ddof=1))
    assert one.stability == pytest.approx(1) and one.below is None


def test_one_pair_is_reported_as_unknown():
    found = report(Contrast({0: np.float32([[1, 0]])}, {0: np.float32([[0, 0]])}, {0: 1.0}))
    assert found.layers[0].ordered is None and found.layers[0].stability is None
    assert found.window is None and found.to_dict()["held_out"] is None


def test_the_seed_decides_and_the_report_is_repeatable():
    contrast = made()
    assert report(contrast).to_dict() == report(contrast).to_dict()
    assert report(contrast).to_dict() != report(contrast, seed=5).to_dict()


def test_where_the_baseline_lies():
    one = np.float32([[8, 0], [8, 1]])
    contrast = Contrast({0: one}, {0: one * 0}, {0: 1.0}, {0: np.float32([[2, 0], [2, 1]])})
    assert report(contrast).layers[0].baseline == pytest.approx(0.25, abs=0.05)
    assert report(made()).layers[4].baseline is None


def test_accuracy_comes_from_the_method():
    method = next(m for m in builtin_methods() if m.name == "lda")
    assert report(made(), method).layers[4].accuracy > 0.8
    assert "accuracy" not in report(made()).to_dict()["layers"][0]


def layers(*scores):
    return {il: LayerReport(1.0, 1.0, (s + 1) / 2, 1.0, 1.0, 1.0, 1.0) for il, s in enumerate(scores)}


def test_the_window_lies_around_the_best_layer_of_the_middle():
    #             0    1    2    3    4     5    6     7    8    9
    scores = (1.0, 1.0, 1.0, 0.5, 0.91, 1.0, 0.95, 0.2, 1.0, 1.0)
    assert suggest_window(layers(*scores), 10) == (4, 6)
    assert suggest_window(layers(*[0.0] * 10), 10) is None
    assert suggest_window({}, 10) is None
    # only early layers were fitted
    assert suggest_window(layers(0.4, 0.9), 30) == (1, 1)


def test_a_lone_peak_takes_its_passable_neighbours_along():
    peak = [0.0, 0.0, 0.0, 0.6, 0.7, 1.0, 0.2, 0.0, 0.0, 0.0]
    assert suggest_window(layers(*peak), 10) == (3, 5)
    assert suggest_window(layers(*peak[:4], 0.1, 1.0, 0.6, *peak[7:]), 10) == (5, 6), "one beside it is noise"
    assert suggest_window(layers(*peak[:3], 0.1, 0.1, 1.0, *peak[6:]), 10) == (5, 5)


def test_a_layer_that_depends_on_the_sample_is_not_suggested():
    found = layers(*[1.0] * 10)
    found[5] = replace(found[5], stability=0.3)
    assert suggest_window(found, 10) in ((3, 4), (6, 6))
    assert found[5].score == pytest.approx(0.3)


def test_the_report_as_json():
    data = report(made()).to_dict()
    assert data["window"] == [4, 5] and [row["layer"] for row in data["layers"]] == [4, 5, 6]
    assert set(data["layers"][0]) == {"layer", "norm", "distance", "ordered", "separation", "above", "stability"}
