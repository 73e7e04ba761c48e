"""PNG, with matplotlib: the tokens and the heatmaps in one picture."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ..errors import SteerError
from .colour import mixed
from .inspection import Inspection, Reading
from .tokens import NEWLINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 104  # characters in a line of tokens
_LINE = 0.24  # inches from line to line
_MOST = 400  # tokens in a picture: more would be narrower than a pixel, and HTML scrolls


def to_png(inspection: Inspection) -> bytes:
    """A PNG, 1200 pixels wide and as high as it takes; the same inspection gives the same bytes.

    Of a text of more than 400 tokens the last 400 are drawn, and the title says so.

    Raises:
        SteerError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = max(0, len(inspection.texts) - _MOST)
    texts = [_printable(text) for text in inspection.texts[first:]]
    lines = _lines(texts, inspection.n_prompt - first)
    readings = inspection.readings
    text_height = 0.4 + _LINE * (lines[-1][0] + 1)
    map_height = max(1.2, 0.13 * len(inspection.layers) + 0.9)
    heights = [0.5] + [text_height] * len(readings) + [map_height] * len(readings)
    figure = Figure(figsize=(10, sum(heights)), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    _key(figure.add_subplot(grid[0]), inspection, first)
    for row, (heading, reading) in enumerate(readings, start=1):
        _tokens(figure.add_subplot(grid[row]), inspection, reading, heading, lines, first)
        _heatmap(figure.add_subplot(grid[row + len(readings)]), inspection, reading, heading, first)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def check_matplotlib() -> None:
    """Raise SteerError, which says how to get it, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise SteerError(
            "pictures as PNG need matplotlib: install it with: pip install 'steer-plugins[pictures]', or write .html"
        ) from None


def _printable(text: str) -> str:
    """The text with what the picture's font lacks as empty boxes: matplotlib would warn, and draw them as well."""
    font = _font()
    return "".join(c if font.get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in text)


def _font() -> Any:
    from matplotlib import font_manager

    return font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))


def _lines(texts: list[str], n_prompt: int) -> list[tuple[int, int, str]]:
    """Where each token stands: (line, column, text). A token too long for the line is cut."""
    line = column = 0
    placed = []
    for i, text in enumerate(texts):
        if i == n_prompt and column:
            line, column = line + 1, 0
        text = text[:_COLUMNS]
        if column + len(text) > _COLUMNS:
            line, column = line + 1, 0
        placed.append((line, column, text))
        column += len(text)
        if text.endswith(NEWLINE):
            line, column = line + 1, 0
    return placed


def _shade(value: float, limit: float) -> tuple[float, float, float]:
    r, g, b = mixed(value, limit)
    return r / 255, g / 255, b / 255


def _key(axes: Axes, inspection: Inspection, first: int) -> None:
    axes.axis("off")
    cut = f"   (the last {len(inspection.texts) - first} of {len(inspection.texts)} tokens)" if first else ""
    axes.set_title(_printable(f"{inspection.vector}   ({inspection.model}){cut}"), fontsize=11, parse_math=False)
    axes.set_xlim(-2.5, 2.5)
    axes.set_ylim(0, 1)
    for step in range(-40, 40):
        axes.axvspan(step / 40, (step + 1) / 40, 0.2, 0.7, color=_shade((step + 0.5) / 40, 1.0), linewidth=0)
    low, high, limit = *inspection.poles, f"{inspection.limit:g}"
    axes.text(-1.05, 0.45, _printable(f"{low} −{limit}"), ha="right", va="center", fontsize=9, parse_math=False)
    axes.text(1.05, 0.45, _printable(f"+{limit} {high}"), ha="left", va="center", fontsize=9, parse_math=False)


def _tokens(
    axes: Axes, inspection: Inspection, reading: Reading, heading: str, lines: list[tuple[int, int, str]], first: int
) -> None:
    from matplotlib.patches import Rectangle

    means = inspection.means(reading)
    axes.set_title(_printable(heading), fontsize=10, loc="left", parse_math=False)
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(lines[-1][0] + 1, 0)
    axes.axis("off")
    for i, (line, column, text) in enumerate(lines, start=first):
        grey = i == 0
        shade = (0.88, 0.88, 0.88) if grey else _shade(float(means[i]), inspection.limit)
        axes.add_patch(Rectangle((column, line + 0.06), len(text), 0.88, facecolor=shade, edgecolor="#cccccc", linewidth=0.3))
        # letter by letter on a grid: the width of a letter is not that of a column
        for offset, letter in enumerate(text):
            if letter != " ":
                axes.text(
                    column + offset + 0.5,
                    line + 0.5,
                    letter,
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    family="DejaVu Sans Mono",
                    parse_math=False,
                )


def _heatmap(axes: Axes, inspection: Inspection, reading: Reading, heading: str, first: int) -> None:
    import numpy as np

    values = reading.projections[:, first:]
    shades = np.array([[_shade(float(v), inspection.limit) for v in row] for row in values])
    if first == 0:
        shades[:, 0] = 0.88
    n = len(inspection.texts)
    layers = inspection.layers
    axes.imshow(
        shades, aspect="auto", origin="lower", interpolation="nearest", extent=(first - 0.5, n - 0.5, -0.5, len(layers) - 0.5)
    )
    step = max(1, len(layers) // 10)
    axes.set_yticks(range(0, len(layers), step), [str(il) for il in layers[::step]], fontsize=7)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_xlabel("token", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    if first < inspection.n_prompt < n:
        axes.axvline(inspection.n_prompt - 0.5, color="black", linewidth=1)
    axes.set_title(_printable(f"layers, {heading}"), fontsize=10, loc="left", parse_math=False)
