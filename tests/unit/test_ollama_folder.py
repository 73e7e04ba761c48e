"""The folder store: what is listed, what a copy is, and that nothing which is still needed is ever deleted."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest
from steer_plugins_ollama import creating, expression, log
from steer_plugins_ollama.errors import BadRequest, NotFound
from steer_plugins_ollama.folder import FolderStore
from steer_plugins_ollama.names import parse_name
from steer_plugins_ollama.plugin import serve_options
from steer_plugins_ollama.store import store_root

from steer_plugins import Library, testing
from steer_plugins.errors import ModelError, SteerError


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("m") / "tiny.gguf")[0]


@pytest.fixture
def root(tmp_path: Path, gguf: Path) -> Path:
    """A folder with ``base.gguf``, and the same weights as an upload."""
    found = tmp_path / "models"
    (found / "blobs").mkdir(parents=True)
    (found / "base.gguf").write_bytes(gguf.read_bytes())
    (found / "blobs" / blob_name(gguf)).write_bytes(gguf.read_bytes())
    return found


def blob_name(gguf: Path) -> str:
    return f"sha256-{hashlib.sha256(gguf.read_bytes()).hexdigest()}"


# ---- deleting ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1"])
@pytest.mark.parametrize("spelling", ["./blobs/{}", "blobs/{}", "{root}/blobs/{}", "./blobs/{} "])
def test_an_upload_that_another_modelfile_names_is_kept(root: Path, gguf: Path, encoding: str, spelling: str) -> None:
    """Whatever its encoding is, and also where it cannot be read as a Modelfile."""
    text = f"FROM {spelling.format(blob_name(gguf), root=root)}\nSYSTEM café\n"
    (root / "other.modelfile").write_bytes(text.encode(encoding))
    (root / "mine.modelfile").write_text(f"FROM ./blobs/{blob_name(gguf)}\n")
    FolderStore(root).delete("mine")
    assert (root / "blobs" / blob_name(gguf)).is_file()
    FolderStore(root).delete("other")
    assert not (root / "blobs" / blob_name(gguf)).exists()


def test_an_upload_that_a_link_leads_to_is_kept(root: Path, gguf: Path) -> None:
    try:
        (root / "linked.gguf").symlink_to(Path("blobs") / blob_name(gguf))
    except OSError as error:  # Windows, without the right to
        pytest.skip(f"no symbolic links here: {error}")
    (root / "mine.modelfile").write_text(f"FROM ./blobs/{blob_name(gguf)}\n")
    FolderStore(root).delete("mine")
    assert FolderStore(root).get("linked").gguf.is_file()


@pytest.mark.parametrize("raw", [b"FROM \xe9", b"nonsense", b"FROM nosuch", b""])
def test_a_broken_modelfile_can_be_deleted(root: Path, raw: bytes) -> None:
    (root / "broken.modelfile").write_bytes(raw)
    FolderStore(root).delete("broken")
    with pytest.raises(NotFound):
        FolderStore(root).delete("broken")


def test_what_a_new_model_of_that_name_no_longer_uses_is_removed(root: Path, gguf: Path, tmp_path: Path) -> None:
    store, library = FolderStore(root), Library(tmp_path / "library")
    for body in ({"files": {"x.gguf": blob_name(gguf).replace("-", ":")}}, {"from": "base"}):
        made = creating.prepare({"model": "mine", **body}, store, library)
        store.create(made.name, made.body)
    assert store.get("mine").gguf == root / "base.gguf" and not list((root / "blobs").iterdir())


# ---- copying ----


def answers(store: FolderStore, name: str) -> tuple[object, ...]:
    """All that makes a model answer as it does."""
    m = store.get(name)
    parts = (m.gguf, m.steering, dict(m.parameters), m.template, m.system, m.messages, m.adapters, m.projectors, dict(m.vectors))
    return (*parts, tuple(one for one in m.licenses if expression.of_license(one) is None))


MODELFILES = {
    "plain text": b"FROM base\nPARAMETER steering mood:0.3\nSYSTEM Hush.\nPARAMETER stop a\nPARAMETER stop b\n",
    "UTF-16": "FROM base\nSYSTEM be käd\nPARAMETER top_k 3\n".encode("utf-16"),
    "a mark": "\ufeffFROM base\nSYSTEM é\n".encode(),
    "several lines": b'FROM base\nTEMPLATE """{{ .Prompt }}\n"x"\n"""\nMESSAGE user "a\nb"\nLICENSE """one\n"two\\""""\n',
    "carrier lines": b'FROM base\nLICENSE MIT\nLICENSE "steering: mood:0.5"\n',
    "files": b"FROM ./base.gguf\nFROM extra.bin\nADAPTER extra.bin\nADAPTER ./extra.bin\n",
}


@pytest.mark.parametrize("raw", MODELFILES.values(), ids=MODELFILES)
@pytest.mark.parametrize("source", ["src", "base"])
def test_a_copy_answers_as_its_source(root: Path, raw: bytes, source: str) -> None:
    """Also a copy of a model that is FROM the GGUF of its own name, of which it would otherwise be made twice over."""
    (root / "extra.bin").write_bytes(b"x")
    (root / f"{source}.modelfile").write_bytes(raw)
    store = FolderStore(root)
    before = answers(store, source)
    for target in ("copy", "me/copy:v2"):
        store.copy(source, parse_name(target))
        assert answers(store, target) == before
    store.copy("copy", parse_name("again"))
    store.delete(source)
    if source == "src":
        store.delete("copy")
    assert answers(store, "again") == before


@pytest.mark.parametrize("target", ["src", "SRC", "Src:latest", "library/src"])
def test_a_model_copied_onto_itself_is_as_it_was(root: Path, target: str) -> None:
    path = root / "src.modelfile"
    path.write_bytes("FROM base\nPARAMETER steering +mood:0.3\n".encode("utf-16"))
    FolderStore(root).copy("src", parse_name(target))
    assert path.read_bytes() == "FROM base\nPARAMETER steering +mood:0.3\n".encode("utf-16")
    assert [p.name for p in root.glob("*.modelfile")] == ["src.modelfile"]


def test_names_have_one_file_whatever_their_case(root: Path, tmp_path: Path) -> None:
    """So that deleting one does not delete, or bring to light, another."""
    store, library = FolderStore(root), Library(tmp_path / "library")
    (root / "one.modelfile").write_text("FROM base\nSYSTEM one\n")
    (root / "two.modelfile").write_text("FROM base\nSYSTEM two\n")
    store.copy("one", parse_name("TWO"))
    assert store.get("two").system == "one"
    made = creating.prepare({"model": "Two", "from": "base", "system": "three"}, store, library)
    store.create(made.name, made.body)
    assert store.get("two").system == "three" and len(list(root.glob("*.modelfile"))) == 2
    store.delete("tWo")
    assert [str(n) for n in store.names()] == ["base:latest", "one:latest"]


# ---- paths ----


def test_a_folder_named_from_here(root: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--folder models`` and ``--folder $PWD/models`` are the same, and what is created can be moved with its folder."""
    monkeypatch.chdir(tmp_path)
    store, library = FolderStore(Path("models")), Library(tmp_path / "library")
    digest = blob_name(gguf).replace("-", ":")
    for body in (
        {"model": "one", "from": "base", "adapters": {"l.gguf": digest}},
        {"model": "two", "from": "one", "system": "x"},
    ):
        made = creating.prepare(body, store, library)
        store.create(made.name, made.body)
    store.copy("two", parse_name("three"))
    monkeypatch.chdir("/")
    assert store.get("two").gguf == root / "base.gguf" and store.get("two").adapters == (root / "blobs" / blob_name(gguf),)
    moved = root.rename(tmp_path / "elsewhere")
    for name in ("two", "three"):
        found = FolderStore(moved).get(name)
        assert (found.gguf, found.adapters) == (moved / "base.gguf", (moved / "blobs" / blob_name(gguf),))


def test_home_folders_in_modelfiles(root: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (home / "x.gguf").write_bytes(gguf.read_bytes())
    (root / "t.modelfile").write_text("FROM ~/x.gguf\nFROM ~/x.gguf\nADAPTER ~/x.gguf\n")
    model = FolderStore(root).get("t")
    assert (model.gguf, model.adapters, model.projectors) == (home / "x.gguf", (home / "x.gguf",), (home / "x.gguf",))
    assert FolderStore(Path("~")).root == home


@pytest.mark.parametrize("line", ["FROM ~nobodyhere/x.gguf", "FROM base\nADAPTER ~nobodyhere/x", "FROM base\nFROM ~nobodyhere/x"])
def test_users_that_are_not_there(root: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is as it is written then, as in a shell."""
    (root / "t.modelfile").write_text(line)
    with pytest.raises(SteerError, match="~nobodyhere"):
        FolderStore(root).get("t")
    assert store_root({"OLLAMA_MODELS": "~nobodyhere/x"}) == Path("~nobodyhere/x")
    assert serve_options(("--folder", "~nobodyhere/x"))[1] == os.path.abspath("~nobodyhere/x")
    assert FolderStore(Path("~nobodyhere/x")).root == Path("~nobodyhere/x").absolute()
    with pytest.raises(SteerError, match="there is no folder"):
        from steer_plugins_ollama.serving import ServeOptions, make_service

        make_service(ServeOptions(folder=Path("~nobodyhere/x")))


@pytest.mark.parametrize("raw", [b"FROM base\nSYSTEM caf\xe9\n", b"FROM base\nSYSTEM \xff\n"])
def test_a_modelfile_that_is_not_unicode_is_refused(root: Path, raw: bytes) -> None:
    (root / "latin.modelfile").write_bytes(raw)
    with pytest.raises(ModelError, match=r"latin\.modelfile is not UTF-8: save it as UTF-8"):
        FolderStore(root).get("latin")


# ---- the listing ----


def test_what_is_listed_can_answer(root: Path, gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    import gguf as library

    data = gguf.read_bytes()
    (root / "BIG.GGUF").write_bytes(data)
    (root / "calm.Modelfile").write_text("FROM big\n")
    for name, part in (("cut", data[:-100]), ("header", data[:900_000]), ("empty", b""), ("text", b"hello")):
        (root / f"{name}.gguf").write_bytes(part)
    (root / "m-00002-of-00002.gguf").write_bytes(data)
    (root / "Odd Name.gguf").write_bytes(data)
    (root / "._base.gguf").write_bytes(b"x")  # what macOS leaves on foreign disks
    (root / "Base.gguf").write_bytes(data) if not (root / "BASE.gguf").exists() else None
    (root / "adrift.modelfile").write_text("FROM ./nosuch.gguf\n")
    (root / "of-a-vector.modelfile").write_text("FROM vector\n")
    writer = library.GGUFWriter(root / "vector.gguf", "controlvector")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    writer = library.GGUFWriter(root / "lora.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    store = FolderStore(root)
    log._told.clear()
    with caplog.at_level(logging.WARNING, logger="steer.ollama"):
        assert [str(n).lower() for n in store.names()] == ["base:latest", "big:latest", "calm:latest"]
        told = caplog.text
        for file in ("cut", "header", "empty", "text", "Odd Name", "vector", "lora", "adrift", "of-a-vector"):
            assert told.count(f"{file}.") >= 1, file
        assert "_base" not in told and "00002" not in told and "rename it" in told
        store.names()
        assert caplog.text == told, "once"
    with pytest.raises(ModelError, match="vector.gguf is a control vector, not a language model"):
        store.get("vector")
    with pytest.raises(ModelError, match="lora.gguf is an adapter"):
        store.get("lora")
    with pytest.raises(ModelError, match="truncated"):
        store.get("cut")


def test_the_shards_of_a_model_are_one_model(root: Path, gguf: Path) -> None:
    """A first shard whose others are missing cannot answer."""
    (root / "m-00001-of-00002.gguf").write_bytes(gguf.read_bytes())
    assert [str(n) for n in FolderStore(root).names()] == ["base:latest"]
    (root / "m-00002-of-00002.gguf").write_bytes(gguf.read_bytes())
    store = FolderStore(root)
    assert [str(n) for n in store.names()] == ["base:latest", "m-00001-of-00002:latest"]
    assert store.get("m-00001-of-00002").size == 2 * gguf.stat().st_size
    with pytest.raises(NotFound):
        store.get("m-00002-of-00002")


def test_both_listings_are_the_same(root: Path, tmp_path: Path, gguf: Path) -> None:
    from steer_plugins_ollama.pool import Pool
    from steer_plugins_ollama.service import Service

    from .ollama_standins import running

    (root / "cut.gguf").write_bytes(gguf.read_bytes()[:900_000])
    (root / "calm.modelfile").write_text("FROM base\n")
    with running(lambda: Service(FolderStore(root), Pool(), Library(tmp_path))) as (client, _):
        tags = [m["name"] for m in client.get("/api/tags").json()["models"]]
        assert tags == [m["id"] for m in client.get("/v1/models").json()["data"]] == ["base:latest", "calm:latest"]
        answer = client.post("/api/generate", json={"model": "cut", "prompt": "hi"})
        assert answer.status_code == 400 and "truncated" in json.loads(answer.text)["error"]
    with pytest.raises(BadRequest):
        FolderStore(root).get("Odd Name")
