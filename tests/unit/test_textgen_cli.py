"""`steer textgen`, on folders laid out as a checkout and as portable builds are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from steer_plugins.cli.textgen import SCRIPT, find_place, textgen
from steer_plugins.errors import SteerError

ROOT = Path(__file__).parents[2]


def webui(root: Path) -> Path:
    (root / "modules").mkdir(parents=True)
    (root / "modules" / "extensions.py").touch()
    (root / "server.py").touch()
    return root


def run(*args: object) -> Result:
    return CliRunner().invoke(textgen, [str(arg) for arg in args], catch_exceptions=True)


def test_install_status_uninstall(tmp_path: Path) -> None:
    root = webui(tmp_path / "webui")
    script = root / "user_data" / "extensions" / "steering" / "script.py"
    installed = run("install", "--dir", root)
    assert installed.exit_code == 0 and "--extensions steering" in installed.output
    assert script.read_text("utf-8") == SCRIPT
    (script.parent / "__pycache__").mkdir()
    (script.parent / "__pycache__" / "script.pyc").touch()
    facts = json.loads(run("status", "--dir", root, "--json").output)
    assert facts["installed"] and facts["script"] == str(script) and facts["python"] is None
    assert run("install", "--dir", root).exit_code == 0  # again
    assert run("uninstall", "--dir", root).exit_code == 0
    assert not script.parent.exists()
    again = run("uninstall", "--dir", root)
    assert isinstance(again.exception, SteerError) and "nothing to remove" in str(again.exception)


def test_the_folder_to_copy_holds_the_same_script() -> None:
    assert (ROOT / "integrations" / "textgen_webui" / "steering" / "script.py").read_text("utf-8") == SCRIPT


def test_another_extension_of_the_name_is_left_alone(tmp_path: Path) -> None:
    root = webui(tmp_path)
    script = root / "user_data" / "extensions" / "steering" / "script.py"
    script.parent.mkdir(parents=True)
    script.write_text("params = {}\n")
    for command in ("install", "uninstall"):
        assert "another extension" in str(run(command, "--dir", root).exception)
    assert script.read_text() == "params = {}\n"


def test_settings_beside_the_script_stay(tmp_path: Path) -> None:
    root = webui(tmp_path)
    run("install", "--dir", root)
    kept = root / "user_data" / "extensions" / "steering" / "notes.txt"
    kept.touch()
    assert run("uninstall", "--dir", root).exit_code == 0 and kept.exists()


@pytest.mark.parametrize(
    ("program", "folders", "data"),
    [
        ("webui", ["webui/user_data"], "webui/user_data"),
        ("webui", ["webui/portable_env", "webui/user_data"], "webui/user_data"),
        ("build/app", ["build/portable_env", "build/user_data"], "build/user_data"),
        ("build/webui", ["build/webui/portable_env", "user_data", "build/app"], "user_data"),
    ],
)
def test_where_user_data_is(tmp_path: Path, program: str, folders: list[str], data: str) -> None:
    root = webui(tmp_path / program)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    assert find_place(root).user_data == tmp_path / data


def test_a_folder_above_a_portable_program_will_do(tmp_path: Path) -> None:
    assert find_place(webui(tmp_path / "app").parent).root == tmp_path / "app"
    with pytest.raises(SteerError, match="server.py"):
        find_place(tmp_path / "nothing")


def test_user_data_may_be_named(tmp_path: Path) -> None:
    root, data = webui(tmp_path / "webui"), tmp_path / "data"
    assert "is not a folder" in str(run("install", "--dir", root, "--user-data-dir", data).exception)
    data.mkdir()
    assert run("install", "--dir", root, "--user-data-dir", data).exit_code == 0
    assert (data / "extensions" / "steering" / "script.py").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for Python is a script with a #! line")
def test_a_python_without_the_package_is_said(tmp_path: Path) -> None:
    root = webui(tmp_path)
    python = root / "installer_files" / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert f"{python} -m pip install" in "".join(run("install", "--dir", root).output.split("\n"))
    assert json.loads(run("status", "--dir", root, "--json").output)["importable"] is False
