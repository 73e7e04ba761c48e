"""Fitting a gate to labelled prompts: which layer, which condition vector, which threshold, above or below.

CAST (arXiv 2409.05907) searches layers, thresholds and directions of comparison for the best F1 on the prompts the condition
vector was fitted to. Where there are more dimensions than prompts, all of them are told apart there at any layer. So the
scores that the search sees are those of prompts that the vector of their fold has not seen.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..engine.base import Engine, Progress, Prompt
from ..errors import DataError, SpecError
from ..steering.gate import MIN_PROMPT, Gate, cosine
from ..steering.vector import SteeringVector
from .extract.lines import Line, lines_of, read_file
from .extract.pairs import chat, side_of

MIN_EACH = 5
"""Prompts of either label that a fit needs: one in four is held out, the others part into folds."""
MAX_PROMPTS = 20_000
FOLDS = 4
HELD_OUT = 4
"""One prompt in so many of each label is held out."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Labelled:
    """A prompt and whether the gate should be open for it."""

    prompt: Prompt
    label: bool


@dataclass(frozen=True)
class LabelledData:
    """Prompts of a file; ``sha256`` of its bytes, ``file`` its name."""

    prompts: tuple[Labelled, ...]
    sha256: str
    file: str


@dataclass(frozen=True)
class Choice:
    """The best threshold for some scores. ``margin``: distance of the scores beside it, in standard deviations."""

    threshold: float
    compare: str
    f1: float
    margin: float


def load_labelled(path: str | Path) -> LabelledData:
    """The prompts of a JSONL file: on each line ``{"prompt": text or chat, "label": true or false}``; true opens the gate.

    Raises:
        DataError: one sentence with the line number.
    """
    raw = read_file(path, "the file of labelled prompts")
    prompts: list[Labelled] = []
    for line in lines_of(raw, str(path)):
        prompts.append(_labelled(line))
        if len(prompts) > MAX_PROMPTS:
            raise DataError(f"{path} holds more than {MAX_PROMPTS} prompts: take a part of them")
    for label in (True, False):
        n = sum(p.label is label for p in prompts)
        if n < MIN_EACH:
            raise DataError(
                f"{path} has {n} prompts labelled {str(label).lower()}: a gate needs at least {MIN_EACH} of either label"
            )
    return LabelledData(tuple(prompts), hashlib.sha256(raw).hexdigest(), Path(path).name)


def _labelled(line: Line) -> Labelled:
    data = line.json()
    if not isinstance(data, dict) or set(data) != {"prompt", "label"}:
        line.refuse("is not an object with the keys prompt and label")
    if not isinstance(data["label"], bool):
        line.refuse("has a label that is neither true nor false")
    side = side_of(data["prompt"], "prompt", line)
    if side.response is not None:
        line.refuse("ends with an assistant's answer: a gate looks at prompts, so leave it out")
    return Labelled(side.prompt, data["label"])


def fit_gate(
    engine: Engine,
    name: str,
    data: LabelledData,
    *,
    condition: SteeringVector | None = None,
    layers: Sequence[int] | None = None,
    positions: str = "mean",
    as_chat: bool | None = None,
    thinking: bool | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SteeringVector:
    """Fit a gate. What comes back holds it (``Gate.of``), with the search and the held-out result in its provenance.

    Args:
        condition: an existing vector whose direction is used; None fits one at each layer, the mean of the states (of unit
            length) of the prompts labelled true, less that of the others.
        layers: where to look; all that can be read, by default.
        positions: as of :class:`Gate`.
        as_chat: make plain texts a user's message of a chat; by default where the model has a template.
        seed: which quarter of the prompts is held out, and the folds.

    Raises:
        DataError: a prompt that is too short.
        SpecError: a layer that cannot be looked at.
    """
    info = engine.info
    readable = info.n_layer - (1 if info.last_layer_outputs_only else 0)
    chosen = sorted(set(range(readable) if layers is None else layers))
    if condition is not None:
        chosen = [il for il in chosen if (il, "resid_post") in condition.directions]
    bad = [il for il in chosen if not 0 <= il < readable]
    if bad or not chosen:
        what = f"layer {bad[0]} cannot be looked at" if bad else "there is no layer to look at"
        raise SpecError(
            f"{what}: this model allows 0 to {readable - 1}" + ("" if condition is None else ", where the condition is")
        )
    wrap = info.has_chat_template if as_chat is None else as_chat
    texts = []
    for i, one in enumerate(data.prompts, start=1):
        prompt = chat(one.prompt) if wrap and isinstance(one.prompt, str) else one.prompt
        tokens = engine.tokenize(prompt, thinking=thinking)
        if len(tokens) < MIN_PROMPT:
            raise DataError(f"prompt {i} of {data.file} has {len(tokens)} tokens: a gate needs at least {MIN_PROMPT}")
        texts.append(tokens[:-1])
    found = engine.read(texts, layers=chosen, positions=positions, progress=progress)
    states = {il: np.stack([_unit(a.values[il][0].astype(np.float64)) for a in found]) for il in chosen}
    labels = np.array([p.label for p in data.prompts])
    held = _held_out(labels, seed)
    fit = ~held
    rows, best = [], None
    for il in chosen:
        given = None if condition is None else condition.directions[il, "resid_post"].astype(np.float64)
        scores = _unseen_scores(states[il][fit], labels[fit], given, seed)
        choice = best_threshold(scores, labels[fit])
        rows.append({"layer": il, "f1": choice.f1, "margin": choice.margin})
        if best is None or (choice.f1, choice.margin) > (best[1].f1, best[1].margin):
            best = (il, choice)
    assert best is not None
    layer, choice = best
    if condition is not None:
        direction = condition.directions[layer, "resid_post"]
    else:
        direction = _difference(states[layer][fit], labels[fit]).astype(np.float32)
    vector = SteeringVector(name, {(layer, "resid_post"): direction}, {(layer, "resid_post"): 1.0}, identity=info.identity)
    gate = Gate(vector, choice.threshold, choice.compare, positions)
    opened = np.array([gate.is_open(gate.score(h)) for h in states[layer][held]])
    return gate.to_vector(
        kind="gate",
        condition="mean_difference" if condition is None else {"name": condition.name, "content_sha256": condition.content_hash},
        source={"file": data.file, "sha256": data.sha256, "true": int(labels.sum()), "false": int((~labels).sum())},
        seed=seed,
        chat=bool(wrap),
        held_out={"n": int(held.sum()), **rates(opened, labels[held])},
        search=rows,
    )


def rates(opened: npt.NDArray[np.bool_], labels: npt.NDArray[np.bool_]) -> dict[str, float]:
    """F1, precision and recall of a gate that should be open where the label is true; 0 where nothing was right."""
    right = float(np.sum(opened & labels))
    precision = right / float(opened.sum()) if opened.any() else 0.0
    recall = right / float(labels.sum()) if labels.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def best_threshold(scores: Floats, labels: npt.NDArray[np.bool_]) -> Choice:
    """The threshold and direction with the best F1, among those half-way between neighbouring scores; wide gaps first."""
    order = np.unique(scores)
    spread = float(scores.std()) or 1.0
    best = Choice(float(np.clip(order[0] - 1e-6, -1, 1)), "above", rates(np.ones_like(labels), labels)["f1"], 0.0)
    for low, high in zip(order, order[1:], strict=False):
        threshold, margin = float((low + high) / 2), float((high - low) / spread)
        for compare in ("above", "below"):
            opened = scores > threshold if compare == "above" else scores < threshold
            f1 = rates(opened, labels)["f1"]
            if (f1, margin) > (best.f1, best.margin):
                best = Choice(threshold, compare, f1, margin)
    return best


def _held_out(labels: npt.NDArray[np.bool_], seed: int) -> npt.NDArray[np.bool_]:
    """One in four of each label."""
    held = np.zeros(len(labels), bool)
    for label in (True, False):
        members = [int(i) for i in np.flatnonzero(labels == label)]
        held[random.Random(seed).sample(members, max(1, len(members) // HELD_OUT))] = True
    return held


def _unseen_scores(states: Floats, labels: npt.NDArray[np.bool_], given: Floats | None, seed: int) -> Floats:
    """The score of each prompt under a condition vector that was fitted without it."""
    if given is not None:
        return np.array([cosine(h, given) for h in states])
    fold = np.zeros(len(labels), int)
    for label in (True, False):
        members = [int(i) for i in np.flatnonzero(labels == label)]
        random.Random(seed + 1).shuffle(members)
        fold[members] = np.arange(len(members)) % FOLDS
    scores = np.zeros(len(labels))
    for k in range(FOLDS):
        direction = _difference(states[fold != k], labels[fold != k])
        scores[fold == k] = [cosine(h, direction) for h in states[fold == k]]
    return scores


def _difference(states: Floats, labels: npt.NDArray[np.bool_]) -> Floats:
    difference: Floats = states[labels].mean(axis=0) - states[~labels].mean(axis=0)
    if not np.linalg.norm(difference) > 1e-9:
        raise DataError("the prompts of both labels have the same states: a gate cannot tell them apart")
    return difference


def _unit(h: Floats) -> Floats:
    norm = np.linalg.norm(h)
    unit: Floats = h / norm if norm else h
    return unit
