"""kill -9 between any two writes, and two at once: the state before or the state after, and the next call puts it right."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.hub import index as indexes
from steer_plugins.hub.hub import Hub
from steer_plugins.hub.publish import Folder
from steer_plugins.hub.signing import PublicKey, SecretKey, blake2b, verify
from steer_plugins.store.library import Library

from ..unit.hub_world import MODEL, World, make

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
WRITES = ("replace", "unlink", "fsync", "open", "mkdir")
"""What changes a folder, or is about to; open counts reads too, which does no harm."""


def ends(action: Callable[[], Any], left: int) -> bool:
    """Run ``action`` in a child that is killed before its call number ``left`` of those; whether it got to its end."""

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapped

    child = os.fork()
    if child == 0:
        try:
            for name in WRITES:
                setattr(os, name, dying(getattr(os, name)))
            action()
            os._exit(0)
        except BaseException:
            os._exit(7)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "the action failed"
    return status == 0


@posix
def test_a_pull_that_is_killed(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.publish()
    bob = world.reader()
    bob.pull("ann/mood")
    world.publish(make(seed=1))
    bob.update()
    start = tmp_path / "start"
    shutil.copytree(bob.library.root, start)
    wanted = {"1": make().content_hash, "2": make(seed=1).content_hash}
    seen, n = set(), 0
    while True:
        root = tmp_path / f"home{n}"
        shutil.copytree(start, root)
        hub = Hub(Library(root))
        done = ends(lambda hub=hub: hub.pull("ann/mood"), n)  # type: ignore[misc]
        (item,) = hub.pulled.items()
        hub.verify(item)
        assert hub.library.get("ann/mood", MODEL).content_hash == wanted[item.version]
        seen.add(item.version)
        assert hub.pull("ann/mood").version == "2"  # and nothing that was left behind is in the way
        assert not list((hub.root / "incoming").iterdir()) and len(list((hub.root / "files").iterdir())) == 3
        n += 1
        shutil.rmtree(root)
        if done:
            break
    assert seen == {"1", "2"} and n > 8


@posix
def test_an_update_that_is_killed(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.publish()
    start = tmp_path / "start"
    shutil.copytree(world.reader().library.root, start)
    world.publish(make(seed=1))
    seen, n = set(), 0
    while True:
        root = tmp_path / f"home{n}"
        shutil.copytree(start, root)
        hub = Hub(Library(root))
        done = ends(hub.update, n)
        seen.add(hub.find("ann/mood").entry["version"])
        hub.update()
        assert hub.pull("ann/mood").version == "2"
        assert [path.suffix for path in (hub.root / "index").iterdir()] == [".db"]
        n += 1
        shutil.rmtree(root)
        if done:
            break
    assert seen == {"1", "2"}


@posix
def test_publishing_that_is_killed(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.publish()
    start = world.there
    seen, n = set(), 0
    while True:
        world.there = tmp_path / f"there{n}"
        shutil.copytree(start, world.there)
        done = ends(lambda: world.publish(make(seed=1)), n)
        eve = world.home(f"eve{n}")
        eve.add(str(world.there))  # signed and whole at each moment
        seen.add(eve.pull("ann/mood").version)
        n += 1
        if done:
            break
        shutil.rmtree(world.there)
    assert seen == {"1", "2"} and n > 8
    with open(world.there / "index.json", encoding="utf-8") as file:
        assert len(file.readlines()) == 4


@posix
def test_a_rotation_that_is_killed(tmp_path: Path) -> None:
    """The index may name signatures that are newer than it: the rotation is called again, and all is whole."""
    world = World(tmp_path)
    world.publish()
    world.publish(make(seed=1), name="ann/calm")
    start, new = world.there, SecretKey.generate()
    n = 0
    while True:
        folder = tmp_path / f"there{n}"
        shutil.copytree(start, folder)
        done = ends(lambda folder=folder: Folder(folder, world.key).rotate(new), n)  # type: ignore[misc]
        Folder(folder, world.key).rotate(new)
        index = indexes.read_index(folder / "index.json", "it")
        assert {entry["key"] for entry in index.entries} == {str(new.public)}
        eve = world.home(f"eve{n}")
        eve.add(str(folder))
        assert eve.pull("ann/calm").key == str(new.public)
        n += 1
        shutil.rmtree(folder)
        if done:
            break


def _pull(root: str, results: Any) -> None:
    hub = Hub(Library(root))
    results.put([hub.pull(name).label for name in ("ann/mood", "ann/calm")])


def test_two_pulls_at_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.publish()
    world.publish(make(seed=1), name="ann/calm")
    bob = world.reader()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [context.Process(target=_pull, args=(str(bob.library.root), results)) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get(timeout=300) for _ in children] == [["ann/mood@1", "ann/calm@1"]] * 2
    for child in children:
        child.join()
    assert [item.label for item in bob.pulled.items()] == ["ann/calm@1", "ann/mood@1"]
    for item in bob.pulled.items():
        bob.verify(item)


@pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")
def test_minisign_agrees(tmp_path: Path) -> None:
    """Both ways: it checks our signatures with our keys, and we check its."""
    path = tmp_path / "x"
    path.write_bytes(b"some bytes")
    key = SecretKey.generate()
    key.write(tmp_path / "key")
    (tmp_path / "x.minisig").write_text(key.sign(blake2b(path), "a comment"))
    check = ["minisign", "-V", "-m", str(path), "-P", str(key.public)]
    assert b"a comment" in subprocess.run(check, check=True, capture_output=True).stdout
    subprocess.run(["minisign", "-S", "-m", str(path), "-s", str(tmp_path / "key")], check=True, capture_output=True)
    assert "file:x" in verify((tmp_path / "x.minisig").read_bytes(), blake2b(path), key.public, "it")
    pair = ("-p", str(tmp_path / "pub"), "-s", str(tmp_path / "sec"))
    subprocess.run(["minisign", "-G", "-W", *pair], check=True, capture_output=True)
    theirs = SecretKey.read(tmp_path / "sec")
    assert theirs.public == PublicKey.parse((tmp_path / "pub").read_text().split()[-1])
