"""Twenty seconds of benchmarks/ollama_soak.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.ollama_soak import soak

from .ollama_sidecar import need_server


@pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")
def test_soak(tmp_path: Path) -> None:
    need_server()
    result = soak(tmp_path, 20.0)
    assert not result.problems, result.problems
    assert result.counts["answers"] > 5 and result.counts["left in the middle"] > 0 and result.counts["loads"] > 2
