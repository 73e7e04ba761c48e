"""Pictures of vectors: what is drawn is what the vector holds, and what is missing is said."""

from __future__ import annotations

import builtins
import sys

import numpy as np
import pytest

from steer_plugins.cli.main import main
from steer_plugins.errors import SteerError, VectorError
from steer_plugins.plugins.manager import reset
from steer_plugins.report.plots import plot_vector, save_plot
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.vectorfile import write_vector

pytest.importorskip("matplotlib")

REPORT = {
    "window": [1, 2],
    "layers": [
        {"layer": il, "norm": 2.0**il, "ordered": 0.9, "separation": 1.0 + il, "above": 0.8, "stability": 0.95, "accuracy": 0.9}
        for il in range(4)
    ],
}
CALIBRATION = {
    "curve": [{"strength": s, "score": s / 2} for s in (-1.0, 0.0, 1.0)],
    "dose": 0.41,
    "objective": {"name": "mood", "unit": "score"},
    "plain": {"perplexity": 4.0},
    "guard": {"perplexity_ratio": 1.5},
    "rows": [{"stage": "curve", "strength": s, "perplexity": p} for s, p in ((-1.0, 6.0), (0.0, 4.0), (0.5, None), (1.0, 5.0))],
}


def vector(**changes):
    directions = {(il, "resid_post"): np.eye(4, dtype=np.float32)[0] for il in (1, 2)}
    return SteeringVector("calm", directions, provenance={"report": REPORT}, calibration=CALIBRATION).replace(**changes)


def lines(axes):
    return {line.get_label(): np.array(line.get_xydata()).tolist() for line in axes.lines}


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_panels_show_the_numbers():
    figure = plot_vector(vector())
    norms, separation, cosines, curve, shares, ratio = figure.axes
    assert lines(norms)["median norm"] == [[il, 2.0**il] for il in range(4)] and norms.get_yscale() == "log"
    assert lines(separation)["mean step / its deviation"] == [[il, 1.0 + il] for il in range(4)]
    assert lines(shares)["pairs in order"][0] == [0, 0.9] and "accuracy" in lines(shares)
    assert lines(cosines)["cosine to the layer above"][3] == [3, 0.8] and "stability over resamples" in lines(cosines)
    assert np.array(curve.lines[0].get_xydata()).tolist() == [[-1, -0.5], [0, 0], [1, 0.5]]
    assert curve.get_legend_handles_labels()[1] == ["mood"] and "0.41" in curve.get_xlabel()
    assert lines(ratio)["perplexity"] == [[-1, 1.5], [0, 1.0], [1, 1.25]]
    assert texts(figure) == []


def test_what_is_missing_is_said():
    bare = plot_vector(vector(provenance=None, calibration=None))
    assert len([t for t in texts(bare) if "no report" in t]) == 3
    assert any("not calibrated" in t for t in texts(bare))


def test_a_report_of_another_kind():
    for layers in (3, [1], [{"layer": "x"}]):
        with pytest.raises(VectorError, match="cannot be drawn"):
            plot_vector(vector(provenance={"report": {"layers": layers}}))
    assert plot_vector(vector(provenance={"report": "fine"}))
    for record in ({}, {"curve": 3}, {**CALIBRATION, "plain": None}, {**CALIBRATION, "curve": []}):
        with pytest.raises(VectorError, match="calibration is not one"):
            plot_vector(vector(calibration=record))


def test_the_picture_is_a_png_and_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        save_plot(vector(), tmp_path / f"{name}.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data == (tmp_path / "b.png").read_bytes()
    assert int.from_bytes(data[16:20], "big") == 1200 and int.from_bytes(data[20:24], "big") == 840
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_without_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *more)

    for name in [n for n in sys.modules if n.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SteerError, match=r"pip install 'steer-plugins\[pictures\]'"):
        plot_vector(vector())


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("STEER_PLUGINS", "")
    reset()
    write_vector(vector(), tmp_path / "v.safetensors")
    assert main(["plot", "v.safetensors"]) == 0
    assert (tmp_path / "calm.png").exists() and "Written to calm.png" in capsys.readouterr().out
    for arguments, sentence in {
        ("v.safetensors",): "calm.png exists",
        ("v.safetensors", "--out", "no/a.png"): "no folder no",
        ("v.safetensors", "--out", "."): "exists",
        ("v.safetensors", "--out", "a.svg"): "a plot is a PNG picture",
        ("nobody",): "nobody",
    }.items():
        assert main(["plot", *arguments]) == 1
        err = capsys.readouterr().err
        assert sentence in err and err.count("\n") == 1
    assert main(["plot", "v.safetensors", "--overwrite", "--json"]) == 0
    assert '"calm.png"' in capsys.readouterr().out
    reset()
