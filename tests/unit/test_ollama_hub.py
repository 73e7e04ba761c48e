"""Vectors of hubs in Ollama's models: pulled for a model by its name there, named in Modelfiles and requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from steer_plugins_ollama import creating
from steer_plugins_ollama.desk import find
from steer_plugins_ollama.store import OllamaStore

from steer_plugins import Library, testing
from steer_plugins.cli.main import cli
from steer_plugins.errors import SteerError
from steer_plugins.hub import safety
from steer_plugins.hub.hub import Hub
from steer_plugins.store.identity import identity_of_gguf

from .hub_world import World
from .test_ollama_stores import ollama_model, vector


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("m") / "tiny.gguf")[0]


@pytest.fixture
def home(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has added a hub, and whose Ollama has the model ``base``; measuring is somebody else's test."""
    world = World(tmp_path)
    world.publish(vector("mood", gguf))
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "vectors"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    ollama_model(tmp_path / "ollama", "base", gguf)
    Hub(Library()).add(str(world.there))
    asked: list[str] = []
    monkeypatch.setattr(safety, "safety_check", lambda library, engine, **named: lambda card, files: asked.append(card["name"]))
    return tmp_path


def steer(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["ollama", *arguments])


def test_pulling_for_a_model_of_ollama(home: Path, gguf: Path) -> None:
    result = steer("pull", "base", "ann/mood@1")
    assert result.exit_code == 0 and "ann/mood@1 for llama" in result.output, (result.output, result.exception)
    assert Library().get("ann/mood", identity_of_gguf(gguf)) is not None
    made = creating.prepare(
        {"model": "new", "from": "base", "parameters": {"steering": "ann/mood:0.6"}}, OllamaStore(home / "ollama"), Library()
    )
    assert made.steering == "ann/mood:0.6" and made.body["parameters"] == {"steering": "ann/mood:0.6"}


def test_from_a_folder(home: Path, gguf: Path) -> None:
    (home / "ggufs").mkdir()
    (home / "ggufs" / "tiny.gguf").write_bytes(gguf.read_bytes())
    assert steer("pull", "tiny", "ann/mood", "--folder", str(home / "ggufs")).exit_code == 0
    assert "not found" in str(steer("pull", "base", "ann/mood", "--folder", str(home / "ggufs")).exception)


def test_what_is_not_there(home: Path) -> None:
    assert "no index has 'ann/nothing'" in str(steer("pull", "base", "ann/nothing").exception)
    assert isinstance(steer("pull", "nosuch", "ann/mood").exception, SteerError)
    body = {"model": "new", "from": "base", "parameters": {"steering": "ann/mood:0.6"}}
    with pytest.raises(SteerError, match="pull it with: steer ollama pull base:latest ann/mood"):
        creating.prepare(body, OllamaStore(home / "ollama"), Library())


def test_a_pulled_vector_is_carried(home: Path, gguf: Path) -> None:
    steer("pull", "base", "ann/mood")
    body = {"model": "new", "from": "base", "parameters": {"steering": "ann/mood:0.6"}, "carry": True}
    store = OllamaStore(home / "ollama")
    made = creating.prepare(body, store, Library())
    store.carry("base", made.vectors)
    model = store.get("base")
    assert list(model.vectors) == ["ann/mood"]
    identity, empty = identity_of_gguf(gguf), Library(home / "empty")
    assert find(model, "ann/mood", identity, empty) == Library().get("ann/mood", identity)
