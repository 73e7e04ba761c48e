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
from ..runtime.rpc import LOST
from ..runtime.waiting import with_short_waits
from .connection import Connection, ServerRefusal
from .controlvectors import check_control_vectors, flag_name
from .facts import device_of

LOG_LINES = 400
"""Lines of the server's log that are kept."""

_DEVICE = re.compile(r"using device (\S+) \(([^()]*(?:\([^()]*\)[^()]*)*)\)")
_LEFT_OUT = re.compile(r"failed to load control vector|no valid control vector|control vector n_embd|buffer for control vector")
_PORT_TAKEN = re.compile(r"couldn't bind|address already in use", re.IGNORECASE)


class ServerProcess:
    """A llama-server and its log. Usable as a context manager; the server also ends when this process does, even by SIGKILL.

    >>> with ServerProcess() as server:
    ...     server.start("model.gguf", ["-c", "8192", "--parallel", "4"])
    ...     server.wait_ready()
    ...     engine = ServerEngine(server.url)

    Args:
        binary: the llama-server; the runtime's by default (built now if there is none).
        host: the address it listens on.
        port: the port; a free one when None.
        on_line: called with each line of its log, from a separate thread.
        grace: seconds it gets to end by itself before it is killed.

    Raises:
        RuntimeMissing: there is no llama-server.
    """

    program = "llama-server"
    health = "/health"
    """A route that answers when the model is loaded."""

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
        self.api_key: str | None = None
        """The key that the server asks for, once it is started: the first of ``--api-key`` or ``LLAMA_API_KEY``."""
        self._prefix = ""
        self._left_out = ""  # what it said of a file that it serves on without

    # ---- life ----

    def start(
        self, model: str | os.PathLike[str] | None, args: Sequence[str] = (), env: Mapping[str, str | None] | None = None
    ) -> None:
        """Start the server; returns at once, see :meth:`wait_ready`.

        Args:
            model: the GGUF file; None when ``args`` say what to load.
            args: further flags of llama-server.
            env: variables on top of this process's own, and of :mod:`..runtime.waiting`; None takes one away.

        Raises:
            EngineError: it runs already, the port is taken, flags or variables have it listen where it could not be found, a
                control vector among the flags would be left out, or the program cannot be started.
        """
        if self.running:
            raise EngineError(f"the server at {self.url} runs already: stop it first")
        if self.port is None:
            self.port = free_port(self.host)
        elif port_taken(self.host, self.port):
            raise EngineError(f"port {self.port} of {self.host} is in use: stop what runs there, or choose another with --port")
        command = [str(self.binary), "--host", self.host, "--port", str(self.port)]
        if model is not None:
            command += ["--model", os.fspath(model)]
        command += args
        environment = with_short_waits(_environment(env or {}))
        _check_address(args, environment)
        check_control_vectors(args, model)
        self.api_key = _api_key(args, environment)
        self._prefix = _setting(args, environment, "--api-prefix", "LLAMA_ARG_API_PREFIX") or ""
        self._lines.clear()
        self._left_out = ""
        self._device = ""
        guard = Path(__file__).with_name("guard.py")
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
            EngineError: the server ended (with its exit code and what it said last), took too long, or left out a control vector.
        """
        self._check_alive()
        started = time.monotonic()
        # a short silence means nothing here: a loading server may be slow to answer
        connection = Connection(self.url, api_key=self.api_key, timeout=10.0)
        try:
            while True:
                self._check_alive()
                try:
                    connection.get(self.health)
                    break
                except ServerRefusal as refusal:
                    raise EngineError(
                        f"what answers at {self.url} is not the {self.program} that was started: {refusal}"
                    ) from None
                except EngineError:
                    pass  # not listening yet, or still loading
                passed = time.monotonic() - started
                if passed > timeout:
                    raise EngineError(
                        f"{self.program} has not loaded its model in {timeout:g} s: allow a longer timeout "
                        f"(it said last: {self._last_words()})"
                    )
                if on_wait is not None:
                    on_wait(passed)
                time.sleep(0.05 if passed < 2 else 0.25)
        finally:
            connection.close()
        if self._left_out:
            self.stop()
            raise EngineError(f"llama-server would serve without a control vector, so it was ended: {self._left_out}")

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the server to end: its exit code (128 + N after signal N), or None if it still runs after ``timeout`` s."""
        if self._child is None:
            return 0
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> int:
        """End the server, gracefully if possible, else by force; returns its exit code. May be called again."""
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
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self._prefix}"

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
        connection = Connection(self.url, api_key=self.api_key, timeout=10.0)
        try:
            return device_of(connection.get("/steering")["model"])
        except (SteerError, KeyError, TypeError, ValueError, AttributeError):
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
                if not self._left_out and _LEFT_OUT.search(line):
                    self._left_out = " ".join(line.split())[:300]
                if self._on_line is not None:
                    with contextlib.suppress(Exception):  # whatever a listener does, the log goes on
                        self._on_line(line)

    def _check_alive(self) -> None:
        if self._child is None:
            raise EngineError("the server was not started, or has been stopped")
        code = self._child.poll()
        if code is None:
            return
        if self._reader is not None:
            self._reader.join(5)
        raise EngineError(self.epitaph(code))

    def epitaph(self, code: int) -> str:
        """One sentence for a server that ended by itself: how, and what it said last."""
        if any(_PORT_TAKEN.search(line) for line in self._lines):
            return f"port {self.port} of {self.host} is in use: stop what runs there, or choose another with --port"
        lost = next((line for line in self._lines if LOST.search(line)), None)
        if lost is not None:
            what = f"{self.program} ended, as it lost a worker of --rpc ({' '.join(lost.split())[:200]})"
            return f"{what}: see whether `steer worker` still runs on each machine, and start again"
        how = f"was killed by signal {code - 128}" if 128 < code < 160 else f"ended with exit code {code}"
        return f"{self.program} {how}; it said last: {self._last_words()}"

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
            raise EngineError(f"a server cannot listen on {host} port {port} ({reason}): choose others") from None
    return False


_IN_USE = {98, 48, 10048}  # EADDRINUSE on Linux, macOS, Windows


def _socket(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM)


#: Whole families of variables by which another program tells llama-server where to listen and what to be.
_FOREIGN = ("AIP_", "LLAMA_SERVER_")


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's variables with some changed, and without those of hosts that start llama-server in another way."""
    found: dict[str, str | None] = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


def _check_address(args: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raise EngineError for what would have the server listen elsewhere than it is looked for."""
    given = [flag_name(arg) for arg in args]
    for flag in ("--host", "--port"):
        if flag in given:
            raise EngineError(f"{flag} cannot be among the flags of llama-server here: give it to the program that starts it")
    for flag, variable in (("--ssl-key-file", "LLAMA_ARG_SSL_KEY_FILE"), ("--ssl-cert-file", "LLAMA_ARG_SSL_CERT_FILE")):
        if _setting(args, environment, flag, variable) is not None:
            named = flag if flag in given else variable
            raise EngineError(
                f"{named}: the server is asked over plain HTTP, so leave this out and put a TLS proxy in front of it"
            )
    prefix = _setting(args, environment, "--api-prefix", "LLAMA_ARG_API_PREFIX")
    if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
        raise EngineError(f"the API prefix {prefix!r} must begin with a slash and not end with one, such as /llama")


def _api_key(args: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """The first key that the server will take, None where it takes any request."""
    given = _setting(args, environment, "--api-key", "LLAMA_API_KEY")
    if given:
        return given.split(",")[0]
    path = _setting(args, environment, "--api-key-file", "LLAMA_ARG_API_KEY_FILE")
    try:
        lines = Path(path).read_text("utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"the file of API keys {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return next((line for line in lines if line), None)


def _setting(args: Sequence[str], environment: Mapping[str, str], flag: str, variable: str) -> str | None:
    """What a flag of llama-server's is set to, or else its variable; None where it is not set."""
    found = [following for one, following in zip(args, args[1:], strict=False) if flag_name(one) == flag]
    return found[-1] if found else environment.get(variable) or None
