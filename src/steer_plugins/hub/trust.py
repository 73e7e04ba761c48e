"""Which keys are trusted: on first use, pinned from then on, followed from an old key to a new one that it signed."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any

from ..errors import HubError
from .schema import now, parse_time
from .signing import PublicKey, SecretKey, verify

MAX_HOPS = 16


def _statement(old: PublicKey, new: PublicKey) -> bytes:
    """BLAKE2b-512 of what an old key signs to name its successor."""
    return hashlib.blake2b(f"steer-hub rotation\nold {old}\nnew {new}\n".encode(), digest_size=64).digest()


def rotation(old: SecretKey, new: PublicKey) -> dict[str, str]:
    """The entry of an index's ``rotations`` by which ``old`` hands over to ``new``."""
    return {"old": str(old.public), "new": str(new), "signature": old.sign(_statement(old.public, new), "rotation")}


def follows(pinned: str, key: str, rotations: list[dict[str, str]]) -> bool:
    """Whether ``key`` is the pinned one, or its successor through rotations that are signed each by the key before."""
    current = pinned
    for _ in range(MAX_HOPS):
        if current == key:
            return True
        for step in rotations:
            if step["old"] == current:
                old, new = PublicKey.parse(step["old"]), PublicKey.parse(step["new"])
                try:
                    verify(step["signature"], _statement(old, new), old, "a rotation of keys")
                except HubError:
                    continue
                current = step["new"]
                break
        else:
            return False
    return False


def check_owner(state: dict[str, Any], entry: dict[str, Any], rotations: list[dict[str, str]]) -> None:
    """Raise HubError if the entry's key is not the one pinned for its owner, or a successor of that."""
    owner = entry["name"].split("/")[0]
    pin = state["keys"].get(owner)
    if pin is not None and not follows(pin["key"], entry["key"], rotations):
        raise HubError(
            f"{entry['name']} is signed with the key {entry['key']}, but {owner!r} was known by {pin['key']} since "
            f"{pin['since'][:10]}: somebody else's, unless {owner} says otherwise; if so: steer hub forget {owner}"
        )


def check_newer(record: dict[str, Any], header: dict[str, Any], sha256: str) -> None:
    """Raise HubError for an index that is older than the one seen before, or another of the same serial."""
    where, seen, serial = record["url"], record["serial"], header["serial"]
    if header["name"] != record["index"]:
        raise HubError(
            f"the index {where} is called {header['name']!r} now, not {record['index']!r}: add it anew if that is meant"
        )
    if serial < seen:
        raise HubError(f"the index {where} is older (serial {serial}) than the one seen before ({seen}): it was rolled back")
    if serial == seen and sha256 != record["sha256"]:
        raise HubError(f"the index {where} has changed without a new serial ({serial}): one of the two is not its keeper's")


def check_fresh(what: str, expires: str | None, clock: datetime | None = None) -> None:
    """Raise HubError for an index whose time is over: somebody may be holding back what is newer."""
    if expires is not None and (clock or now()) > parse_time(expires):
        raise HubError(
            f"the index {what} expired on {expires[:10]}: fetch a newer one with: steer hub update; if there is none, its keeper "
            "has to sign it again"
        )
