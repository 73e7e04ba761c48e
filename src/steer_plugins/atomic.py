"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


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
