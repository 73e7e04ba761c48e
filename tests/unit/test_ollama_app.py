"""The sidecar in front of a stand-in daemon: what is passed on, what is refused, what is answered without any model."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from steer_plugins_ollama.daemon import Daemon
from steer_plugins_ollama.folder import FolderStore
from steer_plugins_ollama.pool import Pool
from steer_plugins_ollama.service import Service
from steer_plugins_ollama.store import OllamaStore

from steer_plugins import Library, testing

from .ollama_standins import StandInDaemon, running, send_chunk, send_json, start_chunks
from .test_ollama_stores import ollama_model, vector


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("m") / "tiny.gguf")[0]


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    found = StandInDaemon()
    yield found
    found.close()


@pytest.fixture
def library(tmp_path: Path, gguf: Path) -> Library:
    from steer_plugins.store.identity import identity_of_gguf

    found = Library(tmp_path / "library")
    found.put(vector("mood", gguf), identity_of_gguf(gguf))
    return found


@pytest.fixture
def sidecar(tmp_path: Path, daemon: StandInDaemon, library: Library) -> Iterator[httpx.Client]:
    store = OllamaStore(tmp_path / "store")
    # no llama-server at all: whatever wants to run a model here says so
    pool = Pool(binary=tmp_path / "no-llama-server", library=library)
    with running(lambda: Service(store, pool, library, daemon=Daemon(daemon.url))) as (client, _):
        yield client


def test_what_passes_through(sidecar: httpx.Client, daemon: StandInDaemon) -> None:
    daemon.answers[("GET", "/api/tags")] = lambda h, b: send_json(h, {"models": [1]})
    daemon.answers[("POST", "/api/copy")] = lambda h, b: send_json(h, {})
    daemon.answers[("POST", "/api/new/thing")] = lambda h, b: send_json(h, {"body": b.decode()}, 202)
    assert sidecar.get("/api/tags").json() == {"models": [1]}
    assert sidecar.post("/api/copy", json={"source": "a"}).status_code == 200
    answer = sidecar.post("/api/new/thing?x=1%2F2", content=b"raw")
    assert (answer.status_code, answer.json()) == (202, {"body": "raw"})
    assert daemon.asked[-1][1] == "/api/new/thing?x=1%2F2"
    assert len(answer.headers.get_list("date")) == 1
    assert sidecar.get("/").text == "Ollama is running" and sidecar.head("/").status_code == 200
    assert sidecar.get("/api/version").json()["version"] == "0.9.3" and "steer" in sidecar.get("/api/version").json()
    assert sidecar.get("/nosuch").json() == {"error": "404 /nosuch"}


def test_large_bodies_stream_both_ways(sidecar: httpx.Client, daemon: StandInDaemon) -> None:
    def echo(handler: Any, body: bytes) -> None:
        start_chunks(handler, "application/octet-stream")
        for at in range(0, len(body), 100_000):
            send_chunk(handler, body[at : at + 100_000])
        send_chunk(handler, b"")

    path = "/api/blobs/sha256:" + "0" * 64
    daemon.answers[("POST", path)] = echo
    data = bytes(range(256)) * 12_000
    answer = sidecar.post(path, content=(data[i : i + 65536] for i in range(0, len(data), 65536)))
    assert hashlib.sha256(answer.content).digest() == hashlib.sha256(data).digest()


def test_lines_arrive_as_they_are_sent(sidecar: httpx.Client, daemon: StandInDaemon) -> None:
    import threading

    seen = threading.Event()

    def pull(handler: Any, body: bytes) -> None:
        start_chunks(handler)
        send_chunk(handler, b'{"status":"one"}\n')
        assert seen.wait(20)
        send_chunk(handler, b'{"status":"two"}\n')
        send_chunk(handler, b"")

    daemon.answers[("POST", "/api/pull")] = pull
    with sidecar.stream("POST", "/api/pull", json={"model": "x"}) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines)) == {"status": "one"}
        seen.set()
        assert [json.loads(line) for line in lines] == [{"status": "two"}]


def test_a_daemon_that_dies_in_the_middle(sidecar: httpx.Client, daemon: StandInDaemon) -> None:
    def pull(handler: Any, body: bytes) -> None:
        start_chunks(handler)
        send_chunk(handler, b'{"status":"one"}\n')
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    daemon.answers[("POST", "/api/pull")] = pull
    lines = sidecar.post("/api/pull", json={}).text.splitlines()
    assert json.loads(lines[0]) == {"status": "one"}
    assert "does not answer" in json.loads(lines[1])["error"] and len(lines) == 2


def test_a_daemon_that_dies_in_an_answer_of_a_promised_length(
    sidecar: httpx.Client, daemon: StandInDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no place for a sentence: only hanging up tells that it is not all."""

    def tags(handler: Any, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"models"')
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    daemon.answers[("GET", "/api/tags")] = tags
    with pytest.raises(httpx.RemoteProtocolError):
        sidecar.get("/api/tags")
    assert "Ollama does not answer" in caplog.text and "Traceback" not in caplog.text


def test_no_daemon(tmp_path: Path, library: Library, daemon: StandInDaemon) -> None:
    daemon.close()
    pool = Pool(binary=tmp_path / "none", library=library)
    with running(lambda: Service(OllamaStore(tmp_path), pool, library, daemon=Daemon(daemon.url))) as (client, _):
        for method, path in (("GET", "/api/tags"), ("POST", "/api/show"), ("GET", "/api/version"), ("POST", "/api/chat")):
            answer = client.request(method, path, json={"model": "x"})
            assert answer.status_code == 502 and "start it with `ollama serve`" in answer.json()["error"], path
        assert client.get("/api/ps").json() == {"models": []}
        assert "does not answer" in client.get("/v1/models").json()["error"]["message"]


def test_unsteered_requests_are_ollamas(sidecar: httpx.Client, daemon: StandInDaemon, tmp_path: Path, gguf: Path) -> None:
    ollama_model(tmp_path / "store", "plain", gguf)
    daemon.answers[("POST", "/api/chat")] = lambda h, b: send_json(h, {"from": "ollama"})
    body = {"model": "plain", "messages": [{"role": "user", "content": "é"}], "options": {"top_k": 3}}
    assert sidecar.post("/api/chat", json=body).json() == {"from": "ollama"}
    assert json.loads(daemon.asked[-1][2]) == body
    assert sidecar.post("/api/chat", json={"model": "not-here", "messages": []}).json() == {"from": "ollama"}


@pytest.mark.parametrize(
    "path", ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
)
def test_steered_requests_never_reach_ollama(
    sidecar: httpx.Client, daemon: StandInDaemon, tmp_path: Path, gguf: Path, path: str
) -> None:
    ollama_model(tmp_path / "store", "plain", gguf)
    ollama_model(tmp_path / "store", "steered", gguf, {"params": {"steering": "mood:0.5"}})
    messages = [{"role": "user", "content": "hi"}]
    for body in (
        {"model": "steered"},
        {"model": "plain", "steering": "mood"},
        {"model": "plain", "options": {"steering": "mood"}},
    ):
        for stream in (True, False):
            answer = sidecar.post(path, json={**body, "messages": messages, "prompt": "hi", "input": "hi", "stream": stream})
            assert answer.status_code == 500 and "llama-server" in answer.text
    assert not [p for p in daemon.paths() if p == path]


def test_ollama_unloads_the_same_weights_first(sidecar: httpx.Client, daemon: StandInDaemon, tmp_path: Path, gguf: Path) -> None:
    other = testing.write("llama", tmp_path / "other.gguf", seed=1)[0]
    ollama_model(tmp_path / "store", "plain", gguf)
    ollama_model(tmp_path / "store", "steered", gguf, {"params": {"steering": "mood:0.5"}})
    ollama_model(tmp_path / "store", "other", other)
    daemon.loaded = ["plain:latest", "other:latest", "unknown:latest"]
    sidecar.post("/api/chat", json={"model": "steered", "messages": [{"role": "user", "content": "hi"}]})
    assert daemon.loaded == ["other:latest", "unknown:latest"]
    unloads = [json.loads(b) for _, p, b in daemon.asked if p == "/api/generate"]
    assert unloads == [{"model": "plain:latest", "keep_alive": 0, "stream": False}]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"options": {"steering": "mood:"}}, "character 6"),
        ({"options": {"steering": 3}}, "text"),
        ({"steering": [{"vector": "mood", "nosuch": 1}]}, "nosuch"),
        ({"options": {"steering": '"/etc/passwd"'}}, "file"),
        ({"options": {"steering": "mood", "temperature": "x"}}, "temperature"),
        ({"options": {"steering": "mood"}, "keep_alive": "soon"}, "keep_alive"),
        ({"options": {"steering": "mood", "num_ctx": 1}}, "num_ctx"),
    ],
)
def test_bad_requests(sidecar: httpx.Client, tmp_path: Path, gguf: Path, body: dict[str, Any], part: str) -> None:
    ollama_model(tmp_path / "store", "plain", gguf)
    answer = sidecar.post("/api/chat", json={"model": "plain", "messages": [{"role": "user", "content": "hi"}], **body})
    assert answer.status_code == 400 and part in answer.json()["error"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"[" * 100_000])
def test_bodies_that_are_no_requests(sidecar: httpx.Client, content: bytes) -> None:
    for path in ("/api/chat", "/api/generate", "/api/show", "/api/create", "/v1/chat/completions"):
        answer = sidecar.post(path, content=content)
        assert answer.status_code == 400 and answer.json()["error"]


def test_create_checks_first_and_sends_what_is_combined(
    sidecar: httpx.Client, daemon: StandInDaemon, tmp_path: Path, gguf: Path
) -> None:
    def create(handler: Any, body: bytes) -> None:
        start_chunks(handler)
        send_chunk(handler, b'{"status":"success"}\n')
        send_chunk(handler, b"")

    daemon.answers[("POST", "/api/create")] = create
    ollama_model(tmp_path / "store", "base", gguf, {"params": {"steering": "mood:0.5"}})
    answer = sidecar.post("/api/create", json={"model": "new", "from": "base", "parameters": {"steering": "+ mood:0.1"}})
    assert [json.loads(line) for line in answer.text.splitlines()] == [{"status": "success"}]
    assert json.loads(daemon.asked[-1][2])["parameters"] == {"steering": "mood:0.5 + mood:0.1"}
    before = len(daemon.asked)
    answer = sidecar.post("/api/create", json={"model": "new", "from": "base", "parameters": {"steering": "nosuch"}})
    assert answer.status_code == 400 and "nosuch" in answer.json()["error"]
    assert len(daemon.asked) == before, "nothing may be stored when a vector is missing"


def test_errors_of_a_create_keep_their_kind(sidecar: httpx.Client, daemon: StandInDaemon) -> None:
    daemon.answers[("POST", "/api/create")] = lambda h, b: send_json(h, {"error": "no such base"}, 400)
    for stream in (True, False):
        answer = sidecar.post("/api/create", json={"model": "new", "from": "base", "stream": stream})
        assert (answer.status_code, answer.json()) == (400, {"error": "no such base"})


def test_show_tells_the_steering(sidecar: httpx.Client, daemon: StandInDaemon, tmp_path: Path, gguf: Path) -> None:
    ollama_model(tmp_path / "store", "a", gguf, licenses=("steering: mood:0.5",))
    daemon.answers[("POST", "/api/show")] = lambda h, b: send_json(h, {"parameters": "", "model_info": {}})
    found = sidecar.post("/api/show", json={"model": "", "name": "a"}).json()
    assert found["steering"] == "mood:0.5" and '"mood:0.5"' in found["parameters"]


def test_a_folder_without_ollama(tmp_path: Path, gguf: Path, library: Library) -> None:
    root = tmp_path / "models"
    root.mkdir()
    pool = Pool(binary=tmp_path / "none", library=library)
    with running(lambda: Service(FolderStore(root), pool, library)) as (client, _):
        data = gguf.read_bytes()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        assert client.head(f"/api/blobs/{digest}").status_code == 404
        wrong = client.post(f"/api/blobs/sha256:{'0' * 64}", content=data)
        assert wrong.status_code == 400 and "digest" in wrong.json()["error"]
        assert list((root / "blobs").iterdir()) == []
        assert client.post("/api/blobs/nonsense", content=b"").status_code == 400
        assert client.post(f"/api/blobs/{digest}", content=data).status_code == 201
        assert client.head(f"/api/blobs/{digest}").status_code == 200
        body = {"model": "calm", "files": {"x.gguf": digest}, "parameters": {"steering": "mood:0.5"}, "stream": False}
        assert client.post("/api/create", json=body).json() == {"status": "success"}
        (entry,) = client.get("/api/tags").json()["models"]
        assert entry["name"] == "calm:latest" and entry["details"]["family"] == "llama"
        found = client.post("/api/show", json={"model": "calm"}).json()
        assert found["steering"] == "mood:0.5" and found["model_info"]["general.architecture"] == "llama"
        assert found["capabilities"] == ["completion"]
        assert client.post("/api/copy", json={"source": "calm", "destination": "me/calmer"}).status_code == 200
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["calm:latest", "me/calmer:latest"]
        assert client.request("DELETE", "/api/delete", json={"name": "calm"}).status_code == 200
        assert client.request("DELETE", "/api/delete", json={"model": "calm"}).status_code == 404
        assert client.post("/api/show", json={"model": "calm"}).status_code == 404
        assert client.post("/api/pull", json={"model": "x"}).status_code == 404
        assert client.post("/api/embed", json={"model": "me/calmer"}).status_code == 400
        assert client.get("/v1/nosuch").json()["error"]["type"] == "not_found_error"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch, gguf: Path) -> None:
    import os

    root = tmp_path / "models"
    root.mkdir()
    data = gguf.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    pool = Pool(binary=tmp_path / "none", library=library)
    with running(lambda: Service(FolderStore(root), pool, library)) as (client, _):
        monkeypatch.setattr(os, "fsync", full)
        answer = client.post("/api/blobs/sha256:" + hashlib.sha256(data).hexdigest(), content=data)
        assert answer.status_code == 500 and "No space left" in answer.json()["error"]
        (root / "tiny.gguf").write_bytes(data)
        answer = client.post("/api/create", json={"model": "new", "from": "tiny"})
        assert "No space left" in answer.text
    assert [p.name for p in root.rglob("*") if p.is_file()] == ["tiny.gguf"]
