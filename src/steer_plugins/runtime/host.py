"""The ggml that a host already ships, as something to build upon.

A host is a site-packages folder with a full llama-cpp-python (headers and cmake package are there), or a folder with
llama-server's ``libggml*`` and nothing else: a llama.cpp release, text-generation-webui's llama_cpp_binaries, Ollama's
``lib/ollama``. For the latter the headers come from the matching sources, and a small cmake package is generated.

llama.cpp and ggml share structures and enumerations that change without notice, so only the same ggml will do: the
version, the commit where both sides know theirs, the list of operations, and the size of a tensor must agree.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import file_sha256, write_atomically
from ..errors import BuildError
from .bindings import DISTRIBUTION, Bindings, find_any_library, ggml_files
from .cache import digest, make_dir
from .elf import read_dynamic
from .sources import SourceOrigin

# Where a host keeps its libraries, relative to the folder people know.
_PLACES = (".", "lib", "bin", "build/bin", "lib/ollama", "llama_cpp_binaries/bin", "llama_cpp_binaries", "llama_cpp/lib")
# The commit that a release of llama-cpp-python vendors; its archive says so only to git.
SDIST_COMMITS = {"0.3.36": "0c1e57098bba43ac29e6e3b677cdceebdd22334f"}
# What a build makes itself; never taken from the host.
_OURS = re.compile(r"(lib)?(llama|mtmd|llava)(?![a-z])")


@dataclass(frozen=True)
class HostGgml:
    """A folder with ggml's shared libraries. ``folder`` is what the user named, ``library_dir`` where they are, ``extra``
    a subfolder with one more back end (Ollama keeps each kind of GPU in one)."""

    folder: Path
    library_dir: Path
    extra: Path | None = None

    @property
    def ggml_prefix(self) -> Path | None:
        """It has no cmake package; one is generated."""
        return None

    def ggml_files(self) -> list[Path]:
        """The ggml libraries and what else of the folder they load (CUDA's run-time libraries, say)."""
        return with_dependencies(self.library_dir) + (with_dependencies(self.extra) if self.extra else [])

    def ggml_id(self) -> str:
        """A content hash of the ggml libraries (sha256 hex)."""
        files = ggml_files(self.library_dir) + (ggml_files(self.extra) if self.extra else [])
        return digest("host", *(part for path in files for part in (path.name, file_sha256(path))))

    def left_out(self) -> list[Path]:
        """Subfolders with back ends that are not taken: there may be several of one name."""
        if self.extra is not None:
            return []
        return sorted(path for path in self.library_dir.iterdir() if path.is_dir() and ggml_files(path))


def host_ggml(folder: Path) -> Bindings | HostGgml:
    """The ggml in ``folder``. Raises BuildError when there is none to build upon."""
    if not folder.is_dir():
        raise BuildError(f"--on {folder} is not a folder; give the one that has the host's libggml files")
    folder = folder.resolve()
    if (folder / "lib" / "cmake" / "ggml" / "ggml-config.cmake").is_file():
        for distribution in importlib.metadata.distributions(name=DISTRIBUTION, path=[str(folder)]):
            installed = Bindings(distribution.version, folder / "llama_cpp", folder)
            if installed.shares_ggml:
                return installed
    for place in _PLACES:
        candidate = folder / place
        if find_any_library(candidate, "ggml-base") and find_any_library(candidate, "ggml"):
            library_dir = candidate.resolve()
            if sys.platform == "win32" and not (library_dir / "ggml.lib").is_file():
                # Windows links against import libraries, which hosts do not ship.
                raise BuildError(f"{folder} has no import libraries (ggml.lib), without which nothing links to it on Windows")
            return HostGgml(folder, library_dir)
    if ggml_files(folder) and find_any_library(folder.parent, "ggml-base") and find_any_library(folder.parent, "ggml"):
        return HostGgml(folder, folder.parent, folder)
    raise BuildError(
        f"{folder} holds no shared libraries ggml and ggml-base to build on (they may be linked into its programs); "
        "leave out --on to build ggml too"
    )


def with_dependencies(library_dir: Path) -> list[Path]:
    """The ggml libraries of a folder, and those libraries in the same folder that they need."""
    found = {path.name: path for path in ggml_files(library_dir)}
    if sys.platform in ("win32", "darwin"):  # what they need is not read there: take whatever is not part of llama.cpp
        for path in library_dir.iterdir():
            if path.name.endswith((".dll", ".dylib")) and not _OURS.match(path.name):
                found[path.name] = path
        return sorted(found.values())
    pending = list(found.values())
    while pending:
        dynamic = read_dynamic(pending.pop())
        for name in dynamic.needed if dynamic else ():
            path = library_dir / name
            if name not in found and "/" not in name and not _OURS.match(name) and path.is_file():
                found[name] = path
                pending.append(path)
    return sorted(found.values())


@dataclass(frozen=True)
class SourceGgml:
    """The ggml of a source tree: ``version``, ``commit`` ("" where nothing says) and the names of its operations."""

    version: str
    commit: str
    operations: tuple[str, ...]


def source_ggml(root: Path, origin: SourceOrigin) -> SourceGgml:
    """What the sources in ``root`` (a copy of ``origin``) say about their ggml. Raises BuildError when they say nothing."""
    try:
        cmake = (root / "ggml" / "CMakeLists.txt").read_text(encoding="utf-8", errors="replace")
        code = (root / "ggml" / "src" / "ggml.c").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cmake = code = ""
    numbers = [re.search(rf"set\(GGML_VERSION_{part}\s+(\d+)\)", cmake) for part in ("MAJOR", "MINOR", "PATCH")]
    table = re.search(r"GGML_OP_NAME\[GGML_OP_COUNT\]\s*=\s*\{(.*?)\};", code, re.DOTALL)
    names = tuple(re.findall(r'"([^"\n]+)"', table.group(1))) if table else ()
    if not all(numbers) or not names:
        raise BuildError(f"the sources {origin} do not say which ggml they have; give others with --source DIR")
    version = ".".join(match.group(1) for match in numbers if match)
    return SourceGgml(version, _commit(origin), names)


def _commit(origin: SourceOrigin) -> str:
    if origin.commit:
        return origin.commit
    if origin.folder is None:
        return SDIST_COMMITS.get(origin.version, "") if origin.archive is None else ""
    if not (origin.folder / ".git").exists():  # a repository that the tree merely lies in says nothing about it
        return ""
    command = ["git", "-C", str(origin.folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def read_host(library_dir: Path, operations: int, extra: Path | None = None) -> dict[str, Any]:
    """What a folder's ggml says of itself, asked in a process of its own: "version", "commit", "tensor" (bytes of one
    with its header), the names of the first "operations", its "devices" (with those of the modules in ``extra``);
    "error" when it cannot be loaded."""
    script = Path(__file__).with_name("probe.py")
    command = [sys.executable, "-I", str(script), str(library_dir), "--ggml", str(operations), *([str(extra)] if extra else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error).splitlines()[0]}
    # One JSON object for each thing found out: what was said before a crash still counts.
    answer: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            answer.update(found)
    if not answer:
        last = (done.stderr.strip().splitlines() or [f"the loading process ended with code {done.returncode}"])[-1]
        answer["error"] = last
    return answer


def host_build(host: HostGgml) -> tuple[str, int]:
    """The llama.cpp that a host was built from: the first digits of its commit and its build number, as far as its libraries
    and its llama-server (``--version``) say; "" and 0 where they do not."""
    commit = _known(str(read_host(host.library_dir, 0).get("commit") or ""))
    number = 0
    name = "llama-server.exe" if sys.platform == "win32" else "llama-server"
    for folder in (host.library_dir, host.folder, host.library_dir.parent / "bin", host.folder.parent):
        program = folder / name
        if not program.is_file():
            continue
        try:
            done = subprocess.run(
                [str(program), "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=False
            )
        except (OSError, subprocess.SubprocessError):
            continue
        found = re.search(r"^version: (\d+) \(([0-9a-f]{7,40})\)", done.stdout + done.stderr, re.MULTILINE)
        if found:
            said = found.group(2)
            if not commit or said.startswith(commit[: len(said)]):
                number, commit = int(found.group(1)), max(said, commit, key=len)
            break
    return commit, number


def require_same_ggml(folder: Path, host: dict[str, Any], source: SourceGgml) -> None:
    """Raise BuildError with one sentence unless the host's ggml (see read_host) is that of the sources."""
    if not host.get("version"):
        why = host.get("error") or "it does not tell its version"
        raise BuildError(f"the ggml in {folder} cannot be built upon: {why}; leave out --on to build ggml too")
    commit = _known(str(host.get("commit") or ""))
    way_out = f"give the llama.cpp sources of {f'commit {commit}' if commit else 'that ggml version'} with --source DIR"
    if host["version"] != source.version:
        raise BuildError(f"{folder} brings ggml {host['version']}, but the sources carry ggml {source.version}; {way_out}")
    own = _known(source.commit)
    length = min(len(commit), len(own))
    if length and commit[:length] != own[:length]:
        raise BuildError(
            f"{folder} brings ggml {host['version']} of llama.cpp commit {commit}, "
            f"but the sources are of commit {own[:9]}; {way_out}"
        )
    if list(host.get("operations") or ()) != list(source.operations):
        raise BuildError(
            f"{folder} brings a ggml {host['version']} whose operations are not those of the sources (a fork?); {way_out}"
        )


def _known(commit: str) -> str:
    """The hexadecimal part of what ggml_commit() says: "0c1e570-dirty" -> "0c1e570", "unknown" -> ""."""
    match = re.fullmatch(r"([0-9a-f]{7,40})(-dirty)?", commit.strip().lower())
    return match.group(1) if match else ""


def lost_devices(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the devices that were there before and are not after."""
    names = [str(device.get("name")) for device in after]
    return [str(device.get("name")) for device in before if str(device.get("name")) not in names]


_CONFIG = """\
# Made by steer-plugins: the ggml libraries of a host, with the headers of the matching sources.
get_filename_component(_steer_here "${{CMAKE_CURRENT_LIST_DIR}}" ABSOLUTE)
# A ggml built with other sizes (GGML_MAX_NAME) would be corrupted silently.
try_compile(_steer_same "${{CMAKE_BINARY_DIR}}/steer-ggml-check" SOURCES "${{_steer_here}}/check.c"
    CMAKE_FLAGS "-DINCLUDE_DIRECTORIES={include}")
if (NOT _steer_same)
    message(FATAL_ERROR "a tensor of the host's ggml has another size than one of the sources")
endif()
find_package(Threads REQUIRED)
if (NOT TARGET ggml::ggml)
    add_library(ggml::ggml-base UNKNOWN IMPORTED)
    set_target_properties(ggml::ggml-base PROPERTIES
        IMPORTED_LOCATION "{base}"
        INTERFACE_INCLUDE_DIRECTORIES "{include}")
    add_library(ggml::ggml UNKNOWN IMPORTED)
    set_target_properties(ggml::ggml PROPERTIES
        IMPORTED_LOCATION "{ggml}"
        INTERFACE_INCLUDE_DIRECTORIES "{include}"
        INTERFACE_COMPILE_DEFINITIONS "GGML_BACKEND_SHARED;GGML_SHARED"
        INTERFACE_LINK_LIBRARIES "ggml::ggml-base"
        # The back ends are the host's affair: what they need is found when they are loaded, not when we link.
        INTERFACE_LINK_OPTIONS "{options}")
    add_library(ggml::all INTERFACE IMPORTED)
endif()
set(ggml_FOUND TRUE)
"""
_CHECK = """\
#include "ggml.h"
/* ggml_tensor_overhead() of the host: a tensor and the object header before it (four words). */
typedef char same[sizeof(struct ggml_tensor) + 4 * sizeof(void *) == {tensor} ? 1 : -1];
int main(void) {{ return 0; }}
"""


def write_cmake_package(prefix: Path, host: HostGgml, include: Path, tensor: int) -> None:
    """Write a cmake package ``ggml`` below ``prefix`` that stands for the host's libraries.

    ``include`` has the sources' headers; ``tensor`` is the host's ggml_tensor_overhead() in bytes.
    """
    folder = make_dir(prefix / "lib" / "cmake" / "ggml")
    ending = {"win32": ".lib"}.get(sys.platform)
    paths = {}
    for key, base in (("ggml", "ggml"), ("base", "ggml-base")):
        path = host.library_dir / f"{base}{ending}" if ending else find_any_library(host.library_dir, base)
        assert path is not None
        paths[key] = _cmake(path)
    options = "-Wl,--allow-shlib-undefined" if sys.platform.startswith("linux") else ""
    text = _CONFIG.format(include=_cmake(include), options=options, **paths)
    write_atomically(folder / "check.c", _CHECK.format(tensor=int(tensor)).encode())
    write_atomically(folder / "ggml-config.cmake", text.encode())


def _cmake(path: Path) -> str:
    return str(path).replace("\\", "/").replace('"', '\\"').replace("$", "\\$")


def host_of(meta: dict[str, Any]) -> Path | None:
    """The host folder that a runtime was built on (``--on``), from its runtime.json; None for other runtimes."""
    ggml = meta.get("ggml")
    host = ggml.get("host") if isinstance(ggml, dict) else None
    return Path(host) if isinstance(host, str) and host else None


def same_host(meta: dict[str, Any]) -> bool:
    """Whether the host that a runtime was built on (see host_of) still has that ggml."""
    host = host_of(meta)
    try:
        return host is not None and host_ggml(host).ggml_id() == meta["ggml"].get("id")
    except (BuildError, OSError):
        return False
