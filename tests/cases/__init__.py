"""The cases of steering.json: what a steering means, for everybody who reads or applies one. See README.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins import testing
from steer_plugins.engine import Engine
from steer_plugins.errors import SteerError
from steer_plugins.steering import formula
from steer_plugins.steering.grammar import from_json, steering_of
from steer_plugins.steering.terms import Steering
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import MissingVector
from steer_plugins.testing.architectures import blueprint

from .templates import TEMPLATES

FILE = Path(__file__).with_name("steering.json")
LAYER = 1  # where positions are looked at: nothing below it is steered
NOISE = 4e-4  # float32 sums in another order; doses are thousands of times that
WRONG = (AssertionError, SteerError, pytest.fail.Exception)
TABLE: dict[str, Any] = json.loads(FILE.read_text("utf-8"))


def cases(section: str, door: str) -> list[Any]:
    """The cases of a section as parameters; what a door gets wrong today has to fail there (strict)."""
    return [pytest.param(case, id=_name(case), marks=_marks(case, door)) for case in TABLE[section]]


def _marks(case: dict[str, Any], door: str) -> list[Any]:
    reason = case.get("wrong", {}).get(door)
    return [pytest.mark.xfail(reason=reason, strict=True, raises=WRONG)] if reason else []


def _name(case: dict[str, Any]) -> str:
    return str(case["name"])


def tiny(template: str, folder: Path) -> Path:
    """A tiny llama of four layers with one of the cases' templates."""
    return testing.write("llama", folder / f"{template}.gguf", n_layer=4, n_ctx=512, chat_template=TEMPLATES[template])[0]


def ids(pieces: list[str]) -> list[int]:
    """Token ids of the tiny llama's tokens, each given as it is stored in the vocabulary."""
    vocabulary = blueprint("llama", n_layer=4, n_ctx=512).vocab
    return [vocabulary.id_of(piece) for piece in pieces]


def vectors(n_embd: int) -> dict[str, SteeringVector]:
    """The vectors that the cases name, by name."""
    made = {}
    for seed, (name, facts) in enumerate(TABLE["vectors"].items()):
        rng = np.random.default_rng(seed)
        places = {(il, "resid_post"): rng.standard_normal(n_embd) for il in facts["layers"]}
        made[name] = SteeringVector(
            name, places, dict.fromkeys(places, facts["dose"]), op=facts["op"], default_scope=facts["scope"]
        )
    return made


def steering(data: Any, n_embd: int) -> Steering:
    """The steering that a case means, with the vectors of the table. Raises SteerError."""
    known = vectors(n_embd)

    def find(name: str) -> SteeringVector:
        if name not in known:
            raise MissingVector(f"no vector {name!r}")
        return known[name]

    return steering_of(from_json(data), find)


def refusal(words: list[str], act: Callable[[], Any]) -> None:
    """What is refused is refused in one line that names all that the case wants named."""
    with pytest.raises(SteerError) as caught:
        act()
    says(str(caught.value), words)


def says(sentence: str, words: list[str]) -> None:
    """One line that names all that the case wants named."""
    assert all(word in sentence for word in words), (sentence, words)
    assert "\n" not in sentence


def states(engine: Engine, prompt: Any, response: list[int], layer: int, steering: Any = None, **options: Any) -> np.ndarray:
    """Hidden states of prompt and response at a layer: float64 [n_tokens, n_embd]."""
    read = engine.read_pairs([(prompt, response)], layers=[layer], positions="all", steering=steering, **options)
    return read[0].values[layer].astype(np.float64)


def check_positions(engine: Engine, case: dict[str, Any]) -> None:
    """Each state has moved as the formula says for the strengths of its position, and no other has."""
    wanted = steering(case["steering"], engine.info.n_embd)
    prompt, response = ids(case["prompt"]), ids(case["response"])
    if "refused" in case:
        return refusal(case["refused"], lambda: states(engine, prompt, response, LAYER, wanted))
    _check(engine, prompt, response, wanted, case["strengths"])


def check_chat(engine: Engine, case: dict[str, Any]) -> None:
    """As :func:`check_positions`, for a chat: nothing before the last token of the prompt is steered."""
    wanted = steering(case["steering"], engine.info.n_embd)
    options = {"thinking": case["thinking"]}
    prompt, response = case["messages"], ids(case["response"])
    if "refused" in case:
        return refusal(case["refused"], lambda: states(engine, prompt, response, LAYER, wanted, **options))
    before = [0.0] * (len(engine.tokenize(prompt, **options)) - 1)
    _check(engine, prompt, response, wanted, [before + strengths for strengths in case["from_last"]], **options)


def _check(
    engine: Engine, prompt: Any, response: list[int], wanted: Steering, strengths: list[list[float]], **options: Any
) -> None:
    plain = states(engine, prompt, response, LAYER, **options)
    moved = states(engine, prompt, response, LAYER, wanted, **options)
    assert len(plain) == len(moved) == len(strengths[0])
    for position, (h, got) in enumerate(zip(plain, moved, strict=True)):
        here = [replace(term, strength=row[position], schedule=None) for term, row in zip(wanted, strengths, strict=True)]
        assert np.abs(got - formula.steer(h, here, LAYER)).max() < NOISE, f"position {position} of {len(plain)}"


def check_layers(engine: Engine, case: dict[str, Any]) -> None:
    """A window leaves what a vector of those layers alone would do."""
    wanted = steering(case["steering"], engine.info.n_embd)
    (term,) = wanted
    assert sorted({layer for layer, _ in term.keys()}) == case["layers"]
    prompt, response = ids(["a", "b", "c"]), ids(["d", "e"])
    only = replace(term, layers=None, vector=term.vector.with_layers(case["layers"][0], case["layers"][-1]))
    for layer in range(3):  # a server cannot read all positions of the last layer
        found, expected = (states(engine, prompt, response, layer, one) for one in (wanted, only))
        assert np.abs(found - expected).max() < NOISE
    first = case["layers"][0]
    step = states(engine, prompt, response, first, wanted) - states(engine, prompt, response, first)
    expected = np.outer([0, 1, 1, 1, 1], term.strength * term.vector.effective(first, "resid_post"))
    assert np.abs(step - expected).max() < NOISE
