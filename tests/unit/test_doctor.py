"""`steer doctor`: it always answers, says what to do about what is missing, and its exit code is the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from steer_plugins.cli.doctor import doctor as command
from steer_plugins.native import API_VERSION
from steer_plugins.runtime import demo_model as models
from steer_plugins.runtime import doctor, locate, tools
from steer_plugins.runtime.bindings import Bindings, library_names
from steer_plugins.runtime.host import HostGgml

from .test_runtime_locate import make_runtime
from .test_runtime_models import write_gguf


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    for name in ("STEER_RUNTIME", "STEER_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(models, "_in_wheel", lambda: None)
    bindings_are(monkeypatch, None)
    monkeypatch.setattr(tools, "find_compiler", lambda *_: None)
    monkeypatch.setattr(doctor, "probe", lambda lib: {"steer": "1", "devices": [{"name": "CPU", "description": "x"}]})
    return tmp_path


def bindings_are(monkeypatch: pytest.MonkeyPatch, found: Bindings | None) -> None:
    monkeypatch.setattr(locate, "find_bindings", lambda: found)
    monkeypatch.setattr(doctor, "find_bindings", lambda: found)


def ask(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(command, ["--json", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, json.loads(result.stdout)


def states(answer: dict[str, Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in answer["findings"]:
        found.setdefault(finding["topic"], set()).add(finding["state"])
    return found


def test_an_empty_machine() -> None:
    code, answer = ask()
    assert code == 1 and answer["works"] is False
    found = states(answer)
    for topic in ("bindings", "runtime", "model", "compiler"):
        assert found[topic] == {"missing"}, topic
    assert all(finding["advice"] for finding in answer["findings"] if finding["state"] == "missing")
    assert any("pip install" in advice for advice in answer["todo"]) and "steer build" in answer["todo"]
    assert answer["runtime"] is None and answer["bindings"] is None and answer["model"] is None


def test_a_working_machine(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings_are(monkeypatch, Bindings("0.3.36", machine / "llama_cpp", None))
    runtime = make_runtime(machine / "cache" / "runtime" / "a")
    model = write_gguf(machine / "m.gguf")
    code, answer = ask("--model", str(model))
    assert code == 0 and answer["works"] is True
    assert answer["runtime"]["path"] == str(runtime) and answer["runtime"]["current_patch"] is True
    assert answer["model"] == {
        "path": str(model),
        "architecture": "llama",
        "name": "a model",
        "n_layer": 3,
        "n_embd": 64,
        "files": 1,
    }
    assert answer["devices"][0]["name"] == "CPU"
    assert states(answer)["compiler"] == {"note"}  # not needed any more
    text = CliRunner().invoke(command, ["--model", str(model)])
    assert text.exit_code == 0 and text.stdout.endswith("Steering works.\n") and str(runtime) in text.stdout


@pytest.mark.parametrize("what", ["model", "other version", "no patch inside", "broken", "old patch", "wrong path"])
def test_what_stops_steering(machine: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    bindings_are(monkeypatch, Bindings("0.3.36", machine / "llama_cpp", None))
    runtime = make_runtime(machine / "cache" / "runtime" / "a", **({"patch": "old"} if what == "old patch" else {}))
    model = write_gguf(machine / "m.gguf")
    topic = "runtime"
    if what == "model":
        topic = "model"
        model.write_bytes(model.read_bytes()[:-10])
    elif what == "other version":
        monkeypatch.setenv("STEER_RUNTIME", str(make_runtime(machine / "other", version="0.3.35")))
    elif what == "wrong path":
        monkeypatch.setenv("STEER_RUNTIME", str(machine / "none"))
    elif what in ("no patch inside", "broken"):
        topic = "devices"
        found = {"steer": None, "devices": []} if what == "no patch inside" else {"error": "wrong ELF class"}
        monkeypatch.setattr(doctor, "probe", lambda lib: found)
    code, answer = ask("--model", str(model))
    assert code == 1 and "missing" in states(answer)[topic], runtime


def test_another_ggml_is_noted(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = machine / "site"
    (site / "include").mkdir(parents=True)
    (site / "include" / "ggml.h").write_text("")
    lib = site / "llama_cpp" / "lib"
    lib.mkdir(parents=True)
    for base in ("ggml", "ggml-base", "llama"):
        (lib / library_names(base)[0]).write_text(base)
    installed = Bindings("0.3.36", site / "llama_cpp", site)
    bindings_are(monkeypatch, installed)
    files = {path.name: doctor.file_sha256(path) for path in installed.ggml_files()}
    folder = make_runtime(machine / "cache" / "runtime" / "a", ggml={"mode": "copy", "files": files})
    for path in installed.ggml_files():
        (folder / "lib" / path.name).write_text(path.read_text())
    model = write_gguf(machine / "m.gguf")
    code, answer = ask("--model", str(model))
    assert code == 0 and states(answer)["runtime"] == {"ok"} and answer["bindings"]["own_library"] is True
    (lib / library_names("ggml")[0]).write_text("with CUDA now")
    code, answer = ask("--model", str(model))
    assert code == 0 and states(answer)["runtime"] == {"ok", "note"}


def test_an_installed_wheel(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings_are(monkeypatch, Bindings("0.3.36", machine / "llama_cpp", None))
    api = f"llama-steer {API_VERSION}"
    package = make_runtime(machine / "site" / "steer_plugins_runtime", wheel="0.3.36+p1", steer_api=api)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(package.parent))
    cached = make_runtime(machine / "cache" / "runtime" / "a")
    model = str(write_gguf(machine / "m.gguf"))
    code, answer = ask("--model", model)
    assert code == 0 and answer["runtime"]["path"] == str(package) and answer["runtime"]["wheel"] == "0.3.36+p1"
    meta = json.loads((package / "runtime.json").read_text())
    (package / "runtime.json").write_text(json.dumps({**meta, "version": "0.3.35"}))
    code, answer = ask("--model", model)
    assert code == 0 and answer["runtime"]["path"] == str(cached) and states(answer)["runtime"] == {"ok", "note"}
    (package / "runtime.json").write_text(json.dumps({**meta, "steer_api": "llama-steer 999"}))
    code, answer = ask("--model", model)
    assert code == 1 and any("llama-steer 999" in finding["text"] for finding in answer["findings"])
    assert any("pip uninstall steer-plugins-runtime" in advice for advice in answer["todo"])


def test_runtimes_on_the_ggml_of_other_programs(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings_are(monkeypatch, Bindings("0.3.36", machine / "llama_cpp", None))
    make_runtime(machine / "cache" / "runtime" / "newest", built_at=9)
    host = machine / "host"
    host.mkdir()
    for base in ("ggml", "ggml-base"):
        (host / library_names(base)[0]).write_text(base)
    ggml = {"mode": "copy", "host": str(host), "version": "0.25.3", "id": HostGgml(host, host).ggml_id()}
    runtime = make_runtime(machine / "cache" / "runtime" / "a", ggml=ggml)
    model = str(write_gguf(machine / "m.gguf"))
    code, answer = ask("--model", model)
    expected = {"host": str(host), "path": str(runtime), "current_patch": True, "same_ggml": True, "server": None}
    assert code == 0 and answer["hosts"] == [expected] and states(answer)["host"] == {"ok"}
    (host / library_names("ggml")[0]).write_text("an upgrade")
    code, answer = ask("--model", model)
    assert code == 0 and answer["hosts"][0]["same_ggml"] is False and states(answer)["host"] == {"note"}
    assert f"steer build --on {host}" in answer["todo"]
