"""Our patch for llama.cpp: the files it adds, the hooks that call them (hooks.py), and putting it on and off a tree.

Everything is worked out in memory first: nothing is written unless every hook has its place, and a file is rewritten
only when its content changes, which is what makes the next compilation short.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ..atomic import write_atomically
from ..errors import BuildError
from .cache import digest, remove_tree, write_if_changed
from .hooks import Hook, Placed, parse_hooks, place_hooks

LIBRARY_FOLDER = "src"
SERVER_FOLDER = "tools/server"
_SUFFIXES = (".h", ".hpp", ".cpp")


class DoesNotFit(Exception):
    """Hooks have no place in a tree: ``misfits`` has one sentence for each."""

    def __init__(self, misfits: list[str]) -> None:
        self.misfits = misfits
        others = len(misfits) - 1
        super().__init__(misfits[0] + (f" (and {others} more, see `steer build --check`)" if others else ""))


@dataclass(frozen=True)
class Placement:
    """What a patch does to one tree: ``content`` of each file afterwards, what became of every hook, and the ``misfits``."""

    content: dict[str, bytes] = field(default_factory=dict)
    hooks: list[Placed] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Patch:
    """The patch. ``added``: (path in the tree, content) of our own files; the ``server_*`` fields are the part that only
    llama-server needs. ``core_hash`` and ``server_hash`` name the content (sha256 hex; the latter "" without a server part)."""

    added: tuple[tuple[str, bytes], ...]
    hooks: tuple[Hook, ...]
    core_hash: str
    server_added: tuple[tuple[str, bytes], ...] = ()
    server_hooks: tuple[Hook, ...] = ()
    server_hash: str = ""

    def files(self, server: bool) -> dict[str, bytes]:
        """Our own files: path in the tree -> content."""
        return dict(self.added + (self.server_added if server else ()))

    def architectures(self) -> list[str]:
        """The architectures that were tested with steering, by their GGUF names."""
        facts = dict(self.added).get(f"{LIBRARY_FOLDER}/llama-steer-facts.cpp", b"").decode()
        table = re.search(r"TESTED\[\] = \{(.*?)\};", facts, re.DOTALL)
        return re.findall(r'"([^"]+)"', table.group(1)) if table else []

    def place(self, read: Callable[[str], bytes | None], server: bool) -> Placement:
        """Find every hook's place in the tree whose originals ``read(path)`` gives."""
        result = Placement(self.files(server))
        for path in list(result.content):
            if read(path) is not None:
                result.misfits.append(f"{path}: the tree already has a file of that name")
        hooks: dict[str, list[Hook]] = {}
        for hook in self.hooks + (self.server_hooks if server else ()):
            hooks.setdefault(hook.file, []).append(hook)
        for path, group in hooks.items():
            content, placed = place_hooks(read(path), group)
            if content is not None:
                result.content[path] = content
            result.hooks.extend(placed)
        result.misfits.extend(str(placed) for placed in result.hooks if placed.misfit)
        return result

    def plan(self, read: Callable[[str], bytes | None], server: bool) -> dict[str, bytes]:
        """Every file's content after patching, from ``read(path)`` of the originals. Raises DoesNotFit."""
        placement = self.place(read, server)
        if placement.misfits:
            raise DoesNotFit(placement.misfits)
        return placement.content


def patch_dir() -> Path:
    """Where the patch sources are: ``STEER_PATCH_DIR``, inside the installed package, or in the project's tree."""
    override = os.environ.get("STEER_PATCH_DIR")
    here = Path(__file__).resolve().parent.parent
    choices = [Path(override)] if override else [here / "cpp_patch", here.parent.parent / "cpp_patch"]
    for choice in choices:
        if (choice / "core.hooks").is_file():
            return choice
    if override:
        raise BuildError(f"STEER_PATCH_DIR={override} holds no core.hooks; point it at a cpp_patch folder or unset it")
    raise BuildError("the patch sources (cpp_patch) are missing from this installation; reinstall steer-plugins")


def load_patch(folder: Path | None = None) -> Patch:
    """The patch in ``folder`` (the one of patch_dir() by default). Raises BuildError when it is missing or malformed."""
    folder = folder or patch_dir()
    found: list[tuple[str, str, int, int]] = []
    for path in sorted(folder.iterdir()):
        own = path.suffix in _SUFFIXES and path.name.startswith(("llama-steer", "server-steer"))
        if path.is_file() and (own or path.name in ("core.hooks", "server.hooks")):
            found.append((path.name, str(path), path.stat().st_mtime_ns, path.stat().st_size))
    return _load(tuple(found))


@lru_cache(maxsize=16)
def _load(signature: tuple[tuple[str, str, int, int], ...]) -> Patch:
    # Text files may have been checked out with CRLF: the content, and so its hash, is the same everywhere.
    content = {key: Path(path).read_bytes().replace(b"\r\n", b"\n") for key, path, _, _ in signature}
    core = sorted(key for key in content if key.startswith("llama-steer"))
    server = sorted(key for key in content if key.startswith("server-steer"))
    hooks = content.get("server.hooks")
    return Patch(
        added=tuple((f"{LIBRARY_FOLDER}/{key}", content[key]) for key in core),
        hooks=parse_hooks("core.hooks", content["core.hooks"]),
        core_hash=digest(*(part for key in [*core, "core.hooks"] for part in (key, content[key]))),
        server_added=tuple((f"{SERVER_FOLDER}/{key}", content[key]) for key in server),
        server_hooks=parse_hooks("server.hooks", hooks) if hooks else (),
        server_hash=digest(*(part for key in [*server, "server.hooks"] for part in (key, content.get(key, b""))))
        if server or hooks
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
