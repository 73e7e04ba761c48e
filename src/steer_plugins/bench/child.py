"""A process that computes for a benchmark when it is its turn: one JSON object a line in, one out."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from ..errors import DataError

_C = TypeVar("_C", bound="Child")


class Child:
    """The process, usable as a context manager. Its first line, unasked, is kept as ``greeting``.

    Args:
        command: the program (an interpreter) and its arguments.
        environment: all of its variables.
        blame: what is said of it when it fails, such as ``python3 cannot run repeng``; the reason follows after a colon.

    Raises:
        DataError: it cannot be started, or ends or fails before it greets: one sentence.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], blame: str) -> None:
        self._blame = blame
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the child)
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=dict(environment),
                # Ctrl-C in a terminal is for this process, which then ends the child
                start_new_session=sys.platform != "win32",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        except OSError as error:
            self._said.close()
            raise DataError(f"{command[0]} cannot be started: {error.strerror or error}") from None
        try:
            self.greeting: Any = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, order: dict[str, Any]) -> Any:
        """One order and its answer. Raises DataError."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a child that has died is found by its missing answer
            self._process.stdin.write((json.dumps(order) + "\n").encode())
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = {"error": self._last_words()}
        if not isinstance(answer, dict) or "error" in answer:
            why = answer["error"] if isinstance(answer, dict) else "it answers something else"
            raise DataError(f"{self._blame}: {why}")
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "it ended without a word")

    def close(self) -> None:
        """End the child, whatever it is doing. Fine to call again."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def __enter__(self: _C) -> _C:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class ChildArm:
    """An arm of ``speed`` that a child computes; ``order`` is what it is told beside the tokens."""

    def __init__(self, name: str, about: str, child: Child, order: dict[str, Any] | None = None) -> None:
        self.name, self.about = name, about
        self._child, self._order = child, order or {}

    def prefill(self, tokens: Sequence[int]) -> tuple[float, float]:
        """Seconds of computing a prompt, on the clock and of the processor."""
        return self._ask("prefill", tokens, 0)[0]

    def decode(self, tokens: Sequence[int], position: int) -> list[tuple[float, float]]:
        """Seconds for each token."""
        return self._ask("decode", tokens, position)

    def _ask(self, what: str, tokens: Sequence[int], position: int) -> list[tuple[float, float]]:
        found = self._child.ask({**self._order, "do": what, "tokens": list(tokens), "position": position})
        return [(float(clock), float(cpu)) for clock, cpu in found["seconds"]]
