"""Files: written so that nobody ever sees half of one, their hashes, and locks between processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sys
from pathlib import Path
from typing import IO

_LOCK_OFFSET = 1 << 30  # Windows locks bytes, not files: lock one far behind the text, which stays readable


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


if sys.platform == "win32":
    import msvcrt

    def try_lock(stream: IO[bytes]) -> bool:
        """Lock an open file for this process; False if another has it. The system drops it when the holder dies."""
        stream.seek(_LOCK_OFFSET)
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def unlock(stream: IO[bytes]) -> None:
        """Let go of what :func:`try_lock` took."""
        stream.seek(_LOCK_OFFSET)
        msvcrt.locking(stream.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def try_lock(stream: IO[bytes]) -> bool:
        """Lock an open file for this process; False if another has it. The system drops it when the holder dies."""
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(stream: IO[bytes]) -> None:
        """Let go of what :func:`try_lock` took."""
        fcntl.flock(stream.fileno(), fcntl.LOCK_UN)
