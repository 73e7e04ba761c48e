"""What steering costs in a llama-server: requests with and without, in turn, on one process in one run.

The arms of a row are timed one after the other in each round, in random order, so that a slow spell of the machine hits both.
A ratio is the speed with steering over the speed without, taken within a round; the median of these ratios is reported.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import requests

from steer_plugins.engine.base import Progress
from steer_plugins.errors import EngineError
from steer_plugins.server import ServerProcess
from steer_plugins.vector import SteeringVector
from steer_plugins.vectorfile import write_vector

PARALLEL = 8
PROMPT_TOKENS = 64
REPLY_TOKENS = 64
READ_PROMPTS = 64
DOSE = 1e-3
"""Too small to change what the model says, so that all arms do the same work."""


@dataclass(frozen=True)
class Row:
    """One comparison. ``plain`` and ``steered`` are medians in ``unit``; ``ratio`` is of speeds, more is faster.

    ``ratio_ci`` is a 95 % bootstrap interval of the median ratio.
    """

    name: str
    ratio: float
    ratio_ci: tuple[float, float]
    plain: float
    steered: float
    unit: str


class _Client:
    """Calls of one server, on a connection for each thread."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._local = threading.local()

    @property
    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False
        session: requests.Session = self._local.session
        return session

    def post(self, path: str, body: Any = None, data: bytes | None = None) -> requests.Response:
        headers = {"Content-Type": "application/octet-stream"} if data is not None else None
        answer = self._session.post(self.url + path, json=body, data=data, headers=headers, timeout=600)
        if answer.status_code != 200:
            raise EngineError(f"The server refused a benchmark request: {answer.text[:300]}")
        return answer

    def first_token(self, body: dict[str, Any]) -> float:
        """Seconds from sending a request to the first piece of its streamed reply."""
        start = time.perf_counter()
        with requests.post(self.url + "/completion", json={**body, "stream": True}, stream=True, timeout=600) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: "):
                    return time.perf_counter() - start
        raise EngineError("A benchmark reply ended before its first token.")


def bench_server(
    model: Path,
    *,
    n_threads: int = 1,
    n_gpu_layers: int = 0,
    rounds: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """Time steered against unsteered requests of one llama-server.

    Rows: ``batch8`` (8 requests at once, 8 different vectors on all layers: tokens/s of all), ``single`` (one request:
    tokens/s), ``ttft`` (one request: the time to its first token; the ratio is of speeds) and ``read`` (the mean hidden state
    of 64 prompts at every readable layer against a prefill of the same prompts: prompt tokens/s).

    Args:
        model: a GGUF file.
        rounds: turns of each arm, after one that is not counted.
        progress: called with (rounds done, all rounds).

    Raises:
        EngineError: the server cannot be started, or refuses a request.
    """
    args = ["--parallel", str(PARALLEL), "-c", str(PARALLEL * 512), "--no-kv-unified", "--cache-ram", "0", "--no-warmup"]
    args += ["-t", str(n_threads), "-tb", str(n_threads), "-ngl", str(n_gpu_layers)]
    with ServerProcess() as process:
        process.start(model, args)
        process.wait_ready()
        return _Bench(_Client(process.url), seed).run(rounds, progress)


class _Bench:
    def __init__(self, client: _Client, seed: int) -> None:
        self.client = client
        self.rng = np.random.default_rng(seed)
        facts = requests.get(client.url + "/steering", timeout=60).json()["model"]
        if "error" in facts:
            raise EngineError(f"{facts['error']}.")
        self.n_vocab = int(facts["n_vocab"])
        self._upload(int(facts["identity"]["n_layer"]), int(facts["identity"]["n_embd"]))
        self.pool = ThreadPoolExecutor(PARALLEL)

    def _upload(self, n_layer: int, n_embd: int) -> None:
        with TemporaryDirectory() as folder:
            for k in range(PARALLEL):
                v = self.rng.standard_normal((n_layer, n_embd)).astype(np.float32)
                places = {(il, "resid_post"): v[il] / np.linalg.norm(v[il]) for il in range(n_layer)}
                file = Path(folder) / "v.safetensors"
                write_vector(SteeringVector("bench", places, {p: DOSE for p in places}), file)
                self.client.post(f"/steering/vectors/bench-{k}", data=file.read_bytes())

    def prompt(self) -> list[int]:
        low, high = min(300, self.n_vocab // 4), min(20000, self.n_vocab // 2)
        return [int(t) for t in self.rng.integers(low, high, PROMPT_TOKENS)]

    def body(self, steered: bool, k: int, prompt: Sequence[int]) -> dict[str, Any]:
        terms = [{"vector": f"bench-{k}", "strength": 1.0, "scope": "all"}] if steered else []
        return {
            "prompt": list(prompt), "n_predict": REPLY_TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
            "steering": terms,
        }  # fmt: skip

    def run(self, rounds: int, progress: Progress | None) -> list[Row]:
        rows: dict[str, tuple[str, Callable[[bool, Any], float], Callable[[], Any]]] = {
            "batch8": ("tok/s", self.batch, lambda: [self.prompt() for _ in range(PARALLEL)]),
            "single": ("tok/s", self.single, self.prompt),
            "ttft": ("s", self.ttft, self.prompt),
            "read": ("prompt tok/s", self.read, lambda: [self.prompt() for _ in range(READ_PROMPTS)]),
        }
        times: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in rows}
        with self.pool:
            for turn in range(rounds + 1):
                for name, (_, arm, prepare) in rows.items():
                    work = prepare()
                    for steered in self.rng.permutation([False, True]):
                        value = arm(bool(steered), work)
                        if turn > 0:  # the first turn warms up
                            times[name][bool(steered)].append(value)
                if progress is not None:
                    progress(turn + 1, rounds + 1)
        return [self._row(name, unit, times[name]) for name, (unit, _, _) in rows.items()]

    def _row(self, name: str, unit: str, times: dict[bool, list[float]]) -> Row:
        plain, steered = np.array(times[False]), np.array(times[True])
        ratios = plain / steered if unit == "s" else steered / plain
        samples = np.median(self.rng.choice(ratios, (2000, len(ratios))), axis=1)
        low, high = np.quantile(samples, [0.025, 0.975])
        return Row(
            name, float(np.median(ratios)), (float(low), float(high)), float(np.median(plain)), float(np.median(steered)), unit
        )

    # ---- the arms: each returns a speed, or a time ----

    def batch(self, steered: bool, prompts: Sequence[Sequence[int]]) -> float:
        start = time.perf_counter()
        calls = [self.pool.submit(self.client.post, "/completion", self.body(steered, k, p)) for k, p in enumerate(prompts)]
        tokens = sum(call.result().json()["tokens_predicted"] for call in calls)
        return float(tokens / (time.perf_counter() - start))

    def single(self, steered: bool, prompt: Sequence[int]) -> float:
        answer = self.client.post("/completion", self.body(steered, 0, prompt)).json()
        return float(answer["timings"]["predicted_per_second"])

    def ttft(self, steered: bool, prompt: Sequence[int]) -> float:
        return self.client.first_token({**self.body(steered, 0, prompt), "n_predict": 1})

    def read(self, steered: bool, prompts: Sequence[Sequence[int]]) -> float:
        start = time.perf_counter()
        if steered:
            self.client.post("/steering/read", {"prompts": prompts, "positions": "mean"})
        else:
            self.client.post("/completion", {"prompt": prompts, "n_predict": 1, "temperature": 0, "cache_prompt": False})
        return sum(map(len, prompts)) / (time.perf_counter() - start)
