"""One llama-server as a child process: started, waited for, watched, ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ..errors import EngineError, RuntimeMissing, SteerError
from ..runtime.waiting import with_short_waits
from .connection import Connection, ServerRefusal

LOG_LINES = 400
"""Lines of the server's log that are kept."""

_DEVICE = re.compile(r"using device (\S+) \(([^()]*(?:\([^()]*\)[^()]*)*)\)")
_PORT_TAKEN = re.compile(r"couldn't bind|address already in use", re.IGNORECASE)


class ServerProcess:
    """A llama-server and its log. Usable as a context manager; the server also ends when this process does, even by SIGKILL.

    >>> with ServerProcess() as server:
    ...     server.start("model.gguf", ["-c", "8192", "--parallel", "4"])
    ...     server.wait_ready()
    ...     engine = ServerEngine(server.url)

    Args:
        binary: the llama-server; that of the runtime by default (built now when there is none).
        host: the address it listens on.
        port: the port; a free one when None.
        on_line: called with each line of its log, from a thread of its own.
        grace: seconds it gets to end in order before it is killed.

    Raises:
        RuntimeMissing: there is no llama-server.
    """

    def __init__(
        self,
        binary: str | os.PathLike[str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        on_line: Callable[[str], None] | None = None,
        grace: float = 10.0,
    ) -> None:
        if binary is None:
            from ..runtime import ensure_runtime

            binary = ensure_runtime(need_server=True).server
        if binary is None or not Path(binary).is_file():
            raise RuntimeMissing(f"there is no llama-server at {binary}: run `steer build`")
        self.binary = Path(binary)
        self.host = host
        self.port = port
        self._on_line = on_line
        self._grace = grace
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._child: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._device = ""
        self._api_key: str | None = None

    # ---- life ----

    def start(self, model: str | os.PathLike[str] | None, args: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """Start the server; returns at once, see :meth:`wait_ready`.

        Args:
            model: the GGUF file; None when ``args`` say what to load.
            args: further flags of llama-server.
            env: variables on top of this process's own, and of :mod:`..runtime.waiting`.

        Raises:
            EngineError: it runs already, the port is taken, or the program cannot be started.
        """
        if self.running:
            raise EngineError(f"The server at {self.url} runs already: stop it first.")
        if self.port is None:
            self.port = free_port(self.host)
        elif port_taken(self.host, self.port):
            raise EngineError(f"Port {self.port} of {self.host} is in use: stop what runs there, or choose another with --port.")
        command = [str(self.binary), "--host", self.host, "--port", str(self.port)]
        if model is not None:
            command += ["--model", os.fspath(model)]
        command += args
        self._api_key = _value_of(args, "--api-key")
        self._lines.clear()
        self._device = ""
        guard = Path(__file__).with_name("guard.py")
        environment = with_short_waits({**os.environ, **(env or {})})
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(guard), str(self._grace), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C in a terminal is for this process, which then ends the server in order
                start_new_session=sys.platform != "win32",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise EngineError(f"{self.binary} cannot be started: {error.strerror or error}") from None
        self._reader = threading.Thread(target=self._read_log, args=(self._child,), daemon=True, name="llama-server log")
        self._reader.start()

    def wait_ready(self, timeout: float = 600.0, *, on_wait: Callable[[float], None] | None = None) -> None:
        """Wait until the model is loaded and requests are answered.

        Args:
            timeout: seconds.
            on_wait: called about four times a second with the seconds that have passed.

        Raises:
            EngineError: the server ended (with its exit code and what it said last), or took too long.
        """
        self._check_alive()
        started = time.monotonic()
        # a short silence is no news here: a loading server may be slow to answer
        connection = Connection(self.url, api_key=self._api_key, timeout=10.0)
        try:
            while True:
                self._check_alive()
                with contextlib.suppress(EngineError, ServerRefusal):  # not listening yet, or still loading
                    connection.get("/health")
                    return
                passed = time.monotonic() - started
                if passed > timeout:
                    raise EngineError(
                        f"llama-server has not loaded its model in {timeout:g} s: allow a longer timeout. "
                        f"It said last: {self._last_words()}"
                    )
                if on_wait is not None:
                    on_wait(passed)
                time.sleep(0.05 if passed < 2 else 0.25)
        finally:
            connection.close()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the server's end; its exit code (128 + N after signal N), or None when it still runs after ``timeout`` s."""
        if self._child is None:
            return 0
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> int:
        """End the server, in order if it can, else by force; returns its exit code. Fine to call again."""
        child, self._child = self._child, None
        if child is None:
            return 0
        assert child.stdin is not None
        with contextlib.suppress(OSError):
            child.stdin.close()  # the guard takes this for the end of the program, and ends the server
        try:
            code = child.wait(self._grace + 5)
        except subprocess.TimeoutExpired:
            _kill(child)
            code = child.wait()
        if self._reader is not None:
            self._reader.join(5)
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # ---- facts ----

    @property
    def running(self) -> bool:
        """True from :meth:`start` until it ends."""
        return self._child is not None and self._child.poll() is None

    @property
    def url(self) -> str:
        """Where it can be reached from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def log_tail(self) -> list[str]:
        """The last lines of its log, oldest first."""
        return list(self._lines)

    @property
    def device(self) -> str:
        """Where the model runs, for people: ``CPU``, or the devices that hold layers (``CUDA0 (NVIDIA RTX 4090)``)."""
        if not self._device and self.running:
            self._device = self._ask_device() or self._logged_device()
        return self._device or "CPU"

    def _ask_device(self) -> str:
        connection = Connection(self.url, api_key=self._api_key, timeout=10.0)
        try:
            model = connection.get("/steering")["model"]
            if int(model.get("n_gpu_layers") or 0) == 0:
                return "CPU"
            found = [d for d in model["devices"] if str(d.get("type")).lower() not in ("cpu", "accel")]
            return ", ".join(f"{d['name']} ({d['description']})" for d in found)
        except (SteerError, KeyError, TypeError, ValueError):
            return ""  # a stock server, or one that does not answer now
        finally:
            connection.close()

    def _logged_device(self) -> str:
        found = dict.fromkeys(f"{m[1]} ({m[2]})" for line in self._lines if (m := _DEVICE.search(line)))
        return ", ".join(found)

    # ---- inside ----

    def _read_log(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        with child.stdout as out:
            for raw in out:  # always drained: a full pipe would stop the server
                line = raw.decode(errors="replace").rstrip("\r\n")
                self._lines.append(line)
                if self._on_line is not None:
                    with contextlib.suppress(Exception):  # whatever a listener does, the log goes on
                        self._on_line(line)

    def _check_alive(self) -> None:
        if self._child is None:
            raise EngineError("The server was not started, or has been stopped.")
        code = self._child.poll()
        if code is None:
            return
        if self._reader is not None:
            self._reader.join(5)
        raise EngineError(self.epitaph(code))

    def epitaph(self, code: int) -> str:
        """One sentence for a server that ended by itself: how, and what it said last."""
        if any(_PORT_TAKEN.search(line) for line in self._lines):
            return f"Port {self.port} of {self.host} is in use: stop what runs there, or choose another with --port."
        how = f"was killed by signal {code - 128}" if 128 < code < 160 else f"ended with exit code {code}"
        return f"llama-server {how}; it said last: {self._last_words()}"

    def _last_words(self) -> str:
        lines = [" ".join(line.split()) for line in self._lines if line.strip()]
        wrong = [line for line in lines if re.search(r"\berror\b|\bfailed\b|invalid|terminate called", line, re.IGNORECASE)]
        chosen = (wrong or lines)[-3:]
        return " | ".join(line[:300] for line in chosen) or "nothing"


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The last resort: the guard and all it started."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True, check=False)
        else:
            os.killpg(child.pid, signal.SIGKILL)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now."""
    with contextlib.closing(_socket(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_taken(host: str, port: int) -> bool:
    """True if nothing can listen there because somebody does.

    Raises:
        EngineError: this machine has no such address, or the port is not ours to take.
    """
    with contextlib.closing(_socket(host)) as probe:
        if sys.platform != "win32":  # there it would allow what is meant to fail
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) in _IN_USE:
                return True
            reason = getattr(error, "strerror", None) or str(error)
            raise EngineError(f"A server cannot listen on {host} port {port} ({reason}): choose others.") from None
    return False


_IN_USE = {98, 48, 10048}  # EADDRINUSE on Linux, macOS, Windows


def _socket(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM)


def _value_of(args: Sequence[str], flag: str) -> str | None:
    """The value of a flag in llama-server's arguments; the first of several keys parted by commas."""
    found = [following for one, following in zip(args, args[1:], strict=False) if one == flag]
    return found[-1].split(",")[0] if found else None
