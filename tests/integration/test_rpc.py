"""Layers on two workers of this machine: the same tokens and reads as here, and a worker that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from click.testing import CliRunner

from steer_plugins import testing
from steer_plugins.cli.main import cli
from steer_plugins.client import ServerProcess, free_port
from steer_plugins.errors import EngineError, SteerError
from steer_plugins.runtime import find_runtime
from steer_plugins.runtime.rpc import check_workers, program
from tests.unit.steering_server import eventually

DRIVER = Path(__file__).with_name("rpc_driver.py")
ARCHITECTURES = ("llama", "deepseek4")


@pytest.fixture(scope="module")
def rpc_server() -> Path:
    try:
        runtime = find_runtime(need_server=True)
        if runtime is None:
            pytest.skip("no runtime with a llama-server: build one with `steer build --rpc`")
        return program(runtime)
    except SteerError as error:
        pytest.skip(str(error))


class Workers:
    def __init__(self, binary: Path) -> None:
        self.ports = [free_port(), free_port()]
        self.children = [
            subprocess.Popen(
                [str(binary), "--host", "127.0.0.1", "--port", str(port), "-t", "1"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for port in self.ports
        ]
        eventually(self.listening)

    def listening(self) -> bool:
        try:
            check_workers(self.names)
        except EngineError:
            return False
        return True

    @property
    def names(self) -> list[str]:
        return [f"127.0.0.1:{port}" for port in self.ports]

    def stop(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()


@pytest.fixture
def workers(rpc_server: Path) -> Iterator[Workers]:
    found = Workers(rpc_server)
    yield found
    found.stop()


def drive(model: Path, workers: str) -> Any:
    done = subprocess.run([sys.executable, str(DRIVER), str(model), workers], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_workers_say_what_one_process_says(architecture: str, workers: Workers, tmp_path: Path) -> None:
    model = testing.write(architecture, tmp_path / "model.gguf")[0]
    here, there = drive(model, ""), drive(model, ",".join(workers.names))
    for what in ("plain", "steered", "removed", "changed", "batch"):
        assert there[what] == here[what], what
    assert here["steered"] != here["plain"] and here["changed"] != here["plain"] and here["changed"][:8] == here["plain"][:8]
    for layer, values in here["read"].items():
        np.testing.assert_allclose(there["read"][layer], values, atol=1e-4 * np.abs(values).max())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_worker_that_dies_is_said_and_the_program_lives(workers: Workers, tmp_path: Path) -> None:
    model = testing.write("llama", tmp_path / "model.gguf")[0]
    with ServerProcess() as server:
        server.start(model, ["-c", "512", "-ngl", "99", "--rpc", ",".join(workers.names), "--no-warmup"])
        server.wait_ready(120)
        body = {"prompt": "The", "n_predict": 4}
        assert requests.post(f"{server.url}/completion", json=body, timeout=120).status_code == 200
        os.kill(workers.children[1].pid, signal.SIGKILL)
        with pytest.raises(requests.RequestException):
            requests.post(f"{server.url}/completion", json={**body, "n_predict": 200}, timeout=120).raise_for_status()
        code = server.wait(30)
        assert code, "llama-server does not go on without a worker"
        assert "lost a worker" in server.epitaph(code) and "steer worker" in server.epitaph(code)


def test_serve_looks_for_the_workers_first(rpc_server: Path, tmp_path: Path) -> None:
    model = testing.write("llama", tmp_path / "model.gguf")[0]
    told = CliRunner().invoke(cli, ["serve", str(model), "--rpc", "127.0.0.1:9"])
    assert isinstance(told.exception, EngineError) and "127.0.0.1:9" in str(told.exception)
