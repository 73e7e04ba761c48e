"""The terminal: tokens on coloured ground and a heatmap of blocks; a table of numbers where there are no colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .colour import mixed
from .inspection import Inspection, Reading
from .tokens import NEWLINE

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

_TICK = 10  # columns between the numbers under a heatmap


def to_terminal(inspection: Inspection, *, colour: bool = True, width: int = 80) -> Group:
    """Something rich prints: ``Console().print(to_terminal(inspection))``.

    ``colour`` False gives a table of numbers, one row a token, for pipes and terminals of fewer than 256 colours.
    ``width``: columns; a heatmap of a longer text is folded.
    """
    from rich.console import Group
    from rich.text import Text

    low, high = inspection.poles
    where = f"{inspection.vector}: -{inspection.limit:g} {low}, +{inspection.limit:g} {high}; {inspection.model}"
    parts: list[RenderableType] = [Text(where, style="bold")]
    if not colour:
        return Group(*parts, Text("Strengths, averaged over the layers; 0 is where neutral texts lie."), _table(inspection))
    parts.append(_key(inspection))
    for heading, reading in inspection.readings:
        parts += [Text(), Text(heading, style="bold"), _tokens(inspection, reading)]
    for heading, reading in inspection.readings:
        parts += [Text(), Text(f"layers, {heading}", style="bold"), _heatmap(inspection, reading, width)]
    return Group(*parts)


def _style(value: float, limit: float) -> str:
    r, g, b = mixed(value, limit)
    return f"#000000 on #{r:02x}{g:02x}{b:02x}"


def _key(inspection: Inspection) -> Text:
    from rich.text import Text

    bar = Text(f"-{inspection.limit:g} ")
    for step in range(-12, 13):
        bar.append(" ", _style(step / 12, 1.0))
    return bar.append(f" +{inspection.limit:g}")


def _tokens(inspection: Inspection, reading: Reading) -> Text:
    from rich.text import Text

    out = Text(overflow="fold")
    for i, (text, mean) in enumerate(zip(inspection.texts, inspection.means(reading), strict=True)):
        if i == inspection.n_prompt:
            out.append(" | ", "bold")
        out.append(text, "dim" if i == 0 else _style(float(mean), inspection.limit))
        if text.endswith(NEWLINE):
            out.append("\n")
    return out


def _heatmap(inspection: Inspection, reading: Reading, width: int) -> Text:
    from rich.text import Text

    out, n = Text(no_wrap=True), len(inspection.texts)
    per_line = max(_TICK, width - 5)
    for first in range(0, n, per_line):
        last = min(n, first + per_line)
        for row in reversed(range(len(inspection.layers))):
            out.append(f"{inspection.layers[row]:>4} ")
            for i in range(first, last):
                value = float(reading.projections[row, i])
                # a sign as well as a colour, for printouts and for eyes that see no colours
                mark = " " if abs(value) < inspection.limit / 3 else "+" if value > 0 else "-"
                out.append(":" if i == 0 else mark, "dim" if i == 0 else _style(value, inspection.limit))
            out.append("\n")
        ticks = "".join(f"{i:<{_TICK}}" for i in range(first, last, _TICK))
        out.append(" " * 5 + ticks.rstrip() + "\n", "dim")
        if first <= inspection.n_prompt < last:
            out.append(" " * (5 + inspection.n_prompt - first) + "^ reply\n", "bold")
    out.rstrip()
    return out


def _table(inspection: Inspection) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("token")
    columns = [inspection.means(reading) for _, reading in inspection.readings]
    for heading, _ in inspection.readings:
        table.add_column(Text(heading), justify="right")
    for i, text in enumerate(inspection.texts):
        if i == inspection.n_prompt:
            table.add_section()
        table.add_row(Text(text), *("sink" if i == 0 else f"{column[i]:+.2f}" for column in columns))
    return table
