"""The host of docs/hosts.md on a real server."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from steer_plugins.steering.vector import ModelIdentity
from steer_plugins.store.library import Library
from tests.hosts.test_new_host import PAGE, post, program
from tests.server.conftest import make_vector


def test_it_steers(exact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = exact()
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path))
    identity = ModelIdentity.from_dict(server.model["identity"])
    Library().put(make_vector(server, dose=40.0).replace(name="mood"), identity)
    module = ModuleType("host")
    exec(compile(program(), str(PAGE), "exec"), module.__dict__)
    host = module.Host(server.url, 0)
    thread = threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{host.server_address[1]}"
        plain, none, steered = (
            post(url, {"prompt": "Hi", "steering": wish}).json()["text"] for wish in ("", "mood:0", "mood?response")
        )
        assert plain == none != steered and steered
        assert "needs" in post(url, {"prompt": "Hi", "steering": "mood?thinking"}).json()["error"]
    finally:
        host.shutdown()
        host.server_close()
        host.engine.close()
        thread.join()
