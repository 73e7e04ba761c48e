"""`steer build --prune`: remove the runtimes in the cache that nothing would choose any more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BuildError, RuntimeMissing
from ..paths import expand_path
from .cache import cache_dir, cache_lock, remove_tree
from .host import host_of, same_host
from .locate import cached_runtimes, find_cached_runtime, is_current, runtime_at
from .process import Reporter


@dataclass
class Pruned:
    """What was removed (folder, bytes that are free now) and what was kept, and why."""

    removed: list[tuple[Path, int]] = field(default_factory=list)
    kept: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def freed(self) -> int:
        """Bytes of the disk."""
        return sum(size for _, size in self.removed)

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "removed": [{"path": str(path), "bytes": size} for path, size in self.removed],
            "kept": [{"path": str(path), "why": why} for path, why in self.kept],
            "freed": self.freed,
        }


def prune_runtimes(reporter: Reporter | None = None) -> Pruned:
    """Remove every runtime in the cache but those that are in use: see _in_use. Waits for a running build.

    Raises BuildError when the cache cannot be written.
    """
    reporter = reporter or Reporter(quiet=True)
    root = cache_dir() / "runtime"
    result = Pruned()
    if not root.is_dir():
        return result
    with cache_lock(cache_dir() / "build.lock", reporter.say):
        used = _in_use()
        for folder in sorted(root.iterdir()):
            if folder in used:
                result.kept.append((folder, used[folder]))
            elif folder.is_dir() and not folder.is_symlink():
                size = exclusive_bytes(folder)
                try:
                    # Renamed first: a folder whose files are open (Windows) then stays whole, and nobody finds half a one.
                    gone = folder.with_name(f".old-{folder.name.lstrip('.')}-{os.getpid()}")
                    os.replace(folder, gone)
                except PermissionError:
                    result.kept.append((folder, "a program has it open, or it may not be removed"))
                    continue
                except OSError as error:
                    raise BuildError(f"{folder} cannot be removed ({error.strerror or error}); check its permissions") from None
                remove_tree(gone)
                result.removed.append((folder, size))
    return result


def _in_use() -> dict[Path, str]:
    """The runtimes to keep: what an engine would choose, with and without server, or the newest when none fits; what
    STEER_RUNTIME names; and for each host (`--on`) whose ggml is still the same, the newest of the current patch."""
    used: dict[Path, str] = {}
    named = os.environ.get("STEER_RUNTIME")
    if named:
        with contextlib.suppress(RuntimeMissing):
            used[runtime_at(expand_path(named).absolute()).path] = "STEER_RUNTIME names it"
    everything = cached_runtimes()
    for need_server in (False, True):
        found = find_cached_runtime(need_server)
        if found is not None:
            used.setdefault(found.path, "the engines use it")
    hosts: set[tuple[Path, bool]] = set()
    for runtime in everything:
        host = host_of(runtime.meta)
        key = (host, runtime.server is not None) if host else None
        if host and key and key not in hosts and is_current(runtime) and runtime.problem() is None and same_host(runtime.meta):
            hosts.add(key)
            used.setdefault(runtime.path, f"it is for {host}")
    if not used and everything:
        used[everything[0].path] = "the newest"
    return used


def exclusive_bytes(folder: Path) -> int:
    """Bytes that removing ``folder`` frees: files that other folders have hard links to do not count."""
    seen: dict[tuple[int, int], tuple[int, int, int]] = {}
    for stat in _stats(folder):
        key = (stat.st_dev, stat.st_ino)
        count = seen.get(key, (0, 0, 0))[0] + 1
        seen[key] = (count, stat.st_nlink, stat.st_size)
    return sum(size for count, links, size in seen.values() if count >= links)


def _stats(folder: Path) -> Iterable[os.stat_result]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                yield path.stat()
