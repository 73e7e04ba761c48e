"""Browsers: which pages may ask the sidecar, and what of the answer they may read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from steer_plugins_ollama.access import host_allowed
from steer_plugins_ollama.daemon import Daemon
from steer_plugins_ollama.pool import Pool
from steer_plugins_ollama.service import Service
from steer_plugins_ollama.store import OllamaStore

from steer_plugins import Library

from .ollama_standins import StandInDaemon, running, send_json


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    found = StandInDaemon()
    yield found
    found.close()


@pytest.fixture
def sidecar(tmp_path: Path, daemon: StandInDaemon) -> Iterator[httpx.Client]:
    library, environ = Library(tmp_path), {"OLLAMA_ORIGINS": "https://*.example.org"}
    store = OllamaStore(tmp_path)
    with running(lambda: Service(store, Pool(), library, daemon=Daemon(daemon.url), environ=environ)) as (client, _):
        yield client


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("app://obsidian.md", 200),
        ("https://chat.example.org", 200),
        ("https://evil.example.com", 403),
        ("http://localhost.evil.com", 403),
        ("null", 403),
    ],
)
def test_origins(sidecar: httpx.Client, daemon: StandInDaemon, origin: str, status: int) -> None:
    daemon.answers[("GET", "/api/tags")] = lambda h, b: send_json(h, {"models": []})
    for path in ("/api/ps", "/api/tags"):
        answer = sidecar.get(path, headers={"Origin": origin})
        assert answer.status_code == status
        assert answer.headers.get_list("access-control-allow-origin") == ([origin] if status == 200 else [])
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = sidecar.options("/api/chat", headers=asked)
    assert answer.status_code == (204 if status == 200 else 403)
    if status == 200:
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "content-type"


def test_a_domain_that_points_here(sidecar: httpx.Client, daemon: StandInDaemon) -> None:
    answer = sidecar.get("/api/tags", headers={"Host": "evil.example.com"})
    assert answer.status_code == 403 and "not allowed" in answer.json()["error"] and not daemon.asked
    assert sidecar.get("/", headers={"Host": "evil.example.com:11435"}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:11435", "127.0.0.1", "[::1]:80", "box.local", "a.internal", "192.168.1.3:1", ""])
def test_names_of_this_machine(host: str) -> None:
    assert host_allowed(host) and not host_allowed("x.evil.com") and not host_allowed("localhost.evil.com")
