"""What is known of the installed llama-cpp-python without importing it (importing loads a library for good)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..atomic import file_sha256
from .cache import digest

PINNED_VERSION = "0.3.36"
DISTRIBUTION = "llama-cpp-python"


def library_names(base: str) -> list[str]:
    """The file names a shared library called ``base`` may have on this platform, likeliest first."""
    if sys.platform == "win32":
        return [f"{base}.dll", f"lib{base}.dll"]
    if sys.platform == "darwin":
        return [f"lib{base}.dylib", f"lib{base}.so"]
    return [f"lib{base}.so"]


def find_library(folder: Path, base: str) -> Path | None:
    """The shared library ``base`` in ``folder``, or None."""
    return next((folder / name for name in library_names(base) if (folder / name).is_file()), None)


def find_any_library(folder: Path, base: str) -> Path | None:
    """Like find_library, but a name with a version (libx.so.0, libx.0.dylib) will do; the shortest one wins."""
    if found := find_library(folder, base):
        return found
    pattern = re.compile(rf"lib{re.escape(base)}(\.so(\.\d+)+|(\.\d+)+\.dylib)")
    names = (path for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else ()
    return min(names, key=lambda path: (len(path.name), path.name), default=None)


@dataclass(frozen=True)
class Bindings:
    """An installed llama-cpp-python: its version, its package folder, and the prefix of its ggml cmake package."""

    version: str
    package: Path
    ggml_prefix: Path | None

    @property
    def library_dir(self) -> Path:
        """Where its own libraries are, when it has any."""
        return self.package / "lib"

    @property
    def has_library(self) -> bool:
        """Whether it was installed with a libllama of its own (a full install)."""
        return find_library(self.library_dir, "llama") is not None

    @property
    def shares_ggml(self) -> bool:
        """Whether its ggml can be built upon: shared libraries, headers and the cmake package are all there."""
        return (
            self.ggml_prefix is not None
            and find_library(self.library_dir, "ggml") is not None
            and find_library(self.library_dir, "ggml-base") is not None
            and (self.ggml_prefix / "include" / "ggml.h").is_file()
        )

    def ggml_files(self) -> list[Path]:
        """The ggml shared libraries, one path for each file name."""
        return ggml_files(self.library_dir)

    def ggml_id(self) -> str:
        """A content hash of the ggml libraries (sha256 hex)."""
        return digest(*(part for path in self.ggml_files() for part in (path.name, file_sha256(path))))


def ggml_files(folder: Path) -> list[Path]:
    """The ggml shared libraries in ``folder``, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_ggml(path.name))


def is_ggml(name: str) -> bool:
    """Whether a file name is that of a ggml shared library."""
    shared = ".so" in name or name.endswith((".dylib", ".dll"))
    return shared and (name.startswith("libggml") or (name.startswith("ggml") and name.endswith(".dll")))


def find_bindings() -> Bindings | None:
    """The llama-cpp-python of this Python, or None. Nothing is imported."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        return None
    package = Path(spec.origin).parent
    prefix = None
    for candidate in (package.parent, Path(str(distribution.locate_file("")))):
        if (candidate / "lib" / "cmake" / "ggml" / "ggml-config.cmake").is_file():
            prefix = candidate
            break
    return Bindings(distribution.version, package, prefix)
