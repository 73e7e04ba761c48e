"""A library's side of hubs: which indexes it knows, what they offer, and what was pulled.

Whatever is fetched is bounded, hashed and checked against signatures in a folder of its own; only then is it renamed into
place, and last of all the record is replaced (:mod:`..store.pulled`). A process that ends anywhere leaves the state before or
the state after.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import file_sha256
from ..errors import HubError, SpecError
from ..steering.vector import ModelIdentity, is_hub_name
from ..store.library import Library
from ..store.pulled import Item, Ref
from . import DEFAULT_INDEX
from . import index as indexes
from .contents import check_contents
from .opening import open_source
from .schema import MAX_CARD_BYTES, entry_of, files_of, model_of, now, read_card, time_text, version_key
from .signing import MAX_SIGNATURE_BYTES, PublicKey, blake2b, verify
from .sources import INDEX, Progress, Source, file_name
from .trust import check_fresh, check_newer, check_owner, follows

_REFERENCE = re.compile(r"(?P<name>[^@]+)(?:@(?P<at>[0-9.]{1,20}|[0-9a-f]{8,64}))?")
Check = Callable[[dict[str, Any], dict[str, Path]], None]
"""Looks at a card and its files before they are kept, and raises HubError to keep them out."""


@dataclass(frozen=True)
class Offer:
    """An entry of an index that is known here."""

    index: str
    url: str
    row: indexes.Listed
    entry: dict[str, Any]

    @property
    def label(self) -> str:
        """For sentences."""
        return f"{self.entry['name']}@{self.entry['version']}"


class Hub:
    """The hubs of a library; the user's own when left out. ``say`` gets a sentence when something takes its time."""

    def __init__(self, library: Library | None = None, *, say: Callable[[str], None] | None = None) -> None:
        self.library = library or Library()
        self.pulled = self.library.pulled
        self.root = self.pulled.root
        self._say = say or (lambda sentence: None)

    # ---- indexes ----

    def indexes(self) -> dict[str, dict[str, Any]]:
        """What is known of each index, by its name here."""
        return dict(self.pulled.state()["indexes"])

    def add(self, url: str, *, name: str | None = None, key: str | None = None) -> str:
        """Fetch an index and trust its key from now on; ``key``: the one it must have. Returns the name it got.

        Raises HubError: no index there, another key, a signature that does not hold, an index that is over, a name taken.
        """
        wanted = None if key is None else str(PublicKey.parse(key))
        with self._locked():
            source = open_source(url, self.root / "git")
            known = [alias for alias, record in self.pulled.state()["indexes"].items() if record["url"] == source.url]
            if known:
                raise HubError(f"the index {source.url} is known as {known[0]!r} already: fetch it anew with: steer hub update")
            record = self._fetched_index(source, None, wanted)
            alias = name or record["index"]
            state = self.pulled.state()
            if alias in state["indexes"]:
                raise HubError(f"an index {alias!r} is known already ({state['indexes'][alias]['url']}): name this one with --as")
            state["indexes"][alias] = record
            self._write(state)
        return alias

    def forget(self, name: str) -> str:
        """Forget an index, or an owner's key, so that the next one seen is trusted. Returns which it was. Raises HubError."""
        with self._locked():
            state = self.pulled.state()
            for what in ("indexes", "keys"):
                if name in state[what]:
                    del state[what][name]
                    self._write(state)
                    return "index" if what == "indexes" else "owner"
        raise HubError(f"no index and no owner {name!r} is known: steer hub list names them")

    def update(self, name: str | None = None) -> list[str]:
        """Fetch the indexes anew, or one of them; returns the names of those that have changed. Raises HubError at the first
        that is refused; those before it are kept."""
        changed = []
        with self._locked():
            state = self.pulled.state()
            if name is not None and name not in state["indexes"]:
                raise HubError(f"no index {name!r} is known: steer hub list names them")
            if not state["indexes"]:
                raise no_index()
            for alias in sorted(state["indexes"]) if name is None else [name]:
                record = state["indexes"][alias]
                fetched = self._fetched_index(open_source(record["url"], self.root / "git"), record, None)
                if fetched != record:
                    if fetched["sha256"] != record["sha256"]:
                        changed.append(alias)
                    state["indexes"][alias] = fetched
                    self._write(state)
        return changed

    def _fetched_index(self, source: Source, record: dict[str, Any] | None, key: str | None) -> dict[str, Any]:
        """Fetch an index, check it against what is known of it, and make its table. Raises HubError."""
        self._say(f"fetching the index {source.url}")
        source.refresh()
        incoming = self._incoming()
        path, signature = incoming / "index.json", incoming / "index.minisig"
        try:
            source.fetch(INDEX, path, most=indexes.MAX_INDEX_BYTES)
            sha256 = file_sha256(path)
            table = self._table(sha256)
            what = f"the index {source.url}"
            index = indexes.read_index(path, what)
            with contextlib.closing(index):
                header = index.header
                pinned = key or (record["key"] if record else header["key"])
                if not follows(pinned, header["key"], header["rotations"]):
                    way_out = "ask its keeper, and if it is meant, forget the index and add it anew"
                    raise HubError(f"{what} has the key {header['key']}, not {pinned}: {way_out}")
                source.fetch(file_name(sha256, "minisig"), signature, most=MAX_SIGNATURE_BYTES)
                verify(signature.read_bytes(), blake2b(path), PublicKey.parse(header["key"]), what)
                if record is not None:
                    check_newer(record, header, sha256)
                check_fresh(source.url, header["expires"])
                if not table.is_file():
                    table.parent.mkdir(parents=True, exist_ok=True)
                    indexes.build_table(index, table, self._table(record["sha256"]) if record else None)
        except OSError as error:
            raise HubError(f"cannot keep the index {source.url}: {error.strerror or error}") from None
        finally:
            for left in (path, signature):
                left.unlink(missing_ok=True)
        fields = {field: header[field] for field in ("key", "serial", "updated", "expires", "count")}
        return {"url": source.url, "index": header["name"], "sha256": sha256, "revision": source.revision, **fields}

    # ---- what is on offer ----

    def search(
        self, words: list[str], *, identity: ModelIdentity | None = None, kind: str | None = None, limit: int = 50
    ) -> tuple[list[Offer], int]:
        """The newest versions that hold all the words, what fits the model first; and how many there are. Raises HubError."""
        known = self.indexes()
        if not known:
            raise no_index()
        key = None if identity is None else identity.key
        offers, total = [], 0
        for alias, record in sorted(known.items()):
            rows, count = indexes.search(self._table(record["sha256"]), words, model=key, kind=kind, limit=limit)
            offers += [Offer(alias, record["url"], row, row.entry()) for row in rows]
            total += count
        if len(known) > 1 and key is not None:
            offers.sort(key=lambda offer: (offer.row.model != key, offer.row.model != ""))
        return offers[:limit], total

    def find(self, reference: str, *, identity: ModelIdentity | None = None, index: str | None = None) -> Offer:
        """The offer meant by ``owner/name``, ``owner/name@version`` or ``owner/name@sha256`` (eight digits or more of its
        file's or card's), for a model. Raises HubError: there is none, or more than one that differ."""
        name, at = parse_reference(reference)
        known = self.indexes()
        if not known:
            raise no_index()
        if index is not None and index not in known:
            raise HubError(f"no index {index!r} is known: steer hub list names them")
        offers: list[Offer] = []
        for alias, record in sorted(known.items()):
            if index in (None, alias):
                rows = indexes.named(self._table(record["sha256"]), name)
                offers += [Offer(alias, record["url"], row, row.entry()) for row in rows]
        if not offers:
            raise HubError(
                f"no index has {name!r}: look for it with: steer hub search, or fetch the indexes anew with: steer hub update"
            )
        meant = [offer for offer in offers if at is None or _is_at(offer.entry, at)]
        if not meant:
            there = ", ".join(dict.fromkeys(offer.entry["version"] for offer in offers))
            raise HubError(f"{name} has no version {at}: there are {there}")
        meant = _for_model(name, meant, identity)
        newest = max(version_key(offer.entry["version"]) for offer in meant)
        meant = [offer for offer in meant if version_key(offer.entry["version"]) == newest]
        if len({offer.entry["card"]["sha256"] for offer in meant}) > 1:
            where = ", ".join(offer.index for offer in meant)
            raise HubError(f"{name} differs between the indexes {where}: say which with --index")
        return meant[0]

    def card(self, offer: Offer) -> dict[str, Any]:
        """The card of an offer, from what was pulled or fetched for this. Raises HubError."""
        for item in self.pulled.items():
            if item.files["card"].sha256 == offer.entry["card"]["sha256"]:
                return read_card(self.pulled.checked(item.files["card"], item.name), offer.label)
        with self._locked():
            return self._fetched_card(open_source(offer.url, self.root / "git"), offer)[0]

    # ---- pulling ----

    def pull(
        self,
        reference: str,
        *,
        identity: ModelIdentity | None = None,
        index: str | None = None,
        check: Check | None = None,
        progress: Progress | None = None,
    ) -> Item:
        """Fetch, check and keep what a reference means; with a version or hash in it, it is pinned. Returns what is kept.

        Raises HubError, and nothing is kept, for all that does not hold: hash, signature, key, size, model, content.
        """
        with self._locked():
            offer = self.find(reference, identity=identity, index=index)
            return self._pull(offer, pinned="@" in reference, check=check, progress=progress)

    def _pull(self, offer: Offer, *, pinned: bool, check: Check | None = None, progress: Progress | None = None) -> Item:
        state = self.pulled.state()
        record = state["indexes"][offer.index]
        entry, what = offer.entry, offer.label
        header = indexes.head_of(self._table(record["sha256"]))
        check_fresh(offer.url, header["expires"])
        check_owner(state, entry, header["rotations"])
        source = open_source(offer.url, self.root / "git")
        source.revision = record["revision"]
        card, card_path, signature = self._fetched_card(source, offer)
        refs = files_of(entry, what)
        files = {role: self._fetched(source, ref, what, progress) for role, ref in refs.items()}
        try:
            check_contents(card, files)
        except HubError:
            for path in files.values():
                path.unlink(missing_ok=True)
            raise
        if check is not None:
            check(card, files)
        card_ref = Ref.from_dict(entry["card"], MAX_CARD_BYTES)
        item = Item(
            entry["name"],
            entry["version"],
            entry["kind"],
            model_of(entry),
            entry["key"],
            offer.url,
            pinned,
            {"card": card_ref, **refs},
        )
        try:
            os.replace(card_path, self.pulled.path(card_ref))
            os.replace(signature, self.pulled.path(card_ref).with_suffix(".minisig"))
            for role, ref in refs.items():
                os.replace(files[role], self.pulled.path(ref))
        except OSError as error:
            raise HubError(f"cannot keep {what}: {error.strerror or error}") from None
        owner = entry["name"].split("/")[0]
        since = state["keys"].get(owner, {}).get("since") or time_text(now())
        state["keys"][owner] = {"key": entry["key"], "since": since, "index": offer.url}
        state["items"] = [other for other in state["items"] if Item.from_dict(other).place != item.place] + [item.to_dict()]
        self._write(state)
        return item

    def _fetched_card(self, source: Source, offer: Offer) -> tuple[dict[str, Any], Path, Path]:
        """The card and its signature, checked against each other and against the entry. Raises HubError."""
        what = f"the card of {offer.label}"
        ref = Ref.from_dict(offer.entry["card"], MAX_CARD_BYTES)
        path = self._fetched(source, ref, what, None)
        signature, kept = self._incoming() / f"{ref.sha256}.minisig", self.pulled.path(ref).with_suffix(".minisig")
        key, digest = PublicKey.parse(offer.entry["key"]), blake2b(path)
        try:
            signature.write_bytes(kept.read_bytes())
            verify(signature.read_bytes(), digest, key, what)
        except (OSError, HubError):  # not pulled yet, or signed anew since
            source.fetch(file_name(ref.sha256, "minisig"), signature, most=MAX_SIGNATURE_BYTES)
            verify(signature.read_bytes(), digest, key, what)
        card = read_card(path, what)
        if entry_of(card, ref, key) != offer.entry:
            raise HubError(f"the index {offer.url} says something else of {offer.label} than its signed card")
        return card, path, signature

    def _fetched(self, source: Source, ref: Ref, what: str, progress: Progress | None) -> Path:
        """A file whose size and hash are the ones named; what came of it before an interruption is used. Raises HubError."""
        path = self._incoming() / f"{ref.sha256}.{ref.type}"
        kept = self.pulled.path(ref)
        try:
            if kept.is_file() and not path.is_file():
                with contextlib.suppress(OSError), kept.open("rb") as file:
                    path.write_bytes(file.read(ref.size + 1))
            for attempt in ("resumed", "anew"):
                if not path.is_file() or path.stat().st_size != ref.size or file_sha256(path) != ref.sha256:
                    if attempt == "anew":
                        path.unlink(missing_ok=True)
                    source.fetch(
                        file_name(ref.sha256, ref.type), path, most=ref.size, resume=attempt == "resumed", progress=progress
                    )
                if path.stat().st_size == ref.size and file_sha256(path) == ref.sha256:
                    return path
            path.unlink(missing_ok=True)
        except OSError as error:
            raise HubError(f"cannot keep a file of {what}: {error.strerror or error}") from None
        raise HubError(f"a file of {what} is not what its hash says: it was altered or damaged on the way")

    # ---- what was pulled ----

    def remove(self, name: str, *, identity: ModelIdentity | None = None) -> list[Item]:
        """Remove what was pulled under a name, for one model or for all; returns it. The owner's key stays trusted."""
        with self._locked():
            state = self.pulled.state()
            gone = [
                item
                for item in self.pulled.items(state)
                if item.name == name and (identity is None or item.model is None or item.model.key == identity.key)
            ]
            if not gone:
                raise HubError(f"{name!r} was not pulled: steer hub list names what was")
            places = {item.place for item in gone}
            state["items"] = [data for data in state["items"] if Item.from_dict(data).place not in places]
            self._write(state)
        return gone

    def outdated(self) -> list[tuple[Item, Offer]]:
        """What was pulled without a pin and has a newer version in an index."""
        found = []
        for item in self.pulled.items():
            if not item.pinned:
                with contextlib.suppress(HubError):
                    offer = self.find(item.name, identity=item.model)
                    if version_key(offer.entry["version"]) > version_key(item.version):
                        found.append((item, offer))
        return found

    def verify(self, item: Item) -> dict[str, Any]:
        """Hash all files of an item again, check its signature against the pinned key, and its content against its card.

        Returns the card. Raises VectorError or HubError.
        """
        files = {role: self.pulled.checked(ref, item.name) for role, ref in item.files.items()}
        card_path = files.pop("card")
        try:
            signature = card_path.with_suffix(".minisig").read_bytes()[: MAX_SIGNATURE_BYTES + 1]
        except OSError:
            raise HubError(f"the signature of {item.label} is missing: pull it again with: steer hub pull {item.name}") from None
        verify(signature, blake2b(card_path), PublicKey.parse(item.key), f"the card of {item.label}")
        card = read_card(card_path, f"the card of {item.label}")
        if (card["name"], card["version"]) != (item.name, item.version) or files_of(card, item.label) != {
            role: ref for role, ref in item.files.items() if role != "card"
        }:
            raise HubError(
                f"the record of {item.label} is not what its card says: pull it again with: steer hub pull {item.name}"
            )
        check_contents(card, files)
        return card

    # ---- the folder ----

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.pulled.locked(lambda: self._say("another steer hub is at work here; waiting")):
            yield

    def _incoming(self) -> Path:
        folder = self.root / "incoming"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _table(self, sha256: str) -> Path:
        return self.root / "index" / f"{sha256}.db"

    def _write(self, state: dict[str, Any]) -> None:
        self.pulled.write(state)
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._incoming()):
                os.unlink(entry.path)
        kept = {self._table(record["sha256"]).name for record in state["indexes"].values()}
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.root / "index"):
                if entry.name not in kept:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


def parse_reference(reference: str) -> tuple[str, str | None]:
    """``owner/name`` and what follows its ``@``, if anything. Raises SpecError."""
    match = _REFERENCE.fullmatch(reference)
    if match is None or not is_hub_name(match["name"]):
        raise SpecError(
            f"{reference!r:.120} is not the name of something on a hub: write owner/name, owner/name@version or owner/name@sha256"
        )
    return match["name"], match["at"]


def no_index() -> HubError:
    """What is said where no index is known."""
    return HubError(f"no index is known yet: add one with: steer hub add FOLDER-OR-URL (the project's own: {DEFAULT_INDEX})")


def _is_at(entry: dict[str, Any], at: str) -> bool:
    if len(at) >= 8 and "." not in at:
        return any(ref["sha256"].startswith(at) for ref in (entry["card"], *entry["files"].values()))
    return bool(entry["version"] == at)


def _for_model(name: str, offers: list[Offer], identity: ModelIdentity | None) -> list[Offer]:
    """Those that fit the model; without one, all, if they are for one model. Raises HubError."""
    models = {offer.row.model: model_of(offer.entry) for offer in offers}
    labels = ", ".join(model.label for model in models.values() if model is not None)
    if identity is None:
        if len(models) > 1:
            raise HubError(f"{name} is there for several models ({labels}): name yours with --model")
        return offers
    fitting = [offer for offer in offers if offer.row.model in ("", identity.key)]
    if not fitting:
        raise HubError(f"{name} is not for this model ({identity.label}): it is for {labels}")
    return fitting
