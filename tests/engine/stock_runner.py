"""Runs decode steps on whatever libllama LLAMA_CPP_LIB_PATH names and writes the logits; see the fixture ``stock``.

A step is ``{"tokens": [[token, position, sequence, output], ...]}``, ``{"clear": true}`` (empty the KV cache) or
``{"cvec": [dose of layer 1 on, as one flat list], "first": il, "last": il}`` (``"cvec": null`` takes it away).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine import harness


def run_steps(raw: harness.Raw, steps: list[dict[str, Any]]) -> list[np.ndarray]:
    """Logits of each step that decodes."""
    results = []
    for step in steps:
        if "tokens" in step:
            results.append(raw.decode([harness.Tok(*entry) for entry in step["tokens"]]))
        elif "cvec" in step:
            raw.set_cvec(step["cvec"], step.get("first", -1), step.get("last", -1))
        else:
            harness.llama_cpp.llama_memory_clear(raw.memory, True)
    return results


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import llama_cpp

    harness.llama_cpp = llama_cpp
    harness.silence()
    assert not hasattr(llama_cpp.llama_cpp._lib, "llama_steer_version"), "this is a patched library"
    raw = harness.Raw(Path(job["path"]), steer=False, **job["options"])
    results = run_steps(raw, job["steps"])
    np.savez(job["out"], **{f"step{i}": r for i, r in enumerate(results)})


if __name__ == "__main__":
    main()
