"""Steering beside what else a request may ask for: pictures, grammars, infill, stop strings, streams of other APIs."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from tests.integration.tiny_projector import png, write_projector
from tests.server.conftest import PROMPT, Server, make_vector
from tests.server.test_cache import LONG, ONE_SLOT, check_fresh, probabilities, term
from tests.unit.steering_server import eventually


def loaded(server: Server, folder: Path, **options: Any) -> Server:
    assert server.put("v", make_vector(server, **options), folder).status_code == 200
    return server


# ---- pictures ----


def test_pictures(own: Any, tmp_path: Path) -> None:
    """The tokens of a picture have positions like others, and are reused like others, but only all of them."""
    projector = write_projector(tmp_path / "mmproj.gguf", 128)
    server = loaded(own("llama", *ONE_SLOT, "--cache-ram", "0", "--mmproj", str(projector), "--no-mmproj-offload"), tmp_path)
    assert server.n_embd == 128
    marker = server.get("/props").json()["media_marker"]
    before = "Something to look at, for a while: "
    picture = base64.b64encode(png(90)).decode()
    prompt = {"prompt_string": f"{before}{marker} and what is there in it?", "multimodal_data": [picture]}
    at = len(server.tokens(before))
    text = server.tokens(before + " and what is there in it?")
    n = server.complete(prompt, [])["timings"]["prompt_n"]
    size = n - len(text)
    assert size > 2, "a picture of several tokens"

    assert server.complete(prompt, [])["cached"] == n - 1
    assert check_fresh(server, prompt, term())["cached"] == 1
    server.complete(prompt, term())
    assert server.complete(prompt, term())["cached"] == n - 1
    assert check_fresh(server, prompt, [])["cached"] == 1
    for first in range(at - 1, at + size + 2):
        server.complete(prompt, [], cache_prompt=False)
        inside = at < first < at + size  # no part of a picture can be kept
        assert check_fresh(server, prompt, term(scope=f"{first}-"))["cached"] == (at if inside else first), first
        server.complete(prompt, term(scope=f"{first}-"))
        assert check_fresh(server, prompt, [])["cached"] == (at if inside else first), first

    def seen(terms: Any) -> Any:
        return probabilities(server.complete(prompt, terms, 4, n_probs=1, cache_prompt=False))

    plain = seen([])
    assert seen(term(scope=f"{at}-{at + size - 1}")) != plain  # acts on the picture alone
    assert seen(term(scope=f"{n + 50}-")) == plain
    every = [*term(scope=f"1-{at - 1}"), *term(scope=f"{at}-{at + size - 1}"), *term(scope=f"{at + size}-")]
    assert np.allclose(seen(every), seen(term()), atol=1e-4)
    # the response begins at the last token of the prompt
    assert np.allclose(seen(term(scope="response")), seen(term(scope=f"{n - 1}-")), atol=1e-4)
    assert np.allclose(seen([*term(scope="response"), *term(scope="prompt")]), seen(term()), atol=1e-4)


# ---- what samples ----


def test_grammars_and_stop_strings(exact: Any, tmp_path: Path) -> None:
    server = loaded(exact(), tmp_path, dose=12.0)
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 999}}, "required": ["a"]}
    said = set()
    for strength in (0, 1, -1, 0.5):
        body = {"prompt": PROMPT, "n_predict": 60, "temperature": 0, "json_schema": schema, "steering": term(strength)}
        text = server.ok("/completion", body)["content"]
        assert isinstance(json.loads(text)["a"], int)
        said.add(text)
    assert len(said) > 1
    for word in ("x", "yz"):
        answer = server.complete(PROMPT, term(), grammar='root ::= "xyz" [a-c]+', stop=["c", "zz"])
        assert answer["content"].startswith("xyz") and "c" not in answer["content"]
        reply = server.complete(PROMPT, term(), grammar='root ::= "xyz"', stop=[word])
        assert reply["content"] == "xyz".split(word)[0] and reply["stop_type"] == "word"


def test_infill(own: Any, tmp_path: Path) -> None:
    keys = (f"tokenizer.ggml.{key}_token_id=int:{i + 5}" for i, key in enumerate(("fim_pre", "fim_suf", "fim_mid")))
    server = loaded(own("llama", *ONE_SLOT, *(word for key in keys for word in ("--override-kv", key))), tmp_path)
    body = {"input_prefix": "def f(", "input_suffix": "return x", "n_predict": 8, "temperature": 0, "ignore_eos": True}
    plain = server.ok("/infill", body)["content"]
    assert server.ok("/infill", {**body, "steering": []})["content"] == plain
    assert server.ok("/infill", {**body, "steering": term()})["content"] != plain
    assert server.ok("/infill", {**body, "steering": []})["content"] == plain
    assert "no vector 'w'" in server.error("/infill", {**body, "steering": [{"vector": "w"}]})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_streams_of_other_apis(exact: Any, tmp_path: Path, path: str) -> None:
    """A stream says what the whole answer says; those without a form of their own carry the id and the numbers of a probe."""
    server = loaded(exact(), tmp_path, dose=40.0)
    messages = [{"role": "user", "content": "Hello there"}]
    body: dict[str, Any] = {
        "messages": messages,
        "prompt": PROMPT,
        "input": "Hello there",
        "max_tokens": 8,
        "max_output_tokens": 8,
    }
    wanted = {"/v1/completions": ("prompt",), "/v1/responses": ("input", "max_output_tokens")}.get(path, ("messages",))
    body = {k: body[k] for k in (*wanted, *(() if "responses" in path else ("max_tokens",)))}
    body |= {"temperature": 0, "ignore_eos": True, "steering": term(), "request_id": "r1", "steering_probe": ["v"]}
    whole = server.ok(path, body)
    answer = server.stream(path, body)
    assert answer.headers["X-Steering-Request"] == "r1"
    events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: {")]
    text = ""
    for event in events:
        choice = (event.get("choices") or [{}])[0]
        text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        delta = event.get("delta")
        if event.get("type") in ("content_block_delta", "response.output_text.delta"):
            text += delta if isinstance(delta, str) else delta.get("text", "")
    if "choices" in whole:
        choice = whole["choices"][0]
        assert text == choice.get("text", (choice.get("message") or {}).get("content"))
        assert whole["request_id"] == "r1" and len(whole["steering_probe"]["v"]) == 8
        assert [e["request_id"] for e in events if "request_id" in e] == ["r1"]
        numbers = [e["steering_probe"]["v"] for e in events if "steering_probe" in e]
        assert np.allclose(numbers[-8:], whole["steering_probe"]["v"], atol=2e-3)
    else:
        blocks = whole.get("content") or whole["output"][0]["content"]
        assert text == blocks[0]["text"] and not any("steering_probe" in e for e in events)


def test_embeddings_are_not_steered(own: Any, tmp_path: Path) -> None:
    """Nor probed: they say so. Reading works on a server for embeddings too."""
    server = loaded(own("llama", "-np", "2", "-c", "1024", "--embeddings", "--pooling", "mean"), tmp_path)
    plain = server.ok("/v1/embeddings", {"input": PROMPT})
    assert len(plain["data"][0]["embedding"]) == server.n_embd
    asked: list[dict[str, Any]] = [{"steering": term()}, {"steering": []}, {"steering_probe": ["v"]}, {"steering_tags": {}}]
    for fields in asked:
        for path in ("/v1/embeddings", "/embeddings"):
            assert "embeddings cannot be steered" in server.error(path, {"input": PROMPT, **fields}), fields
    assert "/rerank cannot be steered" in server.error("/rerank", {"query": "a", "documents": ["b"], "steering": term()})
    _, steered = server.read(prompts=[PROMPT], positions="all", layers=[2], steering=term(scope="3-"))
    _, rows = server.read(prompts=[PROMPT], positions="all", layers=[2])
    moved = np.abs(steered["0.values"] - rows["0.values"]).max(axis=(0, 2))
    assert moved[:3].max() < 1e-3 and moved[3:].min() > 0.1
    assert server.ok("/v1/embeddings", {"input": PROMPT})["data"] == plain["data"]


# ---- one slot for everything ----


def test_a_read_waits_for_the_only_slot(own: Any, tmp_path: Path) -> None:
    server = loaded(own("llama", *ONE_SLOT, "--slots"), tmp_path)
    want = server.read(prompts=[LONG], positions="mean", steering=term())[1]["0.values"]
    tokens = server.complete(PROMPT, term(), 400)["tokens"]
    body = {"prompt": PROMPT, "n_predict": 400, "temperature": 0, "ignore_eos": True, "steering": term(), "request_id": "long"}
    answer = server.stream("/completion", body)
    lines = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: "))
    got = list(next(lines)["tokens"])
    reads: list[np.ndarray] = []
    threads = [
        threading.Thread(
            target=lambda: reads.append(server.read(prompts=[LONG], positions="mean", steering=term())[1]["0.values"])
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for chunk in lines:
        got += chunk["tokens"]
    for thread in threads:
        thread.join()
    assert got == tokens
    assert len(reads) == 3 and all(np.allclose(r, want, atol=2e-3) for r in reads)


def test_a_read_whose_client_goes_away(own: Any, tmp_path: Path) -> None:
    """A heap of texts is dropped, and the server has time for others."""
    server = loaded(own("llama", *ONE_SLOT, "--slots"), tmp_path)
    with pytest.raises(requests.Timeout):
        requests.post(server.url + "/steering/read", json={"prompts": [LONG] * 4000, "positions": "all"}, timeout=0.3)
    eventually(lambda: server.get("/steering").json()["n_requests"] == 0)
    assert len(server.complete(PROMPT, term(), 4)["tokens"]) == 4
    eventually(lambda: not any(s["is_processing"] for s in server.get("/slots").json()))


def test_more_projections_than_fit_at_once(own: Any, tmp_path: Path) -> None:
    """One request too many says so; nobody else is harmed, and there is room again afterwards."""
    server = own("llama", "-np", "2", "-c", "4096", "--cache-ram", "0")
    for i in range(65):
        server.put(f"v{i}", make_vector(server, 1, seed=i), tmp_path)
    many = [{"vector": f"v{i}", "op": "project", "strength": 0.1, "scope": "all"} for i in range(64)]
    last = [{"vector": "v64", "op": "project", "scope": "all"}]
    body = {"prompt": PROMPT, "n_predict": 1900, "ignore_eos": True, "temperature": 0, "steering": many}
    answer = server.stream("/completion", body)
    lines = (line for line in answer.iter_lines() if line.startswith(b"data: "))
    next(lines)
    assert "more than 64" in server.error("/completion", {"prompt": PROMPT, "n_predict": 2, "steering": last}, 503)
    assert server.complete(PROMPT, [{"vector": "v64"}], 2)["tokens"]  # adding has no such limit
    answer.close()
    eventually(lambda: server.get("/steering").json()["n_requests"] == 0)
    assert server.complete(PROMPT, last, 2)["tokens"]
