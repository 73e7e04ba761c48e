"""What a fine-tune learned, as a slider: the mean difference of two models' states on the same neutral texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..engine.base import Engine
from ..errors import ModelError, SpecError
from ..steering.vector import ModelIdentity, SteeringVector

Report = Callable[[str, int, int], None]

FIRST_TOKENS = 16
"""Tokens of each text that are read, the first one apart: where a fine-tune leaves its mark before the text decides."""


def check_pair(base: ModelIdentity, tuned: ModelIdentity) -> None:
    """Raise ModelError unless both are of one base: equal architecture, shape and vocabulary, and not the same weights' norms.

    A LoRA that left the norms alone cannot be told from its base by identity; the difference of states tells it.
    """
    for what in ("architecture", "n_layer", "n_embd", "n_streams", "tokens_sha256"):
        if getattr(base, what) != getattr(tuned, what):
            raise ModelError(
                f"{tuned.label} is not a fine-tune of {base.label}: they differ in {what.replace('_sha256', '')}, "
                "so their states cannot be compared"
            )


def difference(
    base: Engine,
    tuned: Engine,
    name: str,
    texts: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    report: Report | None = None,
) -> SteeringVector:
    """The mean of (tuned − base) states over the first tokens of neutral texts, one direction for each layer.

    Strength 1 on the base model moves its states by the mean difference, towards the fine-tune; −1 on the fine-tune moves away.

    Args:
        texts: prompts (text, chats or token ids); both models get the same tokens.
        layers: blocks to take (default: the middle half).

    Raises:
        ModelError: the models are not of one base, or their states do not differ.
    """
    tell = report or (lambda stage, done, total: None)
    check_pair(base.info.identity, tuned.info.identity)
    if len(texts) < 4:
        raise SpecError("a difference needs at least four texts")
    n = base.info.n_layer
    chosen = list(range(n // 4, n - n // 4)) if layers is None else list(layers)
    tokens = [base.tokenize(text)[: FIRST_TOKENS + 1] for text in texts]
    means = []
    for stage, engine in (("reading the base", base), ("reading the fine-tune", tuned)):
        found = engine.read(tokens, layers=chosen, positions="all", progress=lambda done, total: tell(stage, done, total))  # noqa: B023
        means.append({layer: np.mean([one.values[layer][1:].mean(axis=0) for one in found], axis=0) for layer in chosen})
    directions = {(layer, "resid_post"): means[1][layer] - means[0][layer] for layer in chosen}
    if not any(np.any(d) for d in directions.values()):
        raise ModelError(f"{tuned.info.path} computes the same states as {base.info.path}: there is nothing to learn from")
    return SteeringVector(
        name,
        directions,
        op="add",
        default_scope="response",
        identity=base.info.identity,
        provenance={"method": "difference", "base": base.info.name, "tuned": tuned.info.name, "texts": len(texts)},
    )
