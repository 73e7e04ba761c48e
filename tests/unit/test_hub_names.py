"""``owner/name``: in the grammar, and in a library into which something was pulled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_plugins.atomic import file_sha256
from steer_plugins.errors import SpecError, VectorError
from steer_plugins.steering.grammar import TermSpec, format_terms, parse, parse_options
from steer_plugins.steering.vector import ModelIdentity, SteeringVector, is_hub_name
from steer_plugins.store.library import Library, MissingVector
from steer_plugins.store.pulled import FORMAT, Item, Ref
from steer_plugins.store.vectorfile import write_vector

N = 8
MODEL = ModelIdentity("llama", 4, N, "a" * 64, "b" * 64, name="Tiny Llama")
OTHER = ModelIdentity("qwen2", 4, N, "a" * 64, "b" * 64, name="Tiny Qwen")


def make(identity: ModelIdentity = MODEL, seed: int = 0) -> SteeringVector:
    return SteeringVector("mood", {(1, "resid_post"): np.random.default_rng(seed).normal(size=N)}, identity=identity)


def put(library: Library, vector: SteeringVector, name: str = "ann/mood") -> Path:
    """What a pull leaves behind."""
    with library.pulled.locked():
        path = library.pulled.root / "files" / "new"
        write_vector(vector, path)
        ref = Ref(file_sha256(path), path.stat().st_size, "safetensors")
        path = path.rename(library.pulled.path(ref))
        state = library.pulled.state()
        item = Item(name, "1", "vector", vector.identity, "key", "index", False, {"vector": ref})
        state["items"].append(item.to_dict())
        library.pulled.write(state)
    return path


@pytest.mark.parametrize("name", ["a/b", "ann/mood", "a-1/x.y_z-2", "a/" + "b" * 64])
def test_names_of_the_hub(name: str) -> None:
    assert is_hub_name(name)
    assert parse(f"{name}:0.6 - {name}?response") == [TermSpec(name, 0.6), TermSpec(name, -1.0, scope="response")]
    assert parse_options([f"{name}:0.6"]) == [TermSpec(name, 0.6)]
    assert parse_options([f"mood:0.5 + {name}@3"]) == [TermSpec("mood", 0.5), TermSpec(name, layers=(3, 3))]
    assert format_terms(parse(f"!{name}:2{{{name}}}")) == f"!{name}:2{{{name}}}"


@pytest.mark.parametrize(
    "name", ["a", "a/", "/b", "a//b", "../b", "a/..", "a/.b", "a/b.", "A/b", "a/B", "-a/b", "a-/b", "a/b/c", "a/b.gguf", "a\\b"]
)
def test_what_is_no_name_of_the_hub(name: str) -> None:
    assert not is_hub_name(name)
    if "/" in name and name[0] != "-":  # a sign
        with pytest.raises(SpecError):
            parse(f"{name}:0.6")


def test_files_are_files_still() -> None:
    assert parse_options(["./a/b:0.5"]) == [TermSpec("./a/b", 0.5)]
    assert parse_options(["a/b.gguf:0.5"]) == [TermSpec("a/b.gguf", 0.5)]
    assert parse_options(["a/b/c:0.5"]) == [TermSpec("a/b/c", 0.5)]


def test_a_missing_one_is_offered(tmp_path: Path) -> None:
    library = Library(tmp_path)
    for attempt in (library.get, library.resolve, library.path):
        with pytest.raises(MissingVector) as caught:
            attempt("ann/mood", MODEL)
        assert str(caught.value).endswith("pull it with: steer hub pull ann/mood")
    assert not list(tmp_path.iterdir())


def test_a_pulled_one_is_found_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(tmp_path)
    path = put(library, make())
    assert library.resolve("ann/mood", MODEL) == library.get("ann/mood", MODEL) == library.resolve("ann/mood", None) == make()
    assert library.path("ann/mood", MODEL) == path
    assert [(e.name, e.identity, e.read()) for e in library.list(MODEL)] == [("ann/mood", MODEL, make())]
    assert library.list(OTHER) == []
    with pytest.raises(VectorError, match="steer hub remove ann/mood"):
        library.remove("ann/mood", MODEL)
    # a file of that name is second to it, and still a file as a Path
    monkeypatch.chdir(tmp_path)
    Path("ann").mkdir()
    write_vector(make(seed=2), "ann/mood")
    assert library.resolve("ann/mood", MODEL) == make()
    assert library.resolve(Path("ann/mood"), MODEL) == library.resolve("./ann/mood", MODEL) == make(seed=2)


def test_models_of_one_name(tmp_path: Path) -> None:
    library = Library(tmp_path)
    put(library, make())
    with pytest.raises(VectorError, match="architecture llama vs qwen2"):
        library.resolve("ann/mood", OTHER)
    put(library, make(OTHER))
    assert library.resolve("ann/mood", OTHER) == make(OTHER)
    assert library.resolve("ann/mood", MODEL) == make()
    with pytest.raises(VectorError, match="several models .*--model"):
        library.resolve("ann/mood", None)
    with pytest.raises(MissingVector):
        library.resolve("ann/mood", replace(MODEL, n_layer=5))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""])
def test_an_altered_file_is_no_vector(tmp_path: Path, damage: object) -> None:
    library = Library(tmp_path)
    path = put(library, make())
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    for attempt in (library.get, library.resolve, library.path):
        with pytest.raises(VectorError, match="not what was pulled.*steer hub pull ann/mood"):
            attempt("ann/mood", MODEL)
    path.unlink()
    with pytest.raises(VectorError, match="missing.*steer hub pull ann/mood"):
        library.resolve("ann/mood", MODEL)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"format": "other"}', json.dumps({"format": FORMAT, "items": [1]})]
)
def test_a_damaged_record_is_said(tmp_path: Path, text: str) -> None:
    library = Library(tmp_path)
    put(library, make())
    (library.pulled.root / "state.json").write_text(text)
    with pytest.raises(VectorError, match="damaged"):
        library.resolve("ann/mood", MODEL)


def test_files_that_nothing_names_are_swept(tmp_path: Path) -> None:
    library = Library(tmp_path)
    path = put(library, make())
    stray = path.with_name("0" * 64 + ".json")
    stray.write_bytes(b"x")
    put(library, make(seed=3), "ann/other")
    assert path.is_file() and not stray.exists()
