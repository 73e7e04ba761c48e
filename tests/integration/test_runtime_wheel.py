"""A real runtime, packed, installed by pip into an environment of its own: doctor finds it, a model runs on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer_plugins import testing
from steer_plugins.runtime import find_runtime
from steer_plugins.runtime.locate import WHEEL_NAME

ROOT = Path(__file__).parents[2]

GENERATE = """
import sys
from steer_plugins import LocalEngine
with LocalEngine(sys.argv[1], n_threads=1) as engine:
    print(repr(engine.generate("a b c", max_tokens=6).text))
"""


def run(*argv: str, env: dict[str, str] | None = None, code: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8", env=env, cwd=cwd)
    assert done.returncode == code, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of a fresh environment that has nothing but the wheel."""
    runtime = find_runtime()
    assert runtime is not None, "run: steer build"
    if runtime.ggml_mode == "in-place":
        pytest.skip("a ggml that cannot be moved cannot be packed")
    base = tmp_path_factory.mktemp("runtime-wheel")
    build = (sys.executable, "-m", "steer_plugins", "build", "--wheel", "--runtime", str(runtime.path), "--json")
    wheel = json.loads(run(*build, "--out", str(base / "out"), env={**os.environ, "PYTHONPATH": search_path()}))["wheel"]
    venv = base / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    path = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(sys.executable, "-m", "pip", "--python", str(path), "install", "--quiet", "--no-index", "--no-deps", wheel)
    return str(path)


def search_path() -> str:
    return os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)])


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """The test environment's packages are visible (bindings, numpy), its runtimes and settings are not."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "STEER", "LLAMA", "MTMD", "LD_"))}
    model = testing.write("llama", tmp_path / "tiny.gguf")[0]
    return {**kept, "PYTHONPATH": search_path(), "STEER_CACHE": str(tmp_path / "cache"), "STEER_MODEL": str(model)}


def test_doctor_finds_it_and_a_model_runs(python: str, env: dict[str, str], tmp_path: Path) -> None:
    folder = Path(run(python, "-c", "import steer_plugins_runtime as r; print(r.folder())", env=env, cwd=tmp_path).strip())
    assert folder.is_relative_to(Path(python).parents[1].resolve())
    report = json.loads(run(python, "-m", "steer_plugins", "doctor", "--json", env=env, cwd=tmp_path))
    assert report["works"] is True and report["runtime"]["path"] == str(folder) and report["runtime"]["wheel"]
    assert report["devices"]
    text = run(python, "-c", GENERATE, env["STEER_MODEL"], env=env, cwd=tmp_path)
    assert text == run(sys.executable, "-c", GENERATE, env["STEER_MODEL"], env={**os.environ, "PYTHONPATH": search_path()})
    assert not (tmp_path / "cache").exists()  # nothing was built
    server = report["runtime"]["server"]
    if server:
        run(server, "--version", env=env, cwd=tmp_path)


def test_another_api_version_is_refused(python: str, env: dict[str, str], tmp_path: Path) -> None:
    folder = Path(run(python, "-c", "import steer_plugins_runtime as r; print(r.folder())", env=env, cwd=tmp_path).strip())
    path = folder / "runtime.json"
    content = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(content), "steer_api": "llama-steer 999"}), encoding="utf-8")
    try:
        report = json.loads(run(python, "-m", "steer_plugins", "doctor", "--json", env=env, cwd=tmp_path, code=1))
        refusal = next(finding for finding in report["findings"] if finding["topic"] == "runtime")
        assert refusal["state"] == "missing" and "llama-steer 999" in refusal["text"] and WHEEL_NAME in refusal["advice"]
        done = subprocess.run(
            [python, "-m", "steer_plugins", "generate", "hello"], capture_output=True, text=True, env=env, cwd=tmp_path
        )
        assert done.returncode == 1 and "llama-steer 999" in done.stderr and "Traceback" not in done.stderr
    finally:
        path.write_text(content, encoding="utf-8")


def test_pip_has_nothing_to_complain_about_and_removes_it(python: str, env: dict[str, str]) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python)
    assert WHEEL_NAME in run(*pip, "list", "--format", "json")
    files = [line.strip() for line in run(*pip, "show", "--files", WHEEL_NAME).splitlines()]
    assert any(line.endswith("LICENSE.llama.cpp") for line in files)
    run(*pip, "uninstall", "--yes", "--quiet", WHEEL_NAME)
    assert run(python, "-c", "import importlib.util as u; print(u.find_spec('steer_plugins_runtime'))").strip() == "None"
