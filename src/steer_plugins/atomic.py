"""Files: written so that nobody ever sees half of one, their hashes, and locks between processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to a new file beside ``path``, then rename it over. A failure leaves ``path`` as it was.

    Raises OSError.
    """
    finish(beside(path, data), path)


def beside(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write ``data`` to a new hidden file beside ``path``, for :func:`finish`; a failure leaves none. Raises OSError."""
    path = Path(path)
    # Not tempfile: its files are private to the user, and the permissions would stay with the final file.
    new = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    return new


def finish(new: Path, path: str | os.PathLike[str]) -> None:
    """Rename a file of :func:`beside` over ``path``; a failure removes it. Raises OSError."""
    try:
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def lock(path: str | os.PathLike[str], on_wait: Callable[[], None] | None = None) -> AbstractContextManager[object]:
    """Lock ``path`` between processes, until the context that is returned ends; the system unlocks it when the holder dies.

    The file stays. ``on_wait()`` is called once, when another process has it. Raises OSError.
    """
    file = FileLock(path)
    try:
        return file.acquire(timeout=0)
    except Timeout:
        if on_wait is not None:
            on_wait()
    return file.acquire()
