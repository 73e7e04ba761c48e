"""`steer textgen build` and `steer ollama build`: finding the libraries of a host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from steer_plugins_ollama import libraries, plugin

from steer_plugins.cli import build as build_module
from steer_plugins.cli import textgen
from steer_plugins.errors import BuildError, SteerError


def ggml(folder: Path, name: str = "libggml-base.so") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("")
    return folder


def test_ollamas_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ggml(tmp_path / "lib" / "ollama")
    assert libraries.find_libraries(root, None) == root
    (root / "cuda_v12").mkdir()  # empty
    one = ggml(root / "cuda_v13", "libggml-cuda.so")
    assert libraries.find_libraries(root, None) == one
    assert libraries.find_libraries(root, "none") == root
    ggml(root / "vulkan", "libggml-vulkan.so")
    with pytest.raises(BuildError, match="several kinds of GPU; name one with --gpu: cuda_v13, vulkan, or none"):
        libraries.find_libraries(root, None)
    assert libraries.find_libraries(root, "vulkan") == root / "vulkan"
    with pytest.raises(BuildError, match="has no back end 'rocm'; there is cuda_v13, vulkan"):
        libraries.find_libraries(root, "rocm")
    with pytest.raises(BuildError, match="name their folder with --dir"):
        libraries.find_libraries(tmp_path / "nowhere", None)
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text("")
    monkeypatch.setattr(libraries.shutil, "which", lambda name: str(program))
    assert libraries.find_libraries(None, "vulkan") == root / "vulkan"


def test_ollama_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(build_module, "build_runtime", lambda options, reporter: asked.append(options) or _Built(tmp_path))
    root = ggml(tmp_path / "ollama")
    done = CliRunner().invoke(plugin.ollama, ["build", "--dir", str(root), "--git", "/a/mirror"])
    assert done.exit_code == 0, done.output
    assert asked[0].on == root and asked[0].git == "/a/mirror" and str(tmp_path) in done.output


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for the webui's Python is a script with a #! line")
def test_textgen_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(build_module, "build_runtime", lambda options, reporter: asked.append(options) or _Built(tmp_path))
    webui = tmp_path / "webui"
    for name in ("server.py", "modules/extensions.py", "venv/bin/python"):
        (webui / name).parent.mkdir(parents=True, exist_ok=True)
        (webui / name).write_text("#!/bin/sh\necho /its/llama_cpp_binaries\n")
    python = webui / "venv/bin/python"
    python.chmod(0o755)
    done = CliRunner().invoke(textgen.textgen, ["build", "--dir", str(webui)])
    assert done.exit_code == 0, done.output
    assert asked[0].on == Path("/its/llama_cpp_binaries")
    python.write_text("#!/bin/sh\necho\n")
    done = CliRunner().invoke(textgen.textgen, ["build", "--dir", str(webui)])
    assert isinstance(done.exception, SteerError) and "has no llama_cpp_binaries to build on" in str(done.exception)


class _Built:
    reused = False
    seconds = 1.0

    def __init__(self, folder: Path) -> None:
        self.runtime = type("Runtime", (), {"path": folder})()
