"""Shared libraries in a runtime's folder: linked without using the disk twice, free to be moved, and what they offer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..atomic import file_sha256
from .cache import make_dir
from .elf import make_relative, read_dynamic


def is_shared_library(name: str) -> bool:
    """Whether a file name is that of a shared library, versions behind the suffix included."""
    return name.endswith((".dylib", ".dll")) or re.search(r"\.so(\.\d+)*$", name) is not None


def base_name(name: str) -> str:
    """ "libllama-common.so.0.5.0" -> "llama-common"; also "libllama.0.dylib" and "llama.dll" -> "llama"."""
    return re.sub(r"^lib|(\.\d+)*(\.so|\.dylib|\.dll)(\.\d+)*$", "", name)


def link_libraries(files: Iterable[Path], target: Path) -> None:
    """Put libraries into ``target`` without using the disk twice where that is possible.

    Wheels hold every library once for each of its names (libx.so, libx.so.0, libx.so.0.1). Here one of them is a hard
    link or a copy and the others point to it: a library loaded under two names must be one file, or it is loaded twice.
    """
    make_dir(target)
    first: dict[str, str] = {}
    for path in sorted(files, key=lambda path: (-len(path.name), path.name)):
        content = file_sha256(path)
        place = target / path.name
        with contextlib.suppress(FileNotFoundError):
            place.unlink()
        if content in first and os.name == "posix":
            os.symlink(first[content], place)
            continue
        first.setdefault(content, path.name)
        try:
            os.link(path.resolve(), place)
        except OSError:
            shutil.copy2(path.resolve(), place)


def free_from_place(files: Iterable[Path]) -> None:
    """Let libraries that look for each other in a fixed folder (on Linux) look beside themselves.

    So does libggml in any case, before it looks in LD_LIBRARY_PATH: it is small, and it is the one that loads the back
    ends. Where that means a change, a link to somebody else's file becomes a copy first.
    """
    for path in files:
        dynamic = None if path.is_symlink() else read_dynamic(path)
        if dynamic is None or not dynamic.runpath:
            continue
        if dynamic.runpath.startswith("$ORIGIN") and not (dynamic.yields and base_name(path.name) == "ggml"):
            continue
        copy = path.with_name(f".{path.name}.part")
        shutil.copy2(path, copy)
        with contextlib.suppress(ValueError):  # no room for it: the old place will do as long as it is there
            make_relative(copy, {})
        os.replace(copy, path)


def probe(lib_dir: Path) -> dict[str, Any]:
    """What the libraries in a folder offer, found out in a process of its own (probe.py); "error" when none load."""
    script = Path(__file__).with_name("probe.py")
    command = [sys.executable, "-I", str(script), str(lib_dir)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error).splitlines()[0]}
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
        if not isinstance(answer, dict):
            raise ValueError(answer)
        return answer
    except (ValueError, IndexError):
        if done.returncode == -getattr(signal, "SIGILL", 0):
            return {"error": "they were compiled for another processor"}
        last = (done.stderr.strip().splitlines() or [f"the loading process ended with code {done.returncode}"])[-1]
        return {"error": last}
