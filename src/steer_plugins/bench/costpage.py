"""The page of ``steer bench speed`` and ``steer bench server``: for each measure the ratios, turn by turn, and the medians."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from ..report.html import how_to_repeat, shell, table
from ..report.svg import bars, points, ticks
from .costs import SUMMARY, figures, name_by_processor, ratios_of, summary_rows

if TYPE_CHECKING:
    from .report import BenchReport

TITLES = {"speed": "What steering costs", "server": "What steering costs in llama-server"}
_OURS = ("steer", "project", "read")
_INSTEAD = ("stock-cvec", "transformers", "repeng")


def cost_page(report: BenchReport) -> bytes:
    """The whole page."""
    model, plan, machine = (report.manifest[key] for key in ("model", "plan", "machine"))
    title = f"{TITLES.get(report.kind, 'Times')}: {model['name'] or model['file']}"
    threads = plan["threads"]
    facts = f"{model['file']}, {threads} thread{'s' if threads != 1 else ''}, {plan['rounds']} rounds"
    where = f"{machine['cpu'] or machine['processor']}, {machine['cores']} cores"
    load = machine["load_average"]
    if load:
        where += f"; load average {load[0]:g} at the end, this run included"
    body = [
        f"<p>{escape(facts)}. {escape(where)}.</p>",
        "<p>All arms took turns in one run. A ratio is that of speeds within a round, so more is faster; its median is given "
        "with a 95 % bootstrap interval. Orange is steer-plugins, blue what one could take instead, grey no steering. Faint "
        "dots are single rounds: the closer they lie, the quieter the machine was.</p>",
        "".join(f"<p>{escape(note)}</p>" for note in report.summary["notes"]),
    ]
    measures = report.summary["measures"]
    for name, measure in measures.items():
        if name not in map(name_by_processor, measures):
            body.append(f"<h2>{escape(name)}</h2>{_measure(name, measure, report.rows)}")
            same = name_by_processor(name)
            if same in measures:
                body.append(_measure(same, measures[same], report.rows))
    body += [
        "<h2>What the arms are</h2>",
        table(("arm", "is"), report.summary["arms"].items(), words=(1,)).replace('class="wide"', 'class="wide prose"'),
        "<h2>All numbers</h2>",
        table(SUMMARY, summary_rows(report.summary), words=(1, 3, 6)),
        how_to_repeat(report.manifest),
    ]
    return shell(title, body)


def _measure(name: str, measure: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    base, unit, arms = measure["base"], measure["unit"], measure["arms"]
    less = " (less is faster)" if unit == "s" else ""
    medians = [(arm, found["value"], f"{figures(found['value'])} {_short(unit)}", _colour(arm)) for arm, found in arms.items()]
    out = [f"<p>{escape(measure['about'])}</p>", '<div class="pair">']
    # those that are near the base, on a scale on which their differences can be seen; the bars show the others
    near = {arm: f["ratio"] for arm, f in arms.items() if arm != base and 0.7 <= f["ratio"][0] <= 1.4}
    if len(near) > 1:
        dots = {arm: ratios_of(rows, name, arm, base, unit) for arm in near}
        ends = [value for ratio in near.values() for value in ratio[1:3]] + [1.0]
        low, high = min(ends), max(ends)
        low, high = low - 0.12 * (high - low) - 0.01, high + 0.12 * (high - low) + 0.01
        out.append(f'<figure><figcaption class="soft">Speed, as a part of that of {escape(base)}</figcaption>')
        drawn = [(arm, ratio, _colour(arm)) for arm, ratio in near.items()]
        label = f"{name}: ratios to {base}"
        out.append(points(drawn, low, high, label=label, marks=ticks(low, high), zero=1.0, dots=dots, digits=3) + "</figure>")
    out.append(f'<figure><figcaption class="soft">Medians in {escape(unit)}{less}</figcaption>')
    out.append(bars(medians, label=f"{name}: medians in {unit}") + "</figure></div>")
    return "".join(out)


def _short(unit: str) -> str:
    return unit.replace("prompt ", "")


def _colour(arm: str) -> str:
    return "b" if arm.startswith(_OURS) else "a" if arm in _INSTEAD else "n"
