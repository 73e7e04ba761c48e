"""Replies of every route that the sidecar answers, against the fields that Ollama documents and the official client reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest
from steer_plugins_ollama import pool as pools
from steer_plugins_ollama.folder import FolderStore
from steer_plugins_ollama.pool import Pool
from steer_plugins_ollama.service import Service

from steer_plugins import Library, testing

from .ollama_standins import StandInLlama, StandInProcess, last_said, running, said

CHAT = [{"role": "user", "content": "hi"}]
COUNTS = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}
HEAD = {"model": str, "created_at": str}
DETAILS = {"parent_model", "format", "family", "families", "parameter_size", "quantization_level"}
Kinds = dict[str, Any]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("folder")
    testing.write("llama", root / "one.gguf")
    text = "FROM one\nSYSTEM Be kind.\nLICENSE MIT\nMESSAGE user a\nPARAMETER stop x\nPARAMETER temperature 0.5\n"
    (root / "two.modelfile").write_text(text + 'TEMPLATE """{{ .Prompt }}"""\nPARAMETER steering ""\n')
    llama = StandInLlama()
    llama.events = [said(content="A "), said(content="b."), said(finish="stop"), last_said()]
    plain = [{"content": "A "}, {"content": "b.", "tokens": [3]}]
    stop = {"content": "", "stop": True, "stop_type": "limit", "timings": last_said()["timings"]}
    scripted = llama._reply

    def completion(handler: Any, body: bytes) -> None:
        llama.events, kept = [*plain, stop], llama.events
        scripted(handler, body)
        llama.events = kept

    llama.answers[("POST", "/completion")] = completion
    library = Library(root / "library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "ServerProcess", StandInProcess(llama))
        pool = Pool(binary=root / "one.gguf", library=library, environ={})
        with running(lambda: Service(FolderStore(root), pool, library, environ={})) as (found, _):
            yield found
    llama.close()


def has(found: dict[str, Any], kinds: Kinds, *, also: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """All of these fields with their kinds, and no others but ``also``."""
    assert set(kinds) <= set(found) <= set(kinds) | set(also), sorted(found)
    for key, kind in kinds.items():
        assert isinstance(found[key], kind), (key, found[key])
    if "created_at" in found:
        datetime.fromisoformat(found["created_at"].replace("Z", "+00:00"))


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    """NDJSON: a line for each object, none blank."""
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("\n") and "" not in answer.text[:-1].split("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


LAST: Kinds = {**HEAD, "done": bool, "done_reason": str, **dict.fromkeys(COUNTS, int)}


@pytest.mark.parametrize("model", ["one", "two"])
def test_chat(client: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": CHAT}
    *parts, last = lines(client.post("/api/chat", json=body))
    assert [part["message"] for part in parts] == [{"role": "assistant", "content": text} for text in ("A ", "b.")]
    for part in parts:
        has(part, {**HEAD, "message": dict, "done": bool})
        assert part["done"] is False and part["model"] == model
    has(last, {**LAST, "message": dict})
    assert last["done"] is True and last["message"] == {"role": "assistant", "content": ""}
    assert last["done_reason"] == ("stop" if model == "one" else "length")
    assert (last["prompt_eval_count"], last["eval_count"]) == (7, 3)
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (1_500_000, 2_500_000), "nanoseconds"
    whole = client.post("/api/chat", json={**body, "stream": False})
    assert whole.headers["content-type"].startswith("application/json")
    has(whole.json(), {**LAST, "message": dict})
    assert whole.json()["message"]["content"] == "A b."


def test_generate(client: httpx.Client) -> None:
    body = {"model": "one", "prompt": "hi"}
    *parts, last = lines(client.post("/api/generate", json=body))
    for part in parts:
        has(part, {**HEAD, "response": str, "done": bool})
    has(last, {**LAST, "response": str, "context": list})
    assert last["response"] == "" and last["context"] == [1, 2, 3]
    has(client.post("/api/generate", json={**body, "stream": False}).json(), {**LAST, "response": str, "context": list})
    raw = client.post("/api/generate", json={**body, "raw": True, "stream": False}).json()
    has(raw, {**LAST, "response": str})


@pytest.mark.parametrize(("path", "empty"), [("/api/chat", {"message": dict}), ("/api/generate", {"response": str})])
def test_load_and_unload(client: httpx.Client, path: str, empty: Kinds) -> None:
    for more, reason in (({}, "load"), ({"keep_alive": 0}, "unload")):
        for body in ({}, {"messages": [], "prompt": ""}):
            found = client.post(path, json={"model": "one", **body, **more}).json()
            has(found, {**HEAD, **empty, "done": bool, "done_reason": str})
            assert found["done"] is True and found["done_reason"] == reason


def test_keep_alive_of_zero_ends_the_process_with_the_answer(client: httpx.Client) -> None:
    for path, asked in (("/api/chat", {"messages": CHAT}), ("/api/generate", {"prompt": "hi"})):
        assert client.post(path, json={"model": "one", **asked, "keep_alive": "5m", "stream": False}).status_code == 200
        assert client.get("/api/ps").json()["models"]
        assert client.post(path, json={"model": "one", **asked, "keep_alive": 0, "stream": False}).json()["done"]
        assert client.get("/api/ps").json()["models"] == []


def test_ps_and_tags(client: httpx.Client) -> None:
    client.post("/api/chat", json={"model": "two", "keep_alive": -1})
    entry = {"name": str, "model": str, "size": int, "digest": str, "details": dict}
    ours = {"steering": str, "device": str, "steer_server": str}
    (found,) = client.get("/api/ps").json()["models"]
    has(found, {**entry, "expires_at": str, "size_vram": int, "context_length": int, **ours})
    datetime.fromisoformat(found["expires_at"].replace("Z", "+00:00"))
    assert found["device"] == "CPU" and found["size_vram"] == 0 and found["expires_at"].startswith("2318")
    assert set(found["details"]) == DETAILS
    for found in client.get("/api/tags").json()["models"]:
        has(found, {**entry, "modified_at": str})
        assert set(found["details"]) == DETAILS and len(bytes.fromhex(found["digest"])) == 32


def test_show(client: httpx.Client) -> None:
    kinds: Kinds = {"modelfile": str, "parameters": str, "template": str, "details": dict, "model_info": dict}
    kinds |= {"capabilities": list, "modified_at": str}
    has(client.post("/api/show", json={"model": "one"}).json(), kinds)
    more: Kinds = {"license": str, "system": str, "messages": list, "steering": str}
    found = client.post("/api/show", json={"name": "two"}).json()
    has(found, {**kinds, **more})
    assert found["parameters"].splitlines()[1:] == ['stop                           "x"', "temperature                    0.5"]


def test_create_copy_delete(client: httpx.Client) -> None:
    steps = lines(client.post("/api/create", json={"model": "made", "from": "one"}))
    assert all(set(step) == {"status"} for step in steps) and steps[-1] == {"status": "success"}
    for request in (
        client.build_request("POST", "/api/copy", json={"source": "made", "destination": "copy"}),
        client.build_request("DELETE", "/api/delete", json={"model": "made"}),
        client.build_request("DELETE", "/api/delete", json={"name": "copy"}),
    ):
        answer = client.send(request)
        assert (answer.status_code, answer.content) == (200, b"")
    digest = "sha256:" + hashlib.sha256(b"x").hexdigest()
    assert client.head(f"/api/blobs/{digest}").status_code == 404
    assert client.post(f"/api/blobs/{digest}", content=b"x").status_code == 201


def test_errors(client: httpx.Client) -> None:
    bad = [
        ("POST", "/api/chat", {"model": "nosuch", "messages": CHAT}, 404),
        ("POST", "/api/generate", {"model": "one", "prompt": 3}, 400),
        ("POST", "/api/chat", {}, 400),
        ("POST", "/api/show", {"model": "nosuch"}, 404),
        ("DELETE", "/api/delete", {"model": "nosuch"}, 404),
        ("POST", "/api/create", {"model": "x", "from": 3}, 400),
        ("POST", "/api/create", {"model": "x", "files": [1]}, 400),
        ("POST", "/api/create", {"model": "x", "from": "one", "parameters": {"nosuch": 1}}, 400),
        ("POST", "/api/create", {"model": "x", "from": "one", "template": "a\n{{ nope }}"}, 400),
        ("POST", "/api/copy", {"source": "nosuch", "destination": "x"}, 404),
    ]
    for method, path, body, status in bad:
        answer = client.request(method, path, json=body)
        assert answer.status_code == status, (path, body, answer.text)
        assert set(answer.json()) == {"error"} and isinstance(answer.json()["error"], str), answer.text
    for body, status in (
        ({"model": "nosuch", "messages": CHAT}, 404),
        ({"model": "one"}, 400),
        ({"model": "one", "messages": CHAT, "options": 3}, 400),
        ({"model": "one", "messages": CHAT, "response_format": "json"}, 400),
    ):
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert not [m for m in client.get("/api/tags").json()["models"] if m["name"] == "x:latest"]


def test_openai_chat_of_a_template(client: httpx.Client) -> None:
    body = {"model": "two", "messages": CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *events, done, end = client.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert done == "data: [DONE]" and end == ""
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks:
        kinds: Kinds = {"id": str, "object": str, "created": int, "model": str, "choices": list}
        has(chunk, kinds, also={"usage"})
        assert chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"]
    assert [c["choices"][0]["delta"] for c in chunks[:-1]] == [{"role": "assistant", "content": "A "}, {"content": "b."}, {}]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None, None, "length"]
    assert chunks[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def test_the_official_client_reads_everything(client: httpx.Client) -> None:
    """Its answers are pydantic models: a field of a wrong kind is an error there."""
    ollama = pytest.importorskip("ollama")
    theirs = ollama.Client(str(client.base_url), trust_env=False)
    try:
        whole = theirs.chat("one", CHAT)
        assert whole.message.content == "A b." and whole.created_at and whole.total_duration > 0
        assert [p.done for p in theirs.chat("one", CHAT, stream=True)] == [False, False, True]
        assert theirs.generate("one", "hi").context == [1, 2, 3]
        assert [p.response for p in theirs.generate("one", "hi", stream=True)] == ["A ", "b.", ""]
        assert theirs.show("two").modelinfo["general.architecture"] == "llama"
        assert all(m.size and m.digest and m.modified_at and m.details for m in theirs.list().models)
        assert all(m.expires_at and m.context_length for m in theirs.ps().models)
        assert theirs.create("made", from_="one").status == "success"
        assert theirs.copy("made", "made-too").status == theirs.delete("made").status == theirs.delete("made-too").status
        with pytest.raises(ollama.ResponseError) as caught:
            theirs.chat("nosuch", CHAT)
        assert caught.value.status_code == 404
    finally:
        theirs._client.close()  # it has no way to close itself
