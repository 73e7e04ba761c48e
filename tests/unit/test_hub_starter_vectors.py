"""The starter set as `steer demo` reads it: by name and model, checked against its index."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from steer_plugins.errors import HubError
from steer_plugins.hub import index, starter
from steer_plugins.steering.vector import ModelIdentity
from steer_plugins.training.traits import bundled_traits


def identity_of(folder: Path) -> ModelIdentity:
    opened = index.read_index(folder / "index.json", "the starter set")
    return ModelIdentity.from_dict(next(entry["model"] for entry in opened.entries if entry["name"] == "starter/mood"))


def test_every_trait_is_there_for_the_demo_model() -> None:
    identity = identity_of(starter.starter_folder())
    for name in bundled_traits():
        vector = starter.starter_vector(name, identity)
        assert vector is not None and vector.name == name and vector.identity == identity
    assert starter.starter_vector("nosuch", identity) is None
    assert starter.starter_vector("mood", replace(identity, tokens_sha256="0" * 64)) is None


def test_a_damaged_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(starter.starter_folder(), tmp_path / "starter"))
    monkeypatch.setattr(starter, "starter_folder", lambda: copy)
    for file in (copy / "files").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(HubError, match="not what its index says: reinstall"):
        starter.starter_vector("mood", identity_of(copy))
