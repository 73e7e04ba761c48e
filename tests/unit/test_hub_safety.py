"""What a pull says of a vector that lowers refusals, and what it does about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steer_plugins.errors import HubError
from steer_plugins.hub.safety import LOWERS, betrays, measured, refusal_cosine, safety_check
from steer_plugins.steering.vector import SteeringVector

from .fakes import IDENTITY, N_EMBD, FakeEngine
from .hub_world import MODEL, N, World, make


def towards(direction: np.ndarray, name: str = "mood") -> SteeringVector:
    return make().replace(name=name, directions={(1, "resid_post"): direction}, scales={(1, "resid_post"): 1.0})


def card(**said: object) -> dict[str, object]:
    return {"name": "ann/happy", "description": "Happy.", "tags": [], "trait": None, **said}


@pytest.mark.parametrize("angle", [1.0, 0.0, -0.2, -0.6])
def test_the_cosine_with_a_refusal_direction(tmp_path: Path, angle: float) -> None:
    axis, other = np.eye(N)[:2]
    world = World(tmp_path)
    bob = world.home()
    vector = towards(angle * axis + np.sqrt(1 - angle**2) * other)
    assert refusal_cosine(bob.library, vector) is None
    bob.library.put(towards(axis, "refusal"), MODEL)
    assert refusal_cosine(bob.library, vector) == pytest.approx(angle, abs=1e-6)


def test_a_vector_against_refusals_is_kept_out(tmp_path: Path) -> None:
    world = World(tmp_path)
    axis = np.eye(N)[0]
    world.publish(towards(-axis), name="ann/happy")
    bob = world.reader()
    said: list[str] = []
    check = safety_check(bob.library, None, force=False, say=said.append)
    bob.pull("ann/happy", check=check)  # nobody knows what refusing is here
    bob.remove("ann/happy")
    bob.library.put(towards(axis, "refusal"), MODEL)
    check = safety_check(bob.library, None, force=False, say=said.append)
    with pytest.raises(HubError, match="lowers refusals, which its card does not say.*cosine.*-1.00.*--force"):
        bob.pull("ann/happy", check=check)
    assert bob.pulled.items() == []
    check = safety_check(bob.library, None, force=True, say=said.append)
    bob.pull("ann/happy", check=check)
    assert said[-1].startswith("warning: ann/happy lowers refusals")
    assert any("cosine with a refusal direction" in text and "-1.000" in text for text in said)


def test_what_the_card_says_is_no_betrayal() -> None:
    assert betrays(card(), {"kl": 9.0, "refusal": LOWERS, "refusal_cosine": None})
    assert betrays(card(), {"kl": 9.0, "refusal": LOWERS + 0.1, "refusal_cosine": -0.1}) is None
    # used at negative strengths, a vector towards refusing lowers them as well
    assert "0.40, so at negative strengths" in str(betrays(card(), {"refusal": None, "refusal_cosine": 0.4}))
    assert betrays(card(), {"refusal": None, "refusal_cosine": 0.2}) is None
    for said in ({"description": "Lowers refusals."}, {"tags": ["compliance"]}, {"name": "ann/no-refusals"}):
        assert betrays(card(**said), {"refusal": 2 * LOWERS, "refusal_cosine": -0.9}) is None


def test_the_worse_of_both_signs_counts() -> None:
    """The engine without a model scores replies by the dose they were made with, so the texts here have none to lose."""
    vector = SteeringVector("v", {(1, "resid_post"): np.eye(N_EMBD)[0]}, {(1, "resid_post"): 1.0}, identity=IDENTITY)
    found = measured(FakeEngine(), vector)
    assert set(found) == {"kl", "refusal"} and found["kl"] >= 0.0 and found["refusal"] <= 0.0
