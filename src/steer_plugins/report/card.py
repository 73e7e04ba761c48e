"""A hub's card for the terminal: what a vector does, at which dose, and what is known of its dangers."""

from __future__ import annotations

from html import escape
from typing import Any

from . import svg


def card_text(card: dict[str, Any], *, key: str, index: str, curve: bool = True) -> str:
    """The lines of a card (hub.schema's), its dose curve drawn in blocks. Cards are checked: all their text can be shown."""
    model = card["model"]
    trait = card["trait"]
    facts = {
        "for": f'{model["architecture"]} {model["n_layer"]}x{model["n_embd"]} "{model["name"]}"' if model else "any model",
        "base model": card["base_model"],
        "tried on": ", ".join(card["tried_on"]),
        "trait": f"{trait['name']}: {trait['negative']} (-1) to {trait['positive']} (+1)" if trait else None,
        "method": card["method"],
        "layers": ", ".join(map(str, card["layers"])),
        "op, scope": f"{card['op']}, {card['scope']}" if card["op"] else None,
        "licence": card["licence"],
        "size": f"{sum(file['size'] for file in card['files'].values()) / 1024:,.0f} KiB",
        "sha256": next(iter(card["files"].values()))["sha256"],
        "published": f"{card['published']}, index {index}",
        "key": key,
        **{f"benchmark {name}": f"{value:g}" for name, value in card["benchmark"].items()},
    }
    lines = [f"{card['name']} {card['version']} ({card['kind']})", card["description"], ""]
    lines += [f"  {name:<11} {value}" for name, value in facts.items() if value]
    if curve:
        lines += ["", *curve_lines(card["calibration"])]
    lines += ["", *safety_lines(card["safety"], "as its publisher measured")]
    for sample in card["samples"]:
        lines += ["", f"  at {sample['strength']:g}: {' '.join(sample['text'].split())[:300]}"]
    return "\n".join(lines)


def curve_lines(calibration: dict[str, Any] | None) -> list[str]:
    """The dose curve: a row for each strength, its score as a bar between the lowest and the highest."""
    if calibration is None or not calibration["curve"]:
        return ["  not calibrated: nobody has measured what strength 1 does"]
    scores = [point["score"] for point in calibration["curve"]]
    low, span = min(scores), (max(scores) - min(scores)) or 1.0
    lines = [
        f"  dose curve: {effect_text(calibration)} from -1 to 1, on {calibration['n']} prompts",
        "  strength    score                       perplexity / plain",
    ]
    for point in calibration["curve"]:
        eighths = round((point["score"] - low) / span * 160)
        bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
        ratio = f"{point['perplexity']:.2f}" if point["perplexity"] is not None else ""
        lines.append(f"  {point['strength']:+8.2f} {point['score']:8.3f} {bar:<21} {ratio}")
    return lines


def curve_chart(calibration: dict[str, Any]) -> str:
    """The dose curve with standard errors as a figure, in the colours of the page; "" for fewer than two points."""
    points = sorted(calibration["curve"], key=lambda point: point["strength"])
    if len(points) < 2:
        return ""
    place = [(p["strength"], p["score"]) for p in points]
    spread = [(p["score"] - (p["score_se"] or 0.0), p["score"] + (p["score_se"] or 0.0)) for p in points]
    series = [svg.Series(f"score: {calibration['objective']}", place, spread=spread)]
    fluency = [(p["strength"], p["perplexity"]) for p in points if p["perplexity"] is not None]
    if len(fluency) > 1:
        series.append(svg.Series("perplexity / plain", fluency, "b", right=True))
    drawn = svg.lines(
        series,
        label=f"Dose curve: {calibration['objective']} by strength",
        x_label="strength",
        left=(min(low for low, _ in spread), max(high for _, high in spread)),
        right=(0.0, None),
    )
    caption = (
        f"{effect_text(calibration)} from −1 to 1, {calibration['n']} prompts; "
        f"strength 1 adds {calibration['dose']:.3g} median norms"
    )
    return f'<figure class="steer-chart">{drawn}{svg.key(series)}<figcaption class="soft">{escape(caption)}</figcaption></figure>'


def effect_text(calibration: dict[str, Any]) -> str:
    """What strength 1 does against strength -1: ``mood 1.13 ± 0.11 score``."""
    error = f" ± {calibration['effect_se']:.2g}" if calibration["effect_se"] is not None else ""
    return f"{calibration['objective']} {calibration['effect']:.3g}{error} {calibration['unit']}".strip()


def safety_lines(safety: dict[str, Any] | None, whose: str) -> list[str]:
    """What would betray a hostile vector."""
    if safety is None:
        return [f"  safety ({whose}): not measured"]
    return [f"  safety ({whose}):"] + [f"    {name:<44} {value}" for name, value in safety_figures(safety).items()]


def safety_figures(safety: dict[str, Any]) -> dict[str, str]:
    """What each figure is called, and the figure."""
    shown = {
        "KL on neutral text, nats per token": safety["kl"],
        "refusals, nats at the worse of both signs": safety["refusal"],
        "cosine with a refusal direction": safety["refusal_cosine"],
    }
    return {name: "not measured" if value is None else f"{value:+.3f}" for name, value in shown.items()}
