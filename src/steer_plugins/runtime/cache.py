"""The per-user cache: where runtimes, work trees, logs and fetched files live, and the lock that guards them."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from platformdirs import user_cache_path

from ..atomic import lock, write_atomically
from ..errors import BuildError
from ..paths import expand_path

RUNTIME_FILE = "runtime.json"


def cache_dir() -> Path:
    """The cache folder (not created): ``STEER_CACHE``, else the platform's own place for caches."""
    named = os.environ.get("STEER_CACHE")
    return expand_path(named).absolute() if named else user_cache_path("steer-plugins", appauthor=False)


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


def write_if_changed(path: Path, data: bytes) -> bool:
    """Write ``path`` only when its content differs: an untouched timestamp is what lets ninja skip it."""
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return True


def remove_tree(path: Path) -> None:
    """Delete a folder of ours, or do nothing. Read-only files (Windows) and half-deleted trees are handled."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            time.sleep(0.2)
            shutil.rmtree(path, ignore_errors=True)


def cache_lock(path: Path, on_wait: Callable[[str], None] | None = None) -> AbstractContextManager[object]:
    """One build at a time for each cache, until the context ends. The system drops the lock when its holder dies.

    ``on_wait(text)`` is called once, when another process holds the lock. Raises BuildError when there cannot be a lock.
    """
    make_dir(path.parent)
    try:
        return lock(path, lambda: on_wait and on_wait("another steer build is running; waiting"))
    except OSError as error:
        raise BuildError(f"{path} cannot be locked ({error.strerror or error}); set STEER_CACHE to a writable folder") from None
