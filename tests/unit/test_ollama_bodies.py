"""The bodies of requests: whoever reads JSON behind the sidecar must not read another request than the sidecar did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from steer_plugins_ollama.bodies import folded, loads
from steer_plugins_ollama.daemon import Daemon
from steer_plugins_ollama.pool import Pool
from steer_plugins_ollama.service import Service
from steer_plugins_ollama.store import OllamaStore

from steer_plugins import Library, testing

from .ollama_standins import StandInDaemon, running, send_json
from .test_ollama_stores import ollama_model

CHAT = [{"role": "user", "content": "hi"}]
PATHS = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("m") / "tiny.gguf")[0]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, gguf: Path) -> Iterator[tuple[httpx.Client, StandInDaemon]]:
    """A sidecar before a daemon that has ``steered`` and ``plain``; no llama-server: who wants to run a model here is told so."""
    daemon = StandInDaemon()
    for path in PATHS:
        daemon.answers[("POST", path)] = lambda h, b: send_json(h, {"from": "ollama"})
    root = tmp_path_factory.mktemp("store")
    ollama_model(root, "plain", gguf)
    ollama_model(root, "steered", gguf, {"params": {"steering": "mood:0.5"}})
    pool = Pool(binary=root / "no-llama-server")
    with running(lambda: Service(OllamaStore(root), pool, Library(root), daemon=Daemon(daemon.url))) as (client, _):
        yield client, daemon
    daemon.close()


@pytest.fixture
def daemon(programs: tuple[httpx.Client, StandInDaemon]) -> StandInDaemon:
    programs[1].asked.clear()
    return programs[1]


@pytest.fixture
def sidecar(programs: tuple[httpx.Client, StandInDaemon]) -> httpx.Client:
    return programs[0]


def object_of(*pairs: tuple[str, Any]) -> str:
    """A JSON object whose keys may repeat."""
    return "{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs) + "}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "pairs",
    [
        [("Model", "steered")],
        [("MODEL", "steered"), ("Stream", False)],
        [("model", "plain"), ("Model", "steered")],
        [("model", "plain"), ("MODEL", "plain"), ("model", "steered")],
        [("model", "plain"), ("Steering", "mood")],
        [("model", "plain"), ("\u017fteering", "mood")],
        [("model", "plain"), ("Options", {"steering": "mood"})],
        [("model", "plain"), ("options", {"Steering": "mood"})],
        [("model", "plain"), ("OPTIONS", {"STEERING": "mood"})],
    ],
)
def test_keys_in_any_case_steer(sidecar: httpx.Client, daemon: StandInDaemon, path: str, pairs: list[tuple[str, Any]]) -> None:
    text = object_of(*pairs, ("Messages", CHAT), ("Prompt", "hi"), ("Input", "hi"))
    answer = sidecar.post(path, content=text)
    assert answer.status_code == 500 and "llama-server" in answer.text, answer.text
    assert path not in daemon.paths()


def test_what_is_passed_on_is_what_was_read(sidecar: httpx.Client, daemon: StandInDaemon) -> None:
    """Of two models in one request, the daemon hears of the one that was found not to be steered, and of no other."""
    text = object_of(("Model", "steered"), ("model", "plain"), ("Messages", CHAT))
    assert sidecar.post("/api/chat", content=text).json() == {"from": "ollama"}
    assert json.loads(daemon.asked[-1][2]) == {"model": "plain", "messages": CHAT}


@pytest.mark.parametrize("path", ["/x/../api/chat", "/./api/chat", "/v1/../api/chat", "/x/%2e%2e/api/chat"])
def test_dots_lead_nowhere(sidecar: httpx.Client, daemon: StandInDaemon, path: str) -> None:
    """httpx would make them ``/api/chat`` on the way to Ollama."""
    import socket

    body = json.dumps({"model": "steered", "messages": CHAT}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((sidecar.base_url.host, sidecar.base_url.port)) as link:
        link.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    assert b" 400 " in answer.split(b"\r\n")[0] and b"invalid path" in answer
    assert not daemon.asked


def test_folding_leaves_the_users_own_keys() -> None:
    schema = {"type": "object", "properties": {"City": {"type": "string"}, "city": {"type": "string"}}}
    tool = {"Type": "function", "Function": {"NAME": "f", "Parameters": schema}}
    call = {"Function": {"Name": "f", "Arguments": {"City": 1, "city": 2}}}
    body = {
        "Tools": [tool],
        "Messages": [{"Role": "user", "Content": "Hi", "Tool_Calls": [call]}, 3],
        "Format": schema,
        "options": {"Top_K": 3, "Mine": 1},
        "Files": {"A.gguf": "x", "a.gguf": "y"},
    }
    assert folded(body) == {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "messages": [
            {"role": "user", "content": "Hi", "tool_calls": [{"function": {"name": "f", "arguments": {"City": 1, "city": 2}}}]},
            3,
        ],
        "format": schema,
        "options": {"top_k": 3, "Mine": 1},
        "files": {"A.gguf": "x", "a.gguf": "y"},
    }


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (rb'"\ud83d"', "\ufffd"),
        (rb'"a\uDE00b"', "a\ufffdb"),
        (rb'"\ud83d\ude00 \ud83d\ud83d\ude00"', "😀 \ufffd😀"),
        (b'"caf\xe9"', "caf\ufffd"),
        (b'"\xed\xa0\xbd"', "\ufffd\ufffd\ufffd"),
        (rb'"\\ud83d"', "\\ud83d"),
    ],
)
def test_texts_are_unicode(raw: bytes, text: str) -> None:
    """As Go's decoder reads them: U+FFFD for each half of a pair and each byte that is none."""
    assert loads(raw) == text
    assert loads(b"[" + raw + b"]") == [text] and loads(b"{" + raw + b": {" + raw + b": 1}}") == {text: {text: 1}}


@pytest.mark.parametrize("path", [*PATHS, "/api/show", "/api/create", "/api/embed", "/api/copy", "/api/delete"])
def test_half_a_surrogate_is_never_a_bug(sidecar: httpx.Client, path: str) -> None:
    half = "\\ud83d"
    for name in ("steered", half):
        for extra in ("", f', "options": {{"steering": "{half}"}}', f', "{half}": "{half}"', f', "system": "{half}"'):
            messages = f'[{{"role": "user", "content": "{half}"}}]'
            body = f'{{"model": "{name}", "prompt": "{half}", "input": "{half}", "messages": {messages}{extra}}}'
            answer = sidecar.request("DELETE" if "delete" in path else "POST", path, content=body)
            assert "bug" not in answer.text and "surrogate" not in answer.text, (body, answer.text)


@pytest.mark.parametrize("raw", [b'{"a": 1e999}', b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": ' + b"[" * 100_000, b'{"a": 1}{'])
def test_what_is_not_json(sidecar: httpx.Client, raw: bytes) -> None:
    answer = sidecar.post("/api/chat", content=raw)
    assert answer.status_code == 400 and "not JSON" in answer.json()["error"]
