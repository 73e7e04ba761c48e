"""Workers of llama.cpp's RPC back end: how they are named, and what is said before anything is loaded."""

from __future__ import annotations

import sys

import pytest

from steer_plugins.client import ServerProcess
from steer_plugins.errors import EngineError, SpecError
from steer_plugins.runtime.rpc import check_workers, parse_workers


@pytest.mark.parametrize("text", ["", "host", "host:0", "host:70000", "a:1,", "a:1,a:1", "http://a:1", "a b:1", "a:1;b:2"])
def test_workers_are_read_whole(text: str) -> None:
    with pytest.raises(SpecError):
        parse_workers(text)


def test_workers_are_named() -> None:
    assert parse_workers("10.0.0.2:50052, [fe80::1]:1,gpu-2.lan:65535") == ["10.0.0.2:50052", "[fe80::1]:1", "gpu-2.lan:65535"]


def test_a_worker_that_is_not_there_is_said() -> None:
    with pytest.raises(EngineError, match="no worker answers at 127.0.0.1:9 "):
        check_workers(["127.0.0.1:9"])


def test_a_lost_worker_is_what_ended_the_server() -> None:
    server = ServerProcess(sys.executable)  # it is not started
    server._lines.append("/src/ggml-rpc.cpp:354: Remote RPC server crashed or returned malformed response")
    assert "lost a worker" in server.epitaph(134) and "steer worker" in server.epitaph(134)
    server._lines.clear()
    assert "lost a worker" not in server.epitaph(134)
