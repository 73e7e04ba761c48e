"""Nonsense sent to the steering routes and fields: a 4xx with a sentence, and a server that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_plugins.steering.gate import Gate
from steer_plugins.steering.vector import SteeringVector
from tests.server.conftest import PROMPT, direction, make_vector

FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

words = ["v", "add", "all", "last", "mean", "response", "resid_post", "0-", "5-3", "../v", "a" * 300]
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=20) | st.sampled_from(words)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)

good_term = {
    "vector": st.just("v"), "strength": st.floats(-2, 2), "layers": st.sampled_from([[1, 2], [2, None], None]),
    "op": st.sampled_from(["add", "project", "clamp"]), "scope": st.sampled_from(["all", "prompt", "response", "2-5", "0-"]),
    "stream": st.just(0), "gate": st.sampled_from(["g", "v", None]),
    "schedule": st.fixed_dictionaries({}, optional={"kind": st.sampled_from(["constant", "linear", "cosine"]) | leaves,
                                                    "over": st.integers(0, 40) | leaves, "floor": st.floats(-1, 2) | leaves}),
}  # fmt: skip
odd_term = st.fixed_dictionaries({}, optional={k: v | leaves | trees for k, v in good_term.items()} | {"x": leaves})
terms = st.lists(odd_term | trees, max_size=4) | trees
token_ids = st.lists(st.integers(-3, 800), max_size=8)
message = st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=9)})
positions = st.sampled_from(["last", "all", "mean", "response", "response_mean"]) | st.lists(st.integers(-4, 9), max_size=4)
item = st.fixed_dictionaries({}, optional={"prompt": leaves | trees, "response": leaves | trees})
tags = st.fixed_dictionaries({}, optional={k: leaves | trees for k in ("open", "close", "tool_open", "tool_close")})
FIELDS: dict[str, dict[str, Any]] = {
    "/steering/read": {
        "prompts": st.lists(st.text(max_size=12) | token_ids | trees, max_size=3) | trees,
        "messages": st.lists(message, max_size=2) | trees,
        "layers": st.lists(st.integers(-1, 6), max_size=4) | trees,
        "positions": positions | trees,
        "site": leaves, "stream": leaves, "steering": terms, "steering_tags": trees, "request_id": leaves,
    },
    "/steering/logprobs": {
        "items": st.lists(item | trees, max_size=3) | trees,
        "steering": terms, "steering_tags": trees, "request_id": leaves,
    },
    "/steering/requests/some": {"steering": terms, "x": leaves},
    "/completion": {
        "steering": terms, "steering_probe": st.lists(leaves, max_size=3) | trees, "request_id": leaves,
        "steering_tags": tags | trees,
    },
}  # fmt: skip


@pytest.mark.parametrize("path", FIELDS)
@FUZZ
@given(data=st.data())
def test_any_body(exact: Any, tmp_path: Path, path: str, data: st.DataObject) -> None:
    server = exact()
    if "v" not in [v["name"] for v in server.get("/steering").json()["vectors"]]:
        server.put("v", make_vector(server), tmp_path)
        condition = SteeringVector("g", {(1, "resid_post"): direction(server, 7)})
        server.put("g", Gate(condition, 0.0).to_vector(), tmp_path)
    body = data.draw(st.fixed_dictionaries({}, optional=FIELDS[path]) | trees)
    if path == "/completion":
        body = {**(body if isinstance(body, dict) else {"steering": body}), "prompt": PROMPT, "n_predict": 1, "stream": False}
    answer = server.post(path, body)
    assert answer.status_code in (200, 400, 404, 409), (answer.status_code, answer.text)
    if answer.status_code != 200:
        message = answer.json()["error"]["message"]
        assert message and "exception" not in message.lower(), message
        assert len(message) < 400
    assert server.process.running


@FUZZ
@given(
    raw=st.binary(max_size=60) | st.text(max_size=40).map(str.encode),
    path=st.sampled_from([p for p in FIELDS if p != "/completion"]),
)
def test_any_bytes(exact: Any, raw: bytes, path: str) -> None:
    server = exact()
    answer = server.http.post(server.url + path, data=raw, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code in (400, 404, 411), answer.text
    assert answer.json()["error"]["message"]


def test_deep_and_wide_bodies(exact: Any) -> None:
    server = exact()
    for text in (
        "[" * 100_000,
        '{"steering":' * 5_000,
        json.dumps({"prompts": ["a"] * 5000}),
        json.dumps({"prompts": [[1] * 600]}),
    ):
        answer = server.http.post(
            f"{server.url}/steering/read", data=text, headers={"Content-Type": "application/json"}, timeout=60
        )
        assert answer.status_code == 400, answer.text[:300]
    assert server.get("/health").status_code == 200
