"""The page of ``steer bench control``: summary, and for each trait the arms, the dose curve, conversations and examples."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..report.html import how_to_repeat, shell, table
from ..report.svg import Series, lines, points, signed
from .arms import ARMS
from .summary import SUMMARY, interval, number, summary_rows

if TYPE_CHECKING:
    from .report import BenchReport


def control_page(report: BenchReport) -> bytes:
    """The whole page."""
    model = report.manifest["model"]
    plan = report.manifest["plan"]
    title = f"Prompting against steering: {model['name'] or model['file']}"
    body = [
        "<p>Each reply has three parts between 0 and 1: the trait, the task, and fluency under the plain model. Its score is "
        "their harmonic mean. Replies are greedy unless it says sampled; intervals are 95 % bootstrap intervals over prompts. "
        "The better of two prompts and the strengths were chosen on one half of the prompts, and everything here is measured on "
        "the other. <i>Floor</i>: the plain model cannot do these tasks, so there is nothing to compare.</p>",
        table(SUMMARY, summary_rows(report.summary), words=(1,)),
        _floors(report.summary["families"], plan),
    ]
    for trait, part in report.summary["traits"].items():
        body.append(_trait(trait, part, report.rows))
    body.append(how_to_repeat(report.manifest))
    return shell(title, body)


def _floors(families: dict[str, Any], plan: dict[str, Any]) -> str:
    rows = [
        (name, str(f["tasks"]), interval(f["plain"]["success"]), "floor" if f["plain"]["floor"] else "", f["success"])
        for name, f in families.items()
    ]
    ran = "was run" if plan["run_code"] else "was not run, only read"
    note = f'<p class="soft">Model-written code {ran}.</p>'
    return "<h3>Task families</h3>" + table(("family", "tasks", "plain success", "", "success means"), rows, words=(3, 4)) + note


def _trait(trait: str, part: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    out = [f"<h2>{escape(trait)}: {escape(part['pole'])}</h2>"]
    for family, found in part["families"].items():
        out.append(_family(trait, family, found, rows))
    out.append(_dose(part["dose"]))
    out.append(_persistence(part["persistence"]))
    out.append(_side_effects(part["side_effects"]))
    return "".join(out)


def _family(trait: str, family: str, found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    heading = f"<h3>{escape(family)}</h3>"
    if found["floor"]:
        return heading + "<p>floor: the plain model fails at nearly all of these tasks.</p>"
    strengths = "".join(f", {arm} at {strength:g}" for arm, strength in found["strength"].items())
    chosen = found["versus"]["greedy"]["best prompt"] + strengths
    arms = [arm for arm in ARMS if arm in found["arms"]]
    numbers = table(
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
    colours = {"steer": "b", "both": "b", "prompt": "a", "strong prompt": "a"}
    scores = [(arm, found["arms"][arm]["greedy"]["score"], colours.get(arm, "n")) for arm in arms]
    figure = points(scores, 0.0, 1.0, label="scores of the arms", marks=(0, 0.25, 0.5, 0.75, 1))
    return (
        f'{heading}<p class="soft">Mean score and its 95 % interval: orange is steered, blue prompted alone.</p>{figure}{numbers}'
        f'<p class="soft">Chosen: {escape(chosen)}. Trait effect: the metric less that of the plain reply to the same prompt.</p>'
        f"{_examples(trait, family, arms, rows)}"
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
    if not dose["points"]:
        return ""
    known = [(p["strength"], *p["metric"][:3]) for p in dose["points"] if None not in p["metric"][:3]]
    rows = [
        (number(p["strength"], sign=True), interval(p["metric"], sign=True), interval(p["effect"], sign=True))
        + (number(p["perplexity"]), number(p["repeats"]))
        for p in dose["points"]
    ]
    full = [
        (
            strength.replace("-", "\N{MINUS SIGN}"),
            interval(f["effect"], sign=True),
            interval(f["random"], sign=True),
            number(f["times_random"], digits=1),
        )
        + ("yes" if f["excludes_zero"] else "no",)
        for strength, f in dose["full"].items()
    ]
    return (
        f"<h3>Dose and response</h3>{_curve(known)}"
        f'<p class="soft">Metric by strength, on prompts of {escape(dose["family"])}. Spearman {number(dose["spearman"])}.</p>'
        + table(("strength", "metric", "effect", "perplexity / plain", "repeated"), rows)
        + "<p></p>"
        + table(("at full strength", "effect", "random vectors", "times random", "interval excludes 0"), full)
    )


def _curve(known: Sequence[tuple[float, float, float, float]]) -> str:
    """The metric over strengths: (strength, middle, low, high), in the order of strengths."""
    if len(known) < 2:
        return ""
    most = max(0.1, *(abs(v) for _, _, low, high in known for v in (low, high))) * 1.1
    strengths, middles, lows, highs = zip(*known, strict=True)
    series = Series("metric", list(zip(strengths, middles, strict=True)), "b", spread=list(zip(lows, highs, strict=True)))
    return lines([series], label="dose and response", left=(-most, most), marks=strengths, text=signed)


def _persistence(found: dict[str, Any]) -> str:
    turns = max((len(values) for values in found.values()), default=0)
    if not turns:
        return ""
    rows = [
        (arm, *(interval(values[i], sign=True) if i < len(values) else "–" for i in range(turns)))
        for arm, values in found.items()
    ]
    return "<h3>Through a conversation</h3>" + table(("metric in turn", *(str(i + 1) for i in range(turns))), rows)


def _side_effects(found: dict[str, Any]) -> str:
    rows = [
        (arm, interval(v["accuracy"]), interval(v["accuracy_change"], sign=True), interval(v["kl"]) if "kl" in v else "–")
        for arm, v in found.items()
        if isinstance(v, dict)
    ]
    return (
        f"<h3>Side effects at strength {found['strength']:g}</h3>"
        + table(("arm", "multiple choice", "change", "KL, nats per token"), rows)
        + '<p class="soft">KL: plain against the arm, on replies to neutral requests that were drawn from the plain model.</p>'
    )
