"""The report as one page of HTML: figures are inline SVG, nothing is loaded, no scripts; for phones, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .arms import ARMS

if TYPE_CHECKING:
    from .report import BenchReport

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--soft:#656d76;--line:#d0d7de;--a:#2a6fdb;--b:#d9730d;--zero:#8c959f}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--soft:#9198a1;--line:#30363d;--a:#6ea8fe;--b:#f0a04b;
--zero:#6e7681}}
body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem}h2{font-size:1.2rem;margin-top:2rem;border-top:1px solid var(--line);padding-top:1rem}h3{font-size:1rem}
p{max-width:46rem}.soft{color:var(--soft);font-size:.9rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;white-space:nowrap}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child,.l{text-align:left}
tbody th{font-weight:400;position:sticky;left:0;background:var(--bg)}
svg{display:block;width:100%;max-width:36rem;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--fg)}svg .soft{fill:var(--soft)}
.axis{stroke:var(--line)}.zero{stroke:var(--zero);stroke-dasharray:3 3}
.a{stroke:var(--a);fill:var(--a)}.b{stroke:var(--b);fill:var(--b)}.n{stroke:var(--zero);fill:var(--zero)}.line{fill:none;stroke-width:2}
details{margin:.5rem 0}summary{cursor:pointer}
blockquote{margin:.4rem 0;padding:.2rem .8rem;border-left:3px solid var(--line);white-space:pre-wrap;overflow-wrap:anywhere;
font-size:.9rem}
code,pre{font-size:.82rem;overflow-wrap:anywhere;white-space:pre-wrap}
""".replace("\n", "")

_WIDTH = 560


def report_html(report: BenchReport) -> dict[str, bytes]:
    """``report.html``: summary, and for each trait the arms, the dose curve, conversations, side effects and examples."""
    from .report import SUMMARY, summary_rows

    model = report.manifest["model"]
    plan = report.manifest["plan"]
    title = f"Prompting against steering: {model['name'] or model['file']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        "<p>Each reply has three parts between 0 and 1: the trait, the task, and fluency under the plain model. Its score is "
        "their harmonic mean. Replies are greedy unless it says sampled; intervals are 95 % bootstrap intervals over prompts. "
        "The strength was chosen on one half of the prompts, and everything here is measured on the other. <i>Floor</i>: the "
        "plain model cannot do these tasks, so there is nothing to compare.</p>",
        _table(SUMMARY, summary_rows(report.summary)),
        _floors(report.summary["families"], plan),
    ]
    for trait, part in report.summary["traits"].items():
        body.append(_trait(trait, part, report.rows))
    body.append(_manifest(report.manifest))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    return {"report.html": page.encode("utf-8", "replace")}


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = [
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in (tuple(map(str, row)) for row in rows)
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _floors(families: dict[str, Any], plan: dict[str, Any]) -> str:
    from .report import interval

    rows = [
        (name, str(f["tasks"]), interval(f["plain"]["success"]), "floor" if f["plain"]["floor"] else "", f["success"])
        for name, f in families.items()
    ]
    ran = "was run" if plan["run_code"] else "was not run, only read"
    note = f'<p class="soft">Model-written code {ran}.</p>'
    return "<h3>Task families</h3>" + _table(("family", "tasks", "plain success", "", "success means"), rows) + note


def _trait(trait: str, part: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    out = [f"<h2>{escape(trait)}: {escape(part['pole'])}</h2>"]
    for family, found in part["families"].items():
        out.append(_family(trait, family, found, rows))
    out.append(_dose(part["dose"]))
    out.append(_persistence(part["persistence"]))
    out.append(_side_effects(part["side_effects"]))
    return "".join(out)


def _family(trait: str, family: str, found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    from .report import interval, number

    strengths = ", ".join(f"{arm} {strength:g}" for arm, strength in found["strength"].items())
    heading = f"<h3>{escape(family)}</h3>"
    if found["floor"]:
        return heading + "<p>floor: the plain model fails at nearly all of these tasks.</p>"
    arms = [arm for arm in ARMS if arm in found["arms"]]
    table = _table(
        ("arm", "score", "sampled", "trait effect", "task", "fluency", "perplexity", "context tokens", *_measures(found)),
        [
            (
                arm,
                interval(values["greedy"]["score"]),
                number(values["sampled"]["score"][0]) if "sampled" in values else "–",
                interval(values["greedy"]["effect"], sign=True),
                number(values["greedy"]["success"][0]),
                number(values["greedy"]["fluency"][0]),
                number(values["greedy"]["perplexity"]),
                number(values["greedy"]["context_tokens"][0], sign=True, digits=0),
                *(number(values["greedy"]["measures"][name][0]) for name in _measures(found)),
            )
            for arm, values in ((arm, found["arms"][arm]) for arm in arms)
        ],
    )
    bars = _bars([(arm, found["arms"][arm]["greedy"]["score"]) for arm in arms])
    return (
        f"{heading}{bars}{table}"
        f'<p class="soft">Strengths chosen: {escape(strengths)}. Trait effect: the metric less that of the plain reply to the '
        f"same prompt.</p>{_examples(trait, family, arms, rows)}"
    )


def _measures(found: dict[str, Any]) -> list[str]:
    return list(found["arms"]["plain"]["greedy"]["measures"])


def _examples(trait: str, family: str, arms: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """The replies to one prompt, the first of the scored half, whatever they are like."""
    mine = [
        row
        for row in rows
        if row["kind"] == "reply"
        and (row["trait"], row["family"], row["half"], row["decoding"]) == (trait, family, "score", "greedy")
    ]
    if not mine:
        return ""
    first = {row["arm"]: row for row in mine if row["task"] == mine[0]["task"]}
    quotes = "".join(
        f"<p class=soft>{escape(arm)}: metric {first[arm]['metric']:+.2f}, score {first[arm]['score']:.2f}</p>"
        f"<blockquote>{escape(first[arm]['text']) or '(nothing)'}</blockquote>"
        for arm in arms
        if arm in first
    )
    return f"<details><summary>Replies to the first prompt ({escape(mine[0]['task'])})</summary>{quotes}</details>"


def _dose(dose: dict[str, Any]) -> str:
    from .report import interval, number

    if not dose["points"]:
        return ""
    points = [(p["strength"], p["metric"]) for p in dose["points"]]
    rows = [
        (number(p["strength"], sign=True), interval(p["metric"], sign=True), interval(p["effect"], sign=True))
        + (number(p["perplexity"]), number(p["repeats"]))
        for p in dose["points"]
    ]
    full = [
        (strength, interval(f["effect"], sign=True), interval(f["random"], sign=True), number(f["times_random"], digits=1))
        + ("yes" if f["excludes_zero"] else "no",)
        for strength, f in dose["full"].items()
    ]
    return (
        f"<h3>Dose and response</h3>{_curve(points)}"
        f'<p class="soft">Metric by strength, on prompts of {escape(dose["family"])}. Spearman {number(dose["spearman"])}.</p>'
        + _table(("strength", "metric", "effect", "perplexity / plain", "repeated"), rows)
        + "<p></p>"
        + _table(("at full strength", "effect", "random vectors", "times random", "interval excludes 0"), full)
    )


def _persistence(found: dict[str, Any]) -> str:
    from .report import interval

    turns = max((len(values) for values in found.values()), default=0)
    if not turns:
        return ""
    rows = [
        (arm, *(interval(values[i], sign=True) if i < len(values) else "–" for i in range(turns)))
        for arm, values in found.items()
    ]
    return "<h3>Through a conversation</h3>" + _table(("metric in turn", *(str(i + 1) for i in range(turns))), rows)


def _side_effects(found: dict[str, Any]) -> str:
    from .report import interval

    rows = [
        (arm, interval(v["accuracy"]), interval(v["accuracy_change"], sign=True), interval(v["kl"]) if "kl" in v else "–")
        for arm, v in found.items()
        if isinstance(v, dict)
    ]
    return (
        f"<h3>Side effects at strength {found['strength']:g}</h3>"
        + _table(("arm", "multiple choice", "change", "KL, nats per token"), rows)
        + '<p class="soft">KL: plain against the arm, on replies to neutral requests that were drawn from the plain model.</p>'
    )


def _manifest(manifest: dict[str, Any]) -> str:
    import json

    return (
        "<h2>To repeat it</h2>"
        f"<pre>{escape(' '.join(manifest['command']))}</pre>"
        f"<details><summary>Manifest</summary><pre>{escape(json.dumps(manifest, indent=1))}</pre></details>"
    )


# ---- figures ----


def _x(value: float, low: float, high: float, left: float, right: float) -> float:
    return left + (value - low) / (high - low) * (right - left)


def _bars(arms: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Mean scores as points with their intervals, one line for each arm, from 0 to 1."""
    left, right, step = 110, _WIDTH - 20, 24
    height = step * len(arms) + 30
    out = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="scores of the arms">']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _x(tick, 0, 1, left, right)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
        out.append(f'<text class="soft" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>')
    for i, (arm, (mean, low, high, *_)) in enumerate(arms):
        y = 16 + i * step
        colour = {"steer": "b", "both": "b", "prompt": "a", "strong prompt": "a"}.get(arm, "n")
        out.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(arm)}</text>')
        if mean is not None and low is not None and high is not None:
            ends = [f"{_x(value, 0, 1, left, right):.1f}" for value in (low, high)]
            out.append(f'<line class="{colour}" stroke-width="3" x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}"/>')
            mark = f"{arm}: {mean:.2f} ({low:.2f} to {high:.2f})"
            out.append(
                f'<circle class="{colour}" cx="{_x(mean, 0, 1, left, right):.1f}" cy="{y}" r="5"><title>{mark}</title></circle>'
            )
    return "".join([*out, "</svg>"])


def _curve(points: Sequence[tuple[float, Sequence[float | None]]]) -> str:
    """A metric between -1 and 1 over strengths, with intervals."""

    def signed(value: float) -> str:
        return f"{value:+g}" if value else "0"

    left, right, top, bottom = 52, _WIDTH - 20, 10, 200
    known = [(s, m, low, high) for s, (m, low, high, *_) in points if m is not None and low is not None and high is not None]
    if len(known) < 2:
        return ""
    first, last = known[0][0], known[-1][0]
    most = max(0.1, *(abs(v) for _, _, low, high in known for v in (low, high))) * 1.1

    def at(strength: float, value: float) -> tuple[float, float]:
        return _x(strength, first, last, left, right), _x(value, -most, most, bottom, top)

    out = [f'<svg viewBox="0 0 {_WIDTH} {bottom + 30}" role="img" aria-label="dose and response">']
    for value in (-most, 0.0, most):
        y = at(first, value)[1]
        out.append(f'<line class="{"axis" if value else "zero"}" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="soft" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(at(s, m) for s, m, _, _ in known))
    out.append(f'<path class="b line" style="fill:none" d="{path}"/>')
    for strength, mean, low, high in known:
        (x, y), y_low, y_high = at(strength, mean), at(strength, low)[1], at(strength, high)[1]
        out.append(f'<line class="b" x1="{x:.1f}" x2="{x:.1f}" y1="{y_low:.1f}" y2="{y_high:.1f}"/>')
        mark = f"{signed(strength)}: {mean:+.2f} ({low:+.2f} to {high:+.2f})"
        out.append(f'<circle class="b" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{mark}</title></circle>')
        out.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 22}" text-anchor="middle">{signed(strength)}</text>')
    return "".join([*out, "</svg>"])
