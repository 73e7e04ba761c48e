"""A lock file: what was pulled, by hash and key, so that a set-up can be repeated elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..errors import HubError, VectorError
from ..steering.vector import ModelIdentity
from ..store.pulled import Item
from .hub import Hub
from .schema import parse_json

FORMAT = "steer-hub-lock-v1"
MAX_LOCK_BYTES = 16 << 20


def write_lock(hub: Hub, path: Path) -> int:
    """Write down all that was pulled; returns how much that is. Raises HubError."""
    state = hub.pulled.state()
    keys = {record["url"]: record["key"] for record in state["indexes"].values()}
    items = hub.pulled.items(state)
    gone = sorted({item.index for item in items} - keys.keys())
    if gone:
        raise HubError(f"the index {gone[0]} was forgotten, so what came from it cannot be locked: add it again")
    data = {
        "format": FORMAT,
        "indexes": [{"url": url, "key": keys[url]} for url in sorted({item.index for item in items})],
        "items": [
            {
                "name": item.name,
                "version": item.version,
                "model": None if item.model is None else item.model.to_dict(),
                "card": item.files["card"].sha256,
                "key": item.key,
                "index": item.index,
            }
            for item in items
        ],
    }
    try:
        write_atomically(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise HubError(f"cannot write {path}: {error.strerror or error}") from None
    return len(items)


def pull_locked(hub: Hub, path: Path) -> list[Item]:
    """Add the indexes that a lock file names, with the keys it names, and pull just what it names. Raises HubError."""
    indexes, items = _read(path)
    known = {record["url"]: (alias, record["key"]) for alias, record in hub.indexes().items()}
    for url, key in indexes.items():
        if url not in known:
            known[url] = (hub.add(url, key=key), key)
    pulled = []
    for data, model in items:
        alias = known[data["index"]][0]
        offer = hub.find(f"{data['name']}@{data['card']}", identity=model, index=alias)
        if offer.entry["key"] != data["key"]:
            raise HubError(f"{offer.label} is signed by {offer.entry['key']}, not by the key in {path}: {data['key']}")
        pulled.append(hub.pull(f"{data['name']}@{data['card']}", identity=model, index=alias))
    return pulled


def _read(path: Path) -> tuple[dict[str, str], list[tuple[dict[str, str], ModelIdentity | None]]]:
    try:
        if path.stat().st_size > MAX_LOCK_BYTES:
            raise ValueError
        data: dict[str, Any] = parse_json(path.read_bytes(), str(path))
        if data["format"] != FORMAT:
            raise ValueError
        indexes = {str(one["url"]): str(one["key"]) for one in data["indexes"]}
        items = []
        for one in data["items"]:
            texts = {field: one[field] for field in ("name", "version", "card", "key", "index")}
            if not all(isinstance(text, str) for text in texts.values()) or texts["index"] not in indexes:
                raise ValueError
            items.append((texts, None if one["model"] is None else ModelIdentity.from_dict(one["model"])))
        return indexes, items
    except OSError as error:
        raise HubError(f"cannot read {path}: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, VectorError):
        raise HubError(f"{path} is not a lock file of steer hub: write one with: steer hub lock") from None
