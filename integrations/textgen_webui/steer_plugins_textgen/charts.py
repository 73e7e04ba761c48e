"""Small SVG charts in the colours of the page: a portable webui has no matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from steer_plugins.steering.vector import SteeringVector, layer_ranges

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 46, 14, 38

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line. ``kind``: its colour, by class (``a``, ``b``); ``right``: measured on the right axis."""

    label: str
    points: list[Point]
    kind: str = "a"
    right: bool = False


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
    return chart("Where the poles are told apart", "layer (shaded: steered)", series, band=band, right_from=0.0, right_to=100.0)


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
    return chart("Dose curve", "strength", series, right_from=0.0)


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


def chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    *,
    band: tuple[float, float] | None = None,
    right_from: float | None = None,
    right_to: float | None = None,
) -> str:
    """An ``<svg>`` that takes text colour and width from where it is put. Numbers appear on hover."""
    xs = [x for one in series for x, _ in one.points]
    x_lo, x_hi = min(xs), max(xs)
    left = _range([y for one in series if not one.right for _, y in one.points])
    right = _range([y for one in series if one.right for _, y in one.points], right_from, right_to)

    def place(x: float, y: float, scale: tuple[float, float]) -> str:
        across = LEFT + (x - x_lo) / ((x_hi - x_lo) or 1.0) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - scale[0]) / ((scale[1] - scale[0]) or 1.0) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = [f'<figure class="steer-chart"><figcaption>{escape(title)}</figcaption>']
    parts.append(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">')
    if band is not None:
        edges = [float(place(min(max(x, x_lo), x_hi), left[0], left).split(",")[0]) for x in band]
        wide = edges[1] - edges[0]
        parts.append(f'<rect class="band" x="{edges[0]:.1f}" y="{TOP}" width="{wide:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>')
    for y in _ticks(*left):
        at = place(x_lo, y, left).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(at) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    if any(one.right for one in series):
        for y in _ticks(*right):
            at = place(x_lo, y, right).split(",")[1]
            parts.append(f'<text class="b" x="{WIDTH - RIGHT + 6}" y="{float(at) + 4:.1f}">{_number(y)}</text>')
    for x in _ticks(x_lo, x_hi):
        at = place(x, left[0], left).split(",")[0]
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(x)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for one in series:
        scale = right if one.right else left
        line = " ".join(place(x, y, scale) for x, y in one.points)
        parts.append(f'<polyline class="{one.kind}" points="{line}"/>')
        for x, y in one.points:
            cx, cy = place(x, y, scale).split(",")
            tip = escape(f"{one.label}: {_number(y)} at {_number(x)}")
            parts.append(f'<circle class="{one.kind}" cx="{cx}" cy="{cy}" r="3"><title>{tip}</title></circle>')
    keys = "".join(f'<span class="{one.kind}">{escape(one.label)}</span>' for one in series)
    return "".join([*parts, f'</svg><div class="key">{keys}</div></figure>'])


def _column(rows: list[Any], key: str) -> list[Point]:
    return [
        (float(row["layer"]), float(row[key]))
        for row in rows
        if isinstance(row, dict) and isinstance(row.get(key), int | float) and isinstance(row.get("layer"), int)
    ]


def _range(values: list[float], lo: float | None = None, hi: float | None = None) -> tuple[float, float]:
    low = min(values, default=0.0) if lo is None else lo
    high = max(values, default=1.0) if hi is None else hi
    margin = 0.06 * ((high - low) or 1.0)
    return (low - margin if lo is None else low, high + margin if hi is None else high)


def _ticks(lo: float, hi: float) -> list[float]:
    """Four to eight round numbers."""
    span = (hi - lo) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= 6)
    first = math.ceil(lo / step - 1e-9)
    return [k * step for k in range(first, math.floor(hi / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
