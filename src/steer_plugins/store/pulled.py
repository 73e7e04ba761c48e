"""What was pulled from hubs: one record, ``state.json``, and files named by their sha256 beside it.

The record is the only truth. Files come first and the record last, each by a rename, so that whatever ends a process leaves
either the old state or the new one; a file that no record names is nobody's and is swept. Nothing here opens a connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import file_sha256, lock, write_atomically
from ..errors import VectorError
from ..steering.vector import ModelIdentity, SteeringVector, is_hub_name
from .vectorfile import read_vector

FORMAT = "steer-hub-state-v1"
#: Kinds of things that a hub holds; the first two are vector files, ``sae`` is an autoencoder with the names of its features.
MAX_STATE_BYTES = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: What files are called after their sha256.
TYPES = ("safetensors", "json", "minisig")


@dataclass(frozen=True)
class Ref:
    """A file by its content: sha256 (hex), size in bytes, and type (one of :data:`TYPES`)."""

    sha256: str
    size: int
    type: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"sha256": self.sha256, "size": self.size, "type": self.type}

    @classmethod
    def from_dict(cls, data: object, most: int) -> Ref:
        """The checked reference of a file of at most ``most`` bytes. Raises VectorError."""
        if not isinstance(data, dict) or data.keys() != {"sha256", "size", "type"}:
            raise VectorError("a file is not described by just sha256, size and type")
        sha256, size, type_ = data["sha256"], data["size"], data["type"]
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise VectorError("a file's sha256 is not 64 lower-case hex digits")
        if type_ not in TYPES:
            raise VectorError(f"a file has the type {type_!r:.40}: only {', '.join(TYPES)} are taken")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= most:
            raise VectorError(f"a file claims {size!r:.40} bytes: at most {most} are taken")
        return cls(sha256, size, type_)


@dataclass(frozen=True)
class Item:
    """One thing that was pulled: ``owner/name``, its version, its files by role, and where it came from."""

    name: str
    version: str
    kind: str
    model: ModelIdentity | None
    key: str  # of the publisher
    index: str  # the address it came from
    pinned: bool
    files: dict[str, Ref]  # by role: "card", and those of the kind (hub.schema.ROLES)

    @property
    def label(self) -> str:
        """For sentences."""
        return f"{self.name}@{self.version}"

    @property
    def place(self) -> tuple[str, str]:
        """What only one item may have: the name and the model."""
        return self.name, "" if self.model is None else self.model.key

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "model": None if self.model is None else self.model.to_dict(),
            "key": self.key,
            "index": self.index,
            "pinned": self.pinned,
            "files": {role: ref.to_dict() for role, ref in self.files.items()},
        }

    @classmethod
    def from_dict(cls, data: Any) -> Item:
        """The item that :meth:`to_dict` wrote. Raises KeyError, TypeError, ValueError or VectorError for anything else."""
        files = {str(role): Ref.from_dict(ref, 1 << 40) for role, ref in data["files"].items()}
        model = None if data["model"] is None else ModelIdentity.from_dict(data["model"])
        texts = [data[key] for key in ("name", "version", "kind", "key", "index")]
        if not all(isinstance(text, str) for text in texts) or not is_hub_name(texts[0]):
            raise ValueError
        return cls(texts[0], texts[1], texts[2], model, texts[3], texts[4], bool(data["pinned"]), files)


class Pulled:
    """The folder of a library in which pulled things are kept. Nothing is created before the first :meth:`change`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, ref: Ref) -> Path:
        """The file of that content, whether it is there or not."""
        return self.root / "files" / f"{ref.sha256}.{ref.type}"

    def checked(self, ref: Ref, what: str) -> Path:
        """The file, after its bytes have been compared to their hash. Raises VectorError."""
        path, way_out = self.path(ref), f"pull it again with: steer hub pull {what}"
        try:
            sound = path.stat().st_size == ref.size and file_sha256(path) == ref.sha256
        except OSError:
            raise VectorError(f"a file of {what} is missing: {way_out}") from None
        if not sound:
            raise VectorError(
                f"a file of {what} is not what was pulled, so it is damaged: pull it again with: steer hub pull {what}"
            )
        return path

    def state(self) -> dict[str, Any]:
        """The record: ``indexes``, ``keys`` and ``items``, empty before the first change. Raises VectorError."""
        path = self.root / "state.json"
        try:
            if path.stat().st_size > MAX_STATE_BYTES:
                raise ValueError
            state = json.loads(path.read_text("utf-8"))
            if state["format"] != FORMAT or not isinstance(state["items"], list):
                raise ValueError
            if not isinstance(state["indexes"], dict) or not isinstance(state["keys"], dict):
                raise ValueError
            return dict(state)
        except FileNotFoundError:
            return {"format": FORMAT, "indexes": {}, "keys": {}, "items": []}
        except OSError as error:
            raise VectorError(f"cannot read {path}: {error.strerror or error}") from None
        except (KeyError, TypeError, ValueError, RecursionError):
            raise VectorError(f"{path} is damaged: remove it, add the indexes again and pull again") from None

    def items(self, state: dict[str, Any] | None = None) -> list[Item]:
        """All that was pulled, by name and model. Raises VectorError."""
        try:
            items = [Item.from_dict(data) for data in (state or self.state())["items"]]
        except (KeyError, TypeError, ValueError, AttributeError, VectorError):
            raise VectorError(f"{self.root / 'state.json'} is damaged: remove it, add the indexes again and pull again") from None
        return sorted(items, key=lambda item: item.place)

    def vectors(self, name: str | None = None, identity: ModelIdentity | None = None) -> list[Item]:
        """Pulled vectors and gates, of one name, of one model."""
        return [
            item
            for item in self.items()
            if "vector" in item.files
            and name in (None, item.name)
            and (identity is None or (item.model is not None and item.model.mismatch(identity) is None))
        ]

    def vector_file(self, item: Item) -> Path:
        """The file of a vector, its hash compared. Raises VectorError."""
        return self.checked(item.files["vector"], item.name)

    def read(self, item: Item) -> SteeringVector:
        """The vector of an item. Raises VectorError."""
        return read_vector(self.vector_file(item))

    def file(self, name: str, role: str) -> Path | None:
        """The checked file of what was pulled under a name and has that role; None if there is none. Raises VectorError."""
        for item in self.items():
            if item.name == name and role in item.files:
                return self.checked(item.files[role], item.name)
        return None

    def files(self, name: str, kind: str, identity: ModelIdentity) -> dict[str, Path]:
        """The checked files, by role, of what was pulled under a name for this model; none if it is not there or another kind.

        Raises VectorError for one that is damaged, or of another model only.
        """
        found = [item for item in self.items() if (item.name, item.kind) == (name, kind)]
        for item in found:
            if item.model is not None and item.model.mismatch(identity) is None:
                return {role: self.checked(ref, item.name) for role, ref in item.files.items() if role != "card"}
        if found and found[0].model is not None:
            raise VectorError(f"{name} was pulled for another model: {found[0].model.mismatch(identity)}")
        return {}

    @contextlib.contextmanager
    def locked(self, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """One process at a time; the system drops the lock when its holder dies. Raises VectorError."""
        try:
            (self.root / "files").mkdir(parents=True, exist_ok=True)
            held = lock(self.root / "lock", on_wait)
        except OSError as error:
            raise VectorError(f"cannot write to {self.root}: {error.strerror or error}") from None
        with held:
            yield

    def write(self, state: dict[str, Any]) -> None:
        """Replace the record, then sweep files that nothing names. Only while :meth:`locked`. Raises VectorError."""
        text = json.dumps(state, indent=1, ensure_ascii=True, sort_keys=True) + "\n"
        try:
            write_atomically(self.root / "state.json", text.encode())
        except OSError as error:
            raise VectorError(f"cannot write to {self.root}: {error.strerror or error}") from None
        named = {self.path(ref).name for item in self.items(state) for ref in item.files.values()}
        # a signature is named by what it signs
        named |= {f"{item.files['card'].sha256}.minisig" for item in self.items(state) if "card" in item.files}
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.root / "files"):
                if entry.name not in named:
                    with contextlib.suppress(OSError):  # open elsewhere (Windows): the next sweep takes it
                        os.unlink(entry.path)
