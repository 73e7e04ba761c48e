"""Looking for features: those that tell two kinds of text apart, those that change what a model says, and their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.base import Engine, GenerateRequest, Prompt
from ..errors import DataError, SpecError
from ..steering.terms import Steering, Term
from ..steering.vector import SteeringVector
from ..store.features import DOSE
from ..training.extract import ContrastData
from ..training.traits import Trait
from .code import SparseCode
from .index import Feature, FeatureIndex

ORDERS = ("effect", "auroc", "rate")
EFFECT_DOSE = DOSE
"""In median norms of the layer: where single features begin to show in the text."""

PROMPTS = ("Tell me about your day.", "What is outside the window?", "Write the first line of a story.")

Progress = Callable[[int, int], None]


def feature_vector(
    code: SparseCode, feature: Feature, name: str, *, dose: float, identity: Any = None, scope: str = "response"
) -> SteeringVector:
    """The decoder row of a feature as a vector whose strength 1 moves by ``dose`` (in units of the hidden state)."""
    row = code.w_dec[feature.index]
    unit = row / max(float(np.linalg.norm(row)), 1e-12)
    key = (code.layer, code.site)
    return SteeringVector(name, {key: unit}, {key: float(dose)}, op="add", default_scope=scope, identity=identity)


def auroc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Area under the ROC curve of each column: the chance that a positive row lies above a negative one, ties counted half.

    Args:
        positive: [n, m] values; ``negative``: [k, m].
    """
    high, low = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    n, k = len(high), len(low)
    values = np.concatenate([high, low])
    order = np.argsort(values, axis=0, kind="stable")
    ranks = np.empty_like(values)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(1, n + k + 1, dtype=np.float64)[:, None], values.shape), axis=0)
    ordered = np.take_along_axis(values, order, axis=0)
    for column in np.flatnonzero((ordered[1:] == ordered[:-1]).any(axis=0)):  # ties share the mean of their ranks
        _, inverse, counts = np.unique(values[:, column], return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        ranks[:, column] = (last - (counts - 1) / 2)[inverse]
    return (ranks[:n].sum(axis=0) - n * (n + 1) / 2) / (n * k)


def contrast(
    engine: Engine, code: SparseCode, source: Trait | ContrastData, *, pairs: int = 40, progress: Progress | None = None
) -> npt.NDArray[np.float64]:
    """How well each feature tells the two sides of a contrast apart: AUROC of its mean activation, float64 [n_features].

    Of a trait, the model answers under the system prompts of both poles and its replies are read without them, so that only the
    reply tells; of pairs, the given responses, or the texts themselves, are read.

    Raises DataError for fewer than four pairs.
    """
    sides: tuple[list[tuple[Prompt, str | list[int]]], list[tuple[Prompt, str | list[int]]]] = ([], [])
    if isinstance(source, Trait):
        prompts = source.train_prompts[:pairs]
        for side, poles in zip(sides, zip(*source.system_pairs, strict=True), strict=True):
            requests = [
                GenerateRequest(
                    [{"role": "system", "content": poles[i % len(poles)]}, {"role": "user", "content": prompt}], max_tokens=48
                )
                for i, prompt in enumerate(prompts)
            ]
            replies = engine.generate_many(requests)
            side.extend(
                ([{"role": "user", "content": prompt}], reply.tokens)
                for prompt, reply in zip(prompts, replies, strict=True)
                if reply.tokens
            )
    else:
        for pair in source.pairs[:pairs]:
            for side, one in zip(sides, (pair.positive, pair.negative), strict=True):
                if one.response is not None:
                    side.append((one.prompt, one.response))
                else:
                    tokens = engine.tokenize(one.prompt)
                    side.append((tokens[:1], tokens[1:]))
    if min(map(len, sides)) < 4:
        raise DataError("a contrast needs at least four texts on each side")
    means = []
    for done, side in enumerate(sides):
        found = engine.read_pairs(side, layers=[code.layer], site=code.site, positions="response")
        means.append(np.stack([code.encode(one.values[code.layer]).mean(axis=0) for one in found]))
        if progress is not None:
            progress(done + 1, 2)
    return auroc(*means)


def effects(
    engine: Engine,
    code: SparseCode,
    index: FeatureIndex,
    chosen: Sequence[int],
    *,
    dose: float = EFFECT_DOSE,
    prompts: Sequence[str] = PROMPTS,
    progress: Progress | None = None,
) -> FeatureIndex:
    """Measure what adding each chosen feature does to the next token after some prompts: the causal lens.

    Returns:
        The index with ``effect`` (mean KL divergence in nats from the plain distribution) and ``raises`` (the tokens whose
        probability rises most, by their share of the KL) of these features. ``dose`` in median norms.

    A logit lens on decoder rows says nothing in the middle of a model; what the model itself makes of the row does.
    """
    chats: list[Prompt] = [
        [{"role": "user", "content": prompt}] if engine.info.has_chat_template else prompt for prompt in prompts
    ]
    plain = next_logprobs(engine, chats, None)
    new = dict[int, Feature]()
    for i, number in enumerate(chosen):
        vector = feature_vector(code, index.get(number), "feature", dose=dose * index.median_norm)
        steered = next_logprobs(engine, chats, Steering([Term(vector)]))
        parts = np.exp(steered) * (steered - plain)
        best = np.argsort(-parts.mean(axis=0))[:5]
        raises = tuple(piece.decode(errors="replace") for piece in engine.pieces([int(t) for t in best]))
        new[number] = replace(index.get(number), effect=float(parts.sum(axis=1).mean()), raises=raises)
        if progress is not None:
            progress(i + 1, len(chosen))
    return replace(index, features=tuple(new.get(f.index, f) for f in index.features))


def next_logprobs(engine: Engine, prompts: Sequence[Prompt], steering: Steering | None) -> npt.NDArray[np.float64]:
    """Natural log probabilities of every next token after each prompt: float64 [n_prompts, n_vocab].

    Raises SpecError where the engine cannot tell the whole distribution (one over HTTP).
    """
    if not engine.has_distributions:
        raise SpecError("this engine cannot tell whole distributions: use a model in this process, without --server")
    found = engine.distributions([(prompt, [0]) for prompt in prompts], steering=steering)
    return np.stack([one[0] for one in found]).astype(np.float64)


def ranked(
    index: FeatureIndex, by: str, scores: npt.NDArray[np.float64] | None = None, *, candidates: Sequence[Feature] | None = None
) -> list[tuple[Feature, float | None]]:
    """Features in an order, most interesting first, each with its AUROC where ``scores`` has one.

    ``auroc`` puts those first that tell the sides apart, whichever side they are on; ``effect`` those measured to change most.

    Raises SpecError for an unknown order, or ``auroc`` without a contrast.
    """
    if by not in ORDERS:
        raise SpecError(f"unknown order {by!r}: use {', '.join(ORDERS)}")
    if by == "auroc" and scores is None:
        raise SpecError("an order by auroc needs a contrast: name a trait or a file of pairs")

    def value(feature: Feature) -> float:
        if by == "rate":
            return feature.rate
        if by == "effect":
            return -1.0 if feature.effect is None else feature.effect
        assert scores is not None
        return abs(float(scores[feature.index]) - 0.5)

    order = sorted(index.features if candidates is None else candidates, key=value, reverse=True)
    return [(f, None if scores is None else float(scores[f.index])) for f in order]
