"""Where Ollama keeps ggml and its back ends: one folder, and in it one for each kind of GPU."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from steer_plugins.errors import BuildError


def find_libraries(folder: Path | None, gpu: str | None) -> Path:
    """The folder to build on (``steer build --on``): that of the kind of GPU, or the one above it for the CPU alone.

    Args:
        folder: Ollama's library folder, None to look where its installers put it.
        gpu: the name of the subfolder, "none" for the CPU alone, None where there is only one to choose.

    Raises:
        BuildError: there is no Ollama, no such kind of GPU, or several and none was named.
    """
    places = [folder] if folder is not None else list(_places())
    root = next((place for place in places if _has_ggml(place)), None)
    if root is None:
        where = str(folder) if folder is not None else "this machine"
        raise BuildError(f"{where} has no Ollama with shared libraries of ggml; name their folder with --dir")
    kinds = sorted(path.name for path in root.iterdir() if path.is_dir() and _has_ggml(path))
    if gpu == "none":
        return root
    if gpu is not None and gpu not in kinds:
        raise BuildError(f"{root} has no back end {gpu!r}; there is {', '.join(kinds) or 'none'}")
    if gpu is None and len(kinds) > 1:
        raise BuildError(f"{root} has several kinds of GPU; name one with --gpu: {', '.join(kinds)}, or none for the CPU")
    chosen = gpu or (kinds[0] if kinds else None)
    return root / chosen if chosen else root


def _has_ggml(folder: Path) -> bool:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    return any(name.startswith(("libggml", "ggml")) and (".so" in name or name.endswith((".dylib", ".dll"))) for name in names)


def _places() -> Iterator[Path]:
    program = shutil.which("ollama")
    if program is not None:
        yield Path(program).resolve().parent.parent / "lib" / "ollama"
        yield Path(program).resolve().parent / "lib" / "ollama"
    if sys.platform == "darwin":
        yield Path("/Applications/Ollama.app/Contents/Resources")
    elif sys.platform == "win32":
        yield Path(os.environ.get("LOCALAPPDATA", "")) / "Programs" / "Ollama" / "lib" / "ollama"
    else:
        for prefix in ("/usr/local", "/usr", "/opt/ollama"):
            yield Path(prefix) / "lib" / "ollama"
