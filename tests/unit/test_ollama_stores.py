"""Models on disk: Ollama's store, a folder of our own, and what is checked before one is made."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steer_plugins_ollama import creating
from steer_plugins_ollama.errors import BadRequest, NotFound
from steer_plugins_ollama.folder import FolderStore
from steer_plugins_ollama.gguf import facts_of
from steer_plugins_ollama.names import parse_name
from steer_plugins_ollama.store import OllamaStore, store_root

from steer_plugins import Library, testing
from steer_plugins.errors import ModelError, SteerError
from steer_plugins.steering.grammar import parse
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.identity import identity_of_gguf

_MEDIA = "application/vnd.ollama.image."


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("m") / "tiny.gguf")[0]


@pytest.fixture
def library(tmp_path: Path, gguf: Path) -> Library:
    found = Library(tmp_path / "library")
    found.put(vector("mood", gguf), identity_of_gguf(gguf))
    return found


def vector(name: str, gguf: Path) -> SteeringVector:
    identity = identity_of_gguf(gguf)
    direction = np.zeros(identity.n_embd, np.float32)
    direction[0] = 1
    return SteeringVector(name, {(1, "resid_post"): direction}, {(1, "resid_post"): 1.0}, identity=identity)


def ollama_model(root: Path, name: str, gguf: Path, layers: dict[str, Any] | None = None, licenses: tuple[str, ...] = ()) -> Path:
    """Write a model into a store as Ollama does."""
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    written = []

    def add(kind: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        (root / "blobs" / f"sha256-{digest}").write_bytes(data)
        written.append({"mediaType": _MEDIA + kind, "digest": f"sha256:{digest}", "size": len(data)})

    add("model", gguf.read_bytes())
    for kind, value in (layers or {}).items():
        add(kind, value.encode() if isinstance(value, str) else json.dumps(value).encode())
    for text in licenses:
        add("license", text.encode())
    path = root.joinpath("manifests", *parse_name(name).parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "layers": written}))
    return path


def test_ollamas_store(tmp_path: Path, gguf: Path) -> None:
    layers = {
        "params": {"steering": "mood:0.6", "temperature": 0.5, "stop": ["x"]},
        "template": "{{ .Prompt }}",
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "hi"}],
    }
    ollama_model(tmp_path, "me/calm:v2", gguf, layers, ("MIT",))
    store = OllamaStore(tmp_path)
    model = store.get("me/calm:v2")
    assert model.gguf.read_bytes() == gguf.read_bytes()
    assert model.steering == "mood:0.6" and model.parameters == {"temperature": 0.5, "stop": ["x"]}
    assert (model.template, model.system, model.licenses) == ("{{ .Prompt }}", "Be brief.", ("MIT",))
    assert model.messages == ({"role": "user", "content": "hi"},)
    assert [str(name) for name in store.names()] == ["me/calm:v2"]
    assert store.get("ME/Calm:V2").gguf == model.gguf
    assert model.details()["family"] == "llama" and model.capabilities() == ["completion"]


def test_the_last_model_layer_counts(tmp_path: Path, gguf: Path) -> None:
    path = ollama_model(tmp_path, "two", gguf)
    manifest = json.loads(path.read_text())
    digest = hashlib.sha256(b"GGUF").hexdigest()
    (tmp_path / "blobs" / f"sha256-{digest}").write_bytes(b"GGUF")
    manifest["layers"].append({"mediaType": _MEDIA + "model", "digest": f"sha256:{digest}", "size": 4})
    path.write_text(json.dumps(manifest))
    assert OllamaStore(tmp_path).get("two").gguf.name == f"sha256-{digest}"


def test_licence_lines_carry_steering(tmp_path: Path, gguf: Path) -> None:
    store = OllamaStore(tmp_path)
    ollama_model(tmp_path, "a", gguf, {"params": {"steering": "mood:0.6"}}, ("MIT", "steering: kind"))
    assert store.get("a").steering == "kind" and store.get("a").carriers
    ollama_model(tmp_path, "b", gguf, {"params": {"steering": "mood:0.6"}}, ("steering: +kind:0.5",))
    assert store.get("b").steering == "mood:0.6 + kind:0.5"
    ollama_model(tmp_path, "c", gguf)
    assert store.get("c").steering is None and not store.get("c").carriers


@pytest.mark.parametrize(
    ("damage", "error", "part"),
    [
        (lambda root, path: path.write_text("{"), ModelError, "damaged"),
        (lambda root, path: path.write_text('{"layers": [3]}'), ModelError, "damaged"),
        (lambda root, path: path.write_text('{"layers": []}'), ModelError, "damaged"),
        (lambda root, path: [p.unlink() for p in (root / "blobs").iterdir()], ModelError, "missing"),
        (lambda root, path: path.unlink(), NotFound, "not found"),
        (lambda root, path: path.write_text(path.read_text().replace("image.model", "image.tensor")), BadRequest, "no GGUF"),
        (lambda root, path: path.write_text(path.read_text().replace("sha256:", "sha256:../")), ModelError, "missing"),
    ],
)
def test_damaged_stores(tmp_path: Path, gguf: Path, damage: Any, error: type[Exception], part: str) -> None:
    path = ollama_model(tmp_path, "x", gguf)
    damage(tmp_path, path)
    with pytest.raises(error, match=part):
        OllamaStore(tmp_path).get("x")


def test_wrong_steering_in_the_store(tmp_path: Path, gguf: Path) -> None:
    ollama_model(tmp_path, "x", gguf, {"params": {"steering": "mood:"}})
    with pytest.raises(SteerError, match="steering of the model is wrong"):
        OllamaStore(tmp_path).get("x")
    ollama_model(tmp_path, "y", gguf, {"params": {"steering": {"mood": 1}}})
    with pytest.raises(BadRequest):
        OllamaStore(tmp_path).get("y")


def test_vectors_travel_in_the_manifest(tmp_path: Path, gguf: Path) -> None:
    path = ollama_model(tmp_path, "x", gguf, {"params": {"steering": "calm"}})
    store = OllamaStore(tmp_path)
    store.carry("x", {"calm": b"one", "kind": b"two"})
    store.carry("x", {"calm": b"three"})
    found = store.get("x").vectors
    assert {name: file.read_bytes() for name, file in found.items()} == {"calm": b"three", "kind": b"two"}
    assert json.loads(path.read_text())["schemaVersion"] == 2


def test_where_the_store_is(tmp_path: Path) -> None:
    assert store_root({"OLLAMA_MODELS": str(tmp_path)}) == tmp_path
    assert store_root({}).name == "models"


# ---- the folder ----


def test_a_folder_of_ggufs_and_modelfiles(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(gguf.read_bytes())
    (tmp_path / "calm.modelfile").write_text('FROM tiny\nPARAMETER steering "mood:0.6"\nPARAMETER top_k 5\nSYSTEM Hush.')
    (tmp_path / "me%2Fcalmer%3Av2.modelfile").write_text('FROM calm\nPARAMETER steering "+ kind"\nPARAMETER top_k 6')
    store = FolderStore(tmp_path)
    assert [str(name) for name in store.names()] == ["calm:latest", "me/calmer:v2", "tiny:latest"]
    model = store.get("me/calmer:v2")
    assert model.steering == "mood:0.6 + kind" and model.parameters == {"top_k": 6} and model.system == "Hush."
    assert model.gguf == tmp_path / "tiny.gguf" and store.get("tiny").steering is None
    with pytest.raises(NotFound):
        store.get("nosuch")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("FROM nosuch", "neither a model nor a file"),
        ("FROM loop", "FROM itself|neither"),
        ("FROM tiny\nPARAMETER steering mood:", "loop.modelfile: Modelfile line 2"),
    ],
)
def test_broken_modelfiles(tmp_path: Path, gguf: Path, text: str, part: str) -> None:
    (tmp_path / "tiny.gguf").write_bytes(gguf.read_bytes())
    (tmp_path / "loop.modelfile").write_text(text)
    with pytest.raises(SteerError, match=part):
        FolderStore(tmp_path).get("loop")


def test_modelfiles_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.modelfile").write_text("FROM b")
    (tmp_path / "b.modelfile").write_text("FROM a")
    with pytest.raises(ModelError, match="itself"):
        FolderStore(tmp_path).get("a")


def test_create_copy_and_delete_in_a_folder(tmp_path: Path, gguf: Path, library: Library) -> None:
    root = tmp_path / "models"
    root.mkdir()
    store = FolderStore(root)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    blob = store.blob_path(f"sha256:{digest}")
    blob.parent.mkdir()
    blob.write_bytes(gguf.read_bytes())
    made = creating.prepare({"model": "base", "files": {"x.gguf": f"sha256:{digest}"}}, store, library)
    store.create(made.name, made.body, made.vectors)
    carried = base64.b64encode(creating.vector_bytes(vector("own", gguf))).decode()
    body = {"model": "calm", "from": "base", "parameters": {"steering": "mood:0.5 + own"}, "vectors": {"own": carried}}
    made = creating.prepare(body, store, library)
    store.create(made.name, made.body, made.vectors)
    model = store.get("calm")
    assert model.steering == "mood:0.5 + own" and list(model.vectors) == ["own"]
    made = creating.prepare({"model": "calmer", "from": "calm", "parameters": {"steering": "+ mood:0.1"}}, store, library)
    store.create(made.name, made.body, made.vectors)
    store.delete("calm")
    assert store.get("calmer").steering == "mood:0.5 + own + mood:0.1" and list(store.get("calmer").vectors) == ["own"]
    store.copy("calmer", parse_name("me/copy:v1"))
    store.delete("calmer")
    assert store.get("me/copy:v1").vectors["own"].is_file() and blob.is_file()
    store.delete("me/copy:v1")
    store.delete("base")
    assert store.names() == [] and not blob.exists() and list((root / "vectors").iterdir()) == []
    assert not [p for p in root.rglob("*") if p.is_file()]


def test_texts_cannot_become_instructions(tmp_path: Path, gguf: Path, library: Library) -> None:
    (tmp_path / "tiny.gguf").write_bytes(gguf.read_bytes())
    store = FolderStore(tmp_path)
    body = {"model": "evil", "from": "tiny", "system": 'a "b"\n"""\nFROM /etc/passwd\nSYSTEM """x\n'}
    made = creating.prepare(body, store, library)
    with pytest.raises(BadRequest, match="quotes"):
        store.create(made.name, made.body)
    assert [str(n) for n in store.names()] == ["tiny:latest"]


def test_a_plain_gguf_is_not_deleted(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(gguf.read_bytes())
    with pytest.raises(BadRequest, match="delete it yourself"):
        FolderStore(tmp_path).delete("tiny")


# ---- what is checked ----


def prepared(root: Path, library: Library, **body: Any) -> creating.Prepared:
    return creating.prepare({"model": "new", "from": "base", **body}, OllamaStore(root), library)


def test_prepare_combines_and_keeps_the_rest(tmp_path: Path, gguf: Path, library: Library) -> None:
    ollama_model(tmp_path, "base", gguf, {"params": {"steering": "mood:0.6"}})
    made = prepared(tmp_path, library, parameters={"steering": "+ mood:-0.1", "top_k": 3}, system="S", stream=False)
    assert made.body["parameters"] == {"steering": "mood:0.6 + mood:-0.1", "top_k": 3}
    assert made.body["system"] == "S" and made.body["stream"] is False and made.steering == "mood:0.6 + mood:-0.1"
    plain = {"model": "new", "from": "base", "system": "S"}
    assert creating.prepare(plain, OllamaStore(tmp_path), library).body == plain  # Ollama inherits by itself


def test_prepare_lifts_the_carrier_line(tmp_path: Path, gguf: Path, library: Library) -> None:
    ollama_model(tmp_path, "base", gguf)
    made = prepared(tmp_path, library, license=["MIT", "steering: mood:0.5"])
    assert made.body["parameters"] == {"steering": "mood:0.5"} and made.body["license"] == ["MIT"]
    ollama_model(tmp_path, "base", gguf, licenses=("steering: mood:0.5",))
    made = prepared(tmp_path, library, parameters={"steering": "+ mood:0.1"})
    assert made.body["license"] == ["steering: mood:0.5 + mood:0.1"]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"parameters": {"steering": "nosuch:0.5"}}, "steer ollama train base:latest nosuch"),
        ({"parameters": {"steering": "mood:"}}, "character 6"),
        ({"parameters": {"steering": "mood@9"}}, "mood"),
        ({"parameters": {"steering": '"/etc/passwd"'}}, "file"),
        ({"parameters": {"steering": 3}}, "text"),
        ({"parameters": [1]}, "object"),
        ({"parameters": {"steering": "mood"}, "template": "a\n{{ nope }}"}, "TEMPLATE line 2"),
        ({"vectors": {"x": "!"}}, "base64"),
        ({"vectors": {"../x": ""}}, "name"),
        ({"vectors": {"x": base64.b64encode(b"junk").decode()}}, "safetensors|vector"),
    ],
)
def test_prepare_refuses(tmp_path: Path, gguf: Path, library: Library, body: dict[str, Any], part: str) -> None:
    ollama_model(tmp_path, "base", gguf)
    with pytest.raises(SteerError, match=part):
        prepared(tmp_path, library, **body)


def test_carry_takes_vectors_out_of_the_library(tmp_path: Path, gguf: Path, library: Library) -> None:
    ollama_model(tmp_path, "base", gguf)
    made = prepared(tmp_path, library, parameters={"steering": "mood:0.5"}, carry=True)
    assert list(made.vectors) == ["mood"] and "carry" not in made.body and "vectors" not in made.body


def test_files_in_a_modelfile_are_carried(tmp_path: Path, gguf: Path, library: Library) -> None:
    (tmp_path / "My Calm.safetensors").write_bytes(creating.vector_bytes(vector("x", gguf)))
    terms, files = creating.carry_files(tuple(parse('mood + "My Calm.safetensors":0.5')), tmp_path, None, library)
    assert terms == tuple(parse("mood + my-calm:0.5")) and list(files) == ["my-calm"]


def test_facts_of_a_gguf(gguf: Path, tmp_path: Path) -> None:
    facts = facts_of(gguf)
    identity = identity_of_gguf(gguf)
    assert facts.architecture == "llama" and facts.number("embedding_length") == identity.n_embd
    assert facts.parameters > 1000 and "im_start" in facts.chat_template
    for size in (0, 3, 20, 200, 5000):
        cut = tmp_path / f"{size}.gguf"
        cut.write_bytes(gguf.read_bytes()[:size])
        with pytest.raises(ModelError):
            facts_of(cut)
