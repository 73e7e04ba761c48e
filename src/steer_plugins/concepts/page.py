"""An autoencoder as one HTML page: its features with contexts, rates and effects, and a search box. No server needed."""

from __future__ import annotations

from html import escape

from .index import Context, Feature, FeatureIndex

MAX_FEATURES = 20_000

_STYLE = """
:root{color-scheme:light dark;--line:#d0d7de;--soft:#59636e;--hit:#ffd8a8;--card:#f6f8fa}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;background:#fff;color:#1f2328}
h1{font-size:1.35rem;margin:.2em 0}
p,td,th{overflow-wrap:anywhere}
.soft{color:var(--soft);font-size:.87em}
table{border-collapse:collapse;margin:.6em 0;font-size:.9em}
td,th{border:1px solid var(--line);padding:.2em .6em;text-align:right}
th:first-child,td:first-child{text-align:left}
input,select{font:inherit;padding:.35em .6em;border:1px solid var(--line);border-radius:6px;background:inherit;color:inherit}
input{flex:1;min-width:10rem}
.bar{position:sticky;top:0;display:flex;flex-wrap:wrap;gap:.5em;padding:.6em 0;background:inherit;z-index:1}
article{border:1px solid var(--line);border-radius:8px;padding:.6em .8em;margin:.6em 0;background:var(--card);
content-visibility:auto;contain-intrinsic-size:auto 12rem}
article h2{font-size:1rem;margin:0}
article p{margin:.35em 0;font-size:.9em}
mark{background:var(--hit);color:inherit;border-radius:3px;padding:0 2px}
@media (prefers-color-scheme:dark){:root{--line:#30363d;--soft:#9198a1;--hit:#7a4b12;--card:#151b23}
body{background:#0d1117;color:#e6edf3}}
""".replace("\n", "")

_SCRIPT = """
const list=[...document.querySelectorAll('article')],box=document.getElementById('q'),sort=document.getElementById('s'),
told=document.getElementById('n'),home=document.getElementById('f');
function show(){const q=box.value.toLocaleLowerCase();let n=0;
for(const a of list){const hit=!q||a.textContent.toLocaleLowerCase().includes(q);a.hidden=!hit;n+=hit}
told.textContent=n+' features'}
function order(){const k=sort.value,v=a=>k==='i'?-a.dataset.i:+a.dataset[k];list.sort((a,b)=>v(b)-v(a));home.append(...list)}
box.addEventListener('input',show);sort.addEventListener('change',order);show();
""".replace("\n", "")

_FIGURES = (
    ("explained variance", "explained_variance"),
    ("cross-entropy recovered", "ce_recovered"),
)


def features_page(index: FeatureIndex, name: str) -> str:
    """The page of an autoencoder. At most :data:`MAX_FEATURES` features, the active ones first."""
    shown = sorted(index.features, key=lambda f: (f.rate == 0, f.index))[:MAX_FEATURES]
    about = index.about
    model = index.identity.label if index.identity is not None else "any model of its width"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>Features of {escape(name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Features of {escape(name)}</h1>",
        f'<p class="soft">{escape(model)}, layer {index.layer}, {len(index.features)} features, '
        f"{about.get('l0', 0):.1f} active per token, {100 * about.get('dead', 0):.1f} % never active, "
        f"trained on {about.get('tokens', 0):,} tokens.</p>",
        _twins(index),
        '<div class="bar"><input id="q" type="search" placeholder="Search names and contexts" aria-label="Search">',
        '<select id="s" aria-label="Order"><option value="i">by number</option><option value="r">by rate</option>',
        '<option value="e">by effect</option></select></div><p class="soft" id="n"></p><main id="f">',
        *(_article(feature) for feature in shown),
        f"</main><script>{_SCRIPT}</script></body></html>\n",
    ]
    return "".join(parts)


def _twins(index: FeatureIndex) -> str:
    """Each figure beside what a PCA and a random decoder reach."""
    rows = []
    for label, key in _FIGURES:
        cells = [index.about.get(prefix + key) for prefix in ("", "pca_", "random_")]
        if cells[0] is not None:
            rows.append(
                f"<tr><td>{label}</td>" + "".join(f"<td>{'' if c is None else format(c, '.3f')}</td>" for c in cells) + "</tr>"
            )
    if not rows:
        return ""
    head = "<tr><th>held out</th><th>trained</th><th>PCA</th><th>random decoder</th></tr>"
    note = (
        "PCA keeps as many coefficients per token. The random decoder has as many features, frozen; only its encoder was trained."
    )
    return f'<table>{head}{"".join(rows)}</table><p class="soft">{note}</p>'


def _article(feature: Feature) -> str:
    effect = "" if feature.effect is None else f", effect {feature.effect:.2f} nats"
    raises = "" if not feature.raises else f'<p class="soft">makes likelier: {escape(", ".join(map(repr, feature.raises)))}</p>'
    name = escape(feature.name) or '<span class="soft">no name</span>'
    lines = "".join(f"<p>{_context(c)}</p>" for c in feature.contexts) or '<p class="soft">never active on the corpus</p>'
    return (
        f'<article data-i="{feature.index}" data-r="{feature.rate:.6g}" data-e="{feature.effect or 0:.6g}">'
        f"<h2>#{feature.index} {name}</h2>"
        f'<p class="soft">active on {100 * feature.rate:.3f} % of tokens, at most {feature.largest:.1f}{effect}</p>'
        f"{raises}{lines}</article>"
    )


def _context(context: Context) -> str:
    before, after = context.text[: context.at], context.text[context.at + len(context.token) :]
    return (
        f"{escape(before)}<mark>{escape(context.token)}</mark>{escape(after)} <span class='soft'>{context.activation:.1f}</span>"
    )
