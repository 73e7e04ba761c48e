"""Our patch for llama.cpp: which files it adds, what it changes, whether it fits, and putting it on and off a tree.

The diffs are parsed with patch-ng and applied here, in memory, to whole files: a hunk's context must match exactly
(no fuzz), at its own line or, when lines moved, at the nearest place. So nothing is written unless everything fits,
and a file is rewritten only when its content changes, which is what makes the next compilation short.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import patch_ng

from ..atomic import write_atomically
from ..errors import BuildError
from .cache import digest, remove_tree, write_if_changed

LIBRARY_FOLDER = "src"
SERVER_FOLDER = "tools/server"
_SUFFIXES = (".h", ".hpp", ".cpp")


class DoesNotFit(Exception):
    """A diff does not apply. ``file`` is the path in the llama.cpp tree, ``line`` the hunk's line in the original;
    ``places`` lists this place and, in a plan, those of the other files that do not fit either."""

    def __init__(self, file: str, line: int, why: str) -> None:
        self.file = file
        self.line = line
        self.why = why
        self.places = [f"{file}:{line}: {why}" if line else f"{file}: {why}"]
        super().__init__(self.places[0])

    def __str__(self) -> str:
        others = len(self.places) - 1
        return self.places[0] + (f" (and in {others} more)" if others else "")


@dataclass(frozen=True)
class Hunk:
    """One hunk: ``old`` and ``new`` are lines without their ends, ``start`` the 0-based line of ``old``."""

    start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]


@dataclass(frozen=True)
class PatchSet:
    """One version of the patch.

    ``added``: (path in the tree, content) of our own files; ``hunks``: path in the tree -> hunks; the ``server_*``
    fields are the part that only llama-server needs. ``core_hash`` and ``server_hash`` name the content (sha256 hex;
    the latter "" if there is no server part).
    """

    name: str
    added: tuple[tuple[str, bytes], ...]
    hunks: tuple[tuple[str, tuple[Hunk, ...]], ...]
    core_hash: str
    server_added: tuple[tuple[str, bytes], ...] = ()
    server_hunks: tuple[tuple[str, tuple[Hunk, ...]], ...] = ()
    server_hash: str = ""

    def files(self, server: bool) -> dict[str, bytes]:
        """Our own files: path in the tree -> content."""
        return dict(self.added + (self.server_added if server else ()))

    def changes(self, server: bool) -> dict[str, tuple[Hunk, ...]]:
        """The hunks for each changed file of the tree."""
        merged: dict[str, tuple[Hunk, ...]] = {}
        for path, hunks in self.hunks + (self.server_hunks if server else ()):
            merged[path] = tuple(sorted(merged.get(path, ()) + hunks, key=lambda hunk: hunk.start))
        return merged

    def plan(self, read: Callable[[str], bytes | None], server: bool) -> dict[str, bytes]:
        """Every file's content after patching, from ``read(path)`` of the originals. Raises DoesNotFit."""
        result = self.files(server)
        for path in result:
            if read(path) is not None:
                raise DoesNotFit(path, 0, "the tree already has a file of that name")
        misfit: DoesNotFit | None = None
        for path, hunks in self.changes(server).items():
            try:
                original = read(path)
                if original is None:
                    raise DoesNotFit(path, 0, "there is no such file")
                result[path] = apply_hunks(path, original, hunks)
            except DoesNotFit as error:
                if misfit is None:
                    misfit = error
                else:
                    misfit.places += error.places
        if misfit is not None:
            raise misfit
        return result


def apply_hunks(path: str, original: bytes, hunks: tuple[Hunk, ...]) -> bytes:
    """``original`` with the hunks applied, keeping the file's own line ends. Raises DoesNotFit."""
    end = b"\r\n" if original.count(b"\r\n") * 2 > original.count(b"\n") else b"\n"
    lines = original.split(b"\n")
    bare = [line.rstrip(b"\r") for line in lines]
    result: list[bytes] = []
    done = 0  # lines of the original already copied
    drift = 0  # how far the last hunk was from where it said
    for hunk in hunks:
        place = _find(bare, hunk.old, hunk.start + drift, done)
        if place is None:
            raise DoesNotFit(path, hunk.start + 1, "the lines around it are different here")
        drift = place - hunk.start
        result.extend(lines[done:place])
        result.extend(line + end[:-1] for line in hunk.new)
        done = place + len(hunk.old)
    result.extend(lines[done:])
    return b"\n".join(result)


def _find(lines: list[bytes], wanted: tuple[bytes, ...], near: int, lowest: int) -> int | None:
    """The index nearest to ``near``, at or after ``lowest``, where ``wanted`` stands."""
    highest = len(lines) - len(wanted)
    target = list(wanted)
    for distance in range(max(near - lowest, highest - near, 0) + 1):
        for place in {near + distance, near - distance}:
            if lowest <= place <= highest and lines[place : place + len(target)] == target:
                return place
    return None


def parse_diff(name: str, diff: bytes) -> tuple[tuple[str, tuple[Hunk, ...]], ...]:
    """Parse a unified diff with a/ b/ prefixes. Raises BuildError: malformed, or it would leave the tree."""
    parsed: Any = patch_ng.fromstring(diff) if diff.strip() else None
    if not parsed or parsed.errors:
        raise BuildError(f"{name} is not a valid unified diff; reinstall steer-plugins")
    # patch-ng quietly rewrites paths that leave the tree, so look at what the diff itself says.
    for header in re.findall(rb"^(?:---|\+\+\+) ([^\t\r\n]+)", diff, re.MULTILINE):
        if header != b"/dev/null":
            check_tree_path(name, header.decode("utf-8", "replace"))
    result: list[tuple[str, tuple[Hunk, ...]]] = []
    for item in parsed.items:
        path = item.target.decode("utf-8", "replace")
        path = path[2:] if path.startswith("b/") else path
        check_tree_path(name, path)
        if b"/dev/null" in (item.source, item.target) or not item.hunks:
            raise BuildError(f"{name} adds, removes or renames {path}; a diff may only change files")
        hunks = []
        for raw in item.hunks:
            text = [line.rstrip(b"\r\n") for line in raw.text if not line.startswith(b"\\")]
            old = tuple(line[1:] for line in text if line[:1] in (b" ", b"-", b""))
            new = tuple(line[1:] for line in text if line[:1] in (b" ", b"+", b""))
            if not old:
                raise BuildError(f"{name} has a hunk without context in {path}; nothing says where it belongs")
            hunks.append(Hunk(raw.startsrc - 1, old, new))
        result.append((path, tuple(hunks)))
    return tuple(result)


def check_tree_path(name: str, path: str) -> None:
    """Raise BuildError unless ``path`` is a plain relative path that stays inside the tree."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise BuildError(f"{name} names {path!r}, which is not a path inside the llama.cpp tree")


def patch_dir() -> Path:
    """Where the patch sources are: ``STEER_PATCH_DIR``, inside the installed package, or in the project's tree."""
    override = os.environ.get("STEER_PATCH_DIR")
    here = Path(__file__).resolve().parent.parent
    choices = [Path(override)] if override else [here / "cpp_patch", here.parent.parent / "cpp_patch"]
    for choice in choices:
        if (choice / "core.patch").is_file():
            return choice
    if override:
        raise BuildError(f"STEER_PATCH_DIR={override} holds no core.patch; point it at a cpp_patch folder or unset it")
    raise BuildError("the patch sources (cpp_patch) are missing from this installation; reinstall steer-plugins")


def patch_sets(version: str, folder: Path | None = None) -> list[PatchSet]:
    """The versions of the patch worth trying for llama-cpp-python or llama.cpp ``version``, best first."""
    folder = folder or patch_dir()
    versions = folder / "versions"
    names: list[str] = []
    if versions.is_dir():
        names = sorted((path.name for path in versions.iterdir() if path.is_dir()), reverse=True)
    order = [name for name in names if name == version] + ["default"] + [name for name in names if name != version]
    return [load_patch_set(name, folder) for name in order]


def load_patch_set(name: str, folder: Path | None = None) -> PatchSet:
    """The patch called ``name`` ("default" or a folder of ``cpp_patch/versions``); its files override the default's.

    Raises BuildError when it is missing or malformed.
    """
    folder = folder or patch_dir()
    if name != "default" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise BuildError(f"{name!r} is not the name of a patch version")
    layers = [folder] if name == "default" else [folder, folder / "versions" / name]
    found: dict[str, Path] = {}
    for layer in layers:
        if not layer.is_dir():
            raise BuildError(f"the patch version {name} is missing from this installation; reinstall steer-plugins")
        for path in sorted(layer.iterdir()):
            own = path.suffix in _SUFFIXES and path.name.startswith(("llama-steer", "server-steer"))
            if path.is_file() and (own or path.name in ("core.patch", "server.patch")):
                found[path.name] = path
    signature = tuple((key, str(path), path.stat().st_mtime_ns, path.stat().st_size) for key, path in found.items())
    return _load(name, signature)


@lru_cache(maxsize=16)
def _load(name: str, signature: tuple[tuple[str, str, int, int], ...]) -> PatchSet:
    # Text files may have been checked out with CRLF: the content, and so its hash, is the same everywhere.
    content = {key: Path(path).read_bytes().replace(b"\r\n", b"\n") for key, path, _, _ in signature}
    core = sorted(key for key in content if key.startswith("llama-steer"))
    server = sorted(key for key in content if key.startswith("server-steer"))
    core_diff = content["core.patch"]
    server_diff = content.get("server.patch", b"")
    return PatchSet(
        name=name,
        added=tuple((f"{LIBRARY_FOLDER}/{key}", content[key]) for key in core),
        hunks=parse_diff("core.patch", core_diff),
        core_hash=digest(*(part for key in [*core, "core.patch"] for part in (key, content[key]))),
        server_added=tuple((f"{SERVER_FOLDER}/{key}", content[key]) for key in server),
        server_hunks=parse_diff("server.patch", server_diff) if server_diff else (),
        server_hash=digest(*(part for key in [*server, "server.patch"] for part in (key, content.get(key, b""))))
        if server or server_diff
        else "",
    )


class PatchedTree:
    """A llama.cpp tree of ours that patches are put on and taken off.

    ``pristine`` holds the original of every file a patch ever changed, so that the next patch starts from it.
    """

    def __init__(self, root: Path, pristine: Path) -> None:
        self.root = root
        self.pristine = pristine

    def original(self, path: str) -> bytes | None:
        """The unpatched content of a file of the tree, or None where llama.cpp has no such file."""
        for base in (self.pristine, self.root):
            try:
                if base is self.root and path in self._added():
                    return None
                return (base / path).read_bytes()
            except FileNotFoundError:
                continue
        return None

    def choose(self, candidates: list[PatchSet], server: bool) -> tuple[PatchSet, dict[str, bytes]]:
        """The first patch that fits, with its plan. Raises DoesNotFit of the first candidate when none does."""
        first: DoesNotFit | None = None
        for candidate in candidates:
            try:
                return candidate, candidate.plan(self.original, server)
            except DoesNotFit as error:
                first = first or error
        assert first is not None
        raise first

    def put(self, plan: dict[str, bytes]) -> list[str]:
        """Make the tree equal to its originals plus ``plan``; an empty plan unpatches it. Returns what was written."""
        added = {path for path in plan if self.original(path) is None}
        before = self._added()
        # Said before it is done: after a crash the next run still knows which files are ours.
        self.pristine.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._added_file, "\n".join(sorted(added | before)).encode())
        for path in plan:
            keep = self.pristine / path
            if path not in added and not keep.exists():
                keep.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(keep, (self.root / path).read_bytes())
        written = [path for path, content in plan.items() if write_if_changed(self.root / path, content)]
        for path in sorted(before - added):
            remove_tree(self.root / path)
            written.append(path)
        for path in self._kept():
            if path not in plan and write_if_changed(self.root / path, (self.pristine / path).read_bytes()):
                written.append(path)
        write_atomically(self._added_file, "\n".join(sorted(added)).encode())
        return written

    @property
    def _added_file(self) -> Path:
        return self.pristine.parent / "added.txt"

    def _added(self) -> set[str]:
        try:
            return set(self._added_file.read_text(encoding="utf-8").split("\n")) - {""}
        except FileNotFoundError:
            return set()

    def _kept(self) -> list[str]:
        if not self.pristine.is_dir():
            return []
        files = sorted(path for path in self.pristine.rglob("*") if path.is_file())
        return [path.relative_to(self.pristine).as_posix() for path in files]
