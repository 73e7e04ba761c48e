"""Getting llama.cpp's sources: archives are unpacked safely, folders copied, pip's failures told in a sentence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from steer_plugins.errors import BuildError
from steer_plugins.runtime import sources
from steer_plugins.runtime.sources import extract_llama_cpp, fetch_sdist, folder_origin, prepare_tree, sdist_origin

PREFIX = "llama_cpp_python-0.3.36/vendor/llama.cpp"
TREE = {
    "CMakeLists.txt": "set(LLAMA_VERSION_MAJOR 1)\nset(LLAMA_VERSION_MINOR 2)\nset(LLAMA_VERSION_PATCH 3)\n",
    "include/llama.h": "api",
    "src/CMakeLists.txt": "lib",
    "src/models/x.cpp": "model",
    "models/vocab.gguf": "big",
    "docs/a.md": "text",
}


def make_archive(path: Path, members: dict[str, str], special: list[tarfile.TarInfo] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
        for info in special or []:
            tar.addfile(info)
    return path


def make_tree(root: Path) -> Path:
    for name, text in TREE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_only_what_a_build_needs_is_unpacked(tmp_path: Path) -> None:
    members = {f"{PREFIX}/{name}": text for name, text in TREE.items()} | {"llama_cpp_python-0.3.36/README.md": "no"}
    archive = make_archive(tmp_path / "a.tar.gz", members)
    extract_llama_cpp(archive, tmp_path / "out")
    assert names(tmp_path / "out") == {"CMakeLists.txt", "include/llama.h", "src/CMakeLists.txt", "src/models/x.cpp"}


@pytest.mark.parametrize("name", [f"{PREFIX}/../../../../evil", "/etc/evil", f"{PREFIX}/C:evil", f"{PREFIX}/..\\evil"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", {f"{PREFIX}/CMakeLists.txt": "x", name: "evil"})
    with pytest.raises(BuildError, match="outside of it"):
        extract_llama_cpp(archive, tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_left_out(tmp_path: Path, kind: bytes) -> None:
    link = tarfile.TarInfo(f"{PREFIX}/src/link")
    link.type, link.linkname = kind, "../../../../../etc/passwd"
    through = {f"{PREFIX}/include/llama.h": "x"}
    archive = make_archive(tmp_path / "a.tar.gz", through, [link])
    extract_llama_cpp(archive, tmp_path / "out")
    assert names(tmp_path / "out") == {"include/llama.h"}
    assert not os.path.lexists(tmp_path / "out" / "src" / "link")


def test_size_and_number_are_bounded(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", {f"{PREFIX}/{name}": "x" * 100 for name in ("include/llama.h", *"abcdefghi")})
    with pytest.raises(BuildError, match="more than any"):
        extract_llama_cpp(archive, tmp_path / "out", max_bytes=500)
    with pytest.raises(BuildError, match="more than any"):
        extract_llama_cpp(archive, tmp_path / "out", max_files=9)
    extract_llama_cpp(archive, tmp_path / "out", max_bytes=1000, max_files=10)


def test_broken_archives_are_told_in_a_sentence(tmp_path: Path) -> None:
    whole = make_archive(tmp_path / "a.tar.gz", {f"{PREFIX}/src/{index}": os.urandom(999).hex() for index in range(20)})
    broken = tmp_path / "b.tar.gz"
    broken.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(BuildError, match=r"b\.tar\.gz cannot be unpacked"):
        extract_llama_cpp(broken, tmp_path / "out")
    broken.write_bytes(b"no archive at all")
    with pytest.raises(BuildError, match=r"b\.tar\.gz cannot be unpacked"):
        extract_llama_cpp(broken, tmp_path / "out")
    with pytest.raises(BuildError, match="--source"):
        extract_llama_cpp(make_archive(tmp_path / "c.tar.gz", {"x/README": "y"}), tmp_path / "out")


def test_a_given_folder_is_copied_and_left_alone(tmp_path: Path) -> None:
    given = make_tree(tmp_path / "given")
    (given / "build").mkdir()
    (given / "build" / "CMakeCache.txt").write_text("mine")
    (given / ".git").mkdir()
    (given / ".git" / "HEAD").write_text("ref")
    before = {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    prepare_tree(folder_origin(given), tmp_path / "work" / "src")
    assert names(tmp_path / "work" / "src") == {"CMakeLists.txt", "include/llama.h", "src/CMakeLists.txt", "src/models/x.cpp"}
    assert {path: path.read_bytes() for path in given.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["src"]


def test_versions_of_given_folders(tmp_path: Path) -> None:
    tree = folder_origin(make_tree(tmp_path / "tree"))
    assert tree.version == f"llama.cpp-1.2.3-{tree.id[:8]}"
    assert folder_origin(tmp_path / "tree", "0.3.36").version == "0.3.36"
    wrapped = make_tree(tmp_path / "sdist" / "vendor" / "llama.cpp")
    (tmp_path / "sdist" / "llama_cpp").mkdir()
    (tmp_path / "sdist" / "llama_cpp" / "__init__.py").write_text('__version__ = "0.3.99"\n')
    assert folder_origin(tmp_path / "sdist").version == "0.3.99"
    assert folder_origin(tmp_path / "sdist").folder == wrapped
    identity = folder_origin(tmp_path / "sdist").id
    (wrapped / "src" / "models" / "x.cpp").write_text("edited model")
    assert folder_origin(tmp_path / "sdist").id != identity
    with pytest.raises(BuildError, match="holds no llama.cpp sources"):
        folder_origin(tmp_path)


@pytest.mark.parametrize("version", ["", "latest", "../0.3", "0.3.36; rm", "--help"])
def test_versions_are_checked(version: str) -> None:
    with pytest.raises(BuildError, match="is not a version"):
        sdist_origin(version)


def test_no_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "pip_available", lambda: False)
    with pytest.raises(BuildError, match=r"has no pip .*--source DIR"):
        fetch_sdist("0.3.36", tmp_path)


def fake_pip(monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, archive: bytes | None = None) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if archive is not None and "download" in command:
            (Path(command[command.index("--dest") + 1]) / "llama_cpp_python.tar.gz").write_bytes(archive)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(sources, "pip_available", lambda: True)
    monkeypatch.setattr(sources.subprocess, "run", run)
    return calls


def test_the_pinned_version_is_fetched_by_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_pip(monkeypatch, 0, "", b"not the real one")
    with pytest.raises(BuildError, match="sha256"):
        fetch_sdist("0.3.36", tmp_path)
    assert calls[0][:3] == [sys.executable, "-m", "pip"] and "--require-hashes" in calls[0]
    assert sources.SDIST_SHA256["0.3.36"] in (tmp_path / "requirements.txt").read_text()
    assert not any("index" in word for word in calls[0])


def test_other_versions_are_fetched_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_pip(monkeypatch, 0, "", b"any")
    assert fetch_sdist("0.3.35", tmp_path).name == "llama_cpp_python.tar.gz"
    assert calls[0][-1] == "llama-cpp-python==0.3.35"


def test_pips_failure_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, 1, "noise\nERROR: Could not find a version\nERROR: No matching distribution for it\nhint\n")
    with pytest.raises(BuildError) as caught:
        fetch_sdist("0.3.35", tmp_path)
    assert "No matching distribution for it" in str(caught.value) and "--source DIR" in str(caught.value)
    assert "\n" not in str(caught.value)
    fake_pip(monkeypatch, 1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n  x\n")
    with pytest.raises(BuildError, match="sha256 is not the expected one"):
        fetch_sdist("0.3.36", tmp_path)


def test_a_failed_fetch_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, 0, "", b"broken archive")
    with pytest.raises(BuildError):
        prepare_tree(sdist_origin("0.3.35"), tmp_path / "src")
    assert list(tmp_path.iterdir()) == []
