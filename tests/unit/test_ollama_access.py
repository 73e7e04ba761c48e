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


WRITING = (
    ("POST", "/api/create"),
    ("DELETE", "/api/delete"),
    ("POST", "/api/copy"),
    ("POST", "/api/pull"),
    ("POST", "/api/chat"),
)


@pytest.mark.parametrize(
    "kind", ["text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data"]
)
@pytest.mark.parametrize(("method", "path"), WRITING)
def test_forms_of_web_pages(sidecar: httpx.Client, daemon: StandInDaemon, method: str, path: str, kind: str) -> None:
    """A form is sent without asking first, also by pages that may ask: what they mean is sent as JSON."""
    headers = {"Origin": "http://localhost:3000", "Content-Type": kind}
    answer = sidecar.request(method, path, content=b'{"model": "x"}', headers=headers)
    assert answer.status_code == 415 and "application/json" in answer.json()["error"] and not daemon.asked
    # without a browser any type will do, as in Ollama's own examples with curl
    assert sidecar.request(method, path, content=b'{"model": "x"}', headers={"Content-Type": kind}).status_code not in (403, 415)


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/api/version"])
def test_fetches_of_other_sites_without_an_origin(sidecar: httpx.Client, daemon: StandInDaemon, path: str) -> None:
    """Pictures and scripts: browsers tell of the site, if of nothing else."""
    fetched = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert sidecar.get(path, headers=fetched).status_code == 403 and not daemon.asked
    assert sidecar.get("/", headers={**fetched, "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert sidecar.get("/", headers={**fetched, "Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_a_domain_that_points_to_a_sidecar_for_the_whole_network(tmp_path: Path) -> None:
    """Its pages have the sidecar's own origin, as far as a browser knows."""
    import asyncio

    from steer_plugins_ollama.access import Access

    async def app(scope: object, receive: object, send: object) -> None:
        reached.append(scope)

    async def send(message: dict[str, object]) -> None:
        statuses.append(message.get("status"))

    reached: list[object] = []
    statuses: list[object] = []
    guard = Access(app, {"OLLAMA_ORIGINS": "http://box.example.org:11435"}, local=False)  # type: ignore[arg-type]
    for name, allowed in (
        ("evil.example.com:11435", False),
        ("192.168.1.3:11435", True),
        ("box.local:11435", True),
        ("box.example.org:11435", True),
    ):
        reached.clear()
        headers = [(b"host", name.encode()), (b"origin", b"http://" + name.encode())]
        scope = {"type": "http", "method": "POST", "path": "/api/delete", "headers": headers}
        asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
        assert bool(reached) is allowed, name
        reached.clear()
        asyncio.run(guard({**scope, "headers": headers[:1]}, None, send))  # type: ignore[arg-type]
        assert reached, "programs that are not browsers may use any name"
    assert 403 in statuses
