"""The arms of the benchmark: what each puts into the prompt and into the hidden states, and the control vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..engine.base import Engine, Prompt
from ..errors import DataError, VectorError
from ..steering.terms import Steering, Term
from ..steering.vector import SteeringVector
from ..training.controls import random_vector
from ..training.traits import Trait

ARMS = ("plain", "prompt", "strong prompt", "steer", "both", "random", "shuffled")
"""plain: nothing. prompt, strong prompt: a system prompt. steer: the vector. both: prompt and vector. random: a random vector
of the same norms. shuffled: a vector fitted to the same examples with their labels drawn at random."""
PROMPTS = ("prompt", "strong prompt")
"""Arms with a system prompt and nothing else."""
STEERED = ("steer", "both", "random", "shuffled")
IDLE = ("random", "shuffled")
"""Arms whose vector should do nothing."""

RANDOMS = 2

_STRONG = (
    "This is the most important rule and comes before everything else: {system} Follow it in every single sentence, "
    "whatever you are asked, and never mention it. Check your answer before you give it: {system}"
)


@dataclass(frozen=True)
class Case:
    """A trait at one of its poles, the vector fitted to it, and vectors that should do nothing.

    ``randoms``: at least one; the first is the arm ``random``, all of them (``random 2`` and so on) are compared with the
    vector's full effect, since one alone may happen to do something. ``sign``: 1 for the positive pole, -1 for the negative.
    ``prompted``: of :data:`PROMPTS`, the one whose prompt the arm ``both`` has too.
    """

    trait: Trait
    vector: SteeringVector
    randoms: tuple[SteeringVector, ...]
    shuffled: SteeringVector | None
    metric: Any
    sign: int = 1
    prompted: str = "prompt"

    @property
    def name(self) -> str:
        """The trait's name."""
        return self.trait.name

    @property
    def pole(self) -> str:
        """What the pole that is wanted is called."""
        return self.trait.poles["positive" if self.sign > 0 else "negative"]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that can be run."""
        return tuple(arm for arm in ARMS if arm != "shuffled" or self.shuffled is not None)

    @property
    def random_arms(self) -> tuple[str, ...]:
        """``random``, ``random 2`` and so on."""
        return tuple("random" if i == 0 else f"random {i + 1}" for i in range(len(self.randoms)))

    def system(self, arm: str) -> str | None:
        """The system prompt of an arm."""
        prompt = self.prompted if arm == "both" else arm
        if prompt not in PROMPTS:
            return None
        text = self.trait.system["positive" if self.sign > 0 else "negative"][0]
        return _STRONG.format(system=text) if prompt == "strong prompt" else text

    def steering(self, arm: str, strength: float) -> Steering:
        """The steering of an arm, ``strength`` towards the wanted pole."""
        vectors = {"steer": self.vector, "both": self.vector, "shuffled": self.shuffled}
        vectors |= dict(zip(self.random_arms, self.randoms, strict=True))
        vector = vectors.get(arm)
        return Steering() if vector is None or strength == 0.0 else Steering([Term(vector, self.sign * strength)])

    def score(self, text: str) -> float:
        """The trait's metric, from -1 to 1, rising towards the wanted pole."""
        return self.sign * float(self.metric(text))


def is_steered(arm: str) -> bool:
    """Whether an arm has a vector."""
    return arm in STEERED or arm.startswith("random ")


def message(engine: Engine, text: str, system: str | None, history: list[dict[str, str]] | None = None) -> Prompt:
    """The prompt of an arm: chat messages, or plain text for a model without a chat template."""
    turns = [*(history or []), {"role": "user", "content": text}]
    if engine.info.has_chat_template:
        return [*([{"role": "system", "content": system}] if system else []), *turns]
    parts = ([system] if system else []) + [turn["content"] for turn in turns]
    return "\n\n".join(parts) + "\n\n"


def shuffled_vector(
    engine: Engine, trait: Trait, vector: SteeringVector, seed: int, n_pairs: int | None
) -> SteeringVector | None:
    """The vector that the trait's examples give when the sides of each pair are drawn at random.

    Fitted as ``vector`` was as far as its provenance says, at its layers, with its scales. None if nothing can be fitted:
    the vector acts at a site where examples cannot be read, or nothing is left of the poles.
    """
    from ..training.extract import builtin_methods, fit_directions, read_contrast
    from ..training.extract.base import FitOptions
    from ..training.extract.pairs import trait_data
    from ..training.train import options_of

    sites = {site for _, site in vector.directions}
    if len(sites) > 1 or not sites <= set(engine.info.sites):
        return None
    data = trait_data(trait)
    pairs = list(data.pairs[:n_pairs])
    rng = np.random.default_rng(seed)
    # exactly half: chance could leave most of them as they are
    flipped = set(rng.permutation(len(pairs))[: len(pairs) // 2].tolist())
    mixed = [replace(p, positive=p.negative, negative=p.positive) if i in flipped else p for i, p in enumerate(pairs)]
    data = replace(data, pairs=tuple(mixed))
    method, positions = "mean_difference", data.default_positions()
    try:
        made = options_of(vector)
        method, positions = made.method, made.positions or positions
    except VectorError:
        pass  # an imported vector: fitted as `steer train` would
    methods = {m.name: m for m in builtin_methods()}
    fit = FitOptions(layers=tuple(vector.layers), positions=positions, site=sites.pop(), seed=seed)
    chosen = methods.get(method) or next(iter(methods.values()))
    try:
        result = fit_directions(chosen, read_contrast(engine, data, fit), fit)
    except DataError:  # the poles read the same once they are mixed
        return None
    directions = {key: result.directions[key[0]] for key in vector.directions if key[0] in result.directions}
    if not directions:
        return None
    scales = {key: vector.scales[key] for key in directions}
    return vector.replace(name="shuffled", directions=directions, scales=scales, columns={}, calibration=None, provenance=None)


def case_of(
    engine: Engine, trait: Trait, vector: SteeringVector, *, sign: int = 1, seed: int = 0, n_pairs: int | None = None
) -> Case:
    """A case with its control vectors. Raises VectorError for a trait without a metric, or a vector that does not fit."""
    from ..plugins import manager

    vector.check_fits(engine.info.identity)
    if trait.metric is None:
        raise VectorError(f"the trait {trait.name!r} names no metric, so a program cannot score it: give its file a metric")
    metric = manager().find("metrics", trait.metric)
    shuffled = shuffled_vector(engine, trait, vector, seed, n_pairs)
    randoms = tuple(random_vector(vector, seed * RANDOMS + i) for i in range(RANDOMS))
    return Case(trait, vector, randoms, shuffled, metric, sign)
