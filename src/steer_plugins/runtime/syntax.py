"""From ``compile_commands.json`` to a command that checks one source file without compiling it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def syntax_command(entries: Sequence[Mapping[str, Any]], source: Path) -> tuple[list[str], str] | None:
    """The command (and its folder) that checks one source file, from compile_commands.json; None if never compiled.

    Files in a unity build have no entry: theirs is the command of the unity file that includes them.
    """
    for entry in entries:
        listed = Path(entry["file"])
        if _same_path(listed, source):
            return _syntax_only(entry, source)
    for entry in entries:
        listed = Path(entry["file"])
        if "unity" in listed.name and listed.is_file():
            text = listed.read_text(encoding="utf-8", errors="replace")
            if any(_same_path(Path(path), source) for path in re.findall(r'#include "([^"]+)"', text)):
                return _syntax_only(entry, source)
    return None


def _syntax_only(entry: Mapping[str, Any], source: Path) -> tuple[list[str], str]:
    words = list(entry["arguments"]) if "arguments" in entry else _split_command(entry["command"])
    compiler = Path(words[0]).name.lower()
    result = [words[0], "/Zs" if compiler in ("cl", "cl.exe") else "-fsyntax-only"]
    skip = False
    for word in words[1:]:
        if skip:
            skip = False
        elif word in ("-o", "-MF", "-MT", "-MQ"):
            skip = True
        elif word in ("-c", "/c", "-MD", "-MMD") or word.startswith(("/Fo", "/Fd")):
            continue
        elif not _same_path(Path(word), Path(entry["file"])):
            result.append(word)
    return [*result, str(source)], str(entry["directory"])


def _split_command(command: str) -> list[str]:
    if os.name == "posix":
        return shlex.split(command)
    return [word.strip('"') for word in shlex.split(command, posix=False)]


def _same_path(one: Path, other: Path) -> bool:
    return os.path.normcase(os.path.realpath(one)) == os.path.normcase(os.path.realpath(other))
