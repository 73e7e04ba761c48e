"""Figures as inline SVG, for pages and for hosts. Their colours are the variables ``--a``, ``--b`` and ``--zero`` of the place
they are put in, and its text colour; numbers appear on hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
.steer-svg{display:block;width:100%;max-width:32rem;height:auto;font:12.5px system-ui,sans-serif;margin:.6rem 0}
.steer-svg text{fill:currentColor}.steer-svg .soft{opacity:.7;font-size:inherit;color:inherit}
.steer-svg .axis{stroke:currentColor;opacity:.16}.steer-svg .zero{stroke:var(--zero,#8c959f);stroke-dasharray:3 3}
.steer-svg .a{stroke:var(--a,#2a6fdb);fill:var(--a,#2a6fdb)}.steer-svg .b{stroke:var(--b,#d9730d);fill:var(--b,#d9730d)}
.steer-svg .n{stroke:var(--zero,#8c959f);fill:var(--zero,#8c959f)}
.steer-svg .line{fill:none;stroke-width:2}.steer-svg .dot{stroke:none;opacity:.28}.steer-svg .band{stroke:none;opacity:.13}
.steer-svg text.b{stroke:none;fill:var(--b,#d9730d)}
.steer-key{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.85rem}
.steer-key span::before{content:"";display:inline-block;width:14px;height:3px;margin-right:6px;vertical-align:middle;
background:var(--a,#2a6fdb)}
.steer-key span.b::before{background:var(--b,#d9730d)}
""".replace("\n", "")

WIDTH, HEIGHT = 420, 230
"""Of a figure in its own units: near a phone's width in pixels, so that its letters stay legible there."""

Interval = Sequence[float | None]
"""``[middle, low, high, ...]``; None where there were no values."""

Point = tuple[float, float]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most so many."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) < most)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Three digits, with a real minus."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """As :func:`number`, with a plus too."""
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _x(value: float, low: float, high: float, left: float, right: float) -> float:
    return left + (value - low) / ((high - low) or 1.0) * (right - left)


def _start(height: float, label: str) -> str:
    return f'<svg class="steer-svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'


def points(
    rows: Sequence[tuple[str, Interval, str]],
    low: float,
    high: float,
    *,
    label: str,
    marks: Sequence[float] = (),
    zero: float | None = None,
    dots: Mapping[str, Sequence[float]] | None = None,
    digits: int = 2,
) -> str:
    """A line for each row of (name, interval, colour): a, b or n, with its middle as a point.

    ``marks``: numbers on the axis; ``zero``: where nothing differs, a dashed line; ``dots``: single values, small, behind.
    """
    longest = max((len(name) for name, *_ in rows), default=0)
    left, right, step = min(150, 20 + 6.6 * longest), WIDTH - 14, 26
    height = step * len(rows) + 30
    out = [_start(height, label)]
    for mark in marks:
        x = _x(mark, low, high, left, right)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
        out.append(f'<text class="soft" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{mark:g}</text>')
    if zero is not None and low <= zero <= high:
        x = _x(zero, low, high, left, right)
        out.append(f'<line class="zero" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
    for i, (name, (middle, start, end, *_), colour) in enumerate(rows):
        y = 17 + i * step
        out.append(f'<text x="{left - 9:.1f}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for k, value in enumerate((dots or {}).get(name, ())):
            if low <= value <= high:  # scattered up and down, so that equal ones do not hide one another
                x, up = _x(value, low, high, left, right), (k * 5 % 7 - 3) * 1.6
                out.append(f'<circle class="{colour} dot" cx="{x:.1f}" cy="{y + up:.1f}" r="1.8"/>')
        if middle is None or start is None or end is None:
            continue
        ends = [f"{_x(min(max(value, low), high), low, high, left, right):.1f}" for value in (start, end)]
        out.append(f'<line class="{colour}" stroke-width="3" x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}"/>')
        said = f"{name}: {middle:.{digits}f} ({start:.{digits}f} to {end:.{digits}f})"
        x = _x(min(max(middle, low), high), low, high, left, right)
        out.append(f'<circle class="{colour}" cx="{x:.1f}" cy="{y}" r="5"><title>{escape(said)}</title></circle>')
    return "".join([*out, "</svg>"])


def bars(rows: Sequence[tuple[str, float, str, str]], *, label: str) -> str:
    """A bar from zero for each row of (name, value, what is written at its end, colour)."""
    longest = max((len(name) for name, *_ in rows), default=0)
    left, right, step = min(150, 20 + 6.6 * longest), WIDTH - 84, 26
    most = max((value for _, value, *_ in rows), default=1.0) or 1.0
    out = [_start(step * len(rows) + 8, label)]
    for i, (name, value, text, colour) in enumerate(rows):
        y, width = 4 + i * step, max(1.0, value / most * (right - left))
        out.append(f'<text x="{left - 9:.1f}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        out.append(f'<rect class="{colour}" stroke="none" x="{left:.1f}" y="{y + 3}" width="{width:.1f}" height="16" rx="2"/>')
        out.append(f'<text class="soft" x="{left + width + 7:.1f}" y="{y + 15}">{escape(text)}</text>')
    return "".join([*out, "</svg>"])


@dataclass(frozen=True)
class Series:
    """A line. ``kind``: its colour, a or b; ``right``: measured on the right axis; ``spread``: (low, high) at each point."""

    label: str
    points: Sequence[Point]
    kind: str = "a"
    right: bool = False
    spread: Sequence[Point] = ()


def lines(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "",
    band: Point | None = None,
    left: tuple[float | None, float | None] = (None, None),
    right: tuple[float | None, float | None] = (None, None),
    marks: Sequence[float] | None = None,
    text: Callable[[float], str] = number,
) -> str:
    """Lines over one x axis, with a left and, if a series asks for it, a right y axis.

    ``band``: from where to where along x is shaded; ``left``, ``right``: ends of an axis, None to take those of its values;
    ``marks``: numbers on the x axis; ``text``: how numbers are written.
    """
    x_low, x_high = (end(x for one in series for x, _ in one.points) for end in (min, max))
    two = any(one.right for one in series)
    x0, x1, y0, y1 = 46, WIDTH - (46 if two else 16), HEIGHT - (40 if x_label else 26), 12
    scales = {side: _scale([one for one in series if one.right == side], *ends) for side, ends in ((False, left), (True, right))}

    def place(x: float, y: float, side: bool = False) -> Point:
        return _x(x, x_low, x_high, x0, x1), _x(y, *scales[side], y0, y1)

    out = [_start(HEIGHT, label)]
    if band is not None:
        edges = [place(min(max(x, x_low), x_high), 0.0)[0] for x in band]
        out.append(f'<rect class="a band" x="{edges[0]:.1f}" y="{y1}" width="{edges[1] - edges[0]:.1f}" height="{y0 - y1}"/>')
    for value in ticks(*scales[False]):
        y = place(x_low, value)[1]
        out.append(f'<line class="{"axis" if value else "zero"}" x1="{x0}" x2="{x1}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="soft" x="{x0 - 7}" y="{y + 4:.1f}" text-anchor="end">{text(value)}</text>')
    for value in ticks(*scales[True]) if two else ():
        out.append(f'<text class="b" x="{x1 + 6}" y="{place(x_low, value, True)[1] + 4:.1f}">{text(value)}</text>')
    for value in ticks(x_low, x_high) if marks is None else marks:
        out.append(f'<text class="soft" x="{place(value, 0.0)[0]:.1f}" y="{y0 + 17}" text-anchor="middle">{text(value)}</text>')
    if x_label:
        out.append(f'<text class="soft" x="{(x0 + x1) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for one in series:
        at = [place(x, y, one.right) for x, y in one.points]
        out.append(
            f'<polyline class="{one.kind} line" style="fill:none" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>'
        )
        said = [f"{one.label}: {text(y)} at {text(x)}" for x, y in one.points]
        for i, (low, high) in enumerate(one.spread):
            ends = [place(x_low, value, one.right)[1] for value in (low, high)]
            out.append(
                f'<line class="{one.kind}" x1="{at[i][0]:.1f}" x2="{at[i][0]:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            )
            said[i] += f" ({text(low)} to {text(high)})"
        for (x, y), words in zip(at, said, strict=True):
            out.append(f'<circle class="{one.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(words)}</title></circle>')
    return "".join([*out, "</svg>"])


def key(series: Sequence[Series]) -> str:
    """What the colours of :func:`lines` mean."""
    return (
        '<div class="steer-key">' + "".join(f'<span class="{one.kind}">{escape(one.label)}</span>' for one in series) + "</div>"
    )


def _scale(series: Sequence[Series], low: float | None, high: float | None) -> Point:
    values = [y for one in series for _, y in one.points] + [y for one in series for ends in one.spread for y in ends]
    bottom = min(values, default=0.0) if low is None else low
    top = max(values, default=1.0) if high is None else high
    margin = 0.06 * ((top - bottom) or 1.0)
    return (bottom - margin if low is None else bottom, top + margin if high is None else top)
