"""The library: names, models, files that do not fit, and the one sentence about a missing vector."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_plugins.errors import VectorError
from steer_plugins.steering.vector import ModelIdentity, SteeringVector
from steer_plugins.store.library import Library, MissingVector, default_root, missing_sentence
from steer_plugins.store.vectorfile import read_vector, write_vector

N = 8
MODEL = ModelIdentity("llama", 4, N, "a" * 64, "b" * 64, name="Tiny Llama")
FINE_TUNE = replace(MODEL, norms_sha256="c" * 64, name="Tiny Chat")
OTHER = ModelIdentity("qwen2", 4, N, "a" * 64, "b" * 64, name="Tiny Qwen")


def make(name: str = "mood", identity: ModelIdentity | None = MODEL, seed: int = 0) -> SteeringVector:
    return SteeringVector(name, {(1, "resid_post"): np.random.default_rng(seed).normal(size=N)}, identity=identity)


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "vectors")


def test_put_and_get(library):
    path = library.put(make(), MODEL)
    assert path == library.root / MODEL.key / "mood.safetensors" == library.path("mood", MODEL)
    assert library.get("mood", MODEL) == make()
    assert ModelIdentity.from_dict(json.loads((path.parent / "model.json").read_text("utf-8"))) == MODEL


def test_nothing_is_created_before_the_first_put(library):
    assert library.list() == [] and library.list(MODEL) == []
    with pytest.raises(MissingVector):
        library.get("mood", MODEL)
    assert not library.root.exists()


def test_the_sentence():
    sentence = """no vector 'mood' for this model (llama 4x8 "Tiny Llama"): fit it with: steer train mood"""
    assert missing_sentence("mood", MODEL) == sentence
    assert missing_sentence("mood", None) == "no vector 'mood' in the library: fit it with: steer train mood"


def test_every_way_to_a_missing_vector_says_the_sentence(library):
    library.put(make("terse"), MODEL)
    library.put(make("mood", OTHER), OTHER)
    for attempt in (library.get, library.resolve, library.remove):
        with pytest.raises(MissingVector) as caught:
            attempt("mood", MODEL)
        assert str(caught.value) == missing_sentence("mood", MODEL)
    with pytest.raises(MissingVector) as caught:
        library.resolve("other", None)
    assert str(caught.value) == missing_sentence("other", None)


def test_a_vector_without_a_model_gets_one(library):
    library.put(make(identity=None), MODEL)
    assert library.get("mood", MODEL).identity == MODEL
    with pytest.raises(VectorError, match="n_embd 8 vs 16"):
        library.put(make(identity=None), replace(MODEL, n_embd=16))


def test_overwriting_is_asked_for(library):
    library.put(make(seed=1), MODEL)
    with pytest.raises(VectorError, match="already has 'mood'"):
        library.put(make(seed=2), MODEL)
    assert library.get("mood", MODEL) == make(seed=1)
    library.put(make(seed=2), MODEL, overwrite=True)
    assert library.get("mood", MODEL) == make(seed=2)


def test_vectors_of_another_model_are_refused(library, tmp_path):
    with pytest.raises(VectorError, match="architecture qwen2 vs llama"):
        library.put(make(identity=OTHER), MODEL)
    assert not library.root.exists()
    # A file put into the wrong folder by hand.
    path = library.put(make(identity=OTHER), OTHER)
    wrong = library.path("mood", MODEL)
    wrong.parent.mkdir()
    wrong.write_bytes(path.read_bytes())
    for attempt in (library.get, library.resolve):
        with pytest.raises(VectorError, match="architecture qwen2 vs llama"):
            attempt("mood", MODEL)
        with pytest.raises(VectorError, match="architecture qwen2 vs llama"):
            attempt("mood", MODEL, force=True)
    with pytest.raises(VectorError, match="architecture qwen2 vs llama"):
        library.resolve(path, MODEL)


def test_a_fine_tune_needs_force(library, tmp_path):
    path = tmp_path / "mood.safetensors"
    write_vector(make(), path)
    with pytest.raises(VectorError, match="another fine-tune.*with force"):
        library.resolve(path, FINE_TUNE)
    forced = library.resolve(path, FINE_TUNE, force=True)
    assert forced.identity == FINE_TUNE and forced.content_hash == make().content_hash
    forced.check_fits(FINE_TUNE)
    with pytest.raises(VectorError, match="another fine-tune"):
        library.put(make(), FINE_TUNE)
    library.put(make(), FINE_TUNE, force=True)
    assert library.get("mood", FINE_TUNE).identity == FINE_TUNE
    with pytest.raises(MissingVector):
        library.get("mood", MODEL)


@pytest.mark.parametrize("name", ["../mood", "a/b/c", "A/b", "Mood", "con", "", "x" * 65, "..", "mood\0"])
def test_names_are_checked_before_they_become_paths(library, name):
    for attempt in (library.path, library.get, library.remove):
        with pytest.raises(VectorError, match="is not a vector name"):
            attempt(name, MODEL)


def test_list_and_remove(library):
    library.put(make("terse"), MODEL)
    library.put(make("mood"), MODEL)
    library.put(make("mood", OTHER), OTHER)
    assert [(e.name, e.identity) for e in library.list()] == [("mood", MODEL), ("terse", MODEL), ("mood", OTHER)]
    assert [e.name for e in library.list(MODEL)] == ["mood", "terse"]
    assert library.list(FINE_TUNE) == []
    library.remove("mood", MODEL)
    assert [e.name for e in library.list(MODEL)] == ["terse"]
    assert library.get("mood", OTHER)


def test_list_passes_over_what_is_not_a_vector(library):
    folder = library.put(make(), MODEL).parent
    for name in (".mood.safetensors.1-ab.tmp", ".x.safetensors", "Upper Case.safetensors", "notes.txt"):
        (folder / name).write_text("")
    (library.root / "stray").write_text("")
    assert [e.name for e in library.list()] == ["mood"]
    for damage in ("", "[]", "{", "[" * 100_000, json.dumps({**MODEL.to_dict(), "n_layer": -1})):
        (folder / "model.json").write_text(damage)
        assert [(e.name, e.identity) for e in library.list()] == [("mood", None)]
        assert library.get("mood", MODEL) == make()


def test_a_renamed_file_is_a_renamed_vector(library):
    path = library.put(make(), MODEL)
    path.rename(path.with_name("calm.safetensors"))
    assert library.get("calm", MODEL) == make("calm") == library.list()[0].read()


def test_resolve_names_and_files(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library.put(make(seed=1), MODEL)
    for spec in ("mood", "mood.safetensors"):
        write_vector(make(seed=2), spec)
    assert library.resolve("mood", MODEL) == make(seed=1)
    for spec in ("./mood", "mood.safetensors", os.path.join(tmp_path, "mood"), Path("mood.safetensors")):
        assert library.resolve(spec, MODEL) == make(seed=2)
    # A plain word that the library lacks may still be a file.
    write_vector(make("terse"), "terse")
    assert library.resolve("terse", MODEL) == make("terse")
    for spec in ("gone.safetensors", "./mood2", "a/b/c", Path("a/b")):
        with pytest.raises(VectorError, match="no vector file"):
            library.resolve(spec, MODEL)


def test_resolve_without_a_model(library):
    library.put(make("terse"), MODEL)
    assert library.resolve("terse", None) == make("terse")
    library.put(make("terse", OTHER), OTHER)
    with pytest.raises(VectorError, match="several models .*Tiny Llama.*Tiny Qwen.*--model"):
        library.resolve("terse", None)


def test_a_damaged_file_is_named(library):
    path = library.put(make(), MODEL)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VectorError, match="truncated") as caught:
        library.get("mood", MODEL)
    assert str(path) in str(caught.value)


def test_a_library_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VectorError, match="cannot write to the library"):
        Library(tmp_path / "file").put(make(), MODEL)


def test_a_failed_put_keeps_the_old_vector(library, monkeypatch):
    path = library.put(make(seed=1), MODEL)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("steer_plugins.atomic.os.fsync", full)
    with pytest.raises(VectorError, match="No space left"):
        library.put(make(seed=2), MODEL, overwrite=True)
    assert read_vector(path) == make(seed=1)
    assert sorted(os.listdir(path.parent)) == ["model.json", "mood.safetensors"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="places of Linux")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "home/.local/share/steer-plugins/vectors"),
        ({"XDG_DATA_HOME": "{here}/xdg"}, "xdg/steer-plugins/vectors"),
        ({"XDG_DATA_HOME": "xdg"}, "home/.local/share/steer-plugins/vectors"),
        ({"STEER_LIBRARY": "mine", "XDG_DATA_HOME": "{here}/xdg"}, "mine"),
        ({"STEER_LIBRARY": "~/mine"}, "home/mine"),
        ({"STEER_LIBRARY": ""}, "home/.local/share/steer-plugins/vectors"),
    ],
)
def test_where_it_is(monkeypatch, tmp_path, variables, expected):
    for variable in ("STEER_LIBRARY", "XDG_DATA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value.format(here=tmp_path))
    assert default_root() == tmp_path / expected == Library().root
