"""Nonsense sent to the steering routes and fields: a 4xx with a sentence, and a server that goes on."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_plugins.steering.gate import Gate
from steer_plugins.steering.vector import SteeringVector
from tests.server.conftest import EXACT, PROMPT, direction, make_vector

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
    bodiless = body is None and answer.status_code == 415  # nothing is sent, so no type of it
    assert answer.status_code in (200, 400, 404, 409) or bodiless, (answer.status_code, answer.text)
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


class Neighbour:
    """An innocent client: it asks the same unsteered things again and again, and every reply has to be its own."""

    PROMPTS = (PROMPT, "One two three", "The old harbour lay still")

    def __init__(self, server: Any) -> None:
        self.server = server
        self.want = [server.complete(p, [], 12, cache_prompt=False, id_slot=3)["tokens"] for p in self.PROMPTS]
        self.wrong: list[Any] = []
        self.asked = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.stop.is_set():
            i = self.asked % len(self.PROMPTS)
            got = self.server.complete(self.PROMPTS[i], [], 12, id_slot=3)["tokens"]
            if got != self.want[i]:
                self.wrong.append((self.asked, got))
            self.asked += 1
            self.stop.wait(0.05)  # the time is for the others

    def __enter__(self) -> Neighbour:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()


def edges(*limits: float) -> st.SearchStrategy[float]:
    """Numbers at limits, a little inside and a little beyond them, and anywhere."""
    near = [x * (1 + d) for x in limits for d in (-1e-9, 0.0, 1e-9)] + [-x for x in limits]
    return st.sampled_from([*near, 0.0, -0.0, 5e-324]) | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def wishes(draw: st.DrawFn) -> Any:
    """One request of a neighbour who is up to no good: terms, uploads and changes at their bounds."""
    kind = draw(st.sampled_from(["complete", "complete", "complete", "change", "upload", "delete", "read"]))
    name = draw(st.sampled_from(["v", "g", "w"]))
    term = st.fixed_dictionaries(
        {"vector": st.sampled_from(["v", "v", "w"])},
        optional={
            "strength": edges(1e15, 1e14, 2.5e14, 3.0, 1.0, 3.4028234663852886e38),
            "op": st.sampled_from(["add", "project", "clamp", "renorm"]),
            "scope": st.sampled_from(["all", "prompt", "response", "0-", "2-5", "thinking", "answer"]),
            "layers": st.sampled_from([[0, None], [1, 2], [3, 3], None]),
            "schedule": st.fixed_dictionaries(
                {"kind": st.sampled_from(["linear", "cosine"]), "over": st.sampled_from([1, 64, 65, 4096, 4097])}
            ),
            "gate": st.just("g"),
        },
    )
    return kind, name, draw(st.lists(term, max_size=64)), draw(st.integers(0, 2**32 - 1)), draw(edges(1e15, 3e38))


def test_a_neighbour_of_fuzzed_requests(own: Any, tmp_path: Path) -> None:
    """STEER_FUZZ sets the number of inputs; 100000 take an hour or two."""
    server = own("llama", *EXACT)
    condition = SteeringVector("g", {(1, "resid_post"): direction(server, 7)})
    tags = {"open": "<think>", "close": "</think>"}
    seen: Counter[tuple[str, int]] = Counter()

    def start() -> None:
        server.put("v", make_vector(server, *range(server.n_layer)), tmp_path)
        server.put("g", Gate(condition, 0.0).to_vector(), tmp_path)

    start()
    with Neighbour(server) as neighbour:

        @settings(
            max_examples=int(os.environ.get("STEER_FUZZ", "300")),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(wish=wishes())
        def run(wish: Any) -> None:
            kind, name, terms, seed, dose = wish
            if kind == "complete":
                body = {"prompt": PROMPT, "n_predict": 3, "steering": terms, "steering_tags": tags, "id_slot": seed % 3}
                answer = server.post("/completion", body)
            elif kind == "change":
                body = {"prompt": PROMPT, "n_predict": 400, "ignore_eos": True, "request_id": f"r{seed}", "id_slot": seed % 3}
                stream = server.stream("/completion", body)
                lines = stream.iter_lines()
                next(lines, None)
                answer = server.post(f"/steering/requests/r{seed}", {"steering": terms})
                stream.close()
            elif kind == "read":
                answer = server.post(
                    "/steering/read", {"prompts": [PROMPT], "steering": terms, "positions": "all", "steering_tags": tags}
                )
            elif kind == "delete":
                answer = server.http.delete(f"{server.url}/steering/vectors/{name}", timeout=60)
                start()
            else:
                answer = server.put("w", make_vector(server, seed=seed % 1000, dose=dose), tmp_path)
            seen[kind, answer.status_code] += 1
            assert answer.status_code in (200, 400, 404, 409, 500, 503), answer.text
            if answer.status_code == 500:  # a state that outgrew its numbers may be told of, nothing else
                assert "grew beyond" in answer.text, answer.text
            assert server.process.running and not neighbour.wrong, (wish, neighbour.wrong)

        run()
    assert not neighbour.wrong and neighbour.asked > 3, neighbour.wrong
    assert seen["complete", 200] and seen["complete", 400] and seen["upload", 200]
