"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand_path(text: str | os.PathLike[str]) -> Path:
    """The path that is meant, ``~`` and ``~user`` expanded. With an unknown user it is taken as written, as a shell does."""
    return Path(os.path.expanduser(text))
