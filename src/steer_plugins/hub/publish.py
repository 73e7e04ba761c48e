"""The publisher's side: a folder that is a hub. Cards are made, signed and listed; no version is ever written over.

Files come first and ``index.json`` last, each by a rename; the index's own signature is named by its hash, so it lies there
before the index that it signs.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import file_sha256, finish, lock, write_atomically
from ..errors import HubError, SpecError, SteerError
from ..steering.vector import SteeringVector, is_hub_name
from ..store.pulled import Ref
from ..store.vectorfile import read_vector
from . import index as indexes
from .contents import check_contents, facts_of, facts_of_sae
from .schema import (
    CARD_FORMAT,
    INDEX_FORMAT,
    MAX_CARD_BYTES,
    canonical,
    check_card,
    check_entry,
    entry_of,
    files_of,
    now,
    read_card,
    sort_key,
    time_text,
    version_key,
)
from .signing import PublicKey, SecretKey, blake2b, verify
from .sources import INDEX, file_name, is_file_name
from .trust import follows, rotation

if TYPE_CHECKING:
    from ..training.traits import Trait

VALID_DAYS = 365
"""How long an index may be trusted without being signed again, unless its keeper says otherwise."""


def own_key(root: Path, *, make: bool = False) -> SecretKey:
    """The publisher's key in a library's hub folder; ``make``: a new one where there is none. Raises HubError."""
    path = root / "key"
    if path.is_file():
        return SecretKey.read(path)
    if not make:
        raise HubError(f"there is no key {path}: make one with: steer hub key")
    key = SecretKey.generate()
    key.write(path)
    return key


def draft(
    name: str, contents: dict[str, Path], *, version: str | None = None, licence: str, description: str = "", **said: Any
) -> dict[str, Any]:
    """The card of some files by role, as far as they say; ``said`` are further fields. ``version`` None: chosen later.

    Of a trait of the package's own, its description is taken where none is given. Raises HubError, VectorError: a file that is
    none, a name that is none.
    """
    if not is_hub_name(name):
        raise SpecError(
            f"{name!r:.120} is not the name of something on a hub: write owner/name in a-z, 0-9 and -, such as ann/mood"
        )
    role = next(iter(contents))
    facts: dict[str, Any] = {"kind": role, "model": None, "method": None, "layers": [], "op": None, "scope": None}
    card: dict[str, Any] = {"trait": None, "calibration": None, "samples": []}
    if role == "vector":
        vector = read_vector(contents[role])
        if vector.identity is None:
            raise HubError(f"vector {vector.name!r} names no model: put it into the library with --model, then publish it")
        facts = facts_of(vector)
        trait = _trait_of(vector)
        if trait is not None:
            card["trait"] = {"name": trait.name, "positive": trait.poles["positive"], "negative": trait.poles["negative"]}
            description = description or trait.description
        card |= {"calibration": _calibration_of(vector), "samples": _samples_of(vector)}
    elif role == "weights":
        facts = facts_of_sae(contents)
    return {
        "format": CARD_FORMAT,
        "name": name,
        "version": version,
        "description": description,
        "licence": licence,
        "published": time_text(now()),
        "base_model": None,
        "tried_on": [],
        "benchmark": {},
        "safety": None,
        "tags": [],
        **facts,
        **card,
        **said,
        "files": {role: _ref(path).to_dict() for role, path in contents.items()},
    }


class Folder:
    """A hub in a folder, and the key that signs there."""

    def __init__(self, folder: Path, key: SecretKey) -> None:
        self.folder, self.key = folder, key

    def publish(
        self, card: dict[str, Any], contents: dict[str, Path], *, name: str | None = None, days: int | None = None
    ) -> dict[str, Any]:
        """Add a card with its files; returns the entry. ``name``: of an index that is new. ``days``: see :meth:`sign`.

        A card without a version gets the next whole number. Raises HubError: the version is there, the owner has another key,
        the card or a file is wrong.
        """
        with self._locked():
            opened = self._open(name)
            check_card({**card, "version": card["version"] or "1"}, card["name"])
            owner, mine_key, model = card["name"].split("/")[0], str(self.key.public), sort_key({**card, "version": "1"})[2]
            key_of_owner: str | None = None
            before, same, index = 0, [], opened()
            header = index.header
            for entry in index.entries:
                if entry["name"].split("/")[0] == owner:
                    key_of_owner = entry["key"]
                if entry["name"] == card["name"]:
                    same.append(sort_key(entry))
                before += entry["name"] < card["name"]
            versions = [version for _, version, whose in same if whose == model]
            if card["version"] is None:
                card = {**card, "version": str(max((version[0] for version in versions), default=0) + 1)}
            what = f"{card['name']}@{card['version']}"
            check_contents(card, contents)
            if version_key(card["version"]) in versions:
                raise HubError(f"{what} is there already, and no version is written over: publish the next version")
            if key_of_owner is not None and not follows(key_of_owner, mine_key, header["rotations"]):
                raise HubError(f"{owner!r} publishes there with another key ({key_of_owner}): yours is {mine_key}")
            data = canonical(card).encode() + b"\n"
            refs = files_of(card, what)
            for role, ref in refs.items():
                self._put(file_name(ref.sha256, ref.type), contents[role].read_bytes())
            entry = check_entry(self._signed_card(data, card), what)
            at = before + sum(key < sort_key(entry) for key in same)
            lines = indexes.inserted((line for _, line in opened().lines), at, canonical(entry))
            self._write({**header, "count": header["count"] + 1}, lines, days)
        return entry

    def sign(self, *, days: int | None = None) -> dict[str, Any]:
        """Check the whole index and sign it, as its keeper does after changes by others; returns its head. Raises HubError.

        Files that nothing names are removed: of publishing that was interrupted, and signatures of earlier indexes.
        ``days``: how long it may be trusted; 0: for ever; None: as it was, a year for a new one.
        """
        with self._locked():
            opened = self._open(None)
            named = set()
            for entry in opened().entries:
                self._check(entry)
                refs = [Ref.from_dict(entry["card"], MAX_CARD_BYTES), *files_of(entry, entry["name"]).values()]
                named |= {file_name(ref.sha256, ref.type) for ref in refs} | {file_name(refs[0].sha256, "minisig")}
            index = opened()
            header = self._write(index.header, (line for _, line in index.lines), days)
            named.add(file_name(file_sha256(self.folder / INDEX), "minisig"))
            with contextlib.suppress(OSError):
                for path in (self.folder / "files").iterdir():
                    if is_file_name(f"files/{path.name}") and f"files/{path.name}" not in named:
                        path.unlink()
            return header

    def rotate(self, new: SecretKey, *, days: int | None = None) -> int:
        """Hand over from this key to a new one: what this one signed is signed anew, and the index says so.

        Returns how many cards were signed anew.
        """
        with self._locked():
            index = self._open(None)()
            old, count = str(self.key.public), 0
            steps = index.header["rotations"]
            if not follows(old, str(new.public), steps):
                steps = [*steps, rotation(self.key, new.public)]
            signer, self.key = self.key, new

            def lines() -> Iterator[str]:
                nonlocal count
                for entry in index.entries:
                    if entry["key"] == old:
                        self._sign_again(entry, signer.public)
                        entry, count = {**entry, "key": str(new.public)}, count + 1
                    yield canonical(entry)

            self._write({**index.header, "rotations": steps}, lines(), days)
        return count

    # ---- parts ----

    def _sign_again(self, entry: dict[str, Any], old: PublicKey) -> None:
        """Replace the old key's signature of a card by one of ours."""
        ref = Ref.from_dict(entry["card"], MAX_CARD_BYTES)
        digest = blake2b(self.folder / file_name(ref.sha256, ref.type))
        try:
            verify(self._signature(ref), digest, old, entry["name"])
        except HubError:  # signed anew by a rotation that did not get to its end
            verify(self._signature(ref), digest, self.key.public, entry["name"])
        self._put_signature(ref.sha256, digest, entry["name"], again=True)

    def _open(self, name: str | None) -> Callable[[], indexes.Index]:
        """What begins to read the index, or one that is new and empty."""
        path = self.folder / INDEX
        if path.is_file():
            with contextlib.closing(indexes.read_index(path, str(path))) as index:
                known = index.header["name"]
            if name not in (None, known):
                raise HubError(f"the index in {self.folder} is called {known!r}, not {name!r}: leave --index-name out")
            return lambda: indexes.read_index(path, str(path))
        if (self.folder / "files").exists():
            raise HubError(f"{self.folder} has files but no {INDEX}: restore it, or begin in an empty folder")
        name = (
            name or "".join(c if c.isalnum() and c.isascii() else "-" for c in self.folder.name.lower()).strip("-")[:39] or "hub"
        )
        header = {"format": INDEX_FORMAT, "name": name, "serial": 0, "rotations": [], "count": 0, "key": str(self.key.public)}
        return lambda: indexes.Index(header, iter(()), io.StringIO())

    def _write(self, header: dict[str, Any], lines: Iterable[str], days: int | None) -> dict[str, Any]:
        """Write the next index. One whose key is another's waits, unsigned, for its keeper."""
        mine = follows(header["key"], str(self.key.public), header["rotations"])
        if days is None:
            days = 0 if header.get("expires", "") is None else VALID_DAYS
        time = now()
        header = {
            **header,
            "serial": header["serial"] + 1,
            "key": str(self.key.public) if mine else header["key"],
            "updated": time_text(time),
            "expires": time_text(time + timedelta(days=days)) if days else None,
        }
        new = self.folder / f".{INDEX}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            indexes.write_index(new, header, lines)
            if mine:
                self._put_signature(file_sha256(new), blake2b(new), f"index {header['name']}, serial {header['serial']}")
            finish(new, self.folder / INDEX)
        except OSError as error:
            raise HubError(f"cannot write to {self.folder}: {error.strerror or error}") from None
        finally:
            with contextlib.suppress(OSError):
                new.unlink()
        return header

    def _signed_card(self, data: bytes, card: dict[str, Any]) -> dict[str, Any]:
        new = self.folder / f".card.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            new.write_bytes(data)
            ref = Ref(file_sha256(new), len(data), "json")
            self._put_signature(ref.sha256, blake2b(new), f"{card['name']}@{card['version']}")
        finally:
            with contextlib.suppress(OSError):
                new.unlink()
        self._put(file_name(ref.sha256, ref.type), data)
        return entry_of(card, ref, self.key.public)

    def _put(self, name: str, data: bytes) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != data:
                write_atomically(path, data)
        except OSError as error:
            raise HubError(f"cannot write {path}: {error.strerror or error}") from None

    def _put_signature(self, sha256: str, digest: bytes, comment: str, *, again: bool = False) -> None:
        name = file_name(sha256, "minisig")
        if again or not (self.folder / name).is_file():
            self._put(name, self.key.sign(digest, comment).encode())

    def _signature(self, ref: Ref) -> bytes:
        try:
            return (self.folder / file_name(ref.sha256, "minisig")).read_bytes()
        except OSError:
            raise HubError(f"the signature of the card {ref.sha256[:12]} is missing in {self.folder}") from None

    def _check(self, entry: dict[str, Any]) -> None:
        """Raise HubError unless all that an entry names is there, signed, and says the same."""
        what = f"{entry['name']}@{entry['version']}"
        ref = Ref.from_dict(entry["card"], MAX_CARD_BYTES)
        refs = files_of(entry, what)
        paths = {role: self.folder / file_name(one.sha256, one.type) for role, one in {"card": ref, **refs}.items()}
        for role, one in {"card": ref, **refs}.items():
            if not paths[role].is_file() or paths[role].stat().st_size != one.size or file_sha256(paths[role]) != one.sha256:
                raise HubError(f"the file {role!r} of {what} is missing or altered in {self.folder}")
        key = PublicKey.parse(entry["key"])
        verify(self._signature(ref), blake2b(paths["card"]), key, f"the card of {what}")
        card = read_card(paths.pop("card"), what)
        if entry_of(card, ref, key) != entry:
            raise HubError(f"the index says something else of {what} than its signed card")
        check_contents(card, paths)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = lock(self.folder / ".lock")
        except OSError as error:
            raise HubError(f"cannot write to {self.folder}: {error.strerror or error}") from None
        with held:
            yield


def _ref(path: Path) -> Ref:
    return Ref(file_sha256(path), path.stat().st_size, "safetensors" if path.suffix == ".safetensors" else "json")


def _trait_of(vector: SteeringVector) -> Trait | None:
    """The trait of the package's own that a vector was fitted to."""
    from ..training.traits import bundled_traits, load_trait

    source = (vector.provenance or {}).get("source")
    name = source.get("trait") if isinstance(source, dict) else None
    return load_trait(name) if name in bundled_traits() else None


def _calibration_of(vector: SteeringVector) -> dict[str, Any] | None:
    """The dose curve of a calibration in short; None of one that another tool wrote."""
    record = vector.calibration
    try:
        if record is None:
            return None
        plain = record["plain"]["perplexity"]
        ratios = {
            row["strength"]: round(row["perplexity"] / plain, 4)
            for row in record["rows"]
            if row["stage"] == "curve" and row["perplexity"] is not None and plain
        }
        ratios.setdefault(0.0, 1.0)
        curve = [{**point, "perplexity": ratios.get(point["strength"])} for point in record["curve"]]
        fields = {field: record[field] for field in ("n", "dose", "effect", "effect_se")}
        return {"objective": record["objective"]["name"], "unit": record["objective"]["unit"], **fields, "curve": curve}
    except (KeyError, TypeError, AttributeError):
        return None


def _samples_of(vector: SteeringVector) -> list[dict[str, Any]]:
    samples = (vector.calibration or {}).get("samples")
    try:
        return [{"strength": s["strength"], "text": _printable(s["text"])[:600]} for s in samples or []]
    except (KeyError, TypeError, SteerError):
        return []


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
