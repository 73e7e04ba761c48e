"""Paths as people write them: ``~`` on every command that takes a file, and users that nobody knows."""

import os
import sys
from pathlib import Path

import click
import numpy as np
import pytest

from steer_plugins.cli.main import cli, main
from steer_plugins.paths import expand_path
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library, default_root
from steer_plugins.store.vectorfile import write_vector
from steer_plugins.training.traits import load_trait

UNKNOWN = "~nobody-of-this-name/x.gguf"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("USERPROFILE" if sys.platform == "win32" else "HOME", str(tmp_path))
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    return tmp_path


def test_expand_path(home: Path) -> None:
    assert expand_path("~") == home and expand_path("~/a b.npz") == home / "a b.npz" == expand_path(home / "a b.npz")
    assert expand_path("a~b") == Path("a~b")
    assert expand_path(UNKNOWN) == Path(UNKNOWN)  # as a shell does


@pytest.mark.parametrize("arguments", [["show", "-m", UNKNOWN], ["generate", "-m", UNKNOWN, "hi"], ["show", UNKNOWN]])
def test_an_unknown_user_is_a_missing_file(home: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert UNKNOWN in capsys.readouterr().err.replace(os.sep, "/")


def test_an_unknown_user_in_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_LIBRARY", UNKNOWN)
    assert default_root() == Path(UNKNOWN).absolute()


def test_home_in_names_of_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vector = SteeringVector("calm", {(1, "resid_post"): np.ones(8, np.float32)})
    write_vector(vector, home / "calm.safetensors")
    assert Library(home / "none").resolve("~/calm.safetensors", None) == vector
    assert main(["show", "~/calm.safetensors"]) == 0
    assert main(["convert", "~/calm.safetensors", "~/calm.npz", "--lossy"]) == 0 and (home / "calm.npz").is_file()
    (home / "trait.json").write_bytes((Path(load_trait.__code__.co_filename).parent / "data" / "mood.json").read_bytes())
    assert load_trait("~/trait.json") == load_trait("mood")


def test_every_file_of_the_command_line_expands_the_home_folder() -> None:
    def commands(group: click.Group) -> list[click.Command]:
        inside = [group.get_command(context, name) for name in group.list_commands(context)]
        return [c for one in inside if one for c in (commands(one) if isinstance(one, click.Group) else [one])]

    context = click.Context(cli)
    ours = [c for c in commands(cli) if c.callback and c.callback.__module__.startswith("steer_plugins.")]
    plain = [f"{c.name} {p.name}" for c in ours for p in c.params if type(p.type) is click.Path]
    assert len(ours) > 15 and not plain
