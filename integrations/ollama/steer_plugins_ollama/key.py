"""The key of the sidecar's llama-servers, without which nobody else on this machine, and no web page, can ask them."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import stat
import sys
from pathlib import Path

from steer_plugins.runtime.cache import cache_dir


def key_path() -> Path:
    """The file of this user's key, which only this user can read."""
    return cache_dir() / "ollama.key"


@functools.lru_cache(maxsize=1)
def server_key() -> str:
    """This user's key, made when there is none; one for this program alone where none can be kept."""
    path = key_path()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if _private(path) and len(found := path.read_text("ascii").strip()) >= 32:
            return found
    made = secrets.token_hex(32)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(made + "\n")
        os.replace(beside, path)
    return made


def _private(path: Path) -> bool:
    """Whether a file is this user's, and nobody else's to read or write."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return False
    return sys.platform == "win32" or (found.st_uid == os.geteuid() and not found.st_mode & 0o077)
