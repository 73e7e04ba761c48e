"""The cache: its place, its lock between processes, writing only what changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steer_plugins.errors import BuildError
from steer_plugins.runtime.cache import CacheLock, cache_dir, digest, make_dir, write_atomic, write_if_changed

HOLDER = """
import sys, time
from pathlib import Path
from steer_plugins.runtime.cache import CacheLock
with CacheLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_the_second_waits_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    with hold(tmp_path / "lock", 0.6) as child:
        started = time.monotonic()
        with CacheLock(tmp_path / "lock", said.append, poll_seconds=0.02):
            assert time.monotonic() - started > 0.3
        assert len(said) == 1 and str(child.pid) in said[0] and "waiting" in said[0]


def test_a_dead_holder_blocks_nobody(tmp_path: Path) -> None:
    with hold(tmp_path / "lock", 60) as child:
        child.kill()
        child.wait()
        with CacheLock(tmp_path / "lock", poll_seconds=0.02):
            pass


def test_the_lock_can_be_taken_again(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        with CacheLock(tmp_path / "deep" / "lock", said.append):
            pass
    assert said == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("STEER_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "steer-plugins"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path.home() / ".cache" / "steer-plugins"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "steer-plugins"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_dir() == tmp_path / "steer-plugins" / "Cache"


def test_an_impossible_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="STEER_CACHE"):
        make_dir(tmp_path / "file" / "cache")


def test_same_content_keeps_the_timestamp(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    assert write_if_changed(path, b"one")
    os.utime(path, (1, 1))
    assert not write_if_changed(path, b"one")
    assert path.stat().st_mtime == 1
    assert write_if_changed(path, b"two") and path.read_bytes() == b"two"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_digest_tells_lists_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("ab", b"c") == digest(b"ab", "c")
