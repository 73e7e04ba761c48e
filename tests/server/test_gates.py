"""Gates in requests: decided on the prompt before its last token, whatever the batches and the cache look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.steering.gate import Gate, cosine
from steer_plugins.steering.vector import SteeringVector
from tests.server.conftest import EXACT, PROMPT, Server, direction, make_vector

LONG = PROMPT + " and all of this goes on for a while, in many words that say little, until it ends"


def put_gate(server: Server, folder: Path, name: str, threshold: float, compare: str = "above", positions: str = "mean") -> None:
    condition = SteeringVector("g", {(1, "resid_post"): direction(server, 77)})
    assert server.put(name, Gate(condition, threshold, compare, positions).to_vector(), folder).status_code == 200


def score(server: Server, prompt: Any, positions: str = "mean") -> float:
    rows = server.read(prompts=[prompt], layers=[1], positions="all")[1]["0.values"][0].astype(np.float64)[1:-1]
    return cosine(rows.mean(axis=0) if positions == "mean" else rows[-1], direction(server, 77))


def gates(server: Server, folder: Path, prompt: Any, positions: str = "mean") -> None:
    """``yes`` is open for the prompt, ``no`` is closed."""
    at = score(server, prompt, positions)
    put_gate(server, folder, "yes", at - 1e-4, positions=positions)
    put_gate(server, folder, "no", at - 1e-4, "below", positions)


def run(server: Server, prompt: Any, terms: list[dict[str, Any]], **fields: Any) -> tuple[Any, Any]:
    answer = server.complete(prompt, terms, n=8, n_probs=2, **fields)
    return answer["tokens"], [[p["logprob"] for p in q["top_logprobs"]] for q in answer["completion_probabilities"]]


def same(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    return bool(a[0] == b[0] and np.allclose(a[1], b[1], atol=1e-3))


@pytest.mark.parametrize("positions", ["mean", "last"])
@pytest.mark.parametrize("arch", ["llama", "deepseek4", "qwen3next", "gemma3"])
def test_open_and_closed(exact: Any, tmp_path: Path, arch: str, positions: str) -> None:
    server = exact(arch)
    server.put("v", make_vector(server, scope="response"), tmp_path)
    gates(server, tmp_path, LONG, positions)
    for cached in (False, True, True):
        plain, steered = run(server, LONG, [], cache_prompt=cached), run(server, LONG, [{"vector": "v"}], cache_prompt=cached)
        assert not same(plain, steered)
        assert same(run(server, LONG, [{"vector": "v", "gate": "yes"}], cache_prompt=cached), steered)
        assert same(run(server, LONG, [{"vector": "v", "gate": "no"}], cache_prompt=cached), plain)
    # bit for bit, where the batches are the same
    off = [{"vector": "v", "gate": "yes"}, {"vector": "v", "strength": -1, "gate": "yes"}]
    assert run(server, LONG, [{"vector": "v", "gate": "no"}], cache_prompt=False) == run(server, LONG, off, cache_prompt=False)


def test_small_batches(exact: Any, tmp_path: Path) -> None:
    """The prompt comes in pieces; its last token alone in the last one, or with a whole batch before it."""
    for batch in ("8", "16", "1024"):
        server = exact("llama", *EXACT, "-b", batch, "-ub", "8")
        server.put("v", make_vector(server, scope="response"), tmp_path)
        tokens = server.tokens(LONG * 2)
        for n in (3, 8, 9, 10, 16, 17, 18, 25):
            gates(server, tmp_path, tokens[:n])
            plain, steered = run(server, tokens[:n], []), run(server, tokens[:n], [{"vector": "v"}])
            assert same(run(server, tokens[:n], [{"vector": "v", "gate": "yes"}]), steered), n
            assert same(run(server, tokens[:n], [{"vector": "v", "gate": "no"}]), plain), n


def test_together(exact: Any, tmp_path: Path) -> None:
    """Gated and other requests side by side, over and over, with reads between them."""
    server = exact("llama")
    server.put("v", make_vector(server, scope="response"), tmp_path)
    gates(server, tmp_path, LONG)
    kinds: list[list[dict[str, Any]]] = [[], [{"vector": "v"}], [{"vector": "v", "gate": "yes"}], [{"vector": "v", "gate": "no"}]]
    alone = [run(server, LONG, terms) for terms in kinds]
    want = server.read(prompts=[PROMPT], positions="mean")[1]["0.values"]

    def read() -> Any:
        return server.read(prompts=[PROMPT], positions="mean")[1]["0.values"]

    def one(i: int) -> Any:
        return run(server, LONG, kinds[i])

    for _ in range(3):
        found = server.many([lambda i=i: one(i) for i in (3, 2, 1, 0, 2, 3)] + [read, read])  # type: ignore[misc]
        for i, answer in zip((3, 2, 1, 0, 2, 3), found, strict=False):
            assert same(answer, alone[i]), i
        assert all(np.allclose(values, want, atol=1e-3) for values in found[6:])


def test_what_a_gated_reply_leaves_behind(exact: Any, tmp_path: Path) -> None:
    """A prompt that goes on where a gated reply ended matches the cache only as far as it was not steered."""
    server = exact("llama")
    server.put("v", make_vector(server, scope="response"), tmp_path)
    gates(server, tmp_path, LONG)
    n = len(server.tokens(LONG))
    for gate, cached in (("yes", n - 1), ("no", n + 7)):
        reply = server.complete(LONG, [{"vector": "v", "gate": gate}], n=8, id_slot=1)
        history = server.tokens(LONG) + reply["tokens"] + server.tokens(" Then")
        again = server.complete(history, [], n=4, n_probs=1, id_slot=1)
        assert again["cached"] == cached, gate
        fresh = server.complete(history, [], n=4, n_probs=1, cache_prompt=False, id_slot=1)
        assert again["tokens"] == fresh["tokens"]


def test_reading_and_scoring(exact: Any, tmp_path: Path) -> None:
    server = exact("llama")
    server.put("v", make_vector(server, 1, dose=3.0, scope="response"), tmp_path)
    gates(server, tmp_path, LONG)
    item = {"prompt": LONG, "response": " mild and dry"}
    n = len(server.tokens(LONG))
    plain = server.read(prompts=[item], layers=[1], positions="all")[1]["0.values"][0].astype(np.float64)
    for gate, dose in (("yes", 3.0), ("no", 0.0)):
        terms = [{"vector": "v", "gate": gate}]
        rows = server.read(prompts=[item], layers=[1], positions="all", steering=terms)[1]["0.values"][0]
        along = (rows - plain) @ direction(server, 1)
        assert np.allclose(along, [0.0] * (n - 1) + [dose] * (len(plain) - n + 1), atol=2e-3), gate
        scored = server.ok("/steering/logprobs", {"items": [item], "steering": terms})["logprobs"][0]
        want = server.ok("/steering/logprobs", {"items": [item], "steering": [{"vector": "v"}] if dose else []})["logprobs"][0]
        assert np.allclose(scored, want, atol=1e-3)


def test_phases_and_schedules_behind_a_gate(exact: Any, tmp_path: Path) -> None:
    server = exact("llama")
    server.put("v", make_vector(server, 1, dose=3.0), tmp_path)
    prompt = "Some words, and then <A>"
    gates(server, tmp_path, prompt)
    item = {"prompt": prompt, "response": " one</A> two and three more"}
    fields: dict[str, Any] = {
        "prompts": [item],
        "layers": [1],
        "positions": "all",
        "steering_tags": {"open": "<A>", "close": "</A>"},
    }
    for more in ({"scope": "thinking"}, {"scope": "answer"}, {"scope": "answer", "schedule": {"kind": "linear", "over": 20}}):
        want = server.read(**fields, steering=[{"vector": "v", **more}])[1]["0.values"]
        none = server.read(**fields)[1]["0.values"]
        assert not np.allclose(want, none, atol=0.1)
        assert np.allclose(
            server.read(**fields, steering=[{"vector": "v", "gate": "yes", **more}])[1]["0.values"], want, atol=2e-3
        )
        assert np.allclose(
            server.read(**fields, steering=[{"vector": "v", "gate": "no", **more}])[1]["0.values"], none, atol=2e-3
        )


def test_what_is_refused(exact: Any, tmp_path: Path) -> None:
    server = exact("llama")
    server.put("v", make_vector(server), tmp_path)
    put_gate(server, tmp_path, "g", 0.0)
    term = {"vector": "v", "scope": "response", "gate": "g"}
    for terms, words, more in (
        ([{**term, "scope": "all"}], "response, thinking or answer", {}),
        ([{**term, "scope": "5-"}], "response, thinking or answer", {}),
        ([term], "send a request for each", {"n": 2}),
        ([term], "send a request for each", {"n_cmpl": 2}),
        ([term], "at least 3 tokens, this one has 2", {"prompt": server.tokens(PROMPT)[:2]}),
    ):
        assert words in server.error("/completion", {"prompt": PROMPT, "n_predict": 1, "steering": terms, **more}), words
    last = SteeringVector("g", {(server.n_layer - 1, "resid_post"): direction(server, 3)})
    assert server.put("last", Gate(last, 0.0).to_vector(), tmp_path).status_code == 200
    assert "output tokens only" in server.error("/completion", {"prompt": PROMPT, "steering": [{**term, "gate": "last"}]})
    condition = SteeringVector("g", {(1, "resid_post"): direction(server, 77)})
    for bad in (
        3,
        {},
        {"threshold": 2, "compare": "above", "positions": "mean"},
        {"threshold": 0, "compare": "over", "positions": "mean"},
    ):
        assert server.put("bad", condition.replace(provenance={"gate": bad}), tmp_path).status_code == 400, bad
    assert (
        server.put("bad", make_vector(server).replace(provenance=Gate(condition, 0).to_vector().provenance), tmp_path).status_code
        == 400
    )
    listed = {v["name"]: v["gate"] for v in server.get("/steering").json()["vectors"]}
    assert listed["g"] is True and listed["v"] is False
    assert server.get("/health").status_code == 200
