"""What a build needs from the machine: a C++ compiler, cmake, ninja, room on the disk, memory for each job."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import BuildError
from .cache import make_dir, remove_tree
from .sources import run_pip

MINIMUM_CMAKE = (3, 21)
# Measured: sources, objects and result take 150 MB. GPU back ends compile the same kernels for many cards.
FRESH_BUILD_BYTES = 500_000_000
NEXT_BUILD_BYTES = 200_000_000
GPU_BUILD_BYTES = 5_000_000_000
GPU_BACKENDS = ("GGML_CUDA", "GGML_HIP", "GGML_SYCL", "GGML_VULKAN", "GGML_MUSA", "GGML_OPENCL")
JOB_BYTES = 1_500_000_000  # llama.cpp's unity files of sixteen models each need about this much to compile


@dataclass(frozen=True)
class Toolchain:
    """Paths of the programs a build runs; ``ninja`` is None where cmake's own default generator is used (MSVC)."""

    cmake: str
    ninja: str | None
    compiler: str


def find_compiler(definitions: Mapping[str, str] | None = None) -> str | None:
    """The C++ compiler cmake will take, or None. ``definitions`` are the user's cmake -D values."""
    name = (definitions or {}).get("CMAKE_CXX_COMPILER", "")
    if not name and os.environ.get("CXX"):  # cmake takes the first word of CXX as the program, the rest as its options
        name = (shlex.split(os.environ["CXX"], posix=os.name == "posix") or [""])[0]
    if name:
        path = shutil.which(name)
        return path if path and _answers(path) else None
    names = ["c++", "g++", "clang++"] + (["cl", "clang-cl"] if sys.platform == "win32" else [])
    for name in names:
        path = shutil.which(name)
        if path and _answers(path):
            return path
    return _visual_studio() if sys.platform == "win32" else None


def require_compiler(definitions: Mapping[str, str] | None = None) -> str:
    """The C++ compiler, or a BuildError that says how to get one on this platform."""
    found = find_compiler(definitions)
    if found:
        return found
    wanted = (definitions or {}).get("CMAKE_CXX_COMPILER") or os.environ.get("CXX")
    if wanted:
        raise BuildError(f"the C++ compiler {wanted!r} cannot be run; correct CXX or CMAKE_CXX_COMPILER, or unset it")
    raise BuildError(f"no C++ compiler was found, and llama.cpp is compiled on this machine; {compiler_advice()}")


def compiler_advice() -> str:
    """How to get a compiler here."""
    if sys.platform == "darwin":
        return "install Apple's with `xcode-select --install`"
    if sys.platform == "win32":
        return "install the Visual Studio Build Tools with the C++ workload"
    return "install one (Debian, Ubuntu: `apt install build-essential`; Fedora: `dnf install gcc-c++`)"


def find_cmake() -> str | None:
    """A cmake on the PATH that is new enough, or None."""
    path = shutil.which("cmake")
    return path if path and (version_of(path) or (0,)) >= MINIMUM_CMAKE else None


def find_ninja() -> str | None:
    """A ninja on the PATH, or None."""
    for name in ("ninja", "ninja-build"):
        path = shutil.which(name)
        if path and version_of(path):
            return path
    return None


def version_of(program: str) -> tuple[int, ...] | None:
    """The version a program prints for --version, or None when it cannot be run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"(\d+(?:\.\d+)+)", done.stdout) if done.returncode == 0 else None
    return tuple(int(part) for part in match.group(1).split(".")) if match else None


def toolchain(tools_dir: Path, definitions: Mapping[str, str] | None = None) -> Toolchain:
    """Compiler, cmake and ninja; the latter two are put into ``tools_dir`` by pip when the system has none.

    Raises BuildError with one sentence for whatever is missing and cannot be had.
    """
    compiler = require_compiler(definitions)
    cmake = find_cmake() or _from_wheel("cmake", tools_dir)
    if sys.platform == "win32" and Path(compiler).name.lower() == "vswhere.exe":
        return Toolchain(cmake, None, compiler)  # outside a developer prompt only the Visual Studio generator finds cl
    return Toolchain(cmake, find_ninja() or _from_wheel("ninja", tools_dir), compiler)


def _from_wheel(name: str, tools_dir: Path) -> str:
    """The program out of its PyPI wheel, kept in a folder of ours: the user's environment is left alone."""
    home = tools_dir / name
    suffix = ".exe" if sys.platform == "win32" else ""
    # In the wheels, bin/cmake is a Python script that needs its package on the path; the program itself is in data/bin.
    places = [home / name / "data" / "bin" / (name + suffix), home / "bin" / (name + suffix)]

    def ready() -> str | None:
        return next((str(path) for path in places if path.is_file() and version_of(str(path))), None)

    if found := ready():
        return found
    staging = tools_dir / f".{name}.part"
    remove_tree(staging)
    make_dir(tools_dir)
    try:
        run_pip(
            ["install", "--no-deps", "--only-binary", ":all:", "--target", str(staging), name],
            name,
            f"install {name} with the system's package manager",
        )
        remove_tree(home)
        os.replace(staging, home)
    finally:
        remove_tree(staging)
    if found := ready():
        return found
    raise BuildError(f"the {name} that pip fetched does not run here; install {name} with the system's package manager")


def require_space(folder: Path, needed: int) -> None:
    """Raise BuildError when the file system of ``folder`` (which need not exist yet) has less than ``needed`` bytes."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BuildError(
            f"{free / 1e9:.1f} GB are free at {place}, and building llama.cpp takes about {needed / 1e9:.1f} GB; "
            "make room or set STEER_CACHE to a folder on another disk"
        )


def build_bytes(fresh: bool, definitions: Mapping[str, str]) -> int:
    """About how much room a build takes, in bytes."""
    gpu = any(definitions.get(name, "OFF").upper() in ("ON", "1", "TRUE", "YES") for name in GPU_BACKENDS)
    if not fresh:
        return NEXT_BUILD_BYTES
    return GPU_BUILD_BYTES if gpu else FRESH_BUILD_BYTES


def default_jobs() -> int:
    """How many files to compile at once: one for each processor, fewer when memory is short."""
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        processors = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return processors
    return max(1, min(processors, memory // JOB_BYTES))


def _answers(compiler: str) -> bool:
    # On macOS /usr/bin/c++ exists before there is a compiler behind it, so its presence says nothing.
    if Path(compiler).name.lower() in ("cl", "cl.exe"):
        return True
    return version_of(compiler) is not None


def _visual_studio() -> str | None:
    base = os.environ.get("ProgramFiles(x86)")
    path = Path(base) / "Microsoft Visual Studio" / "Installer" / "vswhere.exe" if base else None
    return str(path) if path and path.is_file() else None
