"""One steering for a process that takes none with a request: the control vector of an unmodified llama-server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.client.fixed import fixed_flags
from steer_plugins.errors import SpecError
from steer_plugins.steering.schedule import Schedule
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.foreign import controlvector

RNG = np.random.default_rng(0)


def vector(*layers: int, name: str = "mood", **more: Any) -> SteeringVector:
    rows = {(il, "resid_post"): RNG.standard_normal(8).astype(np.float32) for il in layers}
    return SteeringVector(name, rows, dict.fromkeys(rows, 0.5), **{"default_scope": "0-", **more})


def test_terms_become_one_control_vector(tmp_path: Path) -> None:
    one, two = vector(2, 3, 4), vector(3, 5, name="calm")
    flags = fixed_flags(Steering([Term(one, 2.0, layers=(2, 3)), Term(two, -1.0), Term(one, 0.0)]), tmp_path)
    assert flags[0] == "--control-vector" and flags[2:] == ["--control-vector-layer-range", "2", "5"]
    read = controlvector.read(Path(flags[1]))
    want = {
        2: 2.0 * one.effective(2, "resid_post"),
        3: 2.0 * one.effective(3, "resid_post") - two.effective(3, "resid_post"),
        5: -two.effective(5, "resid_post"),
    }
    assert {layer for layer, _ in read.directions} == set(want)
    for layer, row in want.items():
        np.testing.assert_allclose(read.effective(layer, "resid_post"), row, atol=1e-6)
    assert fixed_flags(Steering([Term(one, 2.0, layers=(2, 3)), Term(two, -1.0)]), tmp_path) == flags, "found by content"


def test_nothing_needs_no_flags(tmp_path: Path) -> None:
    one = vector(2)
    assert fixed_flags(Steering(), tmp_path) == fixed_flags(Steering([Term(one, 0.0)]), tmp_path) == []
    assert fixed_flags(Steering([Term(one, 1.0), Term(one, -1.0)]), tmp_path) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (Term(vector(2, op="project"), 1.0), "op project"),
        (Term(vector(2), 1.0, op="renorm"), "op renorm"),
        (Term(vector(2), 1.0, scope="response"), r"scope response.*write mood\?0-"),
        (Term(vector(2), 1.0, scope="all"), r"scope all.*the first included.*write mood\?0-"),
        (Term(vector(2), 1.0, scope="0-9"), "scope 0-9"),
        (Term(vector(2), 1.0, schedule=Schedule("linear", 9)), "a schedule"),
        (Term(vector(2), 1.0, stream=0), "a stream"),
        (Term(vector(0, 2), 1.0), "layer 0"),
    ],
)
def test_what_it_cannot_do_is_refused(term: Term, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=words):
        fixed_flags(Steering([term]), tmp_path)
    assert not list(tmp_path.iterdir())
    if "layer 0" in words:  # a window that leaves it out is fine
        assert fixed_flags(Steering([Term(term.vector, 1.0, layers=(1, 2))]), tmp_path)
