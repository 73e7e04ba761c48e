"""Running compilers: output to a log, progress to the user, and no child left behind when we are stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_STEP = re.compile(r"^\[(\d+)/(\d+)\]\s*(.*)")
_ERRORS = (
    re.compile(r"\bfatal error\b|(?<![\w-])error: |\berror C\d+|\bLNK\d{4}\b", re.IGNORECASE),
    re.compile(r"^CMake Error"),
    re.compile(r"undefined reference|^(\S*ld|collect2)(\.\w+)?: ", re.IGNORECASE),
    re.compile(r"^ninja: (error|fatal)"),
)


class Reporter:
    """Says what is going on, on stderr: stdout belongs to results. ``quiet`` silences it.

    On a terminal one line is drawn over and over; elsewhere a line is printed at about every tenth of the way.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._shown = -1

    def say(self, text: str) -> None:
        """One line of text."""
        if not self._quiet:
            self._console.print(text, markup=False)

    def progress(self, done: int, total: int, what: str) -> None:
        """``done`` of ``total`` steps of ``what`` are finished."""
        if self._quiet or total <= 0:
            return
        if self._console.is_terminal:
            if self._bar is None or self._task is None:
                columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
                self._bar = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
                self._task = self._bar.add_task(what, total=total)
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total, description=what)
            return
        tenth = done * 10 // total
        if tenth != self._shown:
            self._shown = tenth
            self.say(f"{what} {done}/{total}")

    def finish(self) -> None:
        """The progress line is over (also after an error)."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
        self._shown = -1


class BuildLog:
    """The full output of a build, in one file that is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def write(self, text: str) -> None:
        """Append a line; the file appears with the first one."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", errors="replace")
        self._file.write(text + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def run_logged(
    command: Sequence[str],
    log: BuildLog,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[int, list[str]]:
    """Run a program to its end: (exit code, its output lines). ``on_step(done, total)`` follows ninja's "[n/m]".

    When this process is interrupted or told to terminate, the program and all its children are ended first.
    """
    log.write("$ " + " ".join(command))
    lines: list[str] = []
    with _signals_as_interrupts():
        child = subprocess.Popen(
            list(command),
            cwd=cwd,
            env=dict(env) if env is not None else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            # A group of its own, so that it can be ended together with the compilers it starts.
            start_new_session=sys.platform != "win32",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                line = line.rstrip("\r\n")
                lines.append(line)
                log.write(line)
                if on_step and (match := _STEP.match(line)):
                    on_step(int(match.group(1)), int(match.group(2)))
            code = child.wait()
        except BaseException:
            _end(child)
            raise
        finally:
            if child.stdout is not None:
                child.stdout.close()
    return code, lines


def first_error(lines: Sequence[str]) -> str:
    """The line that says why a build failed: the first compiler error, else cmake's, the linker's or ninja's."""
    for pattern in _ERRORS:
        for index, line in enumerate(lines):
            if pattern.search(line):
                text = _STEP.sub(r"\3", line).strip()
                if text.startswith("CMake Error"):  # the reason stands on the lines below
                    below = [more.strip() for more in lines[index + 1 : index + 6] if more.strip()]
                    text = f"{text.rstrip(':')}: {below[0]}" if below else text
                return text[:400]
    rest = [line.strip() for line in lines if line.strip()]
    return rest[-1][:400] if rest else "no output"


def _end(child: subprocess.Popen[str]) -> None:
    """End a child and everything it started, politely first."""
    for attempt in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True, check=False)
            else:
                os.killpg(child.pid, attempt)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)
            return


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt, so that they clean up like Ctrl-C (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {}
    for name in names:
        number = getattr(signal, name)
        old = signal.getsignal(number)
        if old is signal.SIG_DFL:  # whoever set or ignored one (nohup) knows better
            before[number] = old
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
