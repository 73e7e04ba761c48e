"""What the pictures show, as plain data, and how it is measured with an engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.base import Engine, GenerateRequest, Prompt
from ..errors import DataError, SpecError, VectorError
from ..steering.terms import Steering
from ..steering.vector import SteeringVector, layer_ranges
from .tokens import legible

Array = npt.NDArray[np.float32]

NEUTRAL = (
    "The table stands in the room next to the window.",
    "Water boils at one hundred degrees at sea level.",
    "The train to the north leaves from the second platform.",
)
"""Texts without a mood or a manner: where their tokens lie along a direction is taken for its zero."""


@dataclass(frozen=True)
class Reading:
    """One pass over the text. Both arrays are float32 [n_layers, n_tokens].

    ``projections``: how far the hidden state lies along the direction, in strengths: the dot product with the unit
    direction, less the level of neutral texts, divided by the dose of strength 1. +1 is where strength 1 would take a
    neutral token. ``cosines``: of the hidden state as it is to the direction.
    """

    projections: Array
    cosines: Array

    def to_dict(self) -> dict[str, Any]:
        """Lists of rows, rounded to four decimals."""
        return {"projections": _rows(self.projections), "cosines": _rows(self.cosines)}


@dataclass(frozen=True)
class Inspection:
    """A text, token by token, along one vector; made by :func:`inspect_prompt`, drawn by the functions beside it.

    Position 0 is a sink: its values are there, but say nothing about the text, and pictures leave it grey.

    Attributes:
        vector: name of the vector.
        poles: what its negative and its positive end are called.
        model: for people.
        site: where in the block was read.
        layers: [n_layers] blocks that were read and have a direction.
        levels: [n_layers] projection of neutral texts, in strengths, which was subtracted.
        tokens: ids; texts: the same for people, see :func:`~.tokens.legible`.
        n_prompt: how many of them are prompt; the rest is the reply.
        before: without steering.
        after: the same tokens with ``steering``, or None.
        steering: the terms in words, such as ``mood:0.8``; empty for none.
    """

    vector: str
    poles: tuple[str, str]
    model: str
    site: str
    layers: list[int]
    levels: list[float]
    tokens: list[int]
    texts: list[str]
    n_prompt: int
    before: Reading
    after: Reading | None = None
    steering: str = ""

    @property
    def readings(self) -> list[tuple[str, Reading]]:
        """What there is to draw, with a heading."""
        if self.after is None:
            return [("without steering", self.before)]
        return [("before", self.before), (f"after {self.steering}", self.after)]

    @property
    def limit(self) -> float:
        """The strength at which the colour scale ends: above all but 5 % of the values, position 0 not counted."""
        values = np.concatenate([np.abs(r.projections[:, 1:]).ravel() for _, r in self.readings])
        # A text along which nothing happens should look like one.
        top = max(0.25, float(np.quantile(values, 0.95)) if values.size else 0.0)
        step = 10.0 ** math.floor(math.log10(top)) / 2
        return math.ceil(top / step) * step

    def means(self, reading: Reading) -> Array:
        """[n_tokens] projections, averaged over the layers."""
        mean: Array = reading.projections.mean(axis=0)
        return mean

    def to_dict(self) -> dict[str, Any]:
        """JSON values, everything included."""
        return {
            "vector": self.vector,
            "poles": list(self.poles),
            "model": self.model,
            "site": self.site,
            "layers": self.layers,
            "levels": [round(level, 4) for level in self.levels],
            "tokens": self.tokens,
            "texts": self.texts,
            "n_prompt": self.n_prompt,
            "steering": self.steering,
            "before": self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
        }


def inspect_prompt(
    engine: Engine,
    prompt: Prompt,
    vector: SteeringVector,
    *,
    steering: Any = None,
    response: str | Sequence[int] | None = None,
    max_tokens: int = 0,
    layers: Sequence[int] | None = None,
    levels: Mapping[int, float] | None = None,
    thinking: bool | None = None,
    poles: tuple[str, str] | None = None,
    force: bool = False,
) -> Inspection:
    """Where each token of a prompt and its reply lies along ``vector``, without and with ``steering``.

    Both passes read the same tokens, so that what differs is what steering does. The reply is ``response``, or up to
    ``max_tokens`` greedy tokens, steered where there is a steering.

    Args:
        steering: anything ``Steering.of`` takes; nothing, or strength 0: there is no second pass.
        layers: some of the vector's layers (default: all of them).
        levels: :func:`neutral_levels` from an earlier call, to save the time.
        force: take a vector of another fine-tune of the model.
        poles: names of the two ends, negative first (default: those of the bundled trait of that name).

    Raises:
        VectorError: the vector does not fit the model, or its dose is 0 at every layer. SpecError: ``layers`` without
        a direction. DataError: prompt and reply have no token after position 0. And what the engine raises.
    """
    vector.check_fits(engine.info.identity, force=force)
    wanted = Steering.of(steering)
    site = "resid_post" if "resid_post" in vector.sites else vector.sites[0]
    chosen = _layers(engine, vector, site, layers)
    tokens = engine.tokenize(prompt, thinking=thinking)
    n_prompt, reply = len(tokens), _reply(engine, tokens, wanted, response, max_tokens)
    level = dict(levels or neutral_levels(engine, vector, chosen, chat=engine.info.has_chat_template and not _is_raw(prompt)))

    def measure(terms: Steering) -> tuple[list[int], Reading]:
        options: dict[str, Any] = {"layers": chosen, "site": site, "positions": "all", "steering": terms}
        found = engine.read_pairs([(tokens, reply)], **options) if reply else engine.read([tokens], **options)
        values = found[0].values
        rows = [(values[il].astype(np.float64), vector.directions[il, site].astype(np.float64)) for il in chosen]
        dots = np.stack([h @ u for h, u in rows])
        lengths = np.stack([np.linalg.norm(h, axis=1) for h, _ in rows])
        strengths = np.stack([dots[i] / vector.scales[il, site] - level[il] for i, il in enumerate(chosen)])
        cosines = dots / np.maximum(lengths, 1e-30)
        return found[0].tokens, Reading(strengths.astype(np.float32), cosines.astype(np.float32))

    sequence, before = measure(Steering())
    if len(sequence) < 2:
        raise DataError("the text is a single token, and the first one says nothing: write a longer prompt")
    return Inspection(
        vector=vector.name,
        poles=poles or _poles(vector.name),
        model=engine.info.identity.label,
        site=site,
        layers=chosen,
        levels=[level[il] for il in chosen],
        tokens=sequence,
        texts=legible(engine.pieces(sequence)),
        n_prompt=n_prompt,
        before=before,
        after=measure(wanted)[1] if wanted else None,
        steering=" + ".join(f"{term.vector.name}:{term.strength:g}" for term in wanted.terms) if wanted else "",
    )


def neutral_levels(engine: Engine, vector: SteeringVector, layers: Sequence[int], *, chat: bool) -> dict[int, float]:
    """Where neutral texts lie along the direction of each layer, in strengths: ``{layer: median over their tokens}``.

    ``chat``: as messages of a user, which is right for pictures of chats.
    """
    site = "resid_post" if "resid_post" in vector.sites else vector.sites[0]
    texts: list[Prompt] = [[{"role": "user", "content": text}] if chat else text for text in NEUTRAL]
    found = engine.read(texts, layers=list(layers), site=site, positions="all")
    levels = {}
    for il in layers:
        rows = np.concatenate([one.values[il][1:] for one in found]).astype(np.float64)
        dots = rows @ vector.directions[il, site].astype(np.float64)
        levels[il] = float(np.median(dots)) / vector.scales[il, site]
    return levels


def _layers(engine: Engine, vector: SteeringVector, site: str, layers: Sequence[int] | None) -> list[int]:
    """The layers to read: they have a direction and a dose, and every token is computed there."""
    dosed = [il for il, where in vector.directions if where == site and vector.scales[il, where] != 0.0]
    if not dosed:
        raise VectorError(f"vector {vector.name!r} has a dose of 0 at every layer, so there is no strength to measure in")
    missing = [il for il in layers or () if il not in dosed]
    if missing:
        raise SpecError(f"vector {vector.name!r} has no direction at layer {missing[0]}: it has {layer_ranges(dosed)}")
    chosen = sorted(set(layers)) if layers else dosed
    last = engine.info.n_layer - 1
    if engine.info.last_layer_outputs_only and last in chosen:
        chosen = [il for il in chosen if il != last]
        if not chosen:
            raise SpecError(f"layer {last} is this model's last one, which is computed for the last token only: name others")
    return chosen


def _reply(
    engine: Engine, prompt: list[int], steering: Steering, response: str | Sequence[int] | None, max_tokens: int
) -> str | list[int]:
    if response is not None:
        return response if isinstance(response, str) else list(response)
    if max_tokens <= 0:
        return []
    return engine.generate_many([GenerateRequest(prompt, steering=steering, max_tokens=max_tokens)])[0].tokens


def _is_raw(prompt: Prompt) -> bool:
    return isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)


def _poles(name: str) -> tuple[str, str]:
    from ..training.traits import bundled_traits, load_trait

    if name not in bundled_traits():
        return "negative", "positive"
    words = load_trait(name).poles
    return words["negative"], words["positive"]


def _rows(values: Array) -> list[list[float]]:
    return [[round(float(value), 4) for value in row] for row in values]
