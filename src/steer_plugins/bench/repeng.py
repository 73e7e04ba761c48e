"""repeng on transformers as an arm of a benchmark: what a user would take instead. It runs in a Python of its own.

A child process (``repeng_child.py``) holds the float32 weights of the same GGUF, computes when it is its turn, and trains from
the same pairs. Needs torch, transformers, accelerate, gguf and repeng there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import DataError

NEEDED = ("torch", "transformers", "repeng")
PACKAGES = "torch, transformers, accelerate, gguf and repeng"
_CHILD = Path(__file__).with_name("repeng_child.py")


def this_python_has_it() -> bool:
    """Whether repeng can be imported here, without importing it."""
    return all(importlib.util.find_spec(name) is not None for name in NEEDED)


class RepengArm:
    """Decoding on transformers, plain or with repeng's control on every layer; see ``speed.Arm``."""

    def __init__(self, name: str, about: str, repeng: Repeng, steered: bool) -> None:
        self.name, self.about = name, about
        self._repeng, self._steered = repeng, steered

    def prefill(self, tokens: Sequence[int]) -> tuple[float, float]:
        """Seconds of one forward pass over a prompt, on the clock and of the processor."""
        return self._ask("prefill", tokens)[0]

    def decode(self, tokens: Sequence[int], position: int) -> list[tuple[float, float]]:
        """Seconds of a forward pass for each token."""
        return self._ask("decode", tokens)

    def _ask(self, what: str, tokens: Sequence[int]) -> list[tuple[float, float]]:
        found = self._repeng.ask({"do": what, "steered": self._steered, "tokens": list(tokens)})
        return [(float(clock), float(cpu)) for clock, cpu in found["seconds"]]


class Repeng:
    """The child process, usable as a context manager.

    Args:
        python: the interpreter that has repeng.
        model: the GGUF file.
        n_threads: of torch.

    Raises:
        DataError: that Python cannot be started, lacks a package, or cannot load the model: one sentence.
    """

    def __init__(self, python: str | os.PathLike[str], model: Path, n_threads: int = 1) -> None:
        self.python = os.fspath(python)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(n_threads), "OMP_WAIT_POLICY": "passive"}
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the child)
        try:
            self._child = subprocess.Popen(
                [self.python, str(_CHILD), str(model.absolute()), str(n_threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=env,
                # Ctrl-C in a terminal is for this process, which then ends the child
                start_new_session=sys.platform != "win32",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        except OSError as error:
            self._said.close()
            raise DataError(f"{self.python} cannot be started: {error.strerror or error}") from None
        try:
            self.versions: dict[str, str] = self._answer()
        except BaseException:
            self.close()
            raise

    def arms(self) -> list[RepengArm]:
        """The two arms that decode."""
        return [
            RepengArm("transformers", "transformers with the float32 weights of the same file, no steering", self, False),
            RepengArm("repeng", "the same with repeng's vector on all layers", self, True),
        ]

    def train(self, pairs: Sequence[tuple[str, str]]) -> tuple[float, float]:
        """``ControlVector.train`` with its defaults: seconds on the clock, and of the processor. Raises DataError."""
        found = self.ask({"do": "train", "pairs": [list(pair) for pair in pairs]})
        return float(found["seconds"]), float(found["cpu"])

    def ask(self, order: dict[str, Any]) -> Any:
        """One order and its answer. Raises DataError."""
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # a child that has died is found by its missing answer
            self._child.stdin.write((json.dumps(order) + "\n").encode())
            self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = {"error": self._last_words()}
        if not isinstance(answer, dict) or "error" in answer:
            why = answer["error"] if isinstance(answer, dict) else "it answers something else"
            raise DataError(f"{self.python} cannot run repeng, which needs {PACKAGES}: {why}")
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "it ended without a word")

    def close(self) -> None:
        """End the child, whatever it is doing. Fine to call again."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._said):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Repeng:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
