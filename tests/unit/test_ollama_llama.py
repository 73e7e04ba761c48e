"""The sidecar in front of a scripted llama-server: tools, thinking, images, clients that leave, servers that die."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from steer_plugins_ollama import pool as pools
from steer_plugins_ollama.daemon import Daemon
from steer_plugins_ollama.folder import FolderStore
from steer_plugins_ollama.pool import Pool
from steer_plugins_ollama.service import Service
from steer_plugins_ollama.store import OllamaStore

from steer_plugins import Library, testing

from .ollama_standins import (
    StandInDaemon,
    StandInLlama,
    StandInProcess,
    last_said,
    running,
    said,
    send_json,
)
from .test_ollama_stores import ollama_model

CHAT = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
COUNTS = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}
Serve = Callable[..., tuple[httpx.Client, StandInLlama]]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("m") / "tiny.gguf")[0]


@pytest.fixture
def serve(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """``serve(vision=True)``: a client of a sidecar on a folder, and the llama-server behind it."""
    ends: list[Any] = []

    def start(**facts: Any) -> tuple[httpx.Client, StandInLlama]:
        llama = StandInLlama(**facts)
        monkeypatch.setattr(pools, "ServerProcess", StandInProcess(llama))
        root = tmp_path / "folder"
        root.mkdir()
        for name in ("one", "two"):
            (root / f"{name}.gguf").write_bytes(gguf.read_bytes())
        library = Library(tmp_path / "library")
        pool = Pool(binary=gguf, library=library, environ={})
        context = running(lambda: Service(FolderStore(root), pool, library, environ={}))
        client, _ = context.__enter__()
        ends.extend((llama, context))
        return client, llama

    yield start
    if ends:
        ends[1].__exit__(None, None, None)
        ends[0].close()


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


# ---- tools, thinking, images ----


def call_events() -> list[dict[str, Any]]:
    """Two tool calls whose arguments come in pieces, as llama-server streams them."""
    parts = [
        [{"index": 0, "id": "abc", "type": "function", "function": {"name": "weather", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": '{"city": "Os'}}],
        [{"index": 0, "function": {"arguments": 'lo"}'}}],
        [{"index": 1, "id": "", "type": "function", "function": {"name": "time", "arguments": "{}"}}],
    ]
    return [said(content="Let me see."), *(said(calls=part) for part in parts), said(finish="tool_calls"), last_said()]


WANTED = [
    {"id": "abc", "function": {"index": 0, "name": "weather", "arguments": {"city": "Oslo"}}},
    {"id": "call_1", "function": {"index": 1, "name": "time", "arguments": {}}},
]


def test_tool_calls_streamed(serve: Serve) -> None:
    client, llama = serve()
    llama.events = call_events()
    found = lines(client.post("/api/chat", json={"model": "one", "messages": CHAT, "tools": [TOOL]}))
    assert [part["message"] for part in found] == [
        {"role": "assistant", "content": "Let me see."},
        {"role": "assistant", "content": "", "tool_calls": WANTED},
        {"role": "assistant", "content": ""},
    ]
    assert [part["done"] for part in found] == [False, False, True] and found[-1]["done_reason"] == "stop"
    assert llama.bodies("/v1/chat/completions")[0]["tools"] == [TOOL]


def test_tool_calls_whole_and_in_the_official_client(serve: Serve) -> None:
    client, llama = serve()
    llama.events = call_events()
    whole = client.post("/api/chat", json={"model": "one", "messages": CHAT, "tools": [TOOL], "stream": False}).json()
    assert whole["message"] == {"role": "assistant", "content": "Let me see.", "tool_calls": WANTED}
    ollama = pytest.importorskip("ollama")
    theirs = ollama.Client(str(client.base_url), trust_env=False)
    try:
        call = theirs.chat("one", CHAT, tools=[TOOL]).message.tool_calls[0]
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Oslo"})
        # what the client sends back, with the result of the tool
        history = [
            *CHAT,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "rain", "tool_name": "weather"},
        ]
        theirs.chat("one", history, tools=[TOOL])
    finally:
        theirs._client.close()  # it has no way to close itself
    _, asked, result = llama.bodies("/v1/chat/completions")[-1]["messages"]
    assert json.loads(asked["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo"}
    assert result["tool_call_id"] == asked["tool_calls"][0]["id"] and result["content"] == "rain"


def test_arguments_that_are_no_object(serve: Serve) -> None:
    client, llama = serve()
    for text, wanted in (("[1]", {"arguments": [1]}), ("{oops", {"arguments": "{oops"})):
        llama.events = [said(calls=[{"index": 0, "function": {"name": "f", "arguments": text}}]), last_said()]
        whole = client.post("/api/chat", json={"model": "one", "messages": CHAT, "tools": [TOOL], "stream": False}).json()
        assert whole["message"]["tool_calls"][0]["function"]["arguments"] == wanted


def test_thinking(serve: Serve) -> None:
    client, llama = serve(think=True)
    llama.events = [said(thinking="Hm"), said(thinking="."), said(content="Yes."), said(finish="stop"), last_said()]
    found = lines(client.post("/api/chat", json={"model": "one", "messages": CHAT, "think": True}))
    assert [part["message"] for part in found] == [
        {"role": "assistant", "content": "", "thinking": "Hm"},
        {"role": "assistant", "content": "", "thinking": "."},
        {"role": "assistant", "content": "Yes."},
        {"role": "assistant", "content": ""},
    ]
    whole = client.post("/api/chat", json={"model": "one", "messages": CHAT, "think": False, "stream": False}).json()
    assert whole["message"] == {"role": "assistant", "content": "Yes.", "thinking": "Hm."}
    asked = [body["chat_template_kwargs"] for body in llama.bodies("/v1/chat/completions")]
    assert asked == [{"enable_thinking": on, "thinking": on} for on in (True, False)]
    level = client.post("/api/chat", json={"model": "one", "messages": CHAT, "think": "low", "stream": False})
    assert level.status_code == 200
    kwargs = llama.bodies("/v1/chat/completions")[-1]["chat_template_kwargs"]
    assert kwargs == {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}
    assert client.post("/api/chat", json={"model": "one", "messages": CHAT, "think": "much"}).status_code == 400


def test_images_go_to_a_model_with_a_projector(serve: Serve) -> None:
    client, llama = serve(vision=True)
    llama.events = [said(content="A cat."), said(finish="stop"), last_said()]
    message = {"role": "user", "content": "What is this?", "images": ["QUJD"]}
    assert client.post("/api/chat", json={"model": "one", "messages": [message], "stream": False}).status_code == 200
    parts = llama.bodies("/v1/chat/completions")[-1]["messages"][0]["content"]
    assert parts[0] == {"type": "text", "text": "What is this?"}
    assert parts[1]["type"] == "image_url" and parts[1]["image_url"]["url"] == "data:image/png;base64,QUJD"
    body = {"model": "one", "prompt": "What is this?", "images": ["QUJD"], "stream": False}
    assert client.post("/api/generate", json=body).json()["response"] == "A cat."
    assert llama.bodies("/v1/chat/completions")[-1]["messages"][0]["content"] == parts
    # with a TEMPLATE the prompt is rendered here, with llama-server's marker in the picture's place
    llama.events = [{"content": "A dog.", "stop": True, "stop_type": "eos", "timings": {}}]
    assert client.post("/api/generate", json={**body, "template": "<u>{{ .Prompt }}"}).json()["response"] == "A dog."
    prompt = llama.bodies("/completion")[-1]["prompt"]
    assert prompt == {"prompt_string": "<u><m>What is this?", "multimodal_data": ["QUJD"]}
    for wrong in ([3], "QUJD"):
        assert client.post("/api/generate", json={**body, "images": wrong}).status_code == 400


def test_a_model_without_a_projector_refuses_images(serve: Serve) -> None:
    client, llama = serve()
    message = {"role": "user", "content": "What is this?", "images": ["QUJD"]}
    for stream in (True, False):
        answer = client.post("/api/chat", json={"model": "one", "messages": [message], "stream": stream})
        assert answer.status_code == 400 and answer.json()["error"].endswith("does not support images: it has no projector")
    assert "/v1/chat/completions" not in llama.paths()


# ---- clients that leave ----


def leave(client: httpx.Client, path: str, body: dict[str, Any], when: threading.Event, *, read: bytes = b"") -> None:
    """Send a request, and hang up once the other side is at work (and ``read`` has come back)."""
    at = urlsplit(str(client.base_url))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((str(at.hostname), at.port or 80), timeout=20) as connection:
        connection.settimeout(20)
        connection.sendall(head.encode() + data)
        assert when.wait(20)
        seen = b""
        while read not in seen:
            seen += connection.recv(4096)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_while_the_prompt_is_read(serve: Serve, path: str, stream: bool) -> None:
    """Nothing has been answered yet, so only watching the client tells."""
    client, llama = serve()
    llama.wait_at = 0
    body = {"model": "one", "messages": CHAT, "prompt": "hi", "stream": stream}
    leave(client, path, body, llama.began)
    assert llama.left.wait(10), "the prompt is read on without its reader"


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_a_client_that_leaves_in_the_middle(serve: Serve, path: str) -> None:
    client, llama = serve()
    llama.events, llama.wait_at = [said(content="first")] * 3, 2
    leave(client, path, {"model": "one", "messages": CHAT, "stream": True}, llama.began, read=b"first")
    assert llama.left.wait(10)


@pytest.mark.parametrize("path", ["/api/chat", "/api/pull", "/v1/chat/completions"])
def test_a_client_that_leaves_ollama(tmp_path: Path, path: str) -> None:
    """A request that was passed on, and that Ollama has not answered yet."""
    daemon = StandInDaemon()
    waiting = StandInLlama()
    waiting.wait_at = 0
    daemon.answers[("POST", path)] = waiting._reply
    library = Library(tmp_path / "library")
    service = lambda: Service(OllamaStore(tmp_path), Pool(library=library), library, daemon=Daemon(daemon.url))  # noqa: E731
    with running(service) as (client, _):
        leave(client, path, {"model": "other", "messages": CHAT, "stream": False}, waiting.began)
        assert waiting.left.wait(10), "Ollama works on without its reader"
    daemon.close()
    waiting.close()


# ---- servers that die ----


def test_a_server_that_dies_in_the_middle(serve: Serve) -> None:
    client, llama = serve()
    llama.events, llama.die_at = [said(content="one"), said(content="two")], 1
    first, last = lines(client.post("/api/chat", json={"model": "one", "messages": CHAT}))
    assert first["message"]["content"] == "one" and "stopped unexpectedly" in last["error"] and set(last) == {"error"}
    whole = client.post("/api/chat", json={"model": "one", "messages": CHAT, "stream": False})
    assert whole.status_code == 500 and "stopped unexpectedly" in whole.json()["error"]


@pytest.mark.parametrize("stream", [True, False])
def test_the_sidecar_is_ended_in_the_middle(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    llama = StandInLlama()
    llama.events, llama.wait_at = [said(content="x")], 1
    monkeypatch.setattr(pools, "ServerProcess", StandInProcess(llama))
    (tmp_path / "one.gguf").write_bytes(gguf.read_bytes())
    library = Library(tmp_path / "library")
    service = lambda: Service(FolderStore(tmp_path), Pool(binary=gguf, library=library), library)  # noqa: E731
    with ThreadPoolExecutor(1) as others:
        with running(service) as (client, _):
            url, body = f"{client.base_url}/api/chat", {"model": "one", "messages": CHAT, "stream": stream}
            asked = others.submit(httpx.post, url, json=body, trust_env=False, timeout=60)
            assert llama.began.wait(20)
            time.sleep(0.2)
        answer = asked.result(30)
    assert json.loads(answer.text.splitlines()[-1]) == {"error": "the sidecar is being ended"}
    assert answer.status_code == (200 if stream else 503) and llama.left.wait(20)
    assert "Traceback" not in caplog.text and "Exception" not in caplog.text
    llama.close()


def test_a_reply_without_an_end(serve: Serve) -> None:
    client, llama = serve()
    llama.events = [said(content="one")]
    *_, last = lines(client.post("/api/chat", json={"model": "one", "messages": CHAT}))
    assert "too early" in last["error"]


# ---- processes ----


def pool_on(monkeypatch: pytest.MonkeyPatch, root: Path, gguf: Path, n: int = 3, **seconds: float) -> Any:
    """A pool of stand-in processes, and ``n`` models with weights of their own."""
    llama = StandInLlama()
    process = StandInProcess(llama, **seconds)
    monkeypatch.setattr(pools, "ServerProcess", process)
    for number in range(n):
        (root / f"m{number}.gguf").write_bytes(gguf.read_bytes())
    store = FolderStore(root)
    return llama, process, [store.get(f"m{number}") for number in range(n)]


def run(body: Any, seconds: float = 20.0) -> None:
    """Run a coroutine; a loop that spins without ever waiting is found out too, since it is watched from outside."""
    import asyncio

    done = threading.Event()
    failed: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(asyncio.wait_for(body(), seconds))
        except BaseException as error:
            failed.append(error)
        done.set()

    threading.Thread(target=target, daemon=True).start()
    assert done.wait(seconds + 5), "the event loop hangs"
    if failed:
        raise failed[0]


def test_room_is_made_while_a_process_is_being_ended(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from steer_plugins_ollama.options import LoadOptions

    llama, process, (one, two, _) = pool_on(monkeypatch, tmp_path, gguf, stop_seconds=0.3)
    pool = Pool(binary=gguf, environ={"OLLAMA_MAX_LOADED_MODELS": "1"})

    async def body() -> None:
        async with pool.use(one, LoadOptions(256), 60):
            pass
        ending = asyncio.create_task(pool.unload(one))
        await asyncio.sleep(0.05)
        async with pool.use(two, LoadOptions(256), 60):
            assert process.most == 1, "the old process was not waited for"
        await ending
        # the same weights again, while they are being let go of
        ending = asyncio.create_task(pool.unload(two))
        await asyncio.sleep(0.05)
        async with pool.use(two, LoadOptions(256), 60):
            assert process.most == 1
        await ending
        await pool.close()

    run(body)
    assert process.log == ["start", "stop"] * 3 and not process.alive
    llama.close()


def test_never_more_processes_than_allowed(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from steer_plugins_ollama.options import LoadOptions

    llama, process, models = pool_on(monkeypatch, tmp_path, gguf, n=6, load_seconds=0.04)
    pool = Pool(binary=gguf, environ={"OLLAMA_MAX_LOADED_MODELS": "2"})

    async def one(number: int) -> None:
        async with pool.use(models[number % 6], LoadOptions(256), (0, 60)[number % 2]) as runner:
            assert runner.process.running and not runner.closing
            await asyncio.sleep(0.01)

    async def body() -> None:
        await asyncio.gather(*(one(number) for number in range(24)))
        await pool.close()

    run(body)
    assert process.most <= 2 and not process.alive
    llama.close()


def test_a_load_that_nobody_waits_for_leaves_no_process(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from steer_plugins_ollama.options import LoadOptions

    llama, process, (one, _, _) = pool_on(monkeypatch, tmp_path, gguf, load_seconds=0.4)
    pool = Pool(binary=gguf, environ={})

    async def use() -> None:
        async with pool.use(one, LoadOptions(256), 60):
            pass

    async def body() -> None:
        for seconds in (0.05, 0.3):  # while the program starts, and while the model is loaded
            task = asyncio.create_task(use())
            await asyncio.sleep(seconds)
            assert pool.holds(one.gguf), "an unsteered request would have Ollama load the same weights"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not pool.holds(one.gguf)
        await use()
        await pool.close()

    run(body)
    assert process.log == ["start", "stop"] * 3 and not process.alive
    llama.close()


# ---- Ollama and the weights ----


def test_an_ollama_that_never_answers_is_not_waited_for(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that takes connections and says nothing: what the sidecar itself wants of it is given up."""
    from steer_plugins_ollama import daemon as daemons

    silent = socket.create_server(("127.0.0.1", 0))
    real = daemons.Daemon.call

    async def soon(self: Any, method: str, path: str, body: Any = None, timeout: float = 30.0) -> Any:
        return await real(self, method, path, body, timeout / 100)

    monkeypatch.setattr(daemons.Daemon, "call", soon)
    llama = StandInLlama()
    llama.events = [said(content="x"), last_said()]
    monkeypatch.setattr(pools, "ServerProcess", StandInProcess(llama))
    ollama_model(tmp_path / "store", "plain", gguf)
    library = Library(tmp_path / "library")
    daemon = Daemon(f"http://127.0.0.1:{silent.getsockname()[1]}")
    store = OllamaStore(tmp_path / "store")
    with running(lambda: Service(store, Pool(binary=gguf), library, daemon=daemon, serve_all=True)) as (client, _):
        client.timeout = 20
        assert lines(client.post("/api/chat", json={"model": "plain", "messages": CHAT}))[-1]["done"]
        assert [m["name"] for m in client.get("/api/ps").json()["models"]] == ["plain:latest"]
        assert client.get("/api/version").status_code == 502
    silent.close()
    llama.close()


def test_weights_are_let_go_of_for_ollama(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For embeddings, which Ollama makes, and for a model that is deleted; what others still use stays."""
    daemon, llama = StandInDaemon(), StandInLlama()
    process = StandInProcess(llama)
    llama.events = [said(content="x"), last_said()]
    held: list[int] = []

    def embed(handler: Any, body: bytes) -> None:
        held.append(len(process.alive))
        send_json(handler, {"embeddings": []})

    for path in ("/api/embed", "/api/embeddings", "/v1/embeddings"):
        daemon.answers[("POST", path)] = embed
    daemon.answers[("DELETE", "/api/delete")] = embed
    monkeypatch.setattr(pools, "ServerProcess", process)
    for name in ("plain", "other"):
        ollama_model(tmp_path / "store", name, gguf)
    library = Library(tmp_path / "library")
    store = OllamaStore(tmp_path / "store")
    with running(lambda: Service(store, Pool(binary=gguf), library, daemon=Daemon(daemon.url), serve_all=True)) as (client, _):

        def load(*names: str) -> None:
            for name in names:
                assert client.post("/api/chat", json={"model": name}).json()["done_reason"] == "load"
            assert len(process.alive) == 1

        for path in ("/api/embed", "/api/embeddings", "/v1/embeddings"):
            load("plain")
            assert client.post(path, json={"model": "other", "input": "x"}).json() == {"embeddings": []}
        for left in (1, 0):
            load("plain", *(["other"] if left else []))
            client.request("DELETE", "/api/delete", json={"model": "plain"})
            if left:
                client.request("DELETE", "/api/delete", json={"model": "other"})
    assert held == [0, 0, 0, 1, 0, 0]
    daemon.close()
    llama.close()


def test_requests_for_weights_that_are_loading_here_are_not_ollamas(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, llama = StandInDaemon(), StandInLlama()
    daemon.answers[("POST", "/api/chat")] = lambda h, b: send_json(h, {"from": "ollama"})
    llama.events = [said(content="x"), last_said()]
    monkeypatch.setattr(pools, "ServerProcess", StandInProcess(llama, load_seconds=1.0))
    ollama_model(tmp_path / "store", "plain", gguf)
    library = Library(tmp_path / "library")
    store = OllamaStore(tmp_path / "store")
    body = {"model": "plain", "messages": CHAT, "stream": False}
    with running(lambda: Service(store, Pool(binary=gguf), library, daemon=Daemon(daemon.url))) as (client, service):
        with ThreadPoolExecutor(1) as others:
            first = others.submit(client.post, "/api/chat", json={**body, "options": {"steering": ""}})
            until = time.monotonic() + 10
            while not service.pool._loading:
                assert time.monotonic() < until
                time.sleep(0.01)
            assert client.post("/api/chat", json=body).json()["message"]["content"] == "x"
            assert first.result(20).status_code == 200
    assert "/api/chat" not in daemon.paths()
    daemon.close()
    llama.close()


def test_loading_and_the_whole_are_told_in_nanoseconds(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = StandInLlama()
    llama.events = [said(content="x"), said(finish="stop"), last_said()]
    monkeypatch.setattr(pools, "ServerProcess", StandInProcess(llama, load_seconds=0.05))
    (tmp_path / "one.gguf").write_bytes(gguf.read_bytes())
    library = Library(tmp_path / "library")
    pool = Pool(binary=gguf, library=library, environ={})
    with running(lambda: Service(FolderStore(tmp_path), pool, library, environ={})) as (client, _):
        began = time.monotonic()
        found = client.post("/api/chat", json={"model": "one", "messages": CHAT, "stream": False}).json()
        took = (time.monotonic() - began) * 1e9
    llama.close()
    assert 50_000_000 <= found["load_duration"] <= found["total_duration"] <= took
