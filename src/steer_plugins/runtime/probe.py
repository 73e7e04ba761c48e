"""Load a runtime's libraries and say what is in them. Run as a program: python probe.py LIBRARY_FOLDER.

It is a process of its own because a loaded library stays loaded, and because a broken one must not take the caller
with it. It uses the standard library only and prints one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any


def load(folder: str, base: str) -> ctypes.CDLL | None:
    """The shared library ``base`` of ``folder``, None where there is none. Raises OSError when it is broken."""
    for name in (f"lib{base}.so", f"lib{base}.dylib", f"{base}.dll", f"lib{base}.dll"):
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
    return {"steer": steer, "mtmd": mtmd is not None, "devices": devices(ggml, base)}


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
        answer = probe(sys.argv[1])
    except OSError as error:
        answer = {"error": str(error).splitlines()[0]}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
