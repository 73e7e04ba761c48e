"""Layers on other machines: llama.cpp's RPC back end, whose workers run ggml's rpc-server."""

from __future__ import annotations

import contextlib
import ctypes
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import EngineError, RuntimeMissing, SpecError
from .locate import Runtime

DEFINITION = "GGML_RPC"
PROGRAM = "rpc-server.exe" if sys.platform == "win32" else "rpc-server"
"""What the runtime calls the worker's program."""
BUILD = "build one with: steer build --rpc"
CONNECT_TIMEOUT = 5.0
"""Seconds to wait for a worker."""
LOST = re.compile(
    r"Remote RPC server crashed or returned malformed response|RPC transport|Failed to (?:parse endpoint|connect to)"
)
"""What ggml says before it ends the process that has lost a worker."""

_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_joined: dict[str, None] = {}


def parse_workers(text: str) -> list[str]:
    """``host:port,host:port`` as a list. Raises SpecError."""
    found: list[str] = []
    for part in text.split(","):
        match = _ENDPOINT.fullmatch(part.strip())
        if match is None or not 1 <= int(match[2]) <= 65535:
            raise SpecError(f"the workers {text!r:.200} cannot be read at {part.strip()!r:.60}: write host:port,host:port")
        if match[0] in found:
            raise SpecError(f"the worker {match[0]} is named twice: each is one, however many devices it has")
        found.append(match[0])
    return found


def check_workers(workers: Sequence[str]) -> None:
    """Raise EngineError where nobody listens: ggml would end this process instead."""
    for worker in workers:
        host, _, port = worker.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise EngineError(f"no worker answers at {worker} ({reason}): start one there with `steer worker`") from None


def program(runtime: Runtime) -> Path:
    """The worker's program. Raises RuntimeMissing."""
    for folder in ("bin", "lib"):
        path = runtime.path / folder / PROGRAM
        if path.is_file():
            return path
    raise RuntimeMissing(f"the runtime in {runtime.path} has no {PROGRAM}: {BUILD}")


def join(llama_cpp: Any, workers: Sequence[str]) -> None:
    """Make workers devices of this process, for good: models with layers on the GPU are spread over them.

    Raises:
        RuntimeMissing: the runtime was built without RPC.
        EngineError: nobody listens there, or this process has other workers already.
    """
    if _joined and list(_joined) != list(workers):
        raise EngineError(f"this process has the workers {', '.join(_joined)} already: use another process for others")
    if _joined:
        return
    add = _function(llama_cpp, "ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
    register = _function(llama_cpp, "ggml_backend_register", None, ctypes.c_void_p)
    if add is None or register is None:
        raise RuntimeMissing(f"this runtime was built without RPC: {BUILD}")
    check_workers(workers)
    for worker in workers:
        found = add(worker.encode())
        if not found:
            raise EngineError(f"the worker {worker} has no devices, or is of another version of ggml: update it")
        register(found)
        _joined[worker] = None


def joined() -> list[str]:
    """The workers of this process."""
    return list(_joined)


def _function(llama_cpp: Any, name: str, result: Any, argument: Any) -> Any:
    """A function of ggml, from whichever library has it; None where there is none."""
    libraries = [llama_cpp.llama_cpp._lib]
    folder = Path(str(getattr(libraries[0], "_name", ""))).parent
    for path in sorted(folder.glob("*ggml*")) if folder.is_dir() else []:
        if ".so" in path.name or path.suffix in (".dylib", ".dll"):
            with contextlib.suppress(OSError):
                libraries.append(ctypes.CDLL(str(path)))
    for library in libraries:
        found = getattr(library, name, None)
        if found is not None:
            found.restype, found.argtypes = result, [argument]
            return found
    return None
