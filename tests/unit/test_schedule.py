"""Schedules: their shape, and what terms make of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_plugins.errors import SpecError
from steer_plugins.steering.schedule import Schedule
from steer_plugins.steering.terms import Term
from steer_plugins.steering.vector import SteeringVector

VECTOR = SteeringVector("mood", {(1, "resid_post"): np.ones(4)})
schedules = st.builds(Schedule, st.sampled_from(["linear", "cosine"]), st.integers(1, 300), st.floats(0, 1))


@given(schedules)
def test_json_and_back(schedule: Schedule) -> None:
    assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("log", 4), "unknown schedule"),
        (("constant", 4), "none for a constant"),
        (("linear", 0), "from 1 to 4096"),
        (("linear", 4097), "from 1 to 4096"),
        (("linear", True), "from 1 to 4096"),
        (("linear", 2.0), "from 1 to 4096"),
        (("linear", 2, -0.1), "from 0 to 1"),
        (("linear", 2, math.nan), "from 0 to 1"),
        (("linear", 2, "0"), "from 0 to 1"),
    ],
)
def test_bad_schedules_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Schedule(*arguments)


def test_terms_with_schedules() -> None:
    term = Term(VECTOR, -0.8, schedule=Schedule("linear", 4, 0.5), scope="response")
    assert term.schedule is not None and term.strength == -0.8, "what is left of it is the planner's to say"
    with pytest.raises(SpecError, match="with scope prompt"):
        Term(VECTOR, schedule=Schedule("linear", 4), scope="prompt")
    with pytest.raises(SpecError, match="not a Schedule"):
        Term(VECTOR, schedule={"kind": "linear"})  # type: ignore[arg-type]
