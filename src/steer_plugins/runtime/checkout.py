"""Copies of a tree, and llama.cpp's sources at a host's own commit: one commit of a git repository, without its history.

A commit's hash is a hash of its content, so what comes is what was asked for, from whatever place it comes. Hosts tell the
first digits of theirs only; the repository's list of tags says the rest, for each build of llama.cpp has one (``b10488``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from ..errors import BuildError

# What a build of the library, mtmd and llama-server never reads: about two thirds of the tree.
SKIPPED = {".git", ".github", ".devops", "benches", "conversion", "docs", "gguf-py", "media", "models", "pocs"}

REPOSITORY = "https://github.com/ggml-org/llama.cpp"
"""Where llama.cpp is from, unless ``--git`` names a fork or a mirror."""

_WAY_OUT = "give the sources with --source, or a repository that has it with --git"


def find_commit(repository: str, commit: str, build: int = 0) -> str:
    """The whole hash of ``commit`` (7 to 40 hexadecimal digits) or of the tag ``b<build>`` in a repository, asked for without
    fetching anything. Raises BuildError when it is not there, or when two commits begin like that."""
    if len(commit) == 40:
        return commit
    found: dict[str, str] = {}
    listed = _git(["ls-remote", "--tags", "--heads", "--", _checked(repository)], None, f"{repository} cannot be read")
    for line in listed.splitlines():
        digits, _, name = line.partition("\t")
        # The line with ^{} is the commit of an annotated tag; without, that of the tag itself.
        if re.fullmatch(r"[0-9a-f]{40}", digits) and (digits.startswith(commit) if commit else name == f"refs/tags/b{build}"):
            found[digits] = name
    if len(found) != 1:
        what = f"commit {commit}" if commit else f"build b{build}"
        why = "has no tag or branch at" if not found else "has several that begin like"
        raise BuildError(f"{repository} {why} {what}; {_WAY_OUT}")
    return next(iter(found))


def fetch_commit(repository: str, commit: str, target: Path) -> None:
    """Put the files of ``commit`` (its whole hash) of a repository into the empty folder ``target``.

    Raises BuildError: no git, no network, no such commit.
    """
    scratch = target.with_name(f"{target.name}.git")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        what = f"commit {commit[:9]} cannot be fetched from {repository}"
        _git(["init", "--quiet", "."], scratch, what)
        _git(["fetch", "--quiet", "--depth", "1", "--no-tags", "--", _checked(repository), commit], scratch, what)
        got = _git(["rev-parse", "FETCH_HEAD^{commit}"], scratch, what).strip()
        if got != commit:
            raise BuildError(f"{repository} gave commit {got[:9]} for {commit[:9]}; {_WAY_OUT}")
        _git(["checkout", "--quiet", "--detach", commit], scratch, what)
        copy_tree(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _checked(repository: str) -> str:
    """The repository as git gets it. Raises BuildError unless it is an https or ssh address or a folder."""
    if re.match(r"(https|ssh)://", repository) or re.match(r"[\w.-]+@[\w.-]+:", repository):
        return repository
    folder = Path(repository.removeprefix("file://")).expanduser()
    if "::" in repository or repository.startswith("-") or not folder.is_dir():
        raise BuildError(f"--git {repository} is neither an https address nor a folder; give the llama.cpp repository")
    return str(folder.absolute())


def _git(arguments: list[str], folder: Path | None, what: str) -> str:
    """What git prints. Nothing of the repository is run: no hooks, no links, no prompts."""
    git = shutil.which("git")
    if git is None:
        raise BuildError(f"{what}: git is not installed; {_WAY_OUT}")
    safe = ["-c", "core.symlinks=false", "-c", f"core.hooksPath={os.devnull}", "-c", "core.autocrlf=false"]
    safe += ["-c", "protocol.ext.allow=never", "-c", "submodule.recurse=false"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1"}
    try:
        done = subprocess.run(
            [git, *safe, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=1800,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{what} ({str(error).splitlines()[0]}); {_WAY_OUT}") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = [*(line for line in lines if line.startswith(("fatal:", "error:"))), *lines, "no reason given"][0]
        raise BuildError(f"{what} ({reason.partition(': ')[2] or reason}); {_WAY_OUT}")
    return done.stdout


def copy_tree(source: Path, target: Path) -> None:
    """Copy a llama.cpp tree, without what no build reads and without the user's own build folders and links."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        here = Path(folder)
        skipped = {name for name in names if (here / name).is_symlink()}
        if here == source:
            skipped |= SKIPPED.intersection(names)
        skipped |= {name for name in names if name == ".git" or (here / name / "CMakeCache.txt").is_file()}
        return skipped

    try:
        shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True, copy_function=shutil.copyfile)
    except (OSError, shutil.Error) as error:
        raise BuildError(
            f"{source} cannot be copied ({first_line(error)}); check its permissions and the free disk space"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
