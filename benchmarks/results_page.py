"""The results page: what a run of ``steer bench control`` says, in words and tables, as Markdown. Every number is the run's.

It holds the traits to targets (:func:`targets`) and says by how much one is missed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_plugins.bench.arms import PROMPTS, RANDOMS
from steer_plugins.bench.control import FLOOR, SWING
from steer_plugins.bench.report import BenchReport
from steer_plugins.bench.summary import SUMMARY, interval, number, summary_rows

TIMES_RANDOM = 5.0
"""The effect at full strength is to be at least so many times that of random vectors of the same norms."""
SPEARMAN = 0.9
"""The rank correlation of metric and strength is to be at least this."""
PERPLEXITY = 1.5
"""The mean perplexity at strength 1 is to stay below so many times the plain one."""


@dataclass(frozen=True)
class Target:
    """One target of one trait. ``value``: what was measured; ``missed``: by how much it is missed, empty when it is met."""

    name: str
    value: str
    missed: str = ""


# ---- targets ----


def targets(part: dict[str, Any]) -> list[Target]:
    """The targets of a trait, in the order of the page's table. ``part``: the trait's part of the summary."""
    dose = part["dose"]
    if not dose["points"]:
        return []
    swing = dose["full"][SWING]
    missed = "" if swing["excludes_zero"] else "the interval holds 0"
    found = [Target("effect", interval(swing["effect"], sign=True), missed)]
    times = swing["times_random"]
    # None: the random vectors did nothing at all
    found.append(Target("times random", "∞") if times is None else _at_least("times random", times, TIMES_RANDOM, 1))
    found.append(_at_least("Spearman", dose["spearman"], SPEARMAN, 2))
    for point in dose["points"]:
        if abs(point["strength"]) == 1.0:
            value = point["perplexity"]
            missed = "" if value is not None and value < PERPLEXITY else f"{number(value)}, not below {PERPLEXITY:g}"
            found.append(Target(f"perplexity at {point['strength']:+g}", number(value), missed))
    return found


def _at_least(name: str, value: float | None, wanted: float, digits: int) -> Target:
    missed = "" if value is not None and value >= wanted else f"{number(value, digits=digits)}, not {wanted:g}"
    return Target(name, number(value, digits=digits), missed)


def against_prompt(summary: dict[str, Any], arm: str) -> dict[str, list[tuple[str, str, Sequence[float]]]]:
    """How ``arm`` does against the better prompt in greedy replies: ``ahead``, ``behind``, ``open`` (the interval holds 0) lists
    of (trait, family, [difference, low, high, n]), and ``floor`` ones of (trait, family, [])."""
    found: dict[str, list[tuple[str, str, Sequence[float]]]] = {"ahead": [], "behind": [], "open": [], "floor": []}
    for trait, part in summary["traits"].items():
        for family, one in part["families"].items():
            if one["floor"]:
                found["floor"].append((trait, family, []))
                continue
            change = one["versus"]["greedy"][f"{arm} - prompt"]
            found["ahead" if change[1] > 0 else "behind" if change[2] < 0 else "open"].append((trait, family, change))
    return found


def better_with_prompt(summary: dict[str, Any]) -> dict[str, float]:
    """By trait: how far steering with the prompt is above the better prompt alone, in mean score over the trait's families
    that are not at the floor."""
    found = {}
    for trait, part in summary["traits"].items():
        changes = [f["versus"]["greedy"]["both - prompt"][0] for f in part["families"].values() if not f["floor"]]
        if changes:
            found[trait] = statistics.fmean(changes)
    return found


# ---- the page ----


def results_page(report: BenchReport) -> str:
    """The whole page."""
    summary, manifest = report.summary, report.manifest
    model = manifest["model"]
    parts = [
        f"# Results: {Path(model['file'] or model['name'] or 'a model').stem}",
        "Written from a report of `steer bench control`: every number and every list below is of that one run. What is "
        "measured and how is told in [benchmarks.md](benchmarks.md).",
        *_short(summary),
        "## Targets",
        *_targets(summary),
        "## Scores",
        "Mean score of greedy replies (harmonic mean of trait, task and fluency, 0 to 1) on the scored half of the prompts, and "
        "paired differences from the better of the two prompts, which was chosen on the other half, with 95 % bootstrap "
        "intervals. `both` is that prompt and the vector.",
        table(SUMMARY, summary_rows(summary)),
        *_chosen(summary),
        *_who_wins(summary),
        "## Dose and response",
        *_curves(summary),
        "## Through a conversation",
        *_conversations(summary),
        "## Side effects and context",
        *_side_effects(summary),
        "## To repeat it",
        *_repeat(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _short(summary: dict[str, Any]) -> list[str]:
    """The result in a few sentences."""
    better = better_with_prompt(summary)
    above = [trait for trait, change in better.items() if change > 0]
    lines = []
    for arm, what in (("steer", "Steering alone"), ("both", "Steering with the prompt")):
        found = against_prompt(summary, arm)
        n = sum(len(found[kind]) for kind in ("ahead", "open", "behind"))
        lines.append(
            f"- {what}, against the better of two prompts, on {n} pairs of trait and task: ahead in {len(found['ahead'])}, "
            f"behind in {len(found['behind'])}, undecided in {len(found['open'])}."
        )
    if better:
        lines.append(
            f"- In mean score, steering with the prompt is above the prompt alone for {len(above)} of {len(better)} traits."
        )
    held = {trait: targets(part) for trait, part in summary["traits"].items()}
    met = [trait for trait, found in held.items() if found and not any(target.missed for target in found)]
    lines.append(f"- All targets of effect, dose and fluency are met by {len(met)} of {len(held)} traits{_named(met)}.")
    return ["\n".join(lines)]


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _targets(summary: dict[str, Any]) -> list[str]:
    better = better_with_prompt(summary)
    rows, missed = [], []
    columns: list[str] = []
    for trait, part in summary["traits"].items():
        found = targets(part)
        if trait in better:
            short = "" if better[trait] > 0 else f"{number(better[trait], sign=True)}, not above 0"
            found.append(Target("with prompt − prompt", number(better[trait], sign=True), short))
        columns = max(columns, [target.name.replace("-", "−") for target in found], key=len)
        rows.append((f"{trait}", *(target.value + (" ✗" if target.missed else " ✓") for target in found)))
        if any(target.missed for target in found):
            listed = "; ".join(f"{t.name.replace('-', '−')}: {t.missed}" for t in found if t.missed)
            missed.append(f"- {trait}: {listed}.")
    text = (
        "What the bundled traits are held to: an effect at full strength whose 95 % interval excludes 0, and which is at least "
        f"{TIMES_RANDOM:g} times the mean size of the effects of {RANDOMS} random vectors of the same norms; a Spearman "
        f"correlation of metric and strength of at least {SPEARMAN:g}; a mean perplexity below {PERPLEXITY:g} times the "
        "plain one at strength 1 (at −1 it is held to the same); and a mean score that is higher with steering and prompt "
        "than with the better prompt alone. The effect is the metric at 1 less that at −1; each side's distance from plain "
        "stands below. ✓ met, ✗ missed."
    )
    return [text, table(("trait", *columns), rows), "Missed:\n\n" + "\n".join(missed) if missed else "None is missed."]


def _chosen(summary: dict[str, Any]) -> list[str]:
    """What the half that chooses decided."""
    arms = ("steer", "both")
    rows = [
        (trait, name, one["versus"]["greedy"]["best prompt"], *(number(one["strength"][arm], digits=3) for arm in arms))
        for trait, part in summary["traits"].items()
        for name, one in part["families"].items()
        if not one["floor"]
    ]
    columns = ("trait", "tasks", "prompt", "strength of steer", "strength of both")
    return ["What was chosen on the other half:", table(columns, rows)] if rows else []


def _who_wins(summary: dict[str, Any]) -> list[str]:
    steer, both = against_prompt(summary, "steer"), against_prompt(summary, "both")
    floors = [name for name, family in summary["families"].items() if family["plain"]["floor"]]
    return [
        "### What steering wins",
        _listed(steer["ahead"], "Steering alone is ahead of the better prompt, its interval above 0, in"),
        _listed(both["ahead"], "Steering with the prompt is ahead of the better prompt in"),
        "### What prompting wins",
        _listed(steer["behind"], "The better prompt is ahead of steering alone in"),
        _listed(both["behind"], "The better prompt alone is ahead of steering with the prompt in"),
        "### Undecided",
        _listed(steer["open"], "The interval of steering alone less the better prompt holds 0 in"),
        "### What neither can do",
        *_neither(summary, floors),
    ]


def _listed(found: Sequence[tuple[str, str, Sequence[float]]], begin: str) -> str:
    if not found:
        return f"{begin} no case."
    return f"{begin} " + ", ".join(f"{t} ({f}, {number(change[0], sign=True)})" for t, f, change in found) + "."


def _neither(summary: dict[str, Any], floors: Sequence[str]) -> list[str]:
    """Families at the floor, and those where no arm brings the task's success far up."""
    lines = [
        f"- {name}: *floor*. The plain model succeeds in {number(100 * (f['plain']['success'][0] or 0.0), digits=0)} % (less "
        f"than {100 * FLOOR:g} %), so there is nothing to compare. Success means: {f['success']}."
        for name, f in summary["families"].items()
        if name in floors
    ]
    for name, family in summary["families"].items():
        if name in floors:
            continue
        best: dict[str, float] = {}
        for part in summary["traits"].values():
            one = part["families"].get(name)
            if one is not None:
                for arm, values in one["arms"].items():
                    best[arm] = max(best.get(arm, 0.0), values["greedy"]["success"][0] or 0.0)
        if best:
            top = max(best, key=lambda arm: best[arm])
            lines.append(
                f"- {name}: plain success {interval(family['plain']['success'])}; the most that any arm of any trait "
                f"reaches is {number(best[top])} ({top})."
            )
    return ["\n".join(lines)] if lines else []


def _curves(summary: dict[str, Any]) -> list[str]:
    rows = []
    strengths: list[float] = []
    for trait, part in summary["traits"].items():
        points = part["dose"]["points"]
        strengths = strengths or [p["strength"] for p in points]
        rows.append((trait, "metric", *(number(p["metric"][0], sign=True) for p in points)))
        rows.append(("", "perplexity / plain", *(number(p["perplexity"]) for p in points)))
        rows.append(("", "repeated 4-grams", *(number(p["repeats"]) for p in points)))
    text = "The metric from −1 to 1 (towards the positive pole), and what the dose costs, on prompts of the conversation family."
    heads = [f"{s:+g}".replace("-", "−") if s else "0" for s in strengths]
    sides = []
    for trait, part in summary["traits"].items():
        for key, full in part["dose"].get("full", {}).items():
            where = "−1 to 1" if key == SWING else f"plain to {key}".replace("-", "−")
            clear = "yes" if full["excludes_zero"] else "no"
            times = number(full["times_random"], digits=1)
            sides.append((trait, where, interval(full["effect"], sign=True), clear, number(full["random_size"]), times))
    return [
        text,
        table(("trait", "", *heads), rows),
        "The effect of full strength on the scored half of the prompts, and the mean size of what random vectors of the same "
        "norms do:",
        table(("trait", "from", "effect", "excludes 0", "random", "times random"), sides),
    ]


def _conversations(summary: dict[str, Any]) -> list[str]:
    rows = []
    turns = 0
    for trait, part in summary["traits"].items():
        for arm, values in part["persistence"].items():
            turns = max(turns, len(values))
            rows.append((trait, arm, *(number(value[0], sign=True) for value in values)))
    rows = [(*row, *["–"] * (turns + 2 - len(row))) for row in rows]
    text = "The metric, towards the pole that is wanted, in each turn; the system prompt stands at the beginning alone."
    return [text, table(("trait", "arm", *(f"turn {i + 1}" for i in range(turns))), rows)]


def _side_effects(summary: dict[str, Any]) -> list[str]:
    rows = []
    for trait, part in summary["traits"].items():
        extra: dict[str, list[float]] = {}
        for family in part["families"].values():
            for arm, values in family["arms"].items():
                extra.setdefault(arm, []).append(values["greedy"]["context_tokens"][0] or 0.0)
        for arm, values in part["side_effects"].items():
            if isinstance(values, dict):
                kl = interval(values["kl"]) if "kl" in values else "–"
                tokens = number(statistics.fmean(extra[arm]), sign=True, digits=0) if arm in extra else "–"
                rows.append(
                    (trait, arm, number(values["accuracy"][0]), interval(values["accuracy_change"], sign=True), kl, tokens)
                )
        for arm in (arm for arm in PROMPTS if arm in extra and arm not in part["side_effects"]):
            rows.append((trait, arm, "–", "–", "–", number(statistics.fmean(extra[arm]), sign=True, digits=0)))
    text = (
        "At the strongest strength chosen: multiple choice by log-probability, KL(plain ‖ arm) in nats per token on neutral "
        "replies drawn from the plain model, and what the arm adds to the prompt in tokens."
    )
    return [text, table(("trait", "arm", "multiple choice", "change", "KL", "context tokens"), rows)]


def _repeat(manifest: dict[str, Any]) -> list[str]:
    model, plan, machine = manifest["model"], manifest["plan"], manifest["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    facts = [
        f"- model: {model['file']}, sha256 {model['sha256']}",
        f"- machine: {machine['system']} on {machine['processor']}; {versions}",
        f"- seed {plan['seed']}; {plan['prompts']} prompts of each family; model-written code was "
        f"{'run' if plan['run_code'] else 'not run'}",
        "- vectors (sha256): " + ", ".join(f"{name} {v['content_sha256'][:16]}" for name, v in manifest["vectors"].items()),
    ]
    return ["```\n" + " ".join(manifest["command"]) + "\n```", "\n".join(facts)]
