"""A busy machine for ``steer bench speed --busy N``: programs that spin, and llama.cpp as it waits by itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from ..runtime.waiting import LONG_WAITS
from .child import Child, ChildArm

# the neighbour ends with the process that started it, whatever happens to that
_SPIN = "import os, sys, threading\nthreading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()\nwhile True: pass"


class Neighbours:
    """``n`` processes that each take a core, while the context lasts."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Neighbours:
        for _ in range(self._n):
            self._processes.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", _SPIN], stdin=subprocess.PIPE))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
        self._processes.clear()


class LongWaits(Child):
    """The plain arm in a process whose threads spin while they wait as long as OpenMP's runtime lets them by itself.

    Raises:
        DataError: the process cannot be started, or cannot load the model.
    """

    def __init__(self, model: Path, n_threads: int) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | LONG_WAITS
        command = [sys.executable, "-m", "steer_plugins.bench.speed_child", str(model.absolute()), str(n_threads)]
        super().__init__(command, environment, "the second process of plain decoding failed")

    def arm(self) -> ChildArm:
        """The arm."""
        return ChildArm("long-waits", "as plain, its threads wait as OpenMP's runtime lets them by itself", self)
