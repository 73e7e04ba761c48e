"""``steer inspect`` on a real engine: where a vector is added, the projection moves by the strength."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.report import inspect_prompt
from steer_plugins.steering.terms import Term
from tests.engine.engines import BOTH, PROMPT, ServedEngine, near, open_engine, vector

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


def test_a_server_gives_the_same_picture(tiny: Callable[..., Path], runtime: Any) -> None:
    if runtime.server is None:
        pytest.skip(f"the runtime {runtime.path} has no llama-server: build one with `steer build`")
    prompt = [{"role": "user", "content": "hi \u65e5"}]
    found = []
    for engine in (open_engine(tiny("llama")), ServedEngine(runtime.server, tiny("llama"))):
        with engine:
            v = vector(engine, (1,), scope="response", dose=400.0)  # type: ignore[arg-type]  # it asks for n_embd alone
            found.append(inspect_prompt(engine, prompt, v, steering=Term(v, 0.5), max_tokens=4))
    local, served = found
    assert local.texts == served.texts and "<|im_start|>" in local.texts and "\u65e5" in local.texts
    assert local.after is not None and served.after is not None
    near(local.before.projections[:, 1:], served.before.projections[:, 1:])
    near(local.after.projections[:, 1:], served.after.projections[:, 1:])
