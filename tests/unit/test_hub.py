"""Publishing into a folder, and searching, pulling, checking and removing from another home."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from steer_plugins.cli.main import cli
from steer_plugins.errors import HubError, SpecError
from steer_plugins.hub.hub import Hub
from steer_plugins.hub.lock import pull_locked, write_lock
from steer_plugins.hub.publish import Folder, draft
from steer_plugins.store.library import Library

from .hub_world import MODEL, OTHER, World, make


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_from_one_home_to_another(world: World) -> None:
    entry = world.publish()
    assert (entry["name"], entry["version"], entry["trait"]["positive"]) == ("ann/mood", "1", "cheerful")
    assert entry["calibration"]["curve"][2] == {"strength": 1.0, "score": 0.75, "score_se": 0.1, "perplexity": 1.5}
    assert [point["perplexity"] for point in entry["calibration"]["curve"]] == [None, 1.0, 1.5]
    bob = world.reader()
    offers, total = bob.search(["CHEERFUL"], identity=MODEL)
    assert total == 1 and offers[0].entry == entry
    assert bob.search(["no such word"])[1] == 0
    assert bob.card(offers[0])["samples"] == [{"strength": 1.0, "text": "What a day!"}]
    assert bob.library.list() == []
    item = bob.pull("ann/mood", identity=MODEL)
    assert bob.library.resolve("ann/mood", MODEL).content_hash == make().content_hash
    assert bob.verify(item)["name"] == "ann/mood"
    # offline from here on: the hub is gone
    shutil.rmtree(world.there)
    again = Hub(Library(bob.library.root))
    assert again.library.get("ann/mood", MODEL).calibration == make().calibration
    assert again.search(["mood"])[1] == 1 and again.verify(again.pulled.items()[0])
    again.remove("ann/mood")
    assert again.library.list() == [] and not list((again.root / "files").iterdir())
    with pytest.raises(HubError, match="was not pulled"):
        again.remove("ann/mood")


def test_library_pull(world: World) -> None:
    world.publish()
    bob = world.reader()
    assert Library(bob.library.root).pull("ann/mood").version == "1"
    assert bob.library.get("ann/mood", MODEL).name == "mood"


def test_a_folder_is_the_same_bytes_but_for_time_and_signature(world: World) -> None:
    world.publish()
    names = sorted(path.relative_to(world.there).as_posix() for path in world.there.rglob("*") if path.is_file())
    assert names[-1] == "index.json" and all(name.startswith("files/") for name in names[:-1] if name != ".lock")
    lines = (world.there / "index.json").read_text().splitlines()
    assert len(lines) == 3 and json.loads("".join(lines))["entries"][0]["name"] == "ann/mood"
    world.publish(make(seed=1))
    after = (world.there / "index.json").read_text().splitlines()
    assert after[1] == lines[1] + "," and len(after) == 4


def test_signing_removes_what_nothing_names(world: World) -> None:
    world.publish()
    world.publish(make(seed=1))
    files = world.there / "files"
    kept = {path.name for path in files.iterdir()}
    (files / ("0" * 64 + ".safetensors")).write_bytes(b"of publishing that was killed")
    (files / "notes.txt").write_text("somebody's own")
    Folder(world.there, world.key).sign()
    left = {path.name for path in files.iterdir()}
    gone, new = kept - left, left - kept
    assert len(gone) == 2 and all(name.endswith(".minisig") for name in gone)  # of the two earlier indexes
    assert len(new) == 2 and "notes.txt" in new
    bob = world.reader()
    assert bob.pull("ann/mood@1") and bob.pull("ann/mood@2")


def test_versions(world: World) -> None:
    world.publish()
    with pytest.raises(HubError, match="there already.*no version is written over"):
        world.publish(make(seed=1), version="1")
    before = (world.there / "index.json").read_bytes()
    with pytest.raises(HubError, match="there already"):
        world.publish(make(seed=1), version="1")
    assert (world.there / "index.json").read_bytes() == before
    assert world.publish(make(seed=1))["version"] == "2"
    assert world.publish(make(seed=2), version="10.1")["version"] == "10.1"
    bob = world.reader()
    assert bob.pull("ann/mood").version == "10.1"
    assert bob.search([])[1] == 1  # the newest only
    item = bob.pull("ann/mood@2")
    assert item.pinned and bob.library.get("ann/mood", MODEL).content_hash == make(seed=1).content_hash
    sha256 = item.files["vector"].sha256
    assert bob.pull(f"ann/mood@{sha256}").version == bob.pull(f"ann/mood@{sha256[:8]}").version == "2"
    with pytest.raises(HubError, match="no version 3: there are 1, 2, 10.1"):
        bob.pull("ann/mood@3")
    for bad in ("mood", "ann/mood@", "ann/mood@latest", "../mood", "ann/mood@2@2", "ann/mood.gguf"):
        with pytest.raises(SpecError, match="not the name of something on a hub"):
            bob.pull(bad)


def test_updates(world: World) -> None:
    world.publish()
    bob = world.reader()
    bob.pull("ann/mood")
    assert bob.update() == [] and bob.outdated() == []
    world.publish(make(seed=1))
    assert bob.outdated() == []
    assert bob.update() == ["there"]
    assert [(item.version, offer.entry["version"]) for item, offer in bob.outdated()] == [("1", "2")]
    assert bob.pull("ann/mood").version == "2" and len(bob.pulled.items()) == 1
    bob.pull("ann/mood@1")
    assert bob.outdated() == []


def test_an_update_looks_at_what_has_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer_plugins.hub import index as indexes

    for name in ("ann/mood", "ann/terse", "ann/zeal"):
        world.publish(name=name)
    bob = world.reader()
    for name in ("ann/calm", "ann/mood", "ann/zest"):  # at the beginning, within, at the end
        world.publish(make(seed=1), name=name)
    looked: list[str] = []
    check = indexes.check_entry
    monkeypatch.setattr(indexes, "check_entry", lambda data, what: looked.append(data["name"]) or check(data, what))
    bob.update()
    assert looked == ["ann/calm", "ann/mood", "ann/zest"]
    found = {(offer.entry["name"], offer.entry["version"]) for offer in bob.search([])[0]}
    assert found == {("ann/calm", "1"), ("ann/mood", "2"), ("ann/terse", "1"), ("ann/zeal", "1"), ("ann/zest", "1")}
    # just what somebody reads who sees it for the first time
    eve = world.home("eve")
    eve.add(str(world.there))
    assert [offer.row for offer in eve.search([])[0]] == [offer.row for offer in bob.search([])[0]]


def test_models_of_one_name(world: World) -> None:
    world.publish()
    world.publish(make(OTHER))
    bob = world.reader()
    assert [offer.row.model for offer in bob.search([], identity=OTHER)[0]] == [OTHER.key, MODEL.key]
    assert [offer.row.model for offer in bob.search([], identity=MODEL)[0]] == [MODEL.key, OTHER.key]
    with pytest.raises(HubError, match="several models .*--model"):
        bob.pull("ann/mood")
    bob.pull("ann/mood", identity=MODEL)
    bob.pull("ann/mood", identity=OTHER)
    assert bob.library.get("ann/mood", OTHER).identity == OTHER and bob.library.get("ann/mood", MODEL).identity == MODEL
    bob.remove("ann/mood", identity=OTHER)
    assert [entry.identity for entry in bob.library.list()] == [MODEL]


def test_two_indexes(world: World, tmp_path: Path) -> None:
    world.publish()
    bob = world.reader()
    with pytest.raises(HubError, match="known as 'there' already"):
        bob.add(str(world.there))
    mirror = tmp_path / "mirror"
    shutil.copytree(world.there, mirror)
    with pytest.raises(HubError, match="'there' is known already.*--as"):
        bob.add(str(mirror))
    assert bob.add(str(mirror), name="mirror") == "mirror"
    assert bob.find("ann/mood").entry["version"] == "1"  # the same card in both
    world.there = mirror
    world.publish(make(seed=1), name="ann/calm")
    bob.update("mirror")
    assert bob.find("ann/calm").index == "mirror"
    assert bob.forget("mirror") == "index"
    with pytest.raises(HubError, match="no index has 'ann/calm'"):
        bob.pull("ann/calm")


def test_other_kinds(world: World, tmp_path: Path) -> None:
    from steer_plugins.hub.contents import preset_data, preset_terms
    from steer_plugins.training.traits import load_trait

    trait, preset = tmp_path / "trait.json", tmp_path / "preset.json"
    trait.write_text(json.dumps(load_trait("mood").to_dict()))
    preset.write_text(json.dumps(preset_data("ann/mood:0.5 - terse:0.2")))
    for name, role, path in (("ann/gladness", "trait", trait), ("ann/evening", "preset", preset)):
        card = draft(name, {role: path}, licence="CC0-1.0")
        Folder(world.there, world.key).publish(card, {role: path})
    bob = world.reader()
    bob.pull("ann/gladness")
    item = bob.pull("ann/evening")
    assert [term.vector for term in preset_terms(bob.pulled.checked(item.files["preset"], "it"), "it")] == ["ann/mood", "terse"]
    assert load_trait(bob.pulled.file("ann/gladness", "trait")) == load_trait("mood")
    assert bob.library.list() == []
    preset.write_text(json.dumps({"format": "steer-preset-v1", "terms": [{"vector": "/etc/passwd"}]}))
    card = draft("ann/morning", {"preset": preset}, licence="CC0-1.0")
    with pytest.raises(HubError, match="names the file '/etc/passwd'"):
        Folder(world.there, world.key).publish(card, {"preset": preset})


def test_a_lock_repeats_it(world: World, tmp_path: Path) -> None:
    world.publish()
    world.publish(make(OTHER))
    bob = world.reader()
    bob.pull("ann/mood", identity=OTHER)
    world.publish(make(OTHER, seed=1))
    assert write_lock(bob, tmp_path / "lock") == 1
    eve = world.home("eve")
    assert [item.version for item in pull_locked(eve, tmp_path / "lock")] == ["1"]
    assert eve.library.get("ann/mood", OTHER).content_hash == make().content_hash
    data = json.loads((tmp_path / "lock").read_text())
    data["items"][0]["key"] = str(world.key.generate().public)
    (tmp_path / "lock").write_text(json.dumps(data))
    with pytest.raises(HubError, match="not by the key in"):
        pull_locked(world.home("dan"), tmp_path / "lock")
    for text in ("", "{}", "[]", '{"format": "steer-hub-lock-v1", "indexes": 3, "items": []}'):
        (tmp_path / "lock").write_text(text)
        with pytest.raises(HubError, match="JSON|not a lock file"):
            pull_locked(eve, tmp_path / "lock")


def test_what_cannot_be_published(world: World) -> None:
    with pytest.raises(HubError, match="names no model"):
        world.publish(make(None))
    for name in ("mood", "../x/y", "Ann/mood", "ann/"):
        with pytest.raises(SpecError, match="owner/name"):
            world.publish(name=name)
    for said in (
        {"version": "latest"},
        {"version": "1.2.3.4"},
        {"tags": ["A b"]},
        {"description": "\x1b[2J"},
        {"base_model": "a\nb: c"},
    ):
        with pytest.raises(HubError, match="may not be"):
            world.publish(**said)
    assert not (world.there / "index.json").exists()


def test_the_command_line(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli, ["hub", *arguments], catch_exceptions=True)
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "a"))
    Library().put(make(), MODEL)
    key = run("key").strip()
    assert run("key").strip() == key and key.startswith("RW")
    there = str(tmp_path / "hub")
    out = run(
        "publish", "mood", "--as", "ann/mood", "--to", there, "--licence", "Apache-2.0", "--benchmark", "x=1.5", "--tag", "joy"
    )
    assert "Published ann/mood@1" in out
    run("publish", "mood:0.5", "--kind", "preset", "--as", "ann/evening", "--to", there, "--licence", "CC0-1.0")
    run("publish", "mood", "--kind", "trait", "--as", "ann/trait", "--to", there, "--licence", "CC0-1.0")
    assert "3 entries" in run("sign", there)
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "b"))
    assert key in run("add", there)
    assert "ann/mood" in run("search", "joy")
    card = run("info", "ann/mood")
    assert "sombre (-1) to cheerful (+1)" in card and "benchmark x" in card and "█" in card and "What a day!" in card
    assert "ann/mood:0.8" in run("pull", "ann/mood") and "mood:0.5" in run("pull", "ann/evening")
    run("pull", "ann/trait")
    listed = json.loads(run("list", "--json"))
    assert [item["name"] for item in listed["pulled"]] == ["ann/evening", "ann/mood", "ann/trait"]
    assert run("verify").count("files and signature hold") == 3
    run("lock", "-o", str(tmp_path / "lock"))
    assert "up to date" in run("update")
    assert "Removed ann/mood@1" in run("remove", "ann/mood")
    assert "ann/mood@1" in run("pull", "--locked", str(tmp_path / "lock"))
    run("forget", "hub")
    assert isinstance(CliRunner().invoke(cli, ["hub", "search", "x"]).exception, HubError)


def test_the_site(world: World, tmp_path: Path) -> None:
    from steer_plugins.hub.site import write_site

    world.publish(description="<script>alert(1)</script> & more")
    world.publish(make(OTHER).replace(calibration=None), name="ann/calm", tags=["rest"])
    assert write_site(world.there, tmp_path / "site", "https://example.org/v/?a='b'") == 3
    front = (tmp_path / "site" / "index.html").read_text("utf-8")
    page = (tmp_path / "site" / "ann__mood.html").read_text("utf-8")
    for text in (front, page):
        assert "<script>alert" not in text
        # nothing is loaded from elsewhere
        assert not re.search(r"(?:src|href)=.?(?:https?:)?//|@import|url\(", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in front and "&#x27;b&#x27;" not in front.split("steer hub add")[0]
    assert 'href="ann__calm.html"' in front and "Tiny Qwen" in front
    assert "not calibrated" in front and "Not calibrated" not in page
    assert "Not calibrated: nobody" in (tmp_path / "site" / "ann__calm.html").read_text("utf-8")
    assert "<svg" in page and "steer hub pull ann/mood" in page and "What a day!" in page and "perplexity / plain" in page
    assert "mood 1.5 ± 0.1 score" in front and "mood 1.5 ± 0.1 score from −1 to 1, 20 prompts" in page
