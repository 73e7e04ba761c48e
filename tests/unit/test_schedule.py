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
def test_it_falls_from_one_to_the_floor(schedule: Schedule) -> None:
    values = [schedule.factor(n) for n in range(-1, schedule.over + 3)]
    assert values[0] == values[1] == 1.0
    assert values[schedule.over + 1] == values[-1] == schedule.floor
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_the_shapes() -> None:
    assert [Schedule("linear", 4).factor(n) for n in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert Schedule("linear", 4, 0.5).factor(1) == 0.875
    assert Schedule("cosine", 4).factor(1) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert Schedule("cosine", 4, 0.5).factor(2) == pytest.approx(0.75)


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
    assert term.at(0) == Term(VECTOR, -0.8, scope="response")
    assert term.at(2) == Term(VECTOR, -0.8 * 0.75, scope="response")
    assert Term(VECTOR, 0.5).at(7) == Term(VECTOR, 0.5)
    with pytest.raises(SpecError, match="with scope prompt"):
        Term(VECTOR, schedule=Schedule("linear", 4), scope="prompt")
    with pytest.raises(SpecError, match="not a Schedule"):
        Term(VECTOR, schedule={"kind": "linear"})  # type: ignore[arg-type]
