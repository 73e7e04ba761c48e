"""Hubs on a plain web server and in a git repository: the real transports, interrupted, redirected, too large."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.errors import HubError
from steer_plugins.hub.hub import Hub

from ..unit.hub_world import MODEL, World, make


class Handler(http.server.SimpleHTTPRequestHandler):
    """``trick(handler)`` may answer in place of the folder: it returns True then."""

    protocol_version = "HTTP/1.1"
    trick: Callable[[Any], bool] = staticmethod(lambda handler: False)
    asked: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:
        type(self).asked.append((self.path, self.headers.get("Range")))
        if not type(self).trick(self):
            super().do_GET()

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.publish()
    return world


@pytest.fixture
def web(world: World) -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Ours", (Handler,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(world.there)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", handler
    server.shutdown()
    server.server_close()


def reader(world: World, url: str) -> Hub:
    hub = world.home()
    hub.add(url, name="web")
    return hub


def of_vectors(handler: type[Handler]) -> list[str | None]:
    return [part for path, part in handler.asked if path.endswith(".safetensors")]


def test_over_http_and_offline_after(world: World, web: tuple[str, type[Handler]]) -> None:
    url, handler = web
    bob = reader(world, url)
    bob.pull("ann/mood", identity=MODEL)
    assert len(handler.asked) == 5  # index, its signature; card, its signature, vector: nothing twice
    handler.trick = staticmethod(lambda h: (h.send_error(500), True)[1])
    again = world.home()
    assert again.library.get("ann/mood", MODEL).content_hash == make().content_hash
    assert again.search(["mood"])[1] == 1 and again.verify(again.pulled.items()[0])
    assert again.pull("ann/mood@1").pinned and len(handler.asked) == 5  # all of it is here


def test_updates_over_http(world: World, web: tuple[str, type[Handler]]) -> None:
    bob = reader(world, web[0])
    world.publish(make(seed=1))
    assert bob.update() == ["web"] and bob.pull("ann/mood").version == "2"


def test_a_redirect_to_another_host(world: World, web: tuple[str, type[Handler]]) -> None:
    url, handler = web
    port = url.rsplit(":", 1)[1].strip("/")
    bob = reader(world, url)
    targets = [f"http://localhost:{port}", f"https://127.0.0.1:{port}", "http://127.0.0.1:1", "//example.org", "file:///etc"]
    for target in targets:

        def elsewhere(h: Any, target: str = target) -> bool:
            if h.path.endswith("index.json"):
                return False
            h.send_response(302)
            h.send_header("Location", target + h.path)
            h.send_header("Content-Length", "0")
            h.end_headers()
            return True

        handler.trick = staticmethod(elsewhere)
        with pytest.raises(HubError, match="redirects to another host .*, which is refused"):
            bob.pull("ann/mood")
    assert bob.pulled.items() == []


def test_redirects_within_the_host_are_followed(world: World, web: tuple[str, type[Handler]]) -> None:
    url, handler = web

    def within(h: Any) -> bool:
        if h.path.startswith("/old"):
            h.send_response(301)
            h.send_header("Location", h.path.removeprefix("/old"))
            h.send_header("Content-Length", "0")
            h.end_headers()
            return True
        return False

    handler.trick = staticmethod(within)
    assert reader(world, url + "old/").pull("ann/mood").version == "1"

    def circle(h: Any) -> bool:
        h.send_response(301)
        h.send_header("Location", h.path)
        h.send_header("Content-Length", "0")
        h.end_headers()
        return True

    handler.trick = staticmethod(circle)
    with pytest.raises(HubError, match="more than 5 times"):
        world.home("eve").add(url)


def test_an_interrupted_download_is_gone_on_with(world: World, web: tuple[str, type[Handler]]) -> None:
    url, handler = web
    bob = reader(world, url)

    def cut(h: Any) -> bool:
        if not h.path.endswith(".safetensors"):
            return False
        data = (world.there / h.path.lstrip("/")).read_bytes()
        h.send_response(200)
        h.send_header("Content-Length", str(len(data)))
        h.end_headers()
        h.wfile.write(data[:100])
        h.close_connection = True
        return True

    handler.trick = staticmethod(cut)
    with pytest.raises(HubError, match="broke off"):
        bob.pull("ann/mood")
    assert bob.pulled.items() == [] and bob.library.list() == []
    kept = next((bob.root / "incoming").glob("*.safetensors"))
    assert kept.stat().st_size == 100

    def ranges(h: Any) -> bool:
        part = h.headers.get("Range")
        if not part:
            return False
        data = (world.there / h.path.lstrip("/")).read_bytes()
        start = int(part.removeprefix("bytes=").rstrip("-"))
        h.send_response(206)
        h.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        h.send_header("Content-Length", str(len(data) - start))
        h.end_headers()
        h.wfile.write(data[start:])
        return True

    handler.trick = staticmethod(ranges)
    handler.asked.clear()
    bob.pull("ann/mood")
    assert of_vectors(handler) == ["bytes=100-"]
    assert bob.library.get("ann/mood", MODEL).content_hash == make().content_hash


def test_a_beginning_that_is_wrong_is_fetched_anew(world: World, web: tuple[str, type[Handler]]) -> None:
    """Also where the server knows no ranges, as this one's."""
    url, handler = web
    bob = reader(world, url)
    name = next((world.there / "files").glob("*.safetensors")).name
    incoming = bob.root / "incoming"
    incoming.mkdir(exist_ok=True)
    (incoming / name).write_bytes(b"x" * 50)
    bob.pull("ann/mood")
    assert bob.library.get("ann/mood", MODEL).content_hash == make().content_hash


@pytest.mark.parametrize("said", [True, False])
def test_ten_gigabytes(world: World, web: tuple[str, type[Handler]], said: bool) -> None:
    """Whether the server says so or just goes on and on, no more is taken than the entry says."""
    url, handler = web
    bob = reader(world, url)

    def endless(h: Any) -> bool:
        if not h.path.endswith(".safetensors"):
            return False
        h.send_response(200)
        if said:
            h.send_header("Content-Length", "10000000000")
        h.end_headers()
        h.close_connection = True
        with __import__("contextlib").suppress(OSError):
            for _ in range(1000):
                h.wfile.write(b"\0" * 65536)
        return True

    handler.trick = staticmethod(endless)
    with pytest.raises(HubError, match="taken"):
        bob.pull("ann/mood")
    assert bob.pulled.items() == []
    assert all(path.stat().st_size < 10_000 for path in (bob.root / "incoming").iterdir())


@pytest.mark.parametrize("status", [403, 404, 500, 204])
def test_answers_that_are_none(world: World, web: tuple[str, type[Handler]], status: int) -> None:
    url, handler = web
    bob = reader(world, url)

    def refuse(h: Any) -> bool:
        h.send_response(status)
        if status != 204:
            h.send_header("Content-Length", "0")
        h.end_headers()
        return True

    handler.trick = staticmethod(refuse)
    with pytest.raises(HubError, match=rf"has no file files/.*\(it answers {status}\)"):
        bob.pull("ann/mood")


@pytest.mark.parametrize(
    "url", ["http://", "http://user:secret@127.0.0.1/", "http://127.0.0.1/?x=1", "ftp://127.0.0.1/", "ext::sh -c x"]
)
def test_addresses_that_are_none(world: World, url: str) -> None:
    with pytest.raises(HubError, match="address|no folder"):
        world.home().add(url)


def test_nobody_answers(world: World) -> None:
    with pytest.raises(HubError, match="cannot fetch http://127.0.0.1:9/index.json"):
        world.home().add("http://127.0.0.1:9/")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_from_a_git_repository(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-c", "init.defaultBranch=main")
        subprocess.run(["git", "-C", str(world.there), *who, *arguments], check=True, capture_output=True)

    git("init")
    git("add", "index.json", "files")
    git("commit", "-m", "one")
    # of a user who has line ends turned round (as Git for Windows does)
    (world.root / "gitconfig").write_text("[core]\n\tautocrlf = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(world.root / "gitconfig"))
    url = f"git+{world.there.as_uri()}"
    bob = reader(world, url)
    item = bob.pull("ann/mood")
    assert bob.verify(item) and len(bob.indexes()["web"]["revision"]) == 40
    world.publish(make(seed=1))
    git("add", "index.json", "files")
    assert bob.update() == []  # published, but not committed
    git("commit", "-m", "two")
    assert bob.update() == ["web"] and bob.pull("ann/mood").version == "2"
    shutil.rmtree(world.there)
    assert bob.library.get("ann/mood", MODEL).content_hash == make(seed=1).content_hash
    with pytest.raises(HubError, match="cannot clone git"):
        bob.update()
    assert bob.pull("ann/mood@1").version == "1"  # the clone is still here
