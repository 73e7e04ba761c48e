"""Hugging Face as a source and a target: the program and the real client library, against a stand-in of the API."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from steer_plugins.cli.main import cli
from steer_plugins.errors import SteerError
from steer_plugins.store.library import Library

from ..unit.hub_world import MODEL, OTHER, make
from .hf_standin import TOKEN, HuggingFace

pytest.importorskip("huggingface_hub")
# of the client library itself
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
Steer = Callable[..., str]


@pytest.fixture
def there() -> Iterator[HuggingFace]:
    with HuggingFace().running() as hub:
        yield hub


def settings(there: HuggingFace, home: Path, token: str | None) -> dict[str, str]:
    return {
        "STEER_LIBRARY": str(home),
        "HF_HOME": str(home) + "-hf",
        "HF_ENDPOINT": there.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": token or "",
    }


@pytest.fixture
def program(there: HuggingFace, tmp_path: Path) -> Steer:
    """``steer hub`` as a program, in a home of its own; returns what it prints."""

    def run(home: str, *arguments: str, token: str | None = TOKEN) -> str:
        command = [sys.executable, "-m", "steer_plugins", "hub", *arguments]
        environment = {**os.environ, **settings(there, tmp_path / home, token)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def steer(there: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steer:
    """The same within this process; with ``fails``, returns its error. The client reads its settings when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", there.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", there.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))

    def run(home: str, *arguments: str, fails: bool = False, token: str | None = TOKEN) -> str:
        for name, value in settings(there, tmp_path / home, token).items():
            monkeypatch.setenv(name, value)
        result = CliRunner().invoke(cli, ["hub", *arguments])
        assert isinstance(result.exception, SteerError) == fails and (fails or result.exit_code == 0), result.output
        return str(result.exception) if fails else result.output

    return run


def publish(steer: Steer, tmp_path: Path, seed: int = 0, *, name: str = "ann/mood", home: str = "a", **named: object) -> str:
    Library(tmp_path / home).put(make(seed=seed), MODEL, overwrite=True)
    said = ("--licence", "Apache-2.0", "--base-model", "tiny/llama", "--tag", "joy", "--description", "Happy | *sad*.")
    return steer(home, "publish", "mood", "--as", name, "--to", "hf://ann/vectors", *said, **named)


def test_from_one_home_to_another(program: Steer, there: HuggingFace, tmp_path: Path) -> None:
    assert "Published ann/mood@1 to hf://ann/vectors" in publish(program, tmp_path)
    repository = there.repositories["ann/vectors"]
    first = repository.head
    assert repository.messages == ["initial commit", "ann/mood@1"]  # one commit, whole
    assert repository.front() == {
        "license": "apache-2.0",
        "library_name": "steer-plugins",
        "base_model": ["tiny/llama"],
        "tags": ["activation-steering", "joy", "steer-plugins-vector"],
    }
    readme = repository.commits[first]["README.md"].decode()
    assert r"| ann/mood | 1 | vector | Happy \| \*sad\*. | llama 4x8" in readme and "steer hub add hf://ann/vectors" in readme
    assert program("b", "search", "--huggingface").split() == ["hf://ann/vectors"]
    assert program("b", "search", "--huggingface", "nothing") == ""
    program("b", "add", "hf://ann/vectors", token=None)
    assert "ann/mood" in program("b", "search", "happy")
    publish(program, tmp_path, seed=1)
    # what is pulled is of the commit that the index was read at
    assert "ann/mood@1" in program("b", "pull", "ann/mood", token=None)
    assert Library(tmp_path / "b").get("ann/mood", MODEL).content_hash == make().content_hash
    assert any(f"/resolve/{first}/files/" in line for line in there.log)
    assert "ann/mood: 2 is there (1 is here)" in program("b", "update")
    program("b", "update", "--all")
    there.down = True
    assert Library(tmp_path / "b").get("ann/mood", MODEL).content_hash == make(seed=1).content_hash
    assert "ann/mood@2: files and signature hold" in program("b", "verify")


def test_at_a_commit(steer: Steer, there: HuggingFace, tmp_path: Path) -> None:
    publish(steer, tmp_path)
    first = there.repositories["ann/vectors"].head
    publish(steer, tmp_path, seed=1)
    steer("c", "add", f"hf://ann/vectors@{first}", "--as", "old")
    assert "up to date" in steer("c", "update")
    assert "ann/mood@1" in steer("c", "pull", "ann/mood")
    assert "Revision" in steer("c", "add", f"hf://ann/vectors@{'0' * 40}", fails=True)
    error = steer("a", "publish", "mood", "--as", "ann/x", "--to", f"hf://ann/vectors@{first}", "--licence", "MIT", fails=True)
    assert error.endswith("names a revision: what is published becomes the newest, so leave it out")


def test_a_data_set(steer: Steer, there: HuggingFace, tmp_path: Path) -> None:
    Library(tmp_path / "a").put(make(OTHER), OTHER)
    to = "hf://datasets/ann/more"
    steer("a", "publish", "mood", "--as", "ann/mood", "--to", to, "--licence", "LicenseRef-own")
    front = there.repositories["ann/more"].front()
    assert (front["license"], front["license_name"]) == ("other", "licenseref-own") and "base_model" not in front
    assert steer("b", "search", "--huggingface").split() == [to]
    steer("b", "add", to)
    assert "Tiny Qwen" in steer("b", "pull", "ann/mood")


def test_the_card_is_of_all_entries(steer: Steer, there: HuggingFace, tmp_path: Path) -> None:
    publish(steer, tmp_path)
    arguments = ("publish", "mood:0.5", "--kind", "preset", "--as", "ann/evening", "--to", "hf://ann/vectors", "--tag", "rest")
    steer("a", *arguments, "--licence", "CC0-1.0")
    front = there.repositories["ann/vectors"].front()
    assert front["base_model"] == ["tiny/llama"] and {"joy", "rest"} < set(front["tags"])
    assert (front["license"], front["license_name"]) == ("other", "several")


def test_what_is_refused(steer: Steer, there: HuggingFace, tmp_path: Path) -> None:
    assert "RepositoryNotFound" in steer("b", "add", "hf://ann/nothing", fails=True)
    assert "is not a repository" in steer("b", "add", "hf://ann", fails=True)
    assert re.search("cannot be used: .*401", publish(steer, tmp_path, token="wrong", fails=True))
    assert not there.repositories
    publish(steer, tmp_path)
    before = dict(there.repositories["ann/vectors"].commits)
    # another's index: what waits for a signature would lock its readers out
    error = publish(steer, tmp_path, name="eve/mood", home="e", fails=True)
    assert "is kept by RW" in error and "ask its keeper to sign" in error
    assert there.repositories["ann/vectors"].commits == before
    steer("b", "add", "hf://ann/vectors")
    files = there.repositories["ann/vectors"].commits[there.repositories["ann/vectors"].head]
    vector = next(path for path in files if path.endswith(".safetensors"))
    there.sizes[vector] = 10_000_000_000
    assert re.search("has 10000000000 bytes: at most [0-9]+ are taken", steer("b", "pull", "ann/mood", fails=True))
    del there.sizes[vector]
    data = files.pop(vector)
    assert f"has no file {vector}" in steer("b", "pull", "ann/mood", fails=True)
    files[vector] = data[:-1] + bytes([data[-1] ^ 1])
    assert "not what its hash says" in steer("b", "pull", "ann/mood", fails=True)
    there.down = True
    assert "hf://ann/vectors cannot be used: " in steer("b", "update", fails=True)
    assert Library(tmp_path / "b").list() == []


def test_two_publish_at_once(there: HuggingFace, steer: Steer, tmp_path: Path) -> None:
    """Somebody else commits while this one is at it: nothing is overwritten."""
    publish(steer, tmp_path)
    repository = there.repositories["ann/vectors"]
    there.on_preupload = lambda: repository.commit({**repository.commits[repository.head], "other": b"x"}, "another's")
    assert "A commit has happened since" in publish(steer, tmp_path, seed=1, fails=True)
    there.on_preupload = lambda: None
    assert repository.messages[-1] == "another's"
    assert "ann/mood@2" in publish(steer, tmp_path, seed=1)
