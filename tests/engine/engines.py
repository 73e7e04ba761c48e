"""What the tests of the engines share: texts, tolerances, vectors, and engines of both kinds on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steer_plugins.client import ServerProcess
from steer_plugins.client.engine import ServerEngine
from steer_plugins.engine import Engine
from steer_plugins.engine.local import LocalEngine
from steer_plugins.steering.vector import SteeringVector

BOTH = ("llama", "deepseek4")
PROMPT = "The weather in the old town is"
LONG = "It was a cold morning in the harbour, and the boats lay still. "

# Float32 throughout, on CPU: another batch shape sums in another order. Values of order 10 agree to about
# 1e-4 after some layers; doses are a thousand times that.
NOISE = 4e-4
# gemma3: its activation function is a table of float16
MORE_NOISE = {"gemma3": 5e-3}


def open_engine(path: Path, **options: Any) -> LocalEngine:
    return LocalEngine(path, **{"n_ctx": 512, "n_threads": 1, "n_parallel": 4, **options})


class ServedEngine(ServerEngine):
    """A ServerEngine with a llama-server of its own; as exact as an in-process engine can be made."""

    def __init__(self, binary: Path, path: Path, *, n_ctx: int = 512, n_parallel: int = 8) -> None:
        self.process = ServerProcess(binary)
        flags = "--no-kv-unified --threads 1 --threads-batch 1 --no-warmup -ctk f32 -ctv f32 -fa off".split()
        self.process.start(path, ["--parallel", str(n_parallel), "-c", str(n_ctx * n_parallel), *flags])
        try:
            self.process.wait_ready(120)
            super().__init__(self.process.url)
        except BaseException:
            self.process.stop()
            raise

    def close(self) -> None:
        super().close()
        self.process.stop()


def readable(engine: Engine, positions: Any) -> list[int]:
    """The layers that can be read at these positions. A server keeps the outputs of a text's last token only, so where the
    last layer is computed for outputs alone, it is there for that token and for no other."""
    n = engine.info.n_layer
    everywhere = isinstance(engine, LocalEngine) or not engine.info.last_layer_outputs_only
    return list(range(n if everywhere or positions in ("last", [-1]) else n - 1))


def vector(
    engine: LocalEngine,
    layers: tuple[int, ...] = (1, 2),
    *,
    site: str = "resid_post",
    seed: int = 0,
    dose: float = 4.0,
    scope: str = "all",
    op: str = "add",
    name: str = "v",
) -> SteeringVector:
    rng = np.random.default_rng(seed)
    directions = {(il, site): rng.standard_normal(engine.info.n_embd).astype(np.float32) for il in layers}
    return SteeringVector(
        name, directions, dict.fromkeys(directions, dose / np.sqrt(engine.info.n_embd)), default_scope=scope, op=op
    )


def moved(engine: LocalEngine, v: SteeringVector, layer: int, site: str = "resid_post") -> np.ndarray:
    return v.effective(layer, site).astype(np.float64)


def near(a: np.ndarray, b: np.ndarray, atol: float = NOISE) -> None:
    assert a.shape == b.shape
    error = float(np.abs(a.astype(np.float64) - b).max())
    assert error <= atol, error
