"""repeng on transformers as an arm of a benchmark: what a user would take instead. It runs in a Python of its own.

A child process (``repeng_child.py``) holds the float32 weights of the same GGUF, computes when it is its turn, and trains from
the same pairs. Needs torch, transformers, accelerate, gguf and repeng there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from steer_plugins.bench.child import Child, ChildArm

PACKAGES = "torch, transformers, accelerate, gguf and repeng"
_CHILD = Path(__file__).with_name("repeng_child.py")


class Repeng(Child):
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
        command = [self.python, str(_CHILD), str(model.absolute()), str(n_threads)]
        super().__init__(command, env, f"{self.python} cannot run repeng, which needs {PACKAGES}")
        self.versions: dict[str, str] = self.greeting

    def arms(self) -> list[ChildArm]:
        """The two arms that decode."""
        return [
            ChildArm("transformers", "transformers with the float32 weights of the same file", self, {"steered": False}),
            ChildArm("repeng", "the same with repeng's vector on all layers", self, {"steered": True}),
        ]

    def train(self, pairs: Sequence[tuple[str, str]]) -> tuple[float, float]:
        """``ControlVector.train`` with its defaults: seconds on the clock, and of the processor. Raises DataError."""
        found = self.ask({"do": "train", "pairs": [list(pair) for pair in pairs]})
        return float(found["seconds"]), float(found["cpu"])
