"""The per-user cache: where runtimes, work trees, logs and fetched files live, and the lock that guards them."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from ..atomic import file_sha256 as file_sha256
from ..atomic import try_lock, unlock
from ..errors import BuildError


def cache_dir() -> Path:
    """The cache folder (not created): ``STEER_CACHE``, else the platform's own place for caches."""
    override = os.environ.get("STEER_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "steer-plugins" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "steer-plugins"
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG rule: a relative path there is invalid and is ignored.
    root = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    return root / "steer-plugins"


def make_dir(path: Path) -> Path:
    """Create ``path`` and its parents. Raises BuildError with one sentence when that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"the cache folder {path} cannot be created ({error.strerror or error}); set STEER_CACHE to a writable folder"
        ) from None
    return path


def digest(*parts: bytes | str) -> str:
    """sha256 (hex) over length-prefixed parts, so that no two lists of parts give the same bytes."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside ``path`` and rename over it: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_if_changed(path: Path, data: bytes) -> bool:
    """Write ``path`` only when its content differs: an untouched timestamp is what lets ninja skip it."""
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        pass
    write_atomic(path, data)
    return True


def remove_tree(path: Path) -> None:
    """Delete a folder of ours, or do nothing. Read-only files (Windows) and half-deleted trees are no obstacle."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            time.sleep(0.2)
            shutil.rmtree(path, ignore_errors=True)


class CacheLock:
    """One build at a time for each cache, as a context manager. The operating system drops it when the holder dies.

    ``on_wait(text)`` is called once, when another process holds the lock.
    """

    def __init__(self, path: Path, on_wait: Callable[[str], None] | None = None, poll_seconds: float = 0.5) -> None:
        self.path = path
        self._on_wait = on_wait
        self._poll = poll_seconds
        self._file: IO[bytes] | None = None

    def __enter__(self) -> CacheLock:
        make_dir(self.path.parent)
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        except OSError as error:
            raise BuildError(
                f"the lock file {self.path} cannot be opened ({error.strerror or error}); set STEER_CACHE to a writable folder"
            ) from None
        stream = os.fdopen(handle, "r+b", buffering=0)
        told = False
        try:
            while not try_lock(stream):
                if not told and self._on_wait is not None:
                    holder = self.path.read_bytes()[:64].decode("ascii", "replace").strip()
                    self._on_wait(f"another steer build is running{f' (process {holder})' if holder else ''}; waiting")
                    told = True
                time.sleep(self._poll)
            stream.seek(0)
            stream.truncate()
            stream.write(f"{os.getpid()}\n".encode())
        except BaseException:
            stream.close()
            raise
        self._file = stream
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        if self._file is not None:
            # The file stays: removing it would let a waiter lock a name that a third process creates anew.
            self._file.seek(0)
            self._file.truncate()
            unlock(self._file)
            self._file.close()
            self._file = None
