"""The soak of benchmarks/soak.py, short. STEER_SOAK_SECONDS makes it longer."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_mixed_load(server_binary: Path) -> None:
    spec = importlib.util.spec_from_file_location("soak", FILE)
    assert spec and spec.loader
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    load, memory = soak.run(float(os.environ.get("STEER_SOAK_SECONDS", "20")))
    assert load.problems == []
    assert set(load.done) == {"complete", "read_again", "score", "live", "cancel", "malformed", "churn"}
    assert soak.growth(memory) < 0.15
