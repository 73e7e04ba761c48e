"""What pages have in common: the shell with its style, and tables. Nothing is loaded, no scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from . import svg

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--soft:#656d76;--line:#d0d7de;--a:#2a6fdb;--b:#d9730d;--zero:#8c959f}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--soft:#9198a1;--line:#30363d;--a:#6ea8fe;--b:#f0a04b;
--zero:#6e7681}}
body{margin:0 auto;max-width:66rem;padding:1rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem}h2{font-size:1.2rem;margin-top:2rem;border-top:1px solid var(--line);padding-top:1rem}h3{font-size:1rem}
p{max-width:46rem}.soft{color:var(--soft);font-size:.9rem}
.wide{overflow-x:auto}.wide table{border-collapse:separate;border-spacing:0;font-size:.85rem;white-space:nowrap}
.wide th,.wide td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right}
.wide th:first-child,.wide td:first-child,.wide .l{text-align:left}
main{overflow-wrap:break-word}.prose td{white-space:normal;min-width:14rem}
.wide tbody th{font-weight:400;position:sticky;left:0;background:var(--bg)}
.pair{display:flex;flex-wrap:wrap;gap:0 1.5rem}figure{margin:0 0 .6rem;flex:1 1 20rem;max-width:32rem;min-width:0}
details{margin:.5rem 0}summary{cursor:pointer}
blockquote{margin:.4rem 0;padding:.2rem .8rem;border-left:3px solid var(--line);white-space:pre-wrap;overflow-wrap:anywhere;
font-size:.9rem}
code,pre{font-size:.82rem;overflow-wrap:anywhere;white-space:pre-wrap}
""".replace("\n", "")


def shell(title: str, body: Iterable[str]) -> bytes:
    """A whole page. What the body holds must be escaped already."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{svg.STYLE}</style></head><body><main><h1>{escape(title)}</h1>{''.join(body)}</main></body></html>\n"
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
