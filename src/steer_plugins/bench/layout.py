"""What the pages of reports share: the shell with its style, tables, and figures as inline SVG. Nothing is loaded, no scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--soft:#656d76;--line:#d0d7de;--a:#2a6fdb;--b:#d9730d;--zero:#8c959f}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--soft:#9198a1;--line:#30363d;--a:#6ea8fe;--b:#f0a04b;
--zero:#6e7681}}
body{margin:0 auto;max-width:66rem;padding:1rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem}h2{font-size:1.2rem;margin-top:2rem;border-top:1px solid var(--line);padding-top:1rem}h3{font-size:1rem}
p{max-width:46rem}.soft{color:var(--soft);font-size:.9rem}
.wide{overflow-x:auto}table{border-collapse:separate;border-spacing:0;font-size:.85rem;white-space:nowrap}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child,.l{text-align:left}
main{overflow-wrap:break-word}.prose td{white-space:normal;min-width:14rem}
tbody th{font-weight:400;position:sticky;left:0;background:var(--bg)}
svg{display:block;width:100%;max-width:32rem;height:auto;font:12.5px system-ui,sans-serif;margin:.6rem 0}
svg text{fill:var(--fg)}svg .soft{fill:var(--soft);font-size:inherit}
.axis{stroke:var(--line)}.zero{stroke:var(--zero);stroke-dasharray:3 3}
.a{stroke:var(--a);fill:var(--a)}.b{stroke:var(--b);fill:var(--b)}.n{stroke:var(--zero);fill:var(--zero)}.line{fill:none;stroke-width:2}.dot{stroke:none;opacity:.28}
.pair{display:flex;flex-wrap:wrap;gap:0 1.5rem}figure{margin:0 0 .6rem;flex:1 1 20rem;max-width:32rem;min-width:0}
details{margin:.5rem 0}summary{cursor:pointer}
blockquote{margin:.4rem 0;padding:.2rem .8rem;border-left:3px solid var(--line);white-space:pre-wrap;overflow-wrap:anywhere;
font-size:.9rem}
code,pre{font-size:.82rem;overflow-wrap:anywhere;white-space:pre-wrap}
""".replace("\n", "")

WIDTH = 420
"""Of a figure in its own units: near a phone's width in pixels, so that its letters stay legible there."""

Interval = Sequence[float | None]
"""``[middle, low, high, ...]``; None where there were no values."""


def shell(title: str, body: Iterable[str]) -> bytes:
    """A whole page. What the body holds must be escaped already."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>{''.join(body)}</main></body></html>\n"
    )
    return page.encode("utf-8", "replace")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, words: Sequence[int] = ()) -> str:
    """A table that scrolls sideways where it is too wide, its first column staying. ``words``: columns that hold text."""
    head = "".join(f'<th scope="col"{_left(i, words)}>{escape(column)}</th>' for i, column in enumerate(columns))
    lines = []
    for first, *rest in (tuple(map(str, row)) for row in rows):
        cells = "".join(f"<td{_left(i, words)}>{escape(cell)}</td>" for i, cell in enumerate(rest, start=1))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _left(i: int, words: Sequence[int]) -> str:
    return ' class="l"' if i in words else ""


def how_to_repeat(manifest: dict[str, Any]) -> str:
    """The command, and the manifest folded away."""
    return (
        "<h2>To repeat it</h2>"
        f"<pre>{escape(' '.join(manifest['command']))}</pre>"
        f"<details><summary>Manifest</summary><pre>{escape(json.dumps(manifest, indent=1))}</pre></details>"
    )


# ---- figures ----


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most so many."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) < most)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _x(value: float, low: float, high: float, left: float, right: float) -> float:
    return left + (value - low) / (high - low) * (right - left)


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
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">']
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
    out = [f'<svg viewBox="0 0 {WIDTH} {step * len(rows) + 8}" role="img" aria-label="{escape(label)}">']
    for i, (name, value, text, colour) in enumerate(rows):
        y, width = 4 + i * step, max(1.0, value / most * (right - left))
        out.append(f'<text x="{left - 9:.1f}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        out.append(f'<rect class="{colour}" stroke="none" x="{left:.1f}" y="{y + 3}" width="{width:.1f}" height="16" rx="2"/>')
        out.append(f'<text class="soft" x="{left + width + 7:.1f}" y="{y + 15}">{escape(text)}</text>')
    return "".join([*out, "</svg>"])


def curve(known: Sequence[tuple[float, float, float, float]], label: str) -> str:
    """A value between -1 and 1 over strengths, with intervals: (strength, middle, low, high), in the order of strengths."""
    if len(known) < 2:
        return ""
    left, right, top, bottom = 46, WIDTH - 16, 10, 190
    first, last = known[0][0], known[-1][0]
    most = max(0.1, *(abs(v) for _, _, low, high in known for v in (low, high))) * 1.1

    def at(strength: float, value: float) -> tuple[float, float]:
        return _x(strength, first, last, left, right), _x(value, -most, most, bottom, top)

    out = [f'<svg viewBox="0 0 {WIDTH} {bottom + 30}" role="img" aria-label="{escape(label)}">']
    for value in ticks(-most, most, 5):
        y = at(first, value)[1]
        out.append(f'<line class="{"axis" if value else "zero"}" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="soft" x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{_signed(value)}</text>')
    path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(at(s, m) for s, m, _, _ in known))
    out.append(f'<path class="b line" style="fill:none" d="{path}"/>')
    for strength, middle, low, high in known:
        (x, y), y_low, y_high = at(strength, middle), at(strength, low)[1], at(strength, high)[1]
        out.append(f'<line class="b" x1="{x:.1f}" x2="{x:.1f}" y1="{y_low:.1f}" y2="{y_high:.1f}"/>')
        said = f"{_signed(strength)}: {middle:+.2f} ({low:+.2f} to {high:+.2f})"
        out.append(f'<circle class="b" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(said)}</title></circle>')
        out.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 22}" text-anchor="middle">{_signed(strength)}</text>')
    return "".join([*out, "</svg>"])


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"
