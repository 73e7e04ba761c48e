"""What the whole chain does to a small real model: traits move what they should, and the identities hold token by token."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from steer_plugins.bench.stats import spearman
from steer_plugins.engine.base import GenerateRequest, Generation
from steer_plugins.engine.local import LocalEngine
from steer_plugins.metrics import builtin_metrics
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.training.calibrate import QUICK, rises
from steer_plugins.training.extract import chat
from steer_plugins.training.traits import load_trait
from tests.behaviour.conftest import TRAITS

Get = Callable[[str], SteeringVector]

N_RANDOM = 2
# Plain replies of this model are 60 to 400 tokens long, and expansive ones have no end: cut at 96, both are equally long.
LENGTH = {"mood": 48, "succinctness": 192}
PROMPT = chat("Describe a walk in the forest.")


def fresh_prompts(name: str) -> list[Any]:
    """Held-out prompts that not even the calibration has seen."""
    return [chat(prompt) for prompt in load_trait(name).heldout_prompts[QUICK.n_confirm :]]


def scores(engine: LocalEngine, name: str, steerings: Sequence[Any], n_prompts: int) -> list[list[float]]:
    """The scores of greedy replies under each steering, prompt by prompt."""
    metric = builtin_metrics()[name]
    prompts = fresh_prompts(name)[:n_prompts]
    requests = [GenerateRequest(p, steering=s, max_tokens=LENGTH[name]) for s in steerings for p in prompts]
    values = [metric(reply.text) for reply in engine.generate_many(requests)]
    return [values[i : i + len(prompts)] for i in range(0, len(values), len(prompts))]


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """Random directions of the same norm at the same layers."""
    rng = np.random.default_rng(seed)
    noise = {key: rng.standard_normal(vector.n_embd) for key in vector.directions}
    return vector.replace(directions={k: v / np.linalg.norm(v) for k, v in noise.items()})


@pytest.mark.parametrize("name", TRAITS)
def test_the_score_rises_from_minus_1_to_1(engine: LocalEngine, vector: Get, name: str) -> None:
    """On prompts that neither the fit nor the calibration has seen: towards both poles, beyond what random vectors do, and
    without turning back by more than the error of the turn (greedy replies differ between kinds of processors)."""
    fitted = vector(name)
    strengths = (-1.0, -0.5, 0.0, 0.5, 1.0)
    found = scores(engine, name, [Term(fitted, s) for s in strengths], 10)
    means = [statistics.mean(values) for values in found]
    print(name, dict(zip(strengths, means, strict=True)))
    assert rises(dict(zip(strengths, found, strict=True))), means
    rank = spearman(strengths, means)
    assert rank is not None and rank > 0.85, means  # two neighbours may change places, no more
    for high, low in ((4, 2), (2, 0)):  # each pole for itself; the expansive one has less room, see LENGTH
        assert excess(found[high], found[low]) > 0.5, (strengths[high], strengths[low], means)
    effect = means[-1] - means[0]
    assert effect > 0.5 and excess(found[-1], found[0]) > 4, means
    controls = [random_like(fitted, seed) for seed in range(N_RANDOM)]
    random = [statistics.mean(v) for v in scores(engine, name, [Term(c, s) for c in controls for s in (-1.0, 1.0)], 10)]
    effects = [abs(up - down) for down, up in zip(random[::2], random[1::2], strict=True)]
    print(name, "random", effects)
    assert effect > 2 * max(effects), (effect, effects)


def excess(high: Sequence[float], low: Sequence[float]) -> float:
    """By how many standard errors one strength's scores are above another's, prompt by prompt."""
    steps = np.subtract(high, low)
    return float(steps.mean() / (steps.std(ddof=1) / np.sqrt(len(steps)) + 1e-9))


@pytest.mark.parametrize("name", TRAITS)
def test_the_calibration_says_what_strength_1_means(vector: Get, name: str) -> None:
    record = vector(name).calibration
    assert record is not None
    assert record["monotone"] and record["effect"] > 4 * record["effect_se"]
    here = [row for row in record["rows"] if row["window"] == record["window"] and row["scope"] == record["scope"]]
    confirmed = [row for row in here if row["stage"] == "confirm" and row["dose"] == pytest.approx(record["dose"], abs=1e-3)]
    plain = record["plain"]
    assert len(confirmed) == 2
    for row in confirmed:
        assert row["perplexity"] <= 1.5 * plain["perplexity"]
        assert row["repeats"] <= plain["repeats"] + 0.15 and row["early_ends"] <= plain["early_ends"] + 0.1
    # the next dose of the ladder was tried in this window, and did not pass
    failed = [row for row in here if row["passed"] is False]
    assert any(row["dose"] > record["dose"] for row in failed)
    layers = vector(name).layers
    assert [layers[0], layers[-1]] == record["window"] and vector(name).default_scope == record["scope"]


# ---- identities, in tokens of greedy replies ----


def reply(engine: LocalEngine, steering: Any = None) -> Generation:
    return engine.generate(PROMPT, steering=steering, max_tokens=24)


def test_strength_0_is_the_plain_text(engine: LocalEngine, vector: Get) -> None:
    plain = reply(engine)
    assert reply(engine, Term(vector("mood"), 1.0)).tokens != plain.tokens
    assert reply(engine, Term(vector("mood"), 0.0)).tokens == plain.tokens
    assert reply(engine, Steering([Term(vector("mood"), 0.0), Term(vector("succinctness"), 0.0)])).tokens == plain.tokens


@pytest.mark.parametrize("k", [0.7, -0.7])
def test_a_multiple_at_strength_1_is_the_vector_at_that_strength(engine: LocalEngine, vector: Get, k: float) -> None:
    assert reply(engine, k * vector("mood")).tokens == reply(engine, Term(vector("mood"), k)).tokens != reply(engine).tokens


def test_a_vector_minus_itself_is_the_plain_text(engine: LocalEngine, vector: Get) -> None:
    mood = vector("mood")
    assert (mood - mood).is_zero
    assert reply(engine, mood - mood).tokens == reply(engine).tokens


def test_terms_add_up_as_vectors_do(engine: LocalEngine, vector: Get) -> None:
    mood, short = vector("mood"), vector("succinctness")
    together, added = [Term(mood, 0.6), Term(short, 0.3)], 0.6 * mood + 0.3 * short
    # two sums of the same numbers may differ in their last bit, and which token wins a tie is the processor's affair: so each
    # token of one reply is as likely under both, and much less or more likely without them
    items = [(PROMPT, reply(engine, together).tokens)]
    scores = [engine.logprobs(items, steering=steering)[0] for steering in (together, added, None)]
    assert np.abs(scores[0] - scores[1]).max() < 0.05 < 1.0 < np.abs(scores[0] - scores[2]).max()


def test_replies_in_a_batch_are_those_alone(engine: LocalEngine, vector: Get) -> None:
    steerings: list[Any] = [None, vector("mood"), Term(vector("mood"), -0.5), Term(vector("succinctness"), 0.8)]
    requests = [GenerateRequest(PROMPT, steering=s, max_tokens=24) for s in steerings]
    assert [r.tokens for r in engine.generate_many(requests)] == [reply(engine, s).tokens for s in steerings]
