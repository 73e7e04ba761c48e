"""``steer hub verify --model``: the dose curve is run again, and a vector that does not do what its card says is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.hub.measure import measure_curve, measure_items
from steer_plugins.hub.publish import Folder, draft
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from steer_plugins.store.vectorfile import write_vector
from steer_plugins.training.train import TrainOptions, train
from steer_plugins.training.traits import Trait

from .fakes import IDENTITY, FakeEngine
from .hub_world import World

PROMPTS = [f"Tell me about {what}." for what in "rain bread rivers trains music stones birds letters maps tea".split()]
TRAIT = Trait.from_dict(
    {
        "format": "steer-plugins-trait-v1",
        "name": "gladness",
        "poles": {"positive": "glad", "negative": "gloomy"},
        "description": "Glad or gloomy.",
        "system": {"positive": ["Write with joy.", "Be full of joy."], "negative": ["Write with woe.", "Be full of woe."]},
        "train_prompts": PROMPTS[:6],
        "heldout_prompts": PROMPTS[6:],
    },
    "it",
)


def engine() -> FakeEngine:
    """Answers as its system prompt asks, so that there is something to tell the poles by."""
    made = FakeEngine()

    def reply(prompt: str, pull: float, dose: float, max_tokens: int) -> tuple[str, str]:
        return f"{'joy' * ('joy' in prompt)}{'woe' * ('woe' in prompt)} {pull:+.4f}", "length"

    made.reply = reply
    return made


@pytest.fixture
def vector() -> SteeringVector:
    return train(engine(), "gladness", TRAIT, TrainOptions(calibrate="quick"))


def published(world: World, vector: SteeringVector, trait: bool = True) -> dict[str, Any]:
    path, trait_path = world.root / "v.safetensors", world.root / "trait.json"
    write_vector(vector, path)
    trait_path.write_text(json.dumps(TRAIT.to_dict()))
    contents = {"vector": path, **({"trait": trait_path} if trait else {})}
    card = draft("ann/gladness", contents, licence="MIT")
    Folder(world.there, world.key).publish(card, contents)
    return card


def test_it_agrees(tmp_path: Path, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    card = published(world, vector)
    assert card["calibration"]["effect"] > 0
    bob = world.reader()
    item = bob.pull("ann/gladness")
    monkeypatch.setattr("steer_plugins.engine.local.LocalEngine", lambda path, **named: engine())
    (report,) = measure_items(bob, [(item, bob.verify(item))], "m.gguf")
    assert report.agrees and report.why is None and report.effect == pytest.approx(report.said, rel=1e-3)
    assert [here for _, _, here in report.rows] == pytest.approx([said for _, said, _ in report.rows], abs=2e-3)
    assert "agrees with its card" in report.lines()[0] and set(report.safety) == {"kl", "refusal", "refusal_cosine"}


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.5, 2.0])
def test_another_vector_under_the_same_card_does_not(vector: SteeringVector, tmp_path: Path, factor: float) -> None:
    card = published(World(tmp_path), vector)
    other = vector.replace(scales={key: factor * scale for key, scale in vector.scales.items()})
    report = measure_curve(engine(), other, {**card, "version": "1"}, TRAIT)
    assert not report.agrees and "DOES NOT AGREE" in report.lines()[0]


def test_what_cannot_be_measured_is_said(vector: SteeringVector, tmp_path: Path) -> None:
    card = {**published(World(tmp_path), vector), "version": "1"}
    report = measure_curve(engine(), vector, card, None)
    assert report.agrees and "its trait did not come with it" in report.lines()[0]
    report = measure_curve(engine(), vector, {**card, "calibration": None}, TRAIT)
    assert "no dose curve" in report.lines()[0]
    report = measure_curve(engine(), vector.replace(calibration=None), card, TRAIT)
    assert "cannot be measured here" in report.lines()[0]


def test_without_its_trait(tmp_path: Path, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    published(world, vector, trait=False)
    bob = world.reader()
    item = bob.pull("ann/gladness")
    monkeypatch.setattr("steer_plugins.engine.local.LocalEngine", lambda path, **named: engine())
    (report,) = measure_items(bob, [(item, bob.verify(item))], "m.gguf")
    assert report.why is not None and Library(bob.library.root).get("ann/gladness", IDENTITY)
