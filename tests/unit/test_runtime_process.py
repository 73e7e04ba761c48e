"""Running compilers, and what the machine must have for it."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from steer_plugins.errors import BuildError
from steer_plugins.runtime import tools
from steer_plugins.runtime.process import BuildLog, Reporter, first_error, run_logged

posix = pytest.mark.skipif(os.name != "posix", reason="process groups and scripts of POSIX")


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_output_goes_to_the_log_and_steps_to_the_user(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "logs" / "x.log")
    steps: list[tuple[int, int]] = []
    program = "import sys; print('[1/2] one'); print('[2/2] two', file=sys.stderr); sys.exit(3)"
    code, lines = run_logged([sys.executable, "-c", program], log, on_step=lambda *step: steps.append(step))
    log.close()
    assert code == 3 and sorted(steps) == [(1, 2), (2, 2)] and len(lines) == 2
    assert "[1/2] one" in (tmp_path / "logs" / "x.log").read_text()


INTERRUPTED = """
import os, sys, time
from pathlib import Path
from steer_plugins.runtime.process import BuildLog, run_logged
try:
    run_logged(["/bin/sh", "-c", "sleep 60 & echo $!; wait"], BuildLog(Path(sys.argv[1])))
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_children_end_with_us(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "x.log"
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(path)], stdout=subprocess.PIPE, text=True) as us:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not (path.is_file() and path.read_text().count("\n") == 2):
            time.sleep(0.02)
        grandchild = int(path.read_text().splitlines()[1])
        us.send_signal(number)
        assert us.stdout is not None and us.stdout.read() == "stopped\n"
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and alive(grandchild):
        time.sleep(0.02)
    assert not alive(grandchild)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # one that is dead but not yet collected by init counts as dead
    return not (status.is_file() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["[1/2] x", "a.cpp:3:4: warning: -Werror: soon", "/s/a.cpp:5:1: error: no 'x'", "b: error: y"],
            "/s/a.cpp:5:1: error: no 'x'",
        ),
        (["CMake Error at CMakeLists.txt:3 (x):", "", "  Could not find CUDA", "more"], "Could not find CUDA"),
        (["a.cpp(3): error C2065: 'x': undeclared", "ninja: build stopped"], "error C2065"),
        (["/usr/bin/ld: a.o: in function", "a.cpp: undefined reference to `f'"], "/usr/bin/ld"),
        (["ninja: error: loading 'build.ninja'"], "ninja: error"),
        (["gcc: fatal error: Killed signal terminated program cc1plus"], "Killed"),
        (["strange", ""], "strange"),
        ([], "no output"),
    ],
)
def test_the_first_error_line(lines: list[str], expected: str) -> None:
    assert expected in first_error(lines)


def test_progress_without_a_terminal_is_ten_lines() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream)
    for done in range(201):
        reporter.progress(done, 200, "compiling")
    assert 10 <= len(stream.getvalue().splitlines()) <= 12
    quiet = io.StringIO()
    Reporter(quiet=True, stream=quiet).progress(1, 2, "x")
    Reporter(quiet=True, stream=quiet).say("x")
    assert quiet.getvalue() == ""


def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_programs(monkeypatch, tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler.*build-essential"):
        tools.require_compiler()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BuildError, match="xcode-select"):
        tools.require_compiler()
    monkeypatch.setenv("CXX", "icpx -fast")
    with pytest.raises(BuildError, match="icpx"):
        tools.require_compiler()
    with pytest.raises(BuildError, match="/no/such"):
        tools.require_compiler({"CMAKE_CXX_COMPILER": "/no/such"})


@posix
def test_a_compiler_that_does_not_run_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_programs(monkeypatch, tmp_path)
    script(tmp_path / "empty" / "c++", "exit 1")
    assert tools.find_compiler() is None
    found = script(tmp_path / "empty" / "g++", "echo 'g++ 12.2.0'")
    assert tools.find_compiler() == found
    other = script(tmp_path / "mine" / "clang++", "echo 'clang 17.0.1'")
    monkeypatch.setenv("CXX", f"{other} -O1")
    assert tools.find_compiler() == other


@posix
def test_an_old_cmake_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_programs(monkeypatch, tmp_path)
    script(tmp_path / "empty" / "cmake", "echo 'cmake version 3.10.2'")
    assert tools.find_cmake() is None
    found = script(tmp_path / "empty" / "cmake", "echo 'cmake version 3.25.1'")
    assert tools.find_cmake() == found


@posix
def test_cmake_and_ninja_come_from_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_programs(monkeypatch, tmp_path)
    script(tmp_path / "empty" / "g++", "echo 'g++ 12.2.0'")
    fetched: list[str] = []

    def pip(arguments: list[str], what: str, way_out: str) -> None:
        target = Path(arguments[arguments.index("--target") + 1])
        place = target / "cmake" / "data" / "bin" / "cmake" if what == "cmake" else target / "bin" / "ninja"
        script(place, "echo 'version 4.1.0'")
        fetched.append(what)

    monkeypatch.setattr(tools, "run_pip", pip)
    chain = tools.toolchain(tmp_path / "tools")
    assert fetched == ["cmake", "ninja"]
    assert chain.cmake == str(tmp_path / "tools/cmake/cmake/data/bin/cmake")
    assert chain.ninja == str(tmp_path / "tools/ninja/bin/ninja")
    assert tools.toolchain(tmp_path / "tools") == chain and len(fetched) == 2
    assert sorted(path.name for path in (tmp_path / "tools").iterdir()) == ["cmake", "ninja"]


@posix
def test_a_failed_fetch_of_tools_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_programs(monkeypatch, tmp_path)
    script(tmp_path / "empty" / "g++", "echo 'g++ 12.2.0'")

    def pip(arguments: list[str], what: str, way_out: str) -> None:
        script(Path(arguments[arguments.index("--target") + 1]) / "half", "")
        raise BuildError("pip could not fetch cmake")

    monkeypatch.setattr(tools, "run_pip", pip)
    with pytest.raises(BuildError, match="cmake"):
        tools.toolchain(tmp_path / "tools")
    assert list((tmp_path / "tools").iterdir()) == []


def test_no_disk_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 100_000_000))
    with pytest.raises(BuildError, match=r"0\.1 GB are free .* 0\.5 GB.*STEER_CACHE"):
        tools.require_space(tmp_path / "not" / "yet", tools.build_bytes(True, {}))
    tools.require_space(tmp_path, 100_000_000)
    assert tools.build_bytes(True, {"GGML_CUDA": "on"}) > tools.build_bytes(True, {"GGML_CUDA": "OFF"})


def test_jobs_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tools.default_jobs() >= 1
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18}[name], raising=False)
    assert tools.default_jobs() == 1
