"""SmolLM2 with both traits' vectors, fitted once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from steer_plugins.engine.local import LocalEngine
from steer_plugins.errors import ModelError, SteerError
from steer_plugins.runtime.demo_model import default_model_path
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.training.train import train
from steer_plugins.training.traits import load_trait

TRAITS = ("mood", "succinctness")


@pytest.fixture(scope="session")
def engine() -> Iterator[LocalEngine]:
    """The demo model. Skips when it is not here, unless STEER_REQUIRE_MODEL=1."""
    try:
        model = default_model_path()
    except ModelError as error:
        if os.environ.get("STEER_REQUIRE_MODEL") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
    try:
        opened = LocalEngine(model, n_parallel=12)
    except SteerError as error:
        pytest.fail(f"the engine cannot be tested: {error}")
    with opened:
        yield opened


@pytest.fixture(scope="session")
def vector(engine: LocalEngine) -> Callable[[str], SteeringVector]:
    """``vector("mood")``: fitted with the quick calibration, as `steer train mood` does."""
    return cache(lambda name: train(engine, name, load_trait(name)))
