"""``steer textgen``: puts the extension's one-line script into a text-generation-webui, and takes it out again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import SteerError
from ..plugins import hookimpl
from .common import FilePath, console, json_option, print_json

NAME = "steering"
PACKAGE = "steer_plugins_textgen"
SCRIPT = f"from {PACKAGE}.extension import *  # noqa: F403\n"

_PYTHONS = (
    "portable_env/bin/python3",
    "portable_env/python.exe",
    "installer_files/env/bin/python",
    "installer_files/env/python.exe",
    "venv/bin/python",
    ".venv/bin/python",
)


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer textgen``."""
    cli.add_command(textgen)


@dataclass(frozen=True)
class Place:
    """A text-generation-webui. ``root``: its program folder; ``user_data``: where it keeps what is the user's."""

    root: Path
    user_data: Path

    @property
    def script(self) -> Path:
        """Where our script goes: the webui looks there first, and its updates leave it alone."""
        return self.user_data / "extensions" / NAME / "script.py"

    @property
    def python(self) -> Path | None:
        """The Python that the webui brought, None when it has none of its own."""
        folders = (self.root, self.root.parent)
        return next((folder / name for folder in folders for name in _PYTHONS if (folder / name).is_file()), None)


def find_place(folder: Path) -> Place:
    """The webui in a folder: a checkout, or a portable build.

    Raises:
        SteerError: there is none.
    """
    for root in (folder, folder / "app", folder / "text-generation-webui"):
        if (root / "server.py").is_file() and (root / "modules" / "extensions.py").is_file():
            root = root.absolute()
            return Place(root, _user_data(root))
    raise SteerError(f"{folder} holds no text-generation-webui: give the folder that has its server.py")


def _user_data(root: Path) -> Path:
    """As the webui's own modules/paths.py finds it; portable builds keep it beside the program."""
    portable = any((folder / "portable_env").is_dir() for folder in (root, root.parent))
    places = [root.parent.parent / "user_data", root.parent / "user_data"] if portable else []
    if portable and not (root.parent / "app").is_dir():
        places = places[1:]
    return next((place for place in places if place.is_dir()), root / "user_data")


dir_option = click.option(
    "--dir", "folder", required=True, type=FilePath(path_type=Path), metavar="PATH", help="The webui's folder."
)
data_option = click.option(
    "--user-data-dir", type=FilePath(path_type=Path), metavar="PATH", help="The --user-data-dir that the webui is started with."
)


@click.group()
def textgen() -> None:
    """The Steering tab of text-generation-webui: install, build, uninstall, status."""


@textgen.command(epilog="\b\nExample:\n  steer textgen install --dir ~/text-generation-webui")
@dir_option
@data_option
def install(folder: Path, user_data_dir: Path | None) -> None:
    """Put the extension's script into a webui. Start the webui with --extensions steering afterwards."""
    from ..atomic import write_atomically

    place = _place(folder, user_data_dir)
    script = place.script
    if script.is_file() and not _is_ours(script):
        raise SteerError(f"{script} is another extension of this name: move it away first")
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(script, SCRIPT.encode())
    except OSError as error:
        raise SteerError(f"{script} cannot be written: {error.strerror or error}") from None
    out = console()
    out.print(f"Written: {script}", markup=False)
    if place.python is not None and not _importable(place.python):
        out.print(f"The webui's Python lacks the package: {place.python} -m pip install steer-plugins", markup=False)
    out.print(f"Start the webui with: --extensions {NAME}", markup=False)


@textgen.command()
@dir_option
@data_option
def uninstall(folder: Path, user_data_dir: Path | None) -> None:
    """Remove the script. Settings and presets in user_data/steering and all vectors stay."""
    script = _place(folder, user_data_dir).script
    if not script.is_file():
        raise SteerError(f"there is nothing to remove: {script} does not exist")
    if not _is_ours(script):
        raise SteerError(f"{script} is another extension of this name: it was left alone")
    try:
        script.unlink()
        left = [path for path in script.parent.iterdir() if path.name != "__pycache__"]
        if not left:
            for path in (script.parent / "__pycache__").glob("*.pyc"):
                path.unlink()
            for path in (script.parent / "__pycache__", script.parent):
                if path.is_dir():
                    path.rmdir()
    except OSError as error:
        raise SteerError(f"{script} cannot be removed: {error.strerror or error}") from None
    console().print(f"Removed: {script}", markup=False)


@textgen.command()
@dir_option
@data_option
@json_option
def status(folder: Path, user_data_dir: Path | None, as_json: bool) -> None:
    """Say whether the script is there, and whether the webui can import the package and start our llama-server."""
    from ..runtime import find_runtime

    place = _place(folder, user_data_dir)
    try:
        runtime = find_runtime(need_server=True)
        server, problem = (str(runtime.server), "") if runtime is not None else ("", "no steering llama-server: steer build")
    except SteerError as error:
        server, problem = "", str(error)
    facts: dict[str, Any] = {
        "root": str(place.root),
        "script": str(place.script),
        "installed": place.script.is_file() and _is_ours(place.script),
        "python": str(place.python) if place.python else None,
        "importable": _importable(place.python) if place.python else None,
        "server": server,
        "server_problem": problem,
    }
    if as_json:
        print_json(facts)
        return
    out = console()
    out.print(f"Webui:   {facts['root']}", markup=False)
    out.print(f"Script:  {facts['script'] if facts['installed'] else 'not installed: steer textgen install'}", markup=False)
    if place.python is None:
        out.print("Package: the webui has no Python of its own; install steer-plugins into the one that runs it", markup=False)
    else:
        lacks = f"{place.python} lacks it: {place.python} -m pip install steer-plugins"
        out.print(f"Package: {'importable' if facts['importable'] else lacks}", markup=False)
    out.print(f"Server:  {server or problem}", markup=False)


@textgen.command(epilog="\b\nExample:\n  steer textgen build --dir ~/text-generation-webui")
@dir_option
@click.option("--git", metavar="URL", help="The repository of the webui's llama.cpp (default: llama.cpp's own).")
@json_option
def build(folder: Path, git: str | None, as_json: bool) -> None:
    """Compile the steering llama-server on the GPU libraries of a webui, from the sources of its own llama.cpp."""
    from ..runtime import BuildOptions
    from .build import run_build

    place = find_place(folder)
    run_build(BuildOptions(on=_binaries(place.python or Path(sys.executable)), git=git), as_json)


def _binaries(python: Path) -> Path:
    """The folder of the webui's own llama-server. Raises SteerError when its Python has none."""
    code = (
        "import importlib.util as u; s = u.find_spec('llama_cpp_binaries'); print(s.submodule_search_locations[0] if s else '')"
    )
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise SteerError(f"{python} does not run: {str(error).splitlines()[0]}") from None
    found = done.stdout.strip()
    if done.returncode != 0 or not found:
        raise SteerError(
            f"{python} has no llama_cpp_binaries to build on: install the webui's requirements, or use steer build --on"
        )
    return Path(found)


def _place(folder: Path, user_data_dir: Path | None) -> Place:
    place = find_place(folder)
    if user_data_dir is None:
        return place
    if not user_data_dir.is_dir():
        raise SteerError(f"{user_data_dir} is not a folder: give the one that the webui was started with as --user-data-dir")
    return Place(place.root, user_data_dir.absolute())


def _is_ours(script: Path) -> bool:
    try:
        return script.stat().st_size < 10_000 and PACKAGE in script.read_text("utf-8", errors="replace")
    except OSError:
        return False


def _importable(python: Path) -> bool:
    try:
        done = subprocess.run([str(python), "-c", f"import {PACKAGE}"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
