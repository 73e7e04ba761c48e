"""The sidecar's log."""

from __future__ import annotations

import logging

log = logging.getLogger("steer.ollama")
_told: set[str] = set()


def tell_once(text: str) -> None:
    """Log a warning, the first time only."""
    if text not in _told:
        _told.add(text)
        log.warning("%s", text)
