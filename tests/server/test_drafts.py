"""Speculative decoding: the target is steered by position, the draft is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.server.conftest import PROMPT, make_vector
from tests.server.test_cache import LONG, probabilities, term

FLAGS = ("--parallel", "2", "-c", "2048", "--no-kv-unified", "--cache-ram", "0", "-fa", "off", "-ctk", "f32", "-ctv", "f32")


def test_a_draft_model_changes_no_steered_reply(own: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    plain = own("llama", *FLAGS)
    drafted = own("llama", *FLAGS, "-md", str(tiny_model("llama")), "--spec-type", "draft-simple", "--spec-draft-p-min", "0")
    for server in (plain, drafted):
        server.put("v", make_vector(server), tmp_path)
    for terms in ([], term(0.2), term(0.2, "response"), [*term(0.3, "20-30"), *term(-0.3, "31-60")]):
        for prompt in (PROMPT, LONG):
            one, two = (s.complete(prompt, terms, 40, n_probs=1) for s in (plain, drafted))
            assert one["tokens"] == two["tokens"], terms
    # something was drafted, and the unsteered draft was right at times
    assert any(drafted.complete(PROMPT, t, 40)["timings"].get("draft_n_accepted", 0) > 0 for t in ([], term(0.1)))
    # the caches of a drafted reply know what was applied
    reply = drafted.complete(LONG, term(0.2), 20)
    turn = drafted.tokens(LONG) + reply["tokens"]
    cached = drafted.complete(turn, term(0.2), 4, n_probs=1)
    assert cached["cached"] > len(drafted.tokens(LONG))
    fresh = drafted.complete(turn, term(0.2), 4, n_probs=1, cache_prompt=False)
    assert cached["tokens"] == fresh["tokens"]
    assert drafted.complete(turn, [], 4)["cached"] <= 1


def test_phases_are_refused_with_a_draft_model(own: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    server = own("llama", *FLAGS, "-md", str(tiny_model("llama")), "--spec-type", "draft-simple")
    server.put("v", make_vector(server), tmp_path)
    tags = {"open": "<think>", "close": "</think>"}
    for scope in ("thinking", "answer"):
        body = {"prompt": PROMPT, "steering": term(1.0, scope), "steering_tags": tags}
        assert "speculative decoding" in server.error("/completion", body)
    assert "speculative decoding" in server.error("/steering/logprobs", {"items": [{"prompt": "a", "response": " b"}]}, 501)
    _, rows = server.read(prompts=[PROMPT], positions="mean")
    assert np.isfinite(rows["0.values"]).all()
    assert len(server.complete(n=5, steering_probe=["v"])["steering_probe"]["v"]) == 5
    assert probabilities(server.complete(n=2, n_probs=1))
