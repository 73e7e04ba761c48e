"""A host's own sources: its commit found out, looked up and fetched, from a local mirror; and archives named by their hash."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from steer_plugins.atomic import file_sha256
from steer_plugins.errors import BuildError
from steer_plugins.runtime import host, plan
from steer_plugins.runtime.checkout import find_commit
from steer_plugins.runtime.plan import BuildOptions, plan_build
from steer_plugins.runtime.sources import archive_origin, commit_origin, prepare_tree

from .test_runtime_host import host_folder

needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git")
posix_only = pytest.mark.skipif(os.name != "posix", reason="the toy llama-server is a script with a #! line")

FILES = {"CMakeLists.txt": "project", "include/llama.h": "api", "src/CMakeLists.txt": "lib", "docs/x.md": "skipped"}


@pytest.fixture
def mirror(tmp_path: Path) -> tuple[Path, list[str]]:
    """A repository with the tags b1 and b2 and one more commit; its commits."""
    folder = tmp_path / "mirror"
    folder.mkdir()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@y", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q", "-b", "master")
    git("config", "uploadpack.allowAnySHA1InWant", "true")  # as GitHub does
    commits = []
    for number in range(3):
        for name, text in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{text} {number}")
        git("add", "-A")
        git("commit", "-q", "-m", str(number))
        commits.append(git("rev-parse", "HEAD"))
        if number == 0:
            git("tag", "b1")
        elif number == 1:
            git("tag", "-a", "b2", "-m", "annotated")
    return folder, commits


@needs_git
def test_a_commit_is_found_and_fetched(mirror: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, commits = mirror
    assert find_commit(str(folder), commits[0][:9]) == commits[0]
    assert find_commit(str(folder), commits[1][:7], 2) == commits[1]  # of an annotated tag
    assert find_commit(f"file://{folder}", "", 1) == commits[0]
    target = tmp_path / "work" / "src"
    prepare_tree(commit_origin(str(folder), commits[1], 2), target)
    assert (target / "include/llama.h").read_text() == "api 1"
    assert not (target / "docs").exists() and not (target / ".git").exists()
    assert [path.name for path in target.parent.iterdir()] == ["src"]


@needs_git
def test_what_a_repository_does_not_have(mirror: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = mirror
    with pytest.raises(BuildError, match=r"has no tag or branch at commit abcdef0; give the sources with --source"):
        find_commit(str(folder), "abcdef0")
    with pytest.raises(BuildError, match="no tag or branch at build b9"):
        find_commit(str(folder), "", 9)
    with pytest.raises(BuildError, match=r"commit 012345670 cannot be fetched from .*; give the sources"):
        prepare_tree(commit_origin(str(folder), "01234567" * 5), tmp_path / "src")
    assert not list(tmp_path.glob("src*"))


@pytest.mark.parametrize("repository", ["ext::sh -c x", "/nowhere", "--upload-pack=x", "ftp://x/y", "http://x/y"])
def test_other_repositories_are_refused(repository: str) -> None:
    with pytest.raises(BuildError, match="is neither an https address nor a folder"):
        find_commit(repository, "abcdef0")


def test_no_git_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="git is not installed; give the sources with --source"):
        find_commit("https://example.org/x", "abcdef0")


@posix_only
def test_what_a_host_says_of_its_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = host_folder(tmp_path / "host")
    said = {"commit": "unknown"}
    monkeypatch.setattr(host, "read_host", lambda *_: said)
    given = host.HostGgml(folder, folder)
    assert host.host_build(given) == ("", 0)
    server = folder / "llama-server"
    server.write_text("#!/bin/sh\necho 'loading' >&2\necho 'version: 10488 (4df29be4f)' >&2\n")
    server.chmod(0o755)
    assert host.host_build(given) == ("4df29be4f", 10488)
    said["commit"] = "4df29be"
    assert host.host_build(given) == ("4df29be4f", 10488)
    said["commit"] = "0c1e57098-dirty"  # the server is of another build than the libraries
    assert host.host_build(given) == ("0c1e57098", 0)
    server.write_text("#!/bin/sh\nexit 1\n")
    assert host.host_build(given) == ("0c1e57098", 0)


@needs_git
def test_a_hosts_own_sources_are_taken(mirror: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, commits = mirror
    folder = host_folder(tmp_path / "host")
    said: tuple[str, int] = (commits[0][:7], 1)
    monkeypatch.setattr(plan, "host_build", lambda given: said)
    monkeypatch.setattr(plan, "find_bindings", lambda: None)
    origin = plan_build(BuildOptions(on=folder, git=str(repository))).origin
    assert (origin.commit, origin.repository) == (commits[0], str(repository))
    assert origin.version == f"llama.cpp-b1-{commits[0][:9]}"
    said = ("0c1e57098", 0)  # that of a source archive we know
    assert plan_build(BuildOptions(on=folder, git="/nowhere")).origin.id == "sdist"
    said = ("", 0)  # it does not tell: the checks of its ggml decide
    assert plan_build(BuildOptions(on=folder, git="/nowhere")).origin.id == "sdist"
    said = ("abcdef0", 0)
    with pytest.raises(BuildError, match="has no tag or branch at commit abcdef0"):
        plan_build(BuildOptions(on=folder, git=str(repository)))


def archive(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    return path


@pytest.mark.parametrize("top", ["llama.cpp-b10488", "llama_cpp_python-1/vendor/llama.cpp", "x/llama.cpp"])
def test_an_archive_with_its_hash(tmp_path: Path, top: str) -> None:
    path = archive(tmp_path / "a.tar.gz", *(f"{top}/{name}" for name in FILES), "other/include/not.h")
    origin = archive_origin(path, file_sha256(path).upper())
    prepare_tree(origin, tmp_path / "src")
    assert sorted(p.relative_to(tmp_path / "src").as_posix() for p in (tmp_path / "src").rglob("*") if p.is_file()) == [
        "CMakeLists.txt",
        "include/llama.h",
        "src/CMakeLists.txt",
    ]


def test_an_archive_without_its_hash_is_not_opened(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", "x/include/llama.h")
    with pytest.raises(BuildError, match="name its content with --sha256"):
        archive_origin(path, "")
    with pytest.raises(BuildError, match=r"has the sha256 \w{16}…, not 0{16}…"):
        archive_origin(path, "0" * 64)
