"""``steer inspect`` on a real engine: where a vector is added, the projection moves by the strength."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from steer_plugins.pictures import inspect_prompt
from steer_plugins.steering import Term
from tests.engine.engines import BOTH, PROMPT, open_engine, vector

pytestmark = pytest.mark.usefixtures("float32_cache")


@pytest.mark.parametrize("arch", BOTH)
def test_projections_move_by_the_strength(tiny: Callable[..., Path], arch: str) -> None:
    with open_engine(tiny(arch)) as engine:
        v = vector(engine, (1,), scope="response", dose=400.0)
        found = inspect_prompt(engine, PROMPT, v, steering=Term(v, 0.5), max_tokens=4)
        assert found.after is not None
        change = found.after.projections - found.before.projections
        assert np.allclose(change[:, : found.n_prompt - 1], 0.0, atol=1e-4)
        assert np.allclose(change[:, found.n_prompt - 1 :], 0.5, atol=1e-3)
        assert len(found.texts) == len(found.tokens) == found.n_prompt + 4


def test_special_tokens_have_names(tiny: Callable[..., Path]) -> None:
    with open_engine(tiny("llama")) as engine:
        tokens = engine.tokenize("a")
        assert engine.pieces(tokens)[0] != b"" and engine.detokenize(tokens[:1]) == ""
