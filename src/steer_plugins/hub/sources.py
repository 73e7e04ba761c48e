"""Where a hub lies: a folder or a git checkout here, a git repository, a web server, a Hugging Face repository.

A source brings two kinds of files: ``index.json``, and ``files/<sha256>.<type>``. No path is chosen by others.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from ..errors import HubError

INDEX = "index.json"
Progress = Callable[[int, int], None]
"""Called with the bytes that have come and those that are to come."""

_NAME = re.compile(r"index\.json|files/[0-9a-f]{64}\.(?:safetensors|json|minisig)")
_BLOCK = 1 << 18


def file_name(sha256: str, type: str) -> str:
    """Where a hub has the file of a hash."""
    return f"files/{sha256}.{type}"


def is_file_name(name: str) -> bool:
    """Whether a hub could have a file of that name."""
    return _NAME.fullmatch(name) is not None


class Source(ABC):
    """One hub. ``url``: its address, as it is kept."""

    url: str
    revision: str | None = None
    """The commit that is read, where there is one."""

    @abstractmethod
    def refresh(self) -> None:
        """Look for a newer state of the hub; what is fetched afterwards belongs together. Raises HubError."""

    def fetch(self, name: str, target: Path, *, most: int, resume: bool = False, progress: Progress | None = None) -> None:
        """Bring a file of at most ``most`` bytes to ``target``; with ``resume``, go on where ``target`` ends, if that can be.

        Raises HubError: it is not there, larger, or cannot be had; what came so far may be left in ``target``.
        """
        if not is_file_name(name):
            raise HubError(f"a hub has no file {name!r:.80}")
        self._fetch(name, target, most, resume, progress)

    @abstractmethod
    def _fetch(self, name: str, target: Path, most: int, resume: bool, progress: Progress | None) -> None: ...


class FolderSource(Source):
    """A folder, or a checkout that somebody else keeps up to date."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.url = str(self.folder)

    def refresh(self) -> None:
        """Raises HubError if the folder is gone."""
        if not self.folder.is_dir():
            raise HubError(f"there is no folder {self.folder}")

    def _fetch(self, name: str, target: Path, most: int, resume: bool, progress: Progress | None) -> None:
        path = self.folder / name
        try:
            # no links, pipes or devices: a checkout may hold anything
            flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with open(os.open(path, flags), "rb") as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode):
                    raise HubError(f"{path} is not a file")
                if facts.st_size > most:
                    raise HubError(f"{path} has {facts.st_size} bytes: at most {most} are taken")
                copy_bounded(iter(lambda: file.read(_BLOCK), b""), target, most, facts.st_size, str(path), progress)
        except FileNotFoundError:
            raise HubError(f"the hub {self.url} has no file {name}") from None
        except OSError as error:
            raise HubError(f"cannot read {path}: {error.strerror or error}") from None


class GitSource(Source):
    """A git repository, cloned without its history and without anything of it being run."""

    def __init__(self, url: str, cache: Path) -> None:
        import hashlib

        self.url = url
        self._remote = url.removeprefix("git+")
        self._folder = cache / ("git-" + hashlib.sha256(url.encode()).hexdigest()[:16])

    def refresh(self) -> None:
        """Clone, or fetch what is newer. Raises HubError."""
        new = self._folder.with_name(f"{self._folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(new, ignore_errors=True)
        try:
            # line ends as they are: files are named by their bytes
            settings = ("-c", "core.symlinks=false", "-c", "core.autocrlf=false")
            self._git("clone", "--quiet", "--depth", "1", "--no-tags", *settings, "--", self._remote, str(new))
            self.revision = self._git("-C", str(new), "rev-parse", "HEAD")
            # a clone is small; exchanging the whole folder leaves no state between two commits
            shutil.rmtree(self._folder, ignore_errors=True)
            os.replace(new, self._folder)
        except OSError as error:
            raise HubError(f"cannot keep the clone of {self.url}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _git(self, *arguments: str) -> str:
        environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "http:https:ssh:file", "LC_ALL": "C"}
        command = ["git", "-c", "core.hooksPath=", "-c", "core.fsmonitor=false", *arguments]
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
            )
        except OSError:
            raise HubError(f"the hub {self.url} needs git, which cannot be started: install it") from None
        if done.returncode:
            said = " ".join((done.stderr.strip().splitlines() or ["git failed"])[-1].split())
            raise HubError(f"cannot clone {self.url}: {said:.300}")
        return done.stdout.strip()

    def _fetch(self, name: str, target: Path, most: int, resume: bool, progress: Progress | None) -> None:
        if not self._folder.is_dir():
            self.refresh()
        try:
            FolderSource(self._folder).fetch(name, target, most=most, progress=progress)
        except HubError as error:
            raise HubError(str(error).replace(str(self._folder), self.url)) from None


def copy_bounded(
    blocks: object, target: Path, most: int, total: int, what: str, progress: Progress | None, *, start: int = 0
) -> None:
    """Write blocks to ``target`` (from byte ``start`` on), ``most`` at the most. Raises HubError, OSError."""
    done = start
    with target.open("r+b" if start else "wb") as file:
        file.seek(start)
        for block in blocks:  # type: ignore[attr-defined]
            done += len(block)
            if done > most:
                raise HubError(f"{what} is larger than the {most} bytes that are taken")
            file.write(block)
            if progress is not None:
                progress(done, total)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
