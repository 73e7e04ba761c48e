"""What `steer build` was asked for, and what that means on this machine: sources, arguments, and whose ggml."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BuildError
from ..paths import expand_path
from .bindings import PINNED_VERSION, Bindings, find_bindings
from .cache import RUNTIME_FILE, digest
from .checkout import REPOSITORY, find_commit
from .host import SDIST_COMMITS, HostGgml, host_build, host_ggml
from .patching import Patch
from .sources import SourceOrigin, archive_origin, commit_origin, folder_origin, sdist_origin

RUNTIME_FORMAT = 1
"""Of a finished runtime's folder and its ``runtime.json``."""


@dataclass(frozen=True)
class BuildOptions:
    """What `steer build` was asked for. ``cmake_args`` are added to those of the environment's ``CMAKE_ARGS``;
    ``on`` is a host whose ggml is built upon (host.py), ``into`` the folder to put the runtime in (None: the cache).
    ``source`` is a folder or an archive with this ``sha256``; without one, the sources of a host are those of its own commit
    in the repository ``git`` (None: llama.cpp's own)."""

    version: str | None = None
    source: Path | None = None
    cmake_args: tuple[str, ...] = ()
    own_ggml: bool = False
    server: bool = True
    jobs: int | None = None
    keep: bool = False
    force: bool = False
    stock_twin: bool = False
    on: Path | None = None
    into: Path | None = None
    git: str | None = None
    sha256: str = ""


@dataclass(frozen=True)
class CMakeArguments:
    """The user's cmake arguments: ``definitions`` (-D, last one wins) and whatever else CMAKE_ARGS holds."""

    definitions: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def wants_ggml(self) -> bool:
        """Whether an argument is about ggml, which then has to be built."""
        return any(name.startswith("GGML_") for name in self.definitions)

    def as_list(self) -> list[str]:
        """The command line words."""
        return [*self.others, *(f"-D{name}={value}" for name, value in self.definitions.items())]


def parse_cmake_arguments(arguments: Sequence[str], environment: str = "") -> CMakeArguments:
    """``--cmake-arg`` values, which must be -DNAME=VALUE, on top of the environment's ``CMAKE_ARGS``.

    Raises BuildError naming the argument that cannot be understood.
    """
    try:
        words = shlex.split(environment, posix=True)
    except ValueError as error:
        raise BuildError(f"CMAKE_ARGS={environment!r} cannot be read ({error}); correct its quotes") from None
    definitions: dict[str, str] = {}
    others: list[str] = []
    pending = iter(words)
    for word in pending:
        if word == "-D":
            word = "-D" + next(pending, "")
        if found := _definition(word):
            definitions.pop(found[0], None)
            definitions[found[0]] = found[1]
        else:
            others.append(word)
    for word in arguments:
        found = _definition(word)
        if found is None:
            raise BuildError(f"--cmake-arg {word!r} is not of the form -DNAME=VALUE")
        definitions.pop(found[0], None)
        definitions[found[0]] = found[1]
    # These two are llama-cpp-python's own: they tell pip to install the bindings alone.
    for name in ("LLAMA_BUILD", "LLAVA_BUILD"):
        definitions.pop(name, None)
    return CMakeArguments(definitions, tuple(others))


def _definition(word: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"-D([A-Za-z_][A-Za-z0-9_]*)(?::[A-Za-z]+)?=(.*)", word, re.DOTALL)
    return (match.group(1), match.group(2)) if match else None


@dataclass(frozen=True)
class BuildPlan:
    """Everything that decides what is built: sources, arguments, and whose ggml (None: our own).

    ``host`` is the folder that ``--on`` named, ``into`` where the runtime goes (None: the cache).
    """

    origin: SourceOrigin
    arguments: CMakeArguments
    shared: Bindings | HostGgml | None
    server: bool
    ggml_id: str
    host: Path | None = None
    into: Path | None = None

    @property
    def work_key(self) -> str:
        """Names the work tree: everything but the patch, so that a changed patch compiles only what it touches."""
        return f"{self.origin.version}-{self._flags()[:10]}"

    def key(self, patch: Patch) -> str:
        """Names the finished runtime."""
        server = patch.server_hash if self.server else ""
        flags = digest(self._flags(), patch.core_hash, server)[:10]
        return f"{self.origin.version}-{patch.core_hash[:10]}-{flags}" + ("-server" if self.server else "")

    def place(self, cache: Path, key: str) -> Path:
        """The folder of the finished runtime."""
        return self.into or cache / "runtime" / key

    def _flags(self) -> str:
        machine = f"{sys.platform} {platform.machine()}"
        definitions = sorted(self.arguments.definitions.items())
        words = [f"{name}={value}" for name, value in definitions] + list(self.arguments.others)
        return digest(str(RUNTIME_FORMAT), machine, self.origin.id, self.ggml_id, *words)


def plan_build(options: BuildOptions) -> BuildPlan:
    """Work out what ``options`` mean on this machine. Raises BuildError."""
    bindings = find_bindings()
    host = host_ggml(options.on) if options.on is not None else None
    installed = host if isinstance(host, Bindings) else bindings
    origin: SourceOrigin | None = None
    if options.source is not None and options.source.is_file():
        origin = archive_origin(options.source, options.sha256)
    elif options.source is not None:
        origin = folder_origin(options.source, options.version)
    elif isinstance(host, HostGgml) and options.version is None:
        origin = _origin_of_host(host, options.git or REPOSITORY)
    if origin is None:
        origin = sdist_origin(options.version or (installed.version if installed else PINNED_VERSION))
    arguments = parse_cmake_arguments(options.cmake_args, os.environ.get("CMAKE_ARGS", ""))
    into = _free_place(options.into) if options.into is not None else None
    if host is not None:
        if options.own_ggml or arguments.wants_ggml:
            raise BuildError(f"the ggml of {options.on} is used as it is; leave out --own-ggml and -DGGML_… (also in CMAKE_ARGS)")
        if options.stock_twin:
            raise BuildError("--stock-twin goes with a build of our own ggml; leave out --on")
        return BuildPlan(origin, arguments, host, options.server, host.ggml_id(), options.on, into)
    shared = None
    own = options.own_ggml or arguments.wants_ggml
    if not own and bindings is not None and bindings.shares_ggml and bindings.version == origin.version:
        shared = bindings
    return BuildPlan(origin, arguments, shared, options.server, shared.ggml_id() if shared else "own", None, into)


def _origin_of_host(host: HostGgml, repository: str) -> SourceOrigin | None:
    """The sources of a host's own commit; None where it does not tell, or where they are those of a known sdist."""
    commit, number = host_build(host)
    known = [version for version, whole in SDIST_COMMITS.items() if commit and whole.startswith(commit)]
    if known:
        return sdist_origin(known[0])
    if not commit:
        return None
    return commit_origin(repository, find_commit(repository, commit, number), number)


def _free_place(folder: Path) -> Path:
    """``folder``, absolute, when a runtime may be put there. Raises BuildError."""
    folder = expand_path(folder).absolute()
    if folder.exists() and not (folder / RUNTIME_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise BuildError(f"--into {folder} has other things in it; give a new or empty folder")
    return folder
