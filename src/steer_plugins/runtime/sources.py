"""llama.cpp's sources: the sdist of llama-cpp-python, a folder, an archive, or one commit of a git repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..atomic import file_sha256
from ..errors import BuildError
from .bindings import DISTRIBUTION, PINNED_VERSION
from .cache import digest, make_dir, remove_tree
from .checkout import SKIPPED, copy_tree, fetch_commit, first_line

# The sdist of the version the patch is made for; other versions are checked against the index's own hash by pip.
SDIST_SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}

MAX_BYTES = 2 << 30
MAX_FILES = 60_000


@dataclass(frozen=True)
class SourceOrigin:
    """Where the sources come from. ``version`` is that of llama-cpp-python where known, else a label; ``id`` tells trees
    apart in cache keys. One of ``folder``, ``archive``, and ``repository`` with the whole hash of a ``commit``; none of them
    for the sdist of ``version``."""

    version: str
    folder: Path | None = None
    id: str = "sdist"
    archive: Path | None = None
    repository: str = ""
    commit: str = ""

    def __str__(self) -> str:
        if self.repository:
            return f"llama.cpp {self.commit[:9]} of {self.repository}"
        return str(self.folder or self.archive or f"{DISTRIBUTION} {self.version}")


def sdist_origin(version: str) -> SourceOrigin:
    """The sdist of llama-cpp-python ``version``. Raises BuildError if that is not a version number."""
    if not re.fullmatch(r"\d+(\.\d+)*([a-z0-9.+-]*)", version):
        raise BuildError(f"{version!r} is not a version of {DISTRIBUTION}; give one like {PINNED_VERSION}")
    return SourceOrigin(version)


def commit_origin(repository: str, commit: str, build: int = 0) -> SourceOrigin:
    """One commit (its whole hash) of a git repository; ``build`` is llama.cpp's number for it, 0 where unknown."""
    label = f"b{build}-{commit[:9]}" if build else commit[:9]
    return SourceOrigin(f"llama.cpp-{label}", id=f"git {commit}", repository=repository, commit=commit)


def archive_origin(archive: Path, sha256: str) -> SourceOrigin:
    """A source archive (.tar.gz) whose content is named by its hash. Raises BuildError when it has another one."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BuildError(f"--source {archive} is an archive: name its content with --sha256 (64 hexadecimal digits)")
    found = file_sha256(archive)
    if found != sha256.lower():
        raise BuildError(f"{archive} has the sha256 {found[:16]}…, not {sha256[:16].lower()}…; fetch it again")
    return SourceOrigin(f"llama.cpp-{found[:9]}", id=f"archive {found}", archive=archive.absolute())


def folder_origin(folder: Path, version: str | None = None) -> SourceOrigin:
    """A llama.cpp tree or an unpacked llama-cpp-python sdist, given by the user.

    The version is the given one, else the sdist's own, else a label made from llama.cpp's version and the content.
    Raises BuildError when the folder is neither.
    """
    root = llama_cpp_root(folder)
    wrapper = root.parent.parent / "llama_cpp" / "__init__.py"
    identity = _tree_id(root)
    if version is None and wrapper.is_file() and root.name == "llama.cpp":
        match = re.search(r'__version__\s*=\s*"([^"]+)"', wrapper.read_text(encoding="utf-8", errors="replace"))
        version = match.group(1) if match else None
    if version is None:
        version = f"llama.cpp-{llama_cpp_version(root) or 'unknown'}-{identity[:8]}"
    return SourceOrigin(sdist_origin(version).version if version[:1].isdigit() else version, root, identity)


def llama_cpp_root(folder: Path) -> Path:
    """The llama.cpp tree in ``folder``: itself, or ``vendor/llama.cpp``. Raises BuildError when there is none."""
    for root in (folder, folder / "vendor" / "llama.cpp"):
        if all((root / path).is_file() for path in ("CMakeLists.txt", "include/llama.h", "src/CMakeLists.txt")):
            return root.absolute()
    raise BuildError(f"{folder} holds no llama.cpp sources; give a llama.cpp tree or an unpacked {DISTRIBUTION} source archive")


def llama_cpp_version(root: Path) -> str | None:
    """llama.cpp's own version ("0.5.0") as its CMakeLists.txt states it, or None for trees that do not."""
    text = (root / "CMakeLists.txt").read_text(encoding="utf-8", errors="replace")
    numbers = [re.search(rf"set\(LLAMA_VERSION_{part}\s+(\d+)\)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(match.group(1) for match in numbers if match) or None


def prepare_tree(origin: SourceOrigin, target: Path) -> None:
    """Create ``target`` with a fresh llama.cpp tree (a finished one appears at once or not at all).

    Raises BuildError: no pip, no network, a wrong hash, a broken or hostile archive, no sources in the folder.
    """
    partial = target.with_name(f"{target.name}.part")
    download = target.with_name(f"{target.name}.download")
    remove_tree(partial)
    remove_tree(download)
    make_dir(partial)
    try:
        if origin.folder is not None:
            copy_tree(origin.folder, partial)
        elif origin.archive is not None:
            extract_llama_cpp(origin.archive, partial)
        elif origin.repository:
            fetch_commit(origin.repository, origin.commit, partial)
        else:
            extract_llama_cpp(fetch_sdist(origin.version, make_dir(download)), partial)
        llama_cpp_root(partial)
        os.replace(partial, target)
    finally:
        remove_tree(partial)
        remove_tree(download)


def pip_available() -> bool:
    """Whether this Python has pip."""
    done = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    return done.returncode == 0


def run_pip(arguments: list[str], what: str, way_out: str) -> None:
    """Run this Python's pip, with whatever index the user configured. Raises BuildError with one sentence."""
    if not pip_available():
        raise BuildError(f"{sys.executable} has no pip to fetch {what} with; {way_out}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip exit code {done.returncode}"
        if "No space left on device" in done.stderr:
            reason = "no space left on the disk"
        elif "HASHES" in done.stderr and "MATCH" in done.stderr:
            reason = "its sha256 is not the expected one"
        raise BuildError(f"pip could not fetch {what} ({reason}); {way_out}")


def fetch_sdist(version: str, folder: Path) -> Path:
    """Let pip download the sdist of llama-cpp-python ``version`` into ``folder``; the path of the archive."""
    arguments = ["download", "--no-deps", "--no-binary", DISTRIBUTION, "--dest", str(folder)]
    known = SDIST_SHA256.get(version)
    if known:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{DISTRIBUTION}=={version} --hash=sha256:{known}\n", encoding="utf-8")
        arguments += ["--require-hashes", "--requirement", str(requirements)]
    else:
        arguments.append(f"{DISTRIBUTION}=={version}")
    run_pip(
        arguments,
        f"the sources of {DISTRIBUTION} {version}",
        "give a llama.cpp tree or an unpacked source archive with --source DIR",
    )
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise BuildError(f"pip fetched no source archive of {DISTRIBUTION} {version}; give one with --source DIR")
    if known and file_sha256(archives[0]) != known:
        raise BuildError(f"the sources of {DISTRIBUTION} {version} have a wrong sha256; give a tree with --source DIR")
    return archives[0]


def extract_llama_cpp(archive: Path, target: Path, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
    """Unpack the llama.cpp tree of an archive (its top folder, or a folder inside) into ``target``: plain files only, inside
    ``target``, bounded.

    Raises BuildError on a broken archive, a path that leaves the folder, or too much content.
    """
    total = count = 0
    try:
        root = _root_in_archive(archive, max_bytes, max_files)
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                inner = parts[len(root) :]
                # Links are left out: no file the build reads is one, and a link could lead anywhere.
                if parts[: len(root)] != root or not inner or inner[0] in SKIPPED or not member.isfile():
                    continue
                total += member.size
                count += 1
                if total > max_bytes or count > max_files:
                    raise BuildError(f"{archive.name} holds more than any llama.cpp release; it is not used")
                path = target.joinpath(*inner)
                path.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                with stream, path.open("wb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = first_line(error)
        raise BuildError(f"{archive.name} cannot be unpacked ({reason}); try again or give --source DIR") from None


def _root_in_archive(archive: Path, max_bytes: int, max_files: int) -> tuple[str, ...]:
    """The folder of an archive that is a llama.cpp tree."""
    roots: list[tuple[str, ...]] = []
    total = 0
    with tarfile.open(archive, "r:gz") as tar:
        for count, member in enumerate(tar):
            parts = PurePosixPath(member.name).parts
            if ".." in parts or member.name.startswith("/") or "\\" in member.name or ":" in member.name:
                raise BuildError(f"{archive.name} names {member.name!r}, a path outside of it; it is not used")
            total += member.size
            if count > 2 * max_files or total > 2 * max_bytes:
                raise BuildError(f"{archive.name} holds more than any llama.cpp release; it is not used")
            if parts[-2:] == ("include", "llama.h") and member.isfile():
                roots.append(parts[:-2])
    if not roots:
        raise BuildError(f"{archive.name} holds no llama.cpp sources; give a llama.cpp tree with --source DIR")
    return min(roots, key=len)


def _tree_id(root: Path) -> str:
    """A hash of the names, sizes and times of a tree's source files: enough to notice that the user edited it."""
    entries = []
    for part in ("CMakeLists.txt", "include", "src", "common", "ggml", "tools", "vendor", "cmake"):
        base = root / part
        files = [base] if base.is_file() else (path for path in base.rglob("*") if path.is_file())
        for path in files:
            stat = path.stat()
            entries.append(f"{path.relative_to(root).as_posix()} {stat.st_size} {stat.st_mtime_ns}")
    return digest(str(root), *sorted(entries))
