"""Hubs that lie: each attack has its sentence, and nothing is installed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.atomic import file_sha256
from steer_plugins.errors import HubError
from steer_plugins.hub import index as indexes
from steer_plugins.hub.hub import Hub
from steer_plugins.hub.publish import Folder, own_key
from steer_plugins.hub.schema import canonical
from steer_plugins.hub.signing import SecretKey, blake2b

from .hub_world import MODEL, OTHER, World, make


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.publish()
    return world


def state_of(hub: Hub) -> Any:
    """All that counts as installed."""
    files = hub.root / "files"
    return hub.pulled.state(), sorted(os.listdir(files)) if files.is_dir() else []


def refused(hub: Hub, sentence: str, attempt: Callable[[], Any]) -> None:
    before = state_of(hub)
    with pytest.raises(HubError, match=sentence) as caught:
        attempt()
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")
    assert state_of(hub) == before
    assert hub.library.list() == []


def rewrite(world: World, change: Callable[[dict[str, Any], list[dict[str, Any]]], Any], key: SecretKey | None = None) -> None:
    """Whoever holds ``key`` (the keeper's) says something else in the index, and signs it."""
    path = world.there / "index.json"
    index = indexes.read_index(path, "it")
    header, entries = index.header, list(index.entries)
    change(header, entries)
    lines = ",\n".join(canonical(entry) for entry in entries)
    path.write_text(canonical(header)[:-1] + ',"entries":[\n' + lines + "\n]}\n")
    signature = (key or world.key).sign(blake2b(path), "it")
    (world.there / "files" / f"{file_sha256(path)}.minisig").write_text(signature)


def the_file(world: World, type: str) -> Path:
    """The vector, the card, or the card's signature."""
    card = next(path for path in (world.there / "files").glob("*.json"))
    if type == "json":
        return card
    return card.with_suffix(".minisig") if type == "minisig" else next((world.there / "files").glob("*.safetensors"))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("type", ["safetensors", "json"])
@pytest.mark.parametrize("at", [0, 100, -1])
def test_an_altered_byte(world: World, type: str, at: int) -> None:
    bob = world.reader()
    flip(the_file(world, type), at)
    refused(bob, "not what its hash says", lambda: bob.pull("ann/mood"))
    assert not any(path.suffix == ".safetensors" for path in (bob.root / "incoming").iterdir()) or type == "json"


def test_an_altered_index(world: World) -> None:
    bob, path = world.home(), world.there / "index.json"
    signature = world.there / "files" / f"{file_sha256(path)}.minisig"
    path.write_text(path.read_text().replace("Happy or sad.", "Happy or mad."))
    refused(bob, "has no file files/", lambda: bob.add(str(world.there)))
    shutil.copy(signature, world.there / "files" / f"{file_sha256(path)}.minisig")
    refused(bob, "not what was signed", lambda: bob.add(str(world.there)))


@pytest.mark.parametrize("text", ["", "nonsense\n", "a\nb\ntrusted comment: c\nd\n", "x" * 3000])
def test_a_signature_that_is_none(world: World, text: str) -> None:
    bob = world.reader()
    the_file(world, "minisig").write_text(text)
    refused(bob, "signature of the card of ann/mood@1 is none of minisign's", lambda: bob.pull("ann/mood"))


def test_a_trusted_comment_is_signed_too(world: World) -> None:
    bob = world.reader()
    path = the_file(world, "minisig")
    path.write_text(path.read_text().replace("trusted comment: ann/mood@1", "trusted comment: ann/mood@2"))
    refused(bob, "not what was signed", lambda: bob.pull("ann/mood"))


def test_an_altered_card(world: World) -> None:
    """Also where the keeper of the index goes along with it: the card is the publisher's."""
    other = SecretKey.generate()
    bob = world.reader()
    card = the_file(world, "json")
    text = card.read_text().replace("Happy or sad.", "Happy or mad.")
    card.write_text(text)
    sha256 = file_sha256(card)
    shutil.copy(card.with_suffix(".minisig"), card.with_name(f"{sha256}.minisig"))
    card.rename(card.with_name(f"{sha256}.json"))

    def change(header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        header["serial"] += 1
        entries[0]["card"]["sha256"], entries[0]["description"] = sha256, "Happy or mad."

    rewrite(world, change)
    bob.update()
    refused(bob, "card of ann/mood@1 is not what was signed", lambda: bob.pull("ann/mood"))
    (world.there / "files" / f"{sha256}.minisig").write_text(other.sign(blake2b(card.with_name(f"{sha256}.json")), "x"))
    refused(bob, "signed with another key", lambda: bob.pull("ann/mood"))


@pytest.mark.parametrize(
    "field, value", [("name", "ann/calm"), ("version", "7"), ("licence", "MIT"), ("scope", "prompt"), ("description", "Better.")]
)
def test_a_swapped_entry(world: World, field: str, value: str) -> None:
    def change(header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        entries[0][field] = value
        header["serial"] += 1

    rewrite(world, change)
    bob = world.reader()
    name = value if field == "name" else "ann/mood"
    refused(bob, "says something else of .* than its signed card", lambda: bob.pull(name))


def test_an_older_index(world: World) -> None:
    old = world.root / "old"
    shutil.copytree(world.there, old)
    world.publish(make(seed=1))
    bob = world.reader()
    shutil.copy(old / "index.json", world.there / "index.json")
    refused(bob, r"older \(serial 1\) than the one seen before \(2\): it was rolled back", bob.update)


def test_another_index_of_the_same_serial(world: World) -> None:
    bob = world.reader()
    rewrite(world, lambda header, entries: header.update(updated="2026-01-01T00:00:00Z"))
    refused(bob, "changed without a new serial", bob.update)


def test_an_expired_index(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish(make(seed=1), days=10)
    bob = world.reader()
    from steer_plugins.hub import trust

    monkeypatch.setattr(trust, "now", lambda: datetime(2100, 1, 1, tzinfo=timezone.utc))
    refused(bob, "expired on 20.*steer hub update", lambda: bob.pull("ann/mood"))
    refused(bob, "expired on 20", bob.update)
    eve = world.home("eve")
    refused(eve, "expired on 20", lambda: eve.add(str(world.there)))
    world.publish(make(seed=2), days=0)
    bob.update()
    assert bob.pull("ann/mood").version == "3"


def test_another_keeper(world: World) -> None:
    bob, other = world.reader(), SecretKey.generate()
    rewrite(world, lambda header, entries: header.update(serial=2, key=str(other.public)), other)
    refused(bob, "has the key .*, not RW", bob.update)
    eve = world.home("eve")
    refused(eve, "has the key .*, not RW", lambda: eve.add(str(world.there), key=str(world.key.public)))
    refused(eve, "is not a public key", lambda: eve.add(str(world.there), key="RWnonsense"))


def test_another_owner(world: World, tmp_path: Path) -> None:
    """Bob knows Ann; somebody else publishes under her name elsewhere."""
    bob = world.reader()
    bob.pull("ann/mood")
    bob.remove("ann/mood")
    mallory = World(tmp_path / "mallory")
    mallory.publish(make(seed=5), version="9")
    bob.add(str(mallory.there), name="mallory")
    refused(bob, "'ann' was known by RW.* since 20.*steer hub forget ann", lambda: bob.pull("ann/mood"))
    assert bob.pull("ann/mood", index="there").version == "1"
    assert bob.forget("ann") == "owner"
    assert bob.pull("ann/mood").version == "9"


def test_publishing_with_another_key(world: World) -> None:
    before = (world.there / "index.json").read_bytes()
    with pytest.raises(HubError, match="'ann' publishes there with another key"):
        world.publish(make(seed=1), key=SecretKey.generate())
    assert (world.there / "index.json").read_bytes() == before
    # another owner may, and waits for the keeper's signature
    bob, cleo = world.reader(), SecretKey.generate()
    world.publish(make(seed=1), name="cleo/mood", key=cleo)
    refused(bob, "has no file files/", bob.update)
    Folder(world.there, world.key).sign()
    bob.update()
    assert bob.pull("cleo/mood").key == str(cleo.public)


def test_keys_are_followed(world: World) -> None:
    bob = world.reader()
    bob.pull("ann/mood")
    new = SecretKey.generate()
    assert Folder(world.there, world.key).rotate(new) == 1
    assert bob.update() == ["there"]
    item = bob.pull("ann/mood")
    assert item.key == str(new.public) and bob.verify(item)
    assert bob.pulled.state()["keys"]["ann"]["key"] == bob.indexes()["there"]["key"] == str(new.public)
    bob.remove("ann/mood")
    # the old key counts no more, even if somebody signs a way back
    header = indexes.read_index(world.there / "index.json", "it")
    header.close()
    rewrite(world, lambda header, entries: header.update(serial=9, key=str(world.key.public)))
    refused(bob, "has the key", bob.update)
    with pytest.raises(HubError, match="another key"):
        world.publish(make(seed=1))


@pytest.mark.parametrize("name", ["../ann/mood", "ann/../mood", "/etc/passwd", "ann\\mood", "ann/mood/x", "ann/mood.json", "", 3])
def test_path_tricks_in_names(world: World, name: Any) -> None:
    rewrite(world, lambda header, entries: entries[0].update(name=name))
    bob = world.home()
    refused(bob, "entry 1: the field 'name' may not be", lambda: bob.add(str(world.there)))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda e: e["files"]["vector"].update(size=10_000_000_000), "claims 10000000000 bytes: at most 1073741824"),
        (lambda e: e["card"].update(size=10_000_000_000), "claims 10000000000 bytes: at most 131072"),
        (lambda e: e["files"]["vector"].update(size=0), "claims 0 bytes"),
        (lambda e: e["files"]["vector"].update(size=True), "claims True bytes"),
        (lambda e: e["files"]["vector"].update(sha256="../../../etc/passwd"), "sha256 is not 64"),
        (lambda e: e["files"]["vector"].update(sha256="A" * 64), "sha256 is not 64"),
        (lambda e: e["files"]["vector"].update(type="pickle"), "type 'pickle': only"),
        (lambda e: e["files"]["vector"].update(type="../x"), "type '../x': only"),
        (lambda e: e["files"]["vector"].update(type="json"), "the type 'json', not 'safetensors'"),
        (lambda e: e["files"]["vector"].update(path="/etc/passwd"), "just sha256, size and type"),
        (lambda e: e["files"].update(code=e["files"]["vector"]), "has the files vector, trait and no others"),
        (lambda e: e.update(files={}), "has the files vector, trait"),
        (lambda e: e.update(model=None), "names no model"),
        (lambda e: e["model"].update(n_embd=-1), "field 'model' may not be"),
        (lambda e: e.update(description="\x1b[31mred"), "field 'description' may not be"),
        (lambda e: e.update(description="x" * 2000), "field 'description' may not be"),
        (lambda e: e.update(more=1), "unknown field 'more'"),
        (lambda e: e.pop("licence"), "lacks the field 'licence'"),
        (lambda e: e.update(key="RWx"), "field 'key' may not be"),
        (lambda e: e.update(benchmark={"x": "high"}), "field 'benchmark' may not be"),
        (lambda e: e["calibration"]["curve"][0].update(score=10**400), "field 'calibration' may not be"),
        (lambda e: e.update(tags=["x" * 40000]), "a line of more than 32768"),
    ],
)
def test_entries_that_lie(world: World, change: Callable[[dict[str, Any]], Any], sentence: str) -> None:
    rewrite(world, lambda header, entries: change(entries[0]))
    bob = world.home()
    refused(bob, sentence, lambda: bob.add(str(world.there)))
    assert not list((bob.root / "index").glob("*")) if (bob.root / "index").exists() else True


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (lambda text: "", "is not an index of a hub"),
        (lambda text: "{}", "is not an index of a hub"),
        (lambda text: text[:-30], "cut off|more or fewer|no JSON"),
        (lambda text: text + "{}\n", "more or fewer"),
        (lambda text: text.replace('"count":1', '"count":2'), "index may be cut off"),
        (lambda text: text.replace("steer-hub-v1", "steer-hub-v9"), "this version reads steer-hub-v1"),
        (lambda text: text.replace('"serial":1', '"serial":-1'), "field 'serial' may not be"),
        (lambda text: text.replace('"serial":1', '"serial":1,"serial":2'), "not a hub's JSON"),
        (lambda text: text.replace('"rotations":[]', '"rotations":' + "[" * 100_000), "not a hub's JSON"),
        (lambda text: text.replace('"version":"1"', '"version":NaN'), "not a hub's JSON"),
    ],
)
def test_indexes_that_are_none(world: World, edit: Callable[[str], str], sentence: str) -> None:
    path = world.there / "index.json"
    path.write_text(edit(path.read_text()))
    (world.there / "files" / f"{file_sha256(path)}.minisig").write_text(world.key.sign(blake2b(path), "it"))
    bob = world.home()
    refused(bob, sentence, lambda: bob.add(str(world.there)))


def test_the_same_entry_twice(world: World) -> None:
    def change(header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        entries.append(entries[0])
        header["count"] = 2

    rewrite(world, change)
    bob = world.home()
    refused(bob, "out of order or there twice", lambda: bob.add(str(world.there)))


def test_a_vector_of_another_model(world: World) -> None:
    bob = world.reader()
    refused(bob, "not for this model .*Tiny Qwen.*: it is for .*Tiny Llama", lambda: bob.pull("ann/mood", identity=OTHER))


def test_a_file_of_another_model_under_a_card_of_this_one(world: World) -> None:
    """The publisher signs a card that says what the file does not."""
    from steer_plugins.hub.publish import draft
    from steer_plugins.store.vectorfile import write_vector

    path = world.root / "v.safetensors"
    write_vector(make(OTHER), path)
    card = {**draft("ann/bad", {"vector": path}, licence="MIT"), "model": MODEL.to_dict()}
    with pytest.raises(HubError, match="its card says model .*, its file"):
        Folder(world.there, world.key).publish(card, {"vector": path})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_files_that_are_none(world: World, kind: str) -> None:
    bob, path = world.reader(), the_file(world, "safetensors")
    kept = path.rename(world.root / "kept")
    if kind == "link":
        path.symlink_to(kept)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    refused(bob, "cannot read|is not a file", lambda: bob.pull("ann/mood"))


def test_larger_than_it_claims(world: World) -> None:
    bob, path = world.reader(), the_file(world, "safetensors")
    with path.open("ab") as file:
        file.write(b"\0" * 100)
    refused(bob, "bytes: at most .* are taken", lambda: bob.pull("ann/mood"))


def test_without_cryptography(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from steer_plugins.errors import SteerError

    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    bob = world.home()
    with pytest.raises(SteerError, match=r"need the package cryptography: install it with: pip install 'steer-plugins\[hub\]'"):
        bob.add(str(world.there))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        SteerError, match=r"needs the package huggingface_hub: install it with: pip install 'steer-plugins\[hub\]'"
    ):
        bob.add("hf://ann/vectors")


def test_keys_on_disk(tmp_path: Path) -> None:
    key = own_key(tmp_path, make=True)
    path = tmp_path / "key"
    assert str(SecretKey.read(path).public) == str(key.public)
    if os.name == "posix":
        assert path.stat().st_mode & 0o077 == 0
    path.write_text(path.read_text()[:-20])
    with pytest.raises(HubError, match="not a secret key"):
        own_key(tmp_path)
    path.write_text(json.dumps({}))
    with pytest.raises(HubError, match="not a secret key"):
        own_key(tmp_path)
