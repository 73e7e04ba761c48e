"""Gates and autoencoders travel as vectors do: published, pulled, checked against their cards, used by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from steer_plugins.cli.main import cli
from steer_plugins.concepts.code import SparseCode
from steer_plugins.concepts.index import Feature, FeatureIndex
from steer_plugins.concepts.making import sae_folder
from steer_plugins.errors import HubError, SteerError
from steer_plugins.hub.contents import read_autoencoder
from steer_plugins.hub.publish import Folder, draft
from steer_plugins.steering.gate import Gate
from steer_plugins.steering.grammar import parse, steering_of
from steer_plugins.store.library import Library
from steer_plugins.store.vectorfile import write_vector

from .hub_world import MODEL, OTHER, N, World, make


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_gate(world: World, tmp_path: Path) -> None:
    gate = Gate(make(seed=3).replace(name="joyful", calibration=None, provenance=None), 0.25, "above", "last")
    world.publish()
    entry = world.publish(gate.to_vector(), name="ann/joyful", description="Open on joyful prompts.")
    assert entry["kind"] == "gate" and entry["calibration"] is None
    bob = world.reader()
    assert [offer.entry["name"] for offer in bob.search([], kind="gate")[0]] == ["ann/joyful"]
    item = bob.pull("ann/joyful")
    bob.pull("ann/mood")
    bob.verify(item)
    (term,) = steering_of(parse("ann/mood:0.5?response{ann/joyful}"), lambda name: bob.library.resolve(name, MODEL)).terms
    assert term.gate is not None and term.gate.key == gate.key
    with pytest.raises(SteerError, match="is a vector, not a gate"):
        steering_of(parse("ann/mood:0.5?response{ann/mood}"), lambda name: bob.library.resolve(name, MODEL))


def test_a_gate_that_is_none(world: World, tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    write_vector(make().replace(provenance={"gate": {"threshold": 7}}), path)
    with pytest.raises(SteerError, match="threshold"):
        draft("ann/bad", {"vector": path}, licence="MIT")
    # a vector under the card of a gate
    write_vector(make(), path)
    card = {**draft("ann/bad", {"vector": path}, licence="MIT"), "kind": "gate"}
    with pytest.raises(HubError, match="its card says kind 'gate', its file 'vector'"):
        Folder(world.there, world.key).publish(card, {"vector": path})


def autoencoder(folder: Path, identity: Any = MODEL, features: int = 6, layer: int = 2) -> dict[str, Path]:
    """A small one with names, and its files by role."""
    rows = np.random.default_rng(0).normal(size=(6, N)).astype(np.float32)
    zeros = np.zeros(6, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    SparseCode(rows.T.copy(), zeros, rows, np.zeros(N, np.float32), zeros, layer=2).save(folder)
    names = tuple(Feature(i, name="smell" if i == 3 else "") for i in range(features))
    FeatureIndex(identity, layer, 5.0, names).save(folder)
    return {"weights": folder / "sae_weights.safetensors", "config": folder / "cfg.json", "names": folder / "index.json"}


def publish(world: World, files: dict[str, Path]) -> dict[str, Any]:
    return Folder(world.there, world.key).publish(draft("ann/talk", files, licence="Apache-2.0"), files)


def test_an_autoencoder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sae_folder(Library(tmp_path / "ann" / "vectors"), "talk", MODEL)
    files = autoencoder(folder)
    entry = publish(world, files)
    assert (entry["kind"], entry["layers"], entry["model"]["name"]) == ("sae", [2], "Tiny Llama")
    bob = world.reader()
    item = bob.pull("ann/talk", identity=MODEL)
    shutil.rmtree(world.there)
    bob.verify(item)
    assert bob.library.list() == []  # no vector of itself
    monkeypatch.setenv("STEER_LIBRARY", str(bob.library.root))
    monkeypatch.setattr("steer_plugins.cli.sae.model_path", lambda model: Path("m.gguf"))
    monkeypatch.setattr("steer_plugins.store.identity.identity_of_gguf", lambda path: MODEL)
    result = CliRunner().invoke(cli, ["sae", "import", "ann/talk", "talk"])
    assert result.exit_code == 0, (result.output, result.exception)
    theirs, mine = (Library(root).resolve("talk#smell", MODEL) for root in (tmp_path / "ann" / "vectors", bob.library.root))
    assert theirs == mine and mine.name == "talk-3"
    assert CliRunner().invoke(cli, ["sae", "import", "ann/talk", "talk2", "--layer", "1"]).exit_code == 2
    monkeypatch.setattr("steer_plugins.store.identity.identity_of_gguf", lambda path: OTHER)
    error = CliRunner().invoke(cli, ["sae", "import", "ann/talk", "talk"]).exception
    assert "ann/talk was pulled for another model: architecture llama vs qwen2" in str(error)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda files: files["names"].write_text("{}"), "not a whole index"),
        (lambda files: files["names"].write_text("[" * 100_000), "is not JSON"),
        (lambda files: files["config"].write_text('{"architecture": "pickle"}'), "its architecture is"),
        (
            lambda files: files["weights"].write_bytes(files["weights"].read_bytes()[:-4]),
            "truncated|cannot be read|not a safetensors",
        ),
        (lambda files: autoencoder(files["names"].parent, features=5), "another width, count or layer"),
        (lambda files: autoencoder(files["names"].parent, layer=1), "another width, count or layer"),
        (lambda files: autoencoder(files["names"].parent, identity=None), "names no model"),
    ],
)
def test_an_autoencoder_that_is_none(
    world: World, tmp_path: Path, spoil: Callable[[dict[str, Path]], Any], sentence: str
) -> None:
    files = autoencoder(tmp_path / "a")
    card = draft("ann/talk", files, licence="Apache-2.0", version="1")
    spoil(files)
    with pytest.raises(SteerError, match=sentence):
        read_autoencoder(files) if "names no model" not in sentence and "another" not in sentence else publish(world, files)
    # whoever signs a card of what is none publishes nothing
    from steer_plugins.hub.publish import _ref

    card["files"] = {role: _ref(path).to_dict() for role, path in files.items()}
    with pytest.raises(HubError, match="holds no sae|its card says"):
        Folder(world.there, world.key).publish(card, files)
    assert not (world.there / "index.json").exists()


def test_all_files_of_an_autoencoder(world: World, tmp_path: Path) -> None:
    files = autoencoder(tmp_path / "a")
    card = draft("ann/talk", files, licence="Apache-2.0")
    del files["names"], card["files"]["names"]
    with pytest.raises(HubError, match="a sae has the files weights, config, names and no others"):
        Folder(world.there, world.key).publish(card, files)


def test_publishing_from_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "a"))
    autoencoder(sae_folder(Library(), "talk", MODEL))
    monkeypatch.setattr("steer_plugins.store.identity.identity_of_gguf", lambda path: MODEL)
    monkeypatch.setattr("steer_plugins.cli.common.model_path", lambda model: Path("m.gguf"))
    there = tmp_path / "hub"
    common = ["hub", "publish", "talk", "--kind", "sae", "--as", "ann/talk", "--to", str(there), "--licence", "MIT"]
    result = CliRunner().invoke(cli, [*common, "-m", "m.gguf"])
    assert result.exit_code == 0 and "Published ann/talk@1" in result.output, (result.output, result.exception)
    assert json.loads((there / "index.json").read_text())["entries"][0]["kind"] == "sae"
    result = CliRunner().invoke(cli, common)
    assert "--model" in str(result.exception)
