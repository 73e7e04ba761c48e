"""A wheel of the project, in an environment of its own, is all a user needs beside llama-cpp-python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from steer_plugins.runtime.compiling import library_name

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT))
    (path,) = out.glob("steer_plugins-*.whl")
    return path


def run(*argv: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8", env=env)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_it_carries_the_patch_the_data_and_both_integrations(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "steer_plugins/cpp_patch/core.hooks",
        "steer_plugins/cpp_patch/llama-steer.h",
        "steer_plugins/cpp_patch/llama-steer.cpp",
        "steer_plugins/starter/index.json",
        "steer_plugins/training/traits/data/mood.json",
        "steer_plugins/training/traits/data/succinctness.json",
        "steer_plugins_ollama/__init__.py",
        "steer_plugins_textgen/__init__.py",
    ):
        assert name in names, name
    assert not [n for n in names if n.endswith((".gguf", ".pyc"))]
    libraries = [n for n in names if n.endswith((".so", ".dylib", ".dll"))]
    assert libraries == [f"steer_plugins/native/{library_name(ROOT / 'cpp_patch')}"], libraries
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and not wheel.name.endswith("any.whl")


def test_in_a_fresh_environment_it_finds_the_runtime_and_generates(wheel: Path, tmp_path: Path) -> None:
    """The environment sees the test environment's packages (bindings, demo model) but has our package from the wheel."""
    from steer_plugins.runtime import find_runtime
    from steer_plugins.runtime.demo_model import default_model_path

    runtime = find_runtime()
    assert runtime is not None, "run: steer build"
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    bin_ = venv / ("Scripts" if os.name == "nt" else "bin")
    python = bin_ / ("python.exe" if os.name == "nt" else "python")
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, str(wheel))
    # dependencies come from the environment that runs the tests; the editable install of the project must not
    deps = tmp_path / "deps"
    deps.mkdir()
    import click

    packages = Path(click.__file__).parents[1]
    for entry in packages.iterdir():
        if "steer_plugins" not in entry.name and not entry.name.startswith("__editable__"):
            (deps / entry.name).symlink_to(entry)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "STEER"))}
    env.update(PYTHONPATH=str(deps), STEER_MODEL=str(default_model_path()), STEER_LIBRARY=str(tmp_path / "library"))
    if "STEER_CACHE" in os.environ:
        env["STEER_CACHE"] = os.environ["STEER_CACHE"]

    where = run(str(python), "-c", "import steer_plugins; print(steer_plugins.__file__)", env=env).strip()
    assert Path(where).is_relative_to(Path(site).resolve()) or where.startswith(site)
    report = json.loads(run(str(python), "-m", "steer_plugins", "doctor", "--json", env=env))
    assert report["works"] is True
    text = run(str(python), "-m", "steer_plugins", "generate", "--max-tokens", "8", "Once upon a time", env=env)
    assert text.strip()
