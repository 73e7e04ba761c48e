"""A hub as a static site: a list with search and filters, a page for each name with its card, nothing loaded from elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..errors import HubError
from ..report import html, svg
from ..report.card import curve_chart, effect_text, safety_figures
from ..steering.vector import layer_ranges
from . import index as indexes
from .schema import model_of, read_card, version_key
from .sources import INDEX, file_name

_STYLE = """
<style>.hub-bar{display:flex;flex-wrap:wrap;gap:.5rem;position:sticky;top:0;background:var(--bg);padding:.6rem 0;z-index:1}
.hub-bar input,.hub-bar select{font:inherit;padding:.35rem .6rem;border:1px solid var(--line);border-radius:6px;
background:var(--bg);color:var(--fg);min-width:8rem}.hub-bar input{flex:1 1 12rem}
.hub-list{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:.8rem;padding:0;list-style:none}
.hub-list li{border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem;overflow-wrap:anywhere}
.hub-list li[hidden]{display:none}.hub-list a{color:var(--a);font-weight:600;text-decoration:none}
.hub-list p{margin:.3rem 0;font-size:.9rem}.hub-bar select{flex:1 1 8rem;min-width:0}main a{color:var(--a)}
.prose .wide table{white-space:normal}.prose td{min-width:0;overflow-wrap:anywhere}
.cmd{display:flex;gap:.5rem;align-items:start}.cmd pre{flex:1;border:1px solid var(--line);
border-radius:6px;padding:.5rem .7rem;margin:.3rem 0}
.cmd button{font:inherit;font-size:.85rem;margin-top:.3rem;padding:.4rem .7rem;border:1px solid var(--line);border-radius:6px;
background:var(--bg);color:var(--fg);cursor:pointer}</style>
""".replace("\n", "")

_SEARCH = """
<script>const q=document.getElementById('q'),m=document.getElementById('m'),t=document.getElementById('t'),
n=document.getElementById('n'),
all=[...document.querySelectorAll('.hub-list li')];
function show(){const w=q.value.toLocaleLowerCase().split(/\\s+/).filter(Boolean);let k=0;for(const li of all){
const hit=w.every(x=>li.dataset.s.includes(x))&&(!m.value||li.dataset.m===m.value)&&(!t.value||li.dataset.t===t.value);
li.hidden=!hit;k+=hit}n.textContent=k+' of '+all.length}
for(const e of [q,m,t])e.addEventListener('input',show);show();</script>
""".replace("\n", "")

_COPY = """
<script>for(const b of document.querySelectorAll('.cmd button'))b.addEventListener('click',()=>{
navigator.clipboard.writeText(b.parentNode.querySelector('pre').textContent).then(()=>{b.textContent='copied'})});</script>
""".replace("\n", "")


def write_site(folder: Path, out: Path, url: str) -> int:
    """Write the pages of a hub's folder below ``out``; ``url``: what people add. Returns how many pages. Raises HubError."""
    index = indexes.read_index(folder / INDEX, f"the index {folder / INDEX}")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for entry in index.entries:
        by_name.setdefault(entry["name"], []).append(entry)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "index.html", _front(index.header, by_name, url))
        for name, entries in by_name.items():
            path = out / f"{_file(name)}.html"
            write_atomically(path, _page(folder, name, entries))
    except OSError as error:
        raise HubError(f"cannot write {out}: {error.strerror or error}") from None
    return 1 + len(by_name)


def _file(name: str) -> str:
    """Of a page; names hold lower-case letters, digits, dots and dashes only, so two names never share one."""
    return name.replace("/", "__")


def _front(header: dict[str, Any], by_name: dict[str, list[dict[str, Any]]], url: str) -> bytes:
    # entries are sorted by version, so that the last one for a model is its newest
    newest = {(name, _model(entry)): entry for name, entries in by_name.items() for entry in entries}
    models = sorted({model for _, model in newest})
    traits = sorted({e["trait"]["name"] for e in newest.values() if e["trait"]})
    cards = []
    for (name, _), e in newest.items():
        words = " ".join([name, e["description"], e["kind"], _model(e), *e["tags"], *(e["trait"] or {}).values()]).casefold()
        trait = (e["trait"] or {}).get("name", "")
        poles = f"{e['trait']['negative']} / {e['trait']['positive']}" if e["trait"] else e["kind"]
        curve = f"{effect_text(e['calibration'])} · " if e["calibration"] else _unmeasured(e, "not calibrated · ")
        cards.append(
            f'<li data-s="{escape(words)}" data-m="{escape(_model(e))}" data-t="{escape(trait)}">'
            f'<a href="{_file(name)}.html">{escape(name)}</a><p>{escape(e["description"] or poles)}</p>'
            f'<p class="soft">{escape(poles)} · {escape(curve)}{escape(_model(e))} · version {escape(e["version"])}</p></li>'
        )
    body = [
        _STYLE,
        f'<p class="soft">{len(by_name)} names, updated {escape(header["updated"][:10])}, ',
        f"signed with {escape(header['key'])}</p>",
        _command(f"steer hub add {shlex.quote(url)}"),
        '<div class="hub-bar"><input id="q" type="search" placeholder="Search" aria-label="Search">',
        f'<select id="m" aria-label="Model"><option value="">every model</option>{_options(models)}</select>',
        f'<select id="t" aria-label="Trait"><option value="">every trait</option>{_options(traits)}</select></div>',
        '<p class="soft" id="n"></p>',
        f'<ul class="hub-list">{"".join(cards)}</ul>{_SEARCH}{_COPY}',
    ]
    return html.shell(f"Vectors of {header['name']}", body)


def _options(values: Iterable[str]) -> str:
    return "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)


def _model(entry: dict[str, Any]) -> str:
    model = model_of(entry)
    return "any model" if model is None else model.label


def _page(folder: Path, name: str, entries: list[dict[str, Any]]) -> bytes:
    body = [_STYLE, '<p><a href="index.html">all vectors</a></p>', _command(f"steer hub pull {name}")]
    use = {
        "vector": f'steer generate --steer {name}:0.8 "Describe a walk in the forest"',
        "gate": f'steer generate --steer "mood?response{{{name}}}" "Describe a walk in the forest"',
        "trait": f"steer train {name.split('/')[1]} --trait {name}",
    }
    if entries[-1]["kind"] in use:
        body.append(_command(use[entries[-1]["kind"]]))
    for entry in sorted(entries, key=lambda e: version_key(e["version"]), reverse=True):
        path = folder / file_name(entry["card"]["sha256"], "json")
        try:
            card = read_card(path, f"the card of {name}@{entry['version']}")
        except OSError as error:
            raise HubError(f"cannot read {path}: {error.strerror or error}") from None
        body += _card(card, entry["key"])
    return html.shell(name, [*body, _COPY])


def _unmeasured(entry: dict[str, Any], text: str) -> str:
    return text if entry["kind"] == "vector" and entry["calibration"] is None else ""


def _command(text: str) -> str:
    return f'<div class="cmd"><pre>{escape(text)}</pre><button type="button">copy</button></div>'


def _card(card: dict[str, Any], key: str) -> list[str]:
    facts = [
        ("model", _model(card) + (f" ({card['base_model']})" if card["base_model"] else "")),
        ("kind", card["kind"]),
        ("licence", card["licence"]),
        ("published", card["published"][:10]),
    ]
    if card["trait"]:
        facts.append(("poles", f"{card['trait']['negative']} (−) to {card['trait']['positive']} (+)"))
    if card["layers"]:
        facts.append(("acts", f"{card['op']} at layers {layer_ranges(card['layers'])}, on {card['scope']}"))
    if card["method"]:
        facts.append(("method", card["method"]))
    if card["tried_on"]:
        facts.append(("tried on", ", ".join(card["tried_on"])))
    facts += [(label, f"{value:g}") for label, value in card["benchmark"].items()]
    facts += list(safety_figures(card["safety"]).items()) if card["safety"] else []
    facts.append(("signed with", key))
    out = [f"<h2>Version {escape(card['version'])}</h2>", f"<p>{escape(card['description'])}</p>" if card["description"] else ""]
    if card["calibration"]:
        out.append(curve_chart(card["calibration"]))
    out.append(_unmeasured(card, '<p class="soft">Not calibrated: nobody has measured what strength 1 does.</p>'))
    out.append('<div class="prose">' + html.table(["", ""], facts, words=[1]) + "</div>")
    for sample in card["samples"]:
        at = f"At {svg.signed(sample['strength'])}" if sample["strength"] else "Unsteered"
        out.append(f"<h3>{at}</h3><blockquote>{escape(sample['text'])}</blockquote>")
    return out
