"""Pictures of a vector: what its fit and its calibration measured, layer by layer and dose by dose. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_atomically
from ..errors import SteerError, VectorError
from ..steering.vector import SteeringVector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE, _SECOND, _OWN, _SUGGESTED = "#1f6feb", "#d1671f", "#1f6feb", "#3a9d5d"


def plot_vector(vector: SteeringVector) -> Figure:
    """Four panels: norms, separation on held-out pairs, cosines to the neighbours, and the dose curve.

    What a vector does not hold (an imported one has no report, an uncalibrated one no curve) is said in its panel.

    Raises:
        SteerError: matplotlib is missing. VectorError: a report or a calibration of another kind.
    """
    figure = _new_figure()
    (norms, separation), (cosines, curve) = figure.subplots(2, 2)
    report = (vector.provenance or {}).get("report")
    rows = _rows(report)
    for axes, title, draw in (
        (norms, "Median norm of the hidden states", _draw_norms),
        (separation, "Separation of held-out pairs", _draw_separation),
        (cosines, "Cosine to the neighbours, stability", _draw_cosines),
    ):
        axes.set_title(title, fontsize=10)
        if rows:
            draw(axes, rows)
            _mark_layers(axes, vector, report)
            axes.set_xlabel("layer")
        else:
            _say(axes, "no report: this vector was not made by steer train")
    curve.set_title("Dose curve", fontsize=10)
    if vector.calibration is None:
        _say(curve, "not calibrated: strength 1.0 is a guess")
    else:
        try:
            _draw_curve(curve, vector.calibration)
        except (KeyError, TypeError, ValueError):  # another tool's
            raise VectorError("this vector's calibration is not one that steer train writes, so it cannot be drawn") from None
    model = vector.identity.label if vector.identity is not None else "no model named"
    figure.suptitle(f"{vector.name}   ({model})", parse_math=False)
    return figure


def save_plot(vector: SteeringVector, path: str | Path) -> None:
    """Write :func:`plot_vector` as a PNG of 1200 x 840 pixels. Raises SteerError as it does."""
    picture = io.BytesIO()
    plot_vector(vector).savefig(picture, format="png", metadata={"Software": None})  # the same vector gives the same bytes
    write_atomically(path, picture.getvalue())


def _new_figure() -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SteerError("pictures need matplotlib: install it with: pip install 'steer-plugins[pictures]'") from None
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no display
    return figure


def _rows(report: Any) -> list[dict[str, Any]]:
    """The report's layers, as far as they are what this version writes."""
    rows = report.get("layers") if isinstance(report, dict) else None
    if rows is None:
        return []
    if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r.get("layer"), int) for r in rows):
        raise VectorError("this vector's report is not one that steer train writes, so it cannot be drawn")
    return rows


def _line(axes: Axes, rows: Sequence[dict[str, Any]], key: str, label: str, color: str) -> None:
    points = [(row["layer"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, color=color, label=label)


def _draw_norms(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    _line(axes, rows, "norm", "median norm", _LINE)
    if len({row.get("norm") for row in rows}) > 1:
        axes.set_yscale("log")  # the last layers are many times as long as the first
    axes.set_ylabel("length")


def _draw_separation(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    _line(axes, rows, "separation", "mean step / its deviation", _LINE)
    axes.set_ylabel("standard deviations")
    share = axes.twinx()
    _line(share, rows, "ordered", "pairs in order", _SECOND)
    _line(share, rows, "accuracy", "accuracy", _SUGGESTED)
    share.set_ylim(0.0, 1.05)
    share.set_ylabel("share")
    handles, labels = (a + b for a, b in zip(axes.get_legend_handles_labels(), share.get_legend_handles_labels(), strict=True))
    share.legend(handles, labels, fontsize=7, loc="lower right")


def _draw_cosines(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    _line(axes, rows, "above", "cosine to the layer above", _LINE)
    _line(axes, rows, "stability", "stability over resamples", _SECOND)
    axes.set_ylim(min(0.0, *axes.get_ylim()), 1.05)
    axes.legend(fontsize=7, loc="lower right")


def _mark_layers(axes: Axes, vector: SteeringVector, report: Any) -> None:
    """The layers that the vector steers, and the suggested window."""
    axes.axvspan(vector.layers[0] - 0.5, vector.layers[-1] + 0.5, color=_OWN, alpha=0.12, linewidth=0)
    window = report.get("window")
    if window:
        for edge in (window[0] - 0.5, window[1] + 0.5):
            axes.axvline(edge, color=_SUGGESTED, linewidth=1, linestyle="--")


def _draw_curve(axes: Axes, record: dict[str, Any]) -> None:
    strengths, scores = ([point[key] for point in record["curve"]] for key in ("strength", "score"))
    if not strengths:
        raise ValueError
    errors = [point.get("score_se", 0.0) for point in record["curve"]]
    name = record["objective"]["name"]
    axes.errorbar(strengths, scores, yerr=errors, marker="o", markersize=4, capsize=2, color=_LINE, label=name)
    axes.set_xlabel(f"strength (1.0: {record['dose']:.3g} median norms)")
    axes.set_ylabel(record["objective"]["unit"])
    plain = record["plain"]["perplexity"]
    fluent = [
        (row["strength"], row["perplexity"] / plain)
        for row in record["rows"]
        if row["stage"] == "curve" and row["perplexity"] is not None and plain
    ]
    handles, labels = axes.get_legend_handles_labels()
    if fluent:
        ratio = axes.twinx()
        ratio.plot(*zip(*fluent, strict=True), marker="s", markersize=3, linestyle=":", color=_SECOND, label="perplexity")
        ratio.axhline(record["guard"]["perplexity_ratio"], color=_SECOND, linewidth=0.8, linestyle="--")
        ratio.set_ylim(bottom=0.0)
        ratio.set_ylabel("perplexity / plain")
        more = ratio.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.legend(handles, labels, fontsize=7, loc="upper left")


def _say(axes: Axes, sentence: str) -> None:
    axes.text(0.5, 0.5, sentence, ha="center", va="center", fontsize=9, color="#666666", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
