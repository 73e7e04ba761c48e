"""The plain arm of ``steer bench speed`` in a process of its own, started by ``busy.LongWaits``: JSON lines in, JSON lines out.

Run as ``python -m steer_plugins.bench.speed_child MODEL.gguf THREADS``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ..engine.model import LoadedModel
from ..errors import SteerError
from ..runtime import activate, ensure_runtime
from .speed import plain_arm


def main() -> None:
    """Answer orders until standard input ends."""
    # what libraries print must not get between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        arm = plain_arm(LoadedModel(activate(ensure_runtime(quiet=True)), Path(sys.argv[1])), int(sys.argv[2]))
        say({})
        for line in sys.stdin:
            order = json.loads(line)
            tokens = order["tokens"]
            say({"seconds": [arm.prefill(tokens)] if order["do"] == "prefill" else arm.decode(tokens, order["position"])})
    except SteerError as error:
        say({"error": str(error)})


if __name__ == "__main__":
    main()
