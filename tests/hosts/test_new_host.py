"""The host of docs/hosts.md, as it stands there."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import requests

from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from tests.unit.steering_server import IDENTITY, N_EMBD, FakeServer

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"


def program() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(code)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path))
    Library().put(SteeringVector("mood", {(1, "resid_post"): np.ones(N_EMBD)}, identity=IDENTITY), IDENTITY)
    with FakeServer() as running:
        yield running


@pytest.fixture
def host(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    module = ModuleType("host")
    monkeypatch.setitem(sys.modules, "host", module)
    exec(compile(program(), str(PAGE), "exec"), module.__dict__)
    running = module.Host(server.url, 0)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()
    running.engine.close()
    thread.join()


def post(url: str, body: Any, **headers: str) -> requests.Response:
    return requests.post(url, json=body, headers=headers, timeout=60)


def test_it_is_short() -> None:
    assert len(program().splitlines()) < 100


def test_each_request_has_its_own_steering(host: str) -> None:
    plain, steered = ({"prompt": "Hi"}, {"prompt": "Hi", "steering": "mood:0.5"})
    assert post(host, plain).json()["text"].islower()
    assert post(host, steered).json()["text"].isupper()
    assert post(host, {**steered, "steering": [{"vector": "mood", "strength": 0}]}).json()["text"].isupper()
    assert post(host, plain).json()["text"].islower()


def test_a_slider_moves_a_running_reply(host: str, server: FakeServer) -> None:
    server.gate = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(post, host, {"prompt": "Hi", "id": "r1"})
        assert server.at_work.acquire(timeout=30)
        for _ in range(3):
            server.gate.release()
        assert post(f"{host}/r1", {"steering": "mood"}).json() == {"from_position": 0}
        for _ in range(100):
            server.gate.release()
        text = reply.result(60).json()["text"]
    assert not text.islower() and not text.isupper()
    assert post(f"{host}/r1", {"steering": "mood"}).json() == {"from_position": None}


def test_a_vector_that_was_lost_is_sent_again(host: str, server: FakeServer) -> None:
    for _ in range(2):
        assert post(host, {"prompt": "Hi", "steering": "mood"}).json()["text"].isupper()
        server.vectors.clear()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"steering": "nix"}, "no vector 'nix'"),
        ({"steering": "mood:"}, "expected a number"),
        ({"steering": '"./mood.safetensors"'}, "is a file"),
        ({"steering": [{"vector": "/etc/passwd"}]}, "is a file"),
        ([], "not a JSON object"),
    ],
)
def test_mistakes_are_said(host: str, body: Any, words: str) -> None:
    body = {"prompt": "Hi", **body} if isinstance(body, dict) else body
    answer = post(host, body)
    assert answer.status_code == 400 and words in answer.json()["error"]


def test_pages_of_others_are_refused(host: str, server: FakeServer) -> None:
    asked = len(server.log)
    assert post(host, {"prompt": "Hi"}, Origin="http://evil.example").status_code == 403
    assert requests.post(host, data='{"prompt": "Hi"}', headers={"Content-Type": "text/plain"}, timeout=60).status_code == 400
    assert len(server.log) == asked
