"""The command line as a user meets it: help, exit codes, one sentence for each error; `steer show`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest

import steer_plugins
from steer_plugins import __version__
from steer_plugins.cli import common
from steer_plugins.cli import main as cli_main
from steer_plugins.cli.main import main
from steer_plugins.errors import ModelError, SteerError
from steer_plugins.plugins.manager import reset
from steer_plugins.steering.vector import ModelIdentity, SteeringVector
from steer_plugins.store.library import Library
from steer_plugins.store.vectorfile import write_vector

N = 8
MODEL = ModelIdentity("llama", 40, N, "a" * 64, "b" * 64, name="Tiny [bold]Llama[/bold]")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No library, plugins or debugging of whoever runs the tests."""
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("STEER_PLUGINS", "")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("STEER_DEBUG", raising=False)
    reset()
    yield
    reset()


@pytest.fixture
def failing(monkeypatch):
    """A command that raises what it is told to."""

    def install(error: BaseException) -> None:
        @click.command()
        def fail() -> None:
            raise error

        monkeypatch.setitem(cli_main.cli.commands, "fail", fail)

    return install


def steer(*arguments: str, environment: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(steer_plugins.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        capture_output=True,
        text=True,
        **options,
    )


# --- help and version


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"steer {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_lists_commands_and_an_example(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for words in ("Usage: steer", "  show ", "  plugins ", "  doctor ", "  build ", "steer generate --steer mood:0.8"):
        assert words in out


def test_no_command_is_help_and_wrong_usage(capsys):
    assert main([]) == 2
    assert "Usage: steer" in "".join(capsys.readouterr())


def test_help_imports_nothing_heavy():
    code = "import sys; from steer_plugins.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    done = steer("-c", code)
    modules = done.stdout.splitlines()[-1]
    assert "Usage: steer" in done.stdout
    for heavy in ("'numpy'", "'gguf'", "'llama_cpp'", "'safetensors'"):
        assert heavy not in modules, f"`steer --help` imports {heavy}"


# --- errors


def test_wrong_usage(capsys):
    assert main(["shw"]) == 2
    assert "no such command 'shw'" in capsys.readouterr().err
    assert main(["show", "--colour"]) == 2
    assert "--colour" in capsys.readouterr().err


def test_errors_are_one_sentence_and_the_errors_exit_code(failing, capsys):
    failing(ModelError("there is no model file x.gguf"))
    assert main(["fail"]) == 1
    assert capsys.readouterr() == ("", "steer: there is no model file x.gguf\n")

    class Special(SteerError):
        exit_code = 7

    failing(Special("special"))
    assert main(["fail"]) == 7


def test_the_system_s_errors_are_sentences_too(failing, capsys):
    failing(OSError(28, "No space left on device", "/some/file"))
    assert main(["fail"]) == 1
    assert capsys.readouterr().err == "steer: No space left on device: /some/file\n"


def test_a_bug_is_called_a_bug(failing, capsys, monkeypatch):
    failing(ValueError("first\nsecond"))
    assert main(["fail"]) == 70
    err = capsys.readouterr().err
    assert err == "steer: this is a bug: ValueError: first second (set STEER_DEBUG=1 to see where)\n"
    monkeypatch.setenv("STEER_DEBUG", "1")
    assert main(["fail"]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and "raise error" in err and err.count("this is a bug") == 1


def test_ctrl_c_is_quiet(failing, capsys):
    failing(KeyboardInterrupt())
    assert main(["fail"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_question_answered_with_no(failing, capsys):
    failing(click.exceptions.Abort())
    assert main(["fail"]) == 1
    assert capsys.readouterr().err == "steer: stopped\n"


def test_exit_codes_of_commands(failing):
    failing(click.exceptions.Exit(3))
    assert main(["fail"]) == 3
    failing(SystemExit(4))
    with pytest.raises(SystemExit):
        main(["fail"])


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_error(tmp_path):
    for index in range(300):
        vector = SteeringVector(f"v{index}", {(0, "resid_post"): np.ones(N)})
        Library(tmp_path / "library").put(vector, MODEL)
    assert read_by_nobody("-m", "steer_plugins", "show") == (1, "")
    # Here nothing is written before the buffer is flushed at the end.
    code = """
import sys
from steer_plugins.cli.main import cli, main
cli.command("few")(lambda: print("words"))
sys.exit(main(["few"]))
"""
    assert read_by_nobody("-c", code) == (1, "")


def read_by_nobody(*arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of Python with a stdout that is closed at the other end."""
    path = os.pathsep.join([str(Path(steer_plugins.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


def test_text_that_the_terminal_cannot_show_does_not_stop_it(tmp_path):
    identity = replace(MODEL, name="模型 ✓")
    Library(tmp_path / "library").put(SteeringVector("v", {(0, "resid_post"): np.ones(N)}), identity)
    done = steer("-m", "steer_plugins", "show", environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == "" and "?? ?" in done.stdout


def test_plugin_warnings_are_sentences(monkeypatch, capsys):
    monkeypatch.setenv("STEER_PLUGINS", "nowhere")
    assert main(["plugins"]) == 0
    out, err = capsys.readouterr()
    assert err == (
        "steer: warning: the plugin 'nowhere' (STEER_PLUGINS) is not used: "
        "STEER_PLUGINS names it, but no such plugin is installed\n"
    )
    assert "nowhere" in out


def test_list_of_plugins(capsys):
    assert main(["plugins", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["plugins"]}
    assert listed["steer_plugins.cli.show"]["hooks"] == ["register_commands"]
    assert "register_formats" in listed["steer_plugins.plugins.builtin"]["hooks"]
    assert main(["plugins"]) == 0
    assert "steer_plugins.cli.show" in capsys.readouterr().out


# --- steer show


@pytest.fixture
def vector() -> SteeringVector:
    return SteeringVector(
        "mood",
        {(layer, "resid_post"): np.random.default_rng(layer).normal(size=N) for layer in range(10, 31)},
        {(layer, "resid_post"): 1234.5 + layer for layer in range(10, 31)},
        identity=MODEL,
        default_scope="response",
        provenance={"method": "mean-difference", "trait": {"name": "mood", "prompts": 40}, "evil": "\x1b[31m"},
        calibration={"strength": 0.3, "sweep": [{"dose": 0.1, "score": 1.25, "ok": True}, {"dose": 0.2, "score": None}]},
    )


def test_show_prints_everything(vector, tmp_path, capsys):
    Library().put(vector, MODEL)
    path = tmp_path / "calm.safetensors"
    write_vector(vector, path)
    pages = []
    for spec in ("mood", str(path)):
        assert main(["show", spec]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        pages.append(out)
    assert pages[0] == pages[1]
    lines = [line.split() for line in out.splitlines()]
    for line in (
        ["name", "mood"],
        ["op", "add"],
        ["scope", "response"],
        ["model", "llama", "40x8", '"Tiny', '[bold]Llama[/bold]"'],
        ["layer", "site", "scale"],
        ["10", "resid_post", "1.058e+04"],
        ["method", "mean-difference"],
        ["prompts", "40"],
        ["strength", "0.3"],
        ["dose", "score", "ok"],
        ["0.1", "1.25", "yes"],
    ):
        if line[0] != "10":
            assert line in lines, line
    assert ["30", "resid_post"] in [line[:2] for line in lines]
    assert "\x1b" not in out


def test_show_json(vector, tmp_path, capsys):
    path = tmp_path / "calm.safetensors"
    write_vector(vector, path)
    assert main(["show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["identity"] == MODEL.to_dict() and shown["calibration"] == vector.calibration
    assert shown["directions"][0] == {"layer": 10, "site": "resid_post", "scale": vector.scales[10, "resid_post"]}
    assert shown["content_sha256"] == vector.content_hash
    assert {"name", "op", "default_scope", "n_embd", "provenance"} <= shown.keys()


def test_show_of_what_is_not_there(capsys):
    assert main(["show", "mood"]) == 1
    assert capsys.readouterr().err == "steer: no vector 'mood' in the library: fit it with: steer train mood\n"
    assert main(["show", "./mood.safetensors"]) == 1
    assert "no vector file" in capsys.readouterr().err
    assert main(["show", "mood", "--model", "none.gguf"]) == 1
    assert capsys.readouterr().err == "steer: there is no model file none.gguf\n"


def test_show_checks_the_fit_with_a_model(vector, tmp_path, capsys):
    from steer_plugins import testing
    from steer_plugins.store.identity import identity_of_gguf

    (model,) = testing.write("llama", tmp_path / "tiny.gguf")
    identity = identity_of_gguf(model)
    fits = SteeringVector("mine", {(0, "resid_post"): np.ones(identity.n_embd)})
    Library().put(fits, identity)
    Library().put(vector, MODEL)
    assert main(["show", "mine", "-m", str(model)]) == 0
    assert identity.key in capsys.readouterr().out
    assert main(["show", "mood", "-m", str(model)]) == 1
    assert f"no vector 'mood' for this model ({identity.label})" in capsys.readouterr().err
    assert main(["show", "-m", str(model), "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["vectors"]] == ["mine"]
    file = tmp_path / "mood.safetensors"
    write_vector(vector, file)
    assert main(["show", str(file), "-m", str(model)]) == 1
    assert "n_layer 40 vs" in capsys.readouterr().err


def test_show_lists_the_library_damaged_files_included(vector, tmp_path, capsys):
    assert main(["show"]) == 0
    assert capsys.readouterr().out == f"No vectors in {tmp_path / 'library'} yet: fit one with: steer train mood\n"
    Library().put(vector, MODEL)
    bad = Library().put(vector.replace(name="bad"), MODEL)
    bad.write_bytes(b"")
    assert main(["show"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["mood"]]
    assert line.split() == ["mood", "llama", "40x8", '"Tiny', '[bold]Llama[/bold]"', "add", "response", "10-30", "yes"]
    assert "not a safetensors file" in out
    assert main(["show", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["library"] == str(tmp_path / "library")
    assert "not a safetensors file" in listed["vectors"][0]["error"]
    assert listed["vectors"][1]["layers"] == list(range(10, 31))


# --- what commands share


def test_engine_options(monkeypatch, tmp_path):
    seen: list[common.EngineOptions] = []

    @click.command()
    @common.engine_options
    @common.json_option
    @click.argument("prompt")
    def command(engine: common.EngineOptions, as_json: bool, prompt: str) -> None:
        seen.append(engine)
        assert as_json and prompt == "hello"

    command.main(["-m", "x.gguf", "-c", "512", "-ngl", "-1", "-t", "2", "--json", "hello"], standalone_mode=False)
    command.main(["--json", "hello"], standalone_mode=False)
    assert seen == [common.EngineOptions("x.gguf", 512, -1, 2), common.EngineOptions()]
    with pytest.raises(ModelError, match="there is no model file x.gguf"):
        _ = seen[0].path
    with pytest.raises(click.BadParameter):
        command.main(["-t", "0", "hello"], standalone_mode=False)
    (tmp_path / "m.gguf").touch()
    assert common.model_path(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"


def test_json_is_valid_whatever_is_in_it(capsys):
    common.print_json({"a": float("nan"), "b": np.float32(0.5), "c": np.arange(2), "d": Path("x"), 1: (None, True)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": 0.5, "c": [0, 1], "d": "x", "1": [None, True]}


def test_tables_are_text_and_nothing_is_cut(capsys):
    common.print_table(("a", "[b]"), [(1.23456789, "[red]x[/red]" + "y" * 300), (2, None)], title="T")
    out = capsys.readouterr().out
    assert out.startswith("T\n") and "1.235" in out and "[red]x[/red]" + "y" * 300 in out and "[b]" in out
