"""What is known of a vector, drawn in the colours of the page: a portable webui has no matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from steer_plugins.report.svg import Point, Series, key, lines
from steer_plugins.steering.vector import SteeringVector, layer_ranges


def report_chart(vector: SteeringVector) -> str:
    """Separation of held-out pairs by layer, the layers that are steered shaded. "" for vectors without a report."""
    report = (vector.provenance or {}).get("report")
    rows = report.get("layers") if isinstance(report, dict) else None
    if not isinstance(rows, list):
        return ""
    separation = _column(rows, "separation")
    ordered = [(x, 100 * y) for x, y in _column(rows, "ordered")]
    if not separation:
        return ""
    series = [Series("separation (standard deviations)", separation)]
    if ordered:
        series.append(Series("pairs in order (%)", ordered, "b", right=True))
    band = (vector.layers[0] - 0.5, vector.layers[-1] + 0.5)
    title = "Where the poles are told apart"
    drawn = lines(series, label=title, x_label="layer (shaded: steered)", band=band, right=(0.0, 100.0))
    return _figure(title, series, drawn)


def curve_chart(vector: SteeringVector) -> str:
    """The dose curve: score by strength, perplexity on the right with the guard's limit. "" when not calibrated."""
    record = vector.calibration or {}
    try:
        scores = [(float(point["strength"]), float(point["score"])) for point in record["curve"]]
        name = str(record["objective"]["name"])
        plain = float(record["plain"]["perplexity"])
        fluency = [
            (float(row["strength"]), float(row["perplexity"]) / plain)
            for row in record["rows"]
            if row["stage"] == "curve" and row["perplexity"] is not None
        ]
        limit = float(record["guard"]["perplexity_ratio"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return ""
    series = [Series(f"score: {name}", scores)]
    if fluency:
        series.append(Series(f"perplexity / plain (guard {limit:g})", fluency, "b", right=True))
    title = "Dose curve, the calibrated strengths shaded"
    return _figure(title, series, lines(series, label=title, x_label="strength", right=(0.0, None), band=(-1.0, 1.0)))


def summary(vector: SteeringVector) -> str:
    """One sentence on a vector, for people."""
    where = f"layers {layer_ranges(vector.layers)}, scope {vector.default_scope}"
    record = vector.calibration
    if record is None:
        return f"{vector.name}: {where}; not calibrated, so strength 1 is a guess."
    try:
        error = f" ± {record['effect_se']:.2g}" if record.get("effect_se") is not None else ""
        effect = f"from −1 to 1 the {record['objective']['name']} moves by {record['effect']:.2g}{error}"
        return f"{vector.name}: {where}; {effect} on held-out prompts."
    except (KeyError, TypeError, ValueError):
        return f"{vector.name}: {where}."


def _figure(title: str, series: Sequence[Series], drawn: str) -> str:
    return f'<figure class="steer-chart"><figcaption>{escape(title)}</figcaption>{drawn}{key(series)}</figure>'


def _column(rows: list[Any], key: str) -> list[Point]:
    return [
        (float(row["layer"]), float(row[key]))
        for row in rows
        if isinstance(row, dict) and isinstance(row.get(key), int | float) and isinstance(row.get("layer"), int)
    ]
