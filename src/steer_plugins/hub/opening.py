"""From the address of a hub to what reads it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import HubError
from ..paths import expand_path
from .huggingface import HuggingFaceSource
from .sources import FolderSource, GitSource, Source
from .web import WebSource

_GIT = re.compile(r"git\+(?:https?|ssh|file)://.+|(?:https?|ssh|file)://.+\.git/?|[A-Za-z0-9_.-]+@[A-Za-z0-9.-]+:.+\.git")


def open_source(url: str, cache: Path) -> Source:
    """The source at an address; ``cache``: a folder of ours for git checkouts. Raises HubError."""
    if url.startswith("hf://"):
        return HuggingFaceSource(url)
    if _GIT.fullmatch(url) and not Path(url).is_dir():
        return GitSource(url, cache)
    if url.startswith(("http://", "https://")):
        return WebSource(url)
    if url.startswith("file://"):
        return FolderSource(_file_path(url))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url):
        raise HubError(f"{url!r:.200} is not a hub's address: use a folder, http(s)://, git+https://, or hf://owner/name")
    return FolderSource(expand_path(url))


def _file_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise HubError(f"{url!r:.200} names another machine's file: use a folder of this one")
    path = unquote(parts.path)
    return Path(path.lstrip("/") if os.name == "nt" else path)
