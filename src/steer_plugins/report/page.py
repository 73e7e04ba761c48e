"""HTML: a fragment to put into any page, and a page of its own. No scripts, nothing loaded; numbers appear on hover or tap."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .colour import NEGATIVE, POSITIVE, STRONGEST, amount
from .html import shell
from .inspection import Inspection, Reading
from .tokens import NEWLINE

_LABEL = 14  # characters of a token above its column

# Colours are mixed into whatever is behind, so that the fragment fits light and dark hosts.
_STYLE = f"""
.sp-x{{--p:{",".join(map(str, POSITIVE))};--n:{",".join(map(str, NEGATIVE))};font:15px/1.5 system-ui,sans-serif;color:inherit}}
.sp-x *{{box-sizing:border-box}}
.sp-x h3{{font-size:1rem;margin:1.2em 0 .4em}}
.sp-x .sp-note{{opacity:.75;font-size:.87em;margin:.3em 0;overflow-wrap:anywhere}}
.sp-x .p{{background:rgba(var(--p),var(--a))}}
.sp-x .n{{background:rgba(var(--n),var(--a))}}
.sp-x .sp-text{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:14px;line-height:1.9;
white-space:pre-wrap;overflow-wrap:anywhere;margin:0}}
.sp-x .sp-text span{{border-radius:3px;padding:2px 0;box-shadow:inset 1px 0 rgba(128,128,128,.35)}}
.sp-x .sp-text span.g,.sp-x td.g{{background:repeating-linear-gradient(45deg,rgba(128,128,128,.28) 0 2px,transparent 2px 5px)}}
.sp-x .sp-text b{{font-weight:600;font-size:.75em;border:1px solid currentColor;border-radius:3px;padding:0 4px;margin:0 4px;
opacity:.7}}
.sp-x [data-v]{{cursor:help}}
.sp-x [data-v]:hover,.sp-x [data-v]:focus{{outline:2px solid currentColor;outline-offset:-1px}}
.sp-x [data-v]:hover::after,.sp-x [data-v]:focus::after{{content:attr(data-v);position:fixed;left:50%;bottom:12px;
transform:translateX(-50%);width:max-content;max-width:calc(100vw - 16px);padding:.45em .8em;border-radius:8px;background:#1b1f24;
color:#fff;border:1px solid #8b949e;font:14px/1.4 system-ui,sans-serif;white-space:pre-wrap;z-index:99;pointer-events:none}}
.sp-x .sp-scroll{{overflow-x:auto;padding-bottom:6px}}
.sp-x table{{border-collapse:separate;border-spacing:1px;font-size:11px;width:auto;margin:0}}
.sp-x td,.sp-x th{{padding:0;border:0;background-clip:padding-box}}
.sp-x td{{min-width:14px;height:14px;background-color:transparent}}
.sp-x td.p{{background-color:rgba(var(--p),var(--a))}}
.sp-x td.n{{background-color:rgba(var(--n),var(--a))}}
.sp-x tbody th{{position:sticky;left:0;padding:0 6px 0 2px;text-align:right;font-weight:400;backdrop-filter:blur(6px)}}
.sp-x thead th{{vertical-align:bottom;font-weight:400;font-family:ui-monospace,Menlo,Consolas,monospace;white-space:pre}}
.sp-x thead th i{{font-style:normal;writing-mode:vertical-rl;transform:rotate(180deg);line-height:1.25;
max-height:9em;overflow:hidden}}
.sp-x .r{{border-left:2px solid currentColor}}
.sp-x .sp-key{{display:flex;flex-wrap:wrap;gap:.3em .6em;align-items:center;font-size:.87em;margin:.4em 0}}
.sp-x .sp-bar{{width:160px;height:12px;border-radius:6px;background:linear-gradient(90deg,rgba(var(--n),{STRONGEST}),
rgba(var(--n),0) 50%,rgba(var(--p),0) 50%,rgba(var(--p),{STRONGEST}))}}
""".replace("\n", "")

_PRINT = "<style>@media print{.sp-x{print-color-adjust:exact;-webkit-print-color-adjust:exact}}</style>"


def to_html(inspection: Inspection, *, heatmap: bool = True) -> str:
    """A ``<div>`` with its own style: a colour key, the tokens before and after, and a heatmap of layers by tokens.

    It takes text colour and background from where it is put. Everything from the model is escaped. ``heatmap`` False
    leaves the tokens alone, for narrow places.
    """
    parts = [f'<div class="sp-x"><style>{_STYLE}</style>', _key(inspection, heatmap)]
    for heading, reading in inspection.readings:
        parts += [f"<h3>{escape(_capital(heading))}</h3>", _tokens(inspection, reading)]
    if heatmap:
        for heading, reading in inspection.readings:
            parts += [f"<h3>Layers, {escape(heading)}</h3>", _heatmap(inspection, reading)]
    parts.append("</div>")
    return "".join(parts)


def to_page(inspections: Inspection | Sequence[Inspection], *, title: str = "") -> str:
    """A whole HTML page, self-contained, light and dark, for one inspection or several under each other."""
    several = [inspections] if isinstance(inspections, Inspection) else list(inspections)
    title = title or "Activations along " + ", ".join(one.vector for one in several)
    headings = [f"<h2>{escape(one.vector)}</h2>" if len(several) > 1 else "" for one in several]
    sections = "".join(f"<section>{head}{to_html(one)}</section>" for head, one in zip(headings, several, strict=True))
    return shell(title, [_PRINT, sections]).decode()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _key(inspection: Inspection, heatmap: bool) -> str:
    low, high = map(escape, inspection.poles)
    limit = f"{inspection.limit:g}"
    scrolls = " The pictures of layers scroll sideways." if heatmap else ""
    layers = f"{len(inspection.layers)} layer{'s' if len(inspection.layers) > 1 else ''}"
    return (
        f'<div class="sp-key"><span>{low} −{limit}</span><span class="sp-bar"></span><span>+{limit} {high}</span></div>'
        f'<p class="sp-note">{escape(inspection.model)}, {layers}. In strengths of {escape(inspection.vector)}: 0 is where '
        "neutral texts lie, +1 is where strength 1 would take them. Hover or tap for numbers. Striped: the first token, a "
        f"sink that says nothing about the text.{scrolls}</p>"
    )


def _colour(value: float, limit: float) -> str:
    """Class and amount of a value: nothing where there would be nothing to see."""
    share = amount(value, limit)
    return "" if share < 0.01 else f' class="{"p" if value > 0 else "n"}" style="--a:{share:.2f}"'


def _tokens(inspection: Inspection, reading: Reading) -> str:
    means, cosines = inspection.means(reading), reading.cosines.mean(axis=0)
    other = None if inspection.after is None or reading is inspection.before else inspection.means(inspection.before)
    out = ['<p class="sp-text">']
    for i, text in enumerate(inspection.texts):
        if i == inspection.n_prompt:
            out.append("<b>reply</b>")
        numbers = f"{text!r}: {means[i]:+.2f}" + ("" if other is None else f" (was {other[i]:+.2f})")
        numbers += f", cosine {cosines[i]:+.3f}, token {i}"
        colour = ' class="g"' if i == 0 else _colour(float(means[i]), inspection.limit)
        shown = escape(text).replace(NEWLINE, f"{NEWLINE}\n")
        out.append(f'<span{colour} tabindex="0" data-v="{escape(numbers)}">{shown}</span>')
    return "".join([*out, "</p>"])


def _heatmap(inspection: Inspection, reading: Reading) -> str:
    limit, border = inspection.limit, inspection.n_prompt
    head = "".join(f"<th{_border(i, border)}><i>{escape(_short(text))}</i></th>" for i, text in enumerate(inspection.texts))
    out = ['<div class="sp-scroll" tabindex="0"><table><thead><tr><th></th>', head, "</tr></thead><tbody>"]
    # the last layer on top, as in drawings of networks
    for row in reversed(range(len(inspection.layers))):
        out.append(f"<tr><th>{inspection.layers[row]}</th>")
        for i, text in enumerate(inspection.texts):
            value = float(reading.projections[row, i])
            numbers = f"{text!r}, layer {inspection.layers[row]}: {value:+.2f}, cosine {reading.cosines[row, i]:+.3f}"
            colour = ' class="g"' if i == 0 else _colour(value, limit)
            out.append(f'<td{colour} tabindex="-1" data-v="{escape(numbers)}"></td>')
        out.append("</tr>")
    return "".join([*out, "</tbody></table></div>"])


def _border(i: int, n_prompt: int) -> str:
    return ' class="r"' if i == n_prompt else ""


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"
