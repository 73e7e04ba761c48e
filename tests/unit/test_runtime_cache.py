"""The cache: its place, its lock between processes, writing only what changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer_plugins.errors import BuildError
from steer_plugins.runtime.cache import cache_dir, cache_lock, digest, make_dir, write_if_changed

HOLDER = """
import sys
from pathlib import Path
from steer_plugins.runtime.cache import cache_lock
with cache_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until its standard input ends."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_the_second_waits_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    with hold(tmp_path / "lock") as child:

        def waiting(text: str) -> None:
            said.append(text)
            assert child.poll() is None, "the other still holds it"
            child.communicate("", timeout=60)

        with cache_lock(tmp_path / "lock", waiting):
            assert child.poll() == 0
    assert said == ["another steer build is running; waiting"]


def test_a_dead_holder_blocks_nobody(tmp_path: Path) -> None:
    with hold(tmp_path / "lock") as child:
        child.kill()
        child.wait()
        with cache_lock(tmp_path / "lock"):
            pass


def test_the_lock_can_be_taken_again(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        with cache_lock(tmp_path / "deep" / "lock", said.append):
            pass
    assert said == []


def test_a_named_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_CACHE", "own")
    assert cache_dir() == tmp_path / "own", "the same place for child processes that start elsewhere"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="places of Linux")
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STEER_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "steer-plugins"
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_dir() == tmp_path / "home" / ".cache" / "steer-plugins"


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


def test_a_cache_that_cannot_be_locked_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(BuildError, match="cannot be locked .*STEER_CACHE"), cache_lock(tmp_path / "lock"):
        pass


def test_digest_tells_lists_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("ab", b"c") == digest(b"ab", "c")
