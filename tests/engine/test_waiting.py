"""How long threads spin while they wait: ours by default, the user's own setting where there is one; in process, in a server.

What OpenMP's runtime tells of its settings when it is loaded (OMP_DISPLAY_ENV) is what counts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.client import ServerProcess
from steer_plugins.errors import EngineError
from steer_plugins.runtime import Runtime
from steer_plugins.runtime.waiting import SPINS, short_waits, with_short_waits

from . import harness

CASES = [({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, 77), ({"OMP_WAIT_POLICY": "passive"}, 0)]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")


def spins(said: str) -> int:
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", said)
    if found is None:
        pytest.skip("this ggml does not use GNU's OpenMP runtime")
    return int(found[1])


@pytest.mark.parametrize(("own", "count"), CASES)
def test_in_process(runtime: Runtime, own: dict[str, str], count: int) -> None:
    """The environment that children would get stays as it was."""
    program = (
        "import os; before = dict(os.environ)\n"
        "from steer_plugins.runtime import activate, ensure_runtime\n"
        "activate(ensure_runtime())\n"
        "now = {k: v for k, v in os.environ.items() if k not in ('LLAMA_CPP_LIB_PATH', 'MTMD_CPP_LIB')}\n"
        "assert now == before, now"
    )
    environment = {k: v for k, v in harness.child_environment(runtime).items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
    environment.update(own, STEER_RUNTIME=str(runtime.path))
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        if name not in own:
            environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert spins(done.stderr) == count


@pytest.mark.parametrize(("own", "count"), CASES)
def test_server(runtime: Runtime, tiny: Callable[..., Path], own: Mapping[str, str], count: int) -> None:
    if runtime.server is None:
        pytest.skip(f"the runtime {runtime.path} has no llama-server: build one with `steer build`")
    with ServerProcess(runtime.server) as server:
        server.start(None, ["--version"], own)
        with pytest.raises(EngineError):  # it says its version and ends
            server.wait_ready(60)
        assert spins("\n".join(server.log_tail)) == count


def test_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"A": "1"}
    assert with_short_waits(given) == {"A": "1", "GOMP_SPINCOUNT": str(SPINS)} and given == {"A": "1"}
    for own in ({"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}):
        assert with_short_waits(own) == own
    with pytest.raises(KeyError), short_waits():
        assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)
        raise KeyError
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with short_waits():
        assert "GOMP_SPINCOUNT" not in os.environ
