"""Load a runtime's libraries and say what is in them. Run as a program: python probe.py LIBRARY_FOLDER.

With ``--ggml N [FOLDER]`` it looks at the ggml libraries only, at the names of the first N operations of theirs, and at
the back ends in another folder too.

It is a process of its own because a loaded library stays loaded, and because a broken one must not take the caller
with it. It uses the standard library only and prints one JSON object (with ``--ggml`` one for each thing found out).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from typing import Any


def load(folder: str, base: str) -> ctypes.CDLL | None:
    """The shared library ``base`` of ``folder``, None where there is none. Raises OSError when it is broken."""
    names = [f"lib{base}.so", f"lib{base}.dylib", f"{base}.dll", f"lib{base}.dll"]
    versioned = (f"lib{base}.so.", f"lib{base}.")
    more = [name for name in os.listdir(folder) if name.startswith(versioned) and (".so." in name or name.endswith(".dylib"))]
    for name in names + sorted(more, key=len):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return ctypes.CDLL(path)
    return None


def probe(folder: str) -> dict[str, object]:
    """What the libraries in ``folder`` offer: the patch's version (None when unpatched), devices, what loads."""
    folder = os.path.abspath(folder)
    if hasattr(os, "add_dll_directory"):
        os.add_dll_directory(folder)
    llama = load(folder, "llama")
    if llama is None:
        return {"error": f"{folder} holds no llama library"}
    mtmd = load(folder, "mtmd")
    steer: str | None = None
    if hasattr(llama, "llama_steer_version"):
        llama.llama_steer_version.restype = ctypes.c_char_p
        steer = llama.llama_steer_version().decode("utf-8", "replace")
    ggml = load(folder, "ggml") or llama
    base = load(folder, "ggml-base") or llama
    modules = load_modules(ggml, folder)
    found = devices(ggml, base)
    return {"steer": steer, "mtmd": mtmd is not None, "devices": found, "modules": modules, "loaded": loaded()}


def probe_ggml(folder: str, operations: int, extra: str = "") -> Iterator[dict[str, object]]:
    """What the ggml libraries in ``folder`` say of themselves, one piece after the other: later ones may crash."""
    folder = os.path.abspath(folder)
    if hasattr(os, "add_dll_directory"):
        os.add_dll_directory(folder)
    base = load(folder, "ggml-base")
    if base is None:
        yield {"error": f"{folder} holds no ggml-base library"}
        return
    for key, name in (("version", "ggml_version"), ("commit", "ggml_commit")):
        if hasattr(base, name):
            getattr(base, name).restype = ctypes.c_char_p
            yield {key: getattr(base, name)().decode("utf-8", "replace")}
    base.ggml_tensor_overhead.restype = ctypes.c_size_t
    yield {"tensor": base.ggml_tensor_overhead()}
    base.ggml_op_name.restype = ctypes.c_char_p
    yield {"operations": [base.ggml_op_name(index).decode("utf-8", "replace") for index in range(operations)]}
    ggml = load(folder, "ggml")
    if ggml is not None:
        modules = load_modules(ggml, folder)
        if extra:
            ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
            ggml.ggml_backend_load_all_from_path(os.fsencode(os.path.abspath(extra)))
        yield {"modules": modules, "devices": devices(ggml, base)}


def load_modules(ggml: ctypes.CDLL, folder: str) -> bool:
    """Load back ends built as modules from ``folder``, where none is linked in; whether that was needed.

    By itself ggml looks for them beside the running program, which here is Python.
    """
    if not hasattr(ggml, "ggml_backend_reg_count") or not hasattr(ggml, "ggml_backend_load_all_from_path"):
        return False
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    if ggml.ggml_backend_reg_count():
        return False
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path.restype = None
    ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
    return bool(ggml.ggml_backend_reg_count())


def loaded() -> list[str]:
    """The files of llama.cpp and ggml in this process; empty where the system does not tell (Linux does)."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(None, 5)[5].rstrip("\n") for line in maps if "/" in line}
    except OSError:
        return []
    return sorted(path for path in paths if os.path.basename(path).startswith(("libggml", "libllama", "libmtmd")))


def devices(ggml: ctypes.CDLL, base: ctypes.CDLL) -> list[dict[str, object]]:
    """ggml's devices: name, description, memory in bytes."""

    def function(name: str, result: Any, *arguments: Any) -> Any:
        for library in (ggml, base):
            if hasattr(library, name):
                found = getattr(library, name)
                found.restype = result
                found.argtypes = list(arguments)
                return found
        raise OSError(f"{name} is missing from the ggml libraries")

    size = ctypes.c_size_t
    count = function("ggml_backend_dev_count", size)
    get = function("ggml_backend_dev_get", ctypes.c_void_p, size)
    name = function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    description = function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    memory = function("ggml_backend_dev_memory", None, ctypes.c_void_p, ctypes.POINTER(size), ctypes.POINTER(size))
    result: list[dict[str, object]] = []
    for index in range(count()):
        device = get(index)
        free, total = size(), size()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        result.append(
            {
                "name": name(device).decode("utf-8", "replace"),
                "description": description(device).decode("utf-8", "replace"),
                "memory": total.value,
            }
        )
    return result


def main() -> int:
    """The program."""
    try:
        if sys.argv[2:3] == ["--ggml"]:
            for found in probe_ggml(sys.argv[1], int(sys.argv[3]), *sys.argv[4:5]):
                print(json.dumps(found), flush=True)
        else:
            print(json.dumps(probe(sys.argv[1])))
    except (OSError, AttributeError) as error:  # a library that does not load, or lacks a function
        print(json.dumps({"error": str(error).splitlines()[0]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
