"""What steering costs in a llama-server: requests with and without, in turn, in one run.

The arms of a measure are timed one after the other in each round, in random order, so that a slow spell of the machine hits all
of them. A ratio is the speed of an arm over the speed without steering, taken within a round; the median of these ratios is
reported. Steered and unsteered requests go to one process. What a user would take instead, a server with llama.cpp's own control
vector for all its requests, is a second process on the same file, with the same flags.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import requests

from ..client import ServerProcess
from ..engine.base import Progress
from ..errors import EngineError
from ..steering.vector import SteeringVector
from ..store.foreign import controlvector
from ..store.vectorfile import write_vector
from .costs import Costs, Measure, name_by_processor

PARALLEL = 8
PROMPT_TOKENS = 64
REPLY_TOKENS = 64
READ_PROMPTS = 64
DOSE = 1e-3
"""Too small to change what the model says, so that all arms do the same work."""

PLAIN, STEERED, STOCK = "plain", "steered", "stock-cvec"
MEASURES = (
    Measure("batch8", "tok/s", PLAIN, f"{PARALLEL} requests at once, {PARALLEL} different vectors on all layers: tokens of all."),
    Measure("single", "tok/s", PLAIN, "One request: the tokens of its reply, by the server's own clock."),
    Measure("ttft", "s", PLAIN, "One request: the time to its first token. The ratio is of speeds."),
    Measure(
        "read",
        "prompt tok/s",
        PLAIN,
        f"The mean hidden state of {READ_PROMPTS} prompts at every readable layer, against a prefill of the same prompts.",
    ),
)
BY_PROCESSOR = tuple(
    Measure(
        name_by_processor(m.name),
        "s",
        PLAIN,
        "The same work in the server's processor seconds, which a busy machine disturbs less.",
    )
    for m in MEASURES
)
"""Linux tells them. A request's prompt and the making of answers are counted as well."""


@dataclass(frozen=True)
class ServerRow:
    """One comparison. ``plain`` and ``steered`` are medians in ``unit``; ``ratio`` is of speeds, more is faster.

    ``ratio_ci`` is a 95 % bootstrap interval of the median ratio. ``cpu_ratio``: the same by the server's processor time, None
    where the system does not tell it or layers are on a GPU.
    """

    name: str
    ratio: float
    ratio_ci: tuple[float, float]
    plain: float
    steered: float
    unit: str
    cpu_ratio: float | None = None


class _Client:
    """Calls of one server, on a connection for each thread."""

    def __init__(self, process: ServerProcess) -> None:
        self.url = process.url
        self._pid = _server_pid(process)
        self._local = threading.local()

    @property
    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False
        session: requests.Session = self._local.session
        return session

    def processor_seconds(self) -> float | None:
        """What the server has used so far, all threads; None where that cannot be known."""
        if self._pid is None:
            return None
        try:
            tasks = Path(f"/proc/{self._pid}/task").iterdir()
            return sum(int((task / "schedstat").read_text("ascii").split()[0]) for task in tasks) / 1e9
        except (OSError, ValueError, IndexError):
            return None

    def post(self, path: str, body: Any = None, data: bytes | None = None) -> requests.Response:
        headers = {"Content-Type": "application/octet-stream"} if data is not None else None
        answer = self._session.post(self.url + path, json=body, data=data, headers=headers, timeout=600)
        if answer.status_code != 200:
            raise EngineError(f"the server refused a benchmark request: {answer.text[:300]}")
        return answer

    def first_token(self, body: dict[str, Any]) -> float:
        """Seconds from sending a request to the first piece of its streamed reply."""
        start = time.perf_counter()
        with requests.post(self.url + "/completion", json={**body, "stream": True}, stream=True, timeout=600) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: "):
                    return time.perf_counter() - start
        raise EngineError("a benchmark reply ended before its first token")


def _server_pid(process: ServerProcess) -> int | None:
    """The process below the one that guards it, on Linux."""
    guard = process._child.pid if process._child is not None else 0
    try:
        return int(Path(f"/proc/{guard}/task/{guard}/children").read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None


def bench_server(
    model: Path,
    *,
    n_threads: int = 1,
    n_gpu_layers: int = 0,
    rounds: int = 12,
    seed: int = 0,
    stock: Path | None = None,
    progress: Progress | None = None,
) -> Costs:
    """Time the arms on one llama-server, and one with llama.cpp's control vector; see :data:`MEASURES`.

    Args:
        model: a GGUF file.
        rounds: turns of each arm, after one that is not counted.
        stock: the llama-server for the control vector; by default the unpatched one that belongs to the runtime, or else the
            runtime's own without any steering.
        progress: called with (rounds done, all rounds).

    Raises:
        EngineError: a server cannot be started, or refuses a request. RuntimeMissing: there is no llama-server.
    """
    from ..runtime import ensure_runtime

    runtime = ensure_runtime(need_server=True)
    args = ["--parallel", str(PARALLEL), "-c", str(PARALLEL * 512), "--no-kv-unified", "--cache-ram", "0", "--no-warmup"]
    args += ["-t", str(n_threads), "-tb", str(n_threads), "-ngl", str(n_gpu_layers)]
    other = stock or runtime.stock_server or runtime.server
    notes = {runtime.stock_server: "the unpatched build of the same sources", runtime.server: "the patched server, unsteered"}
    which = notes.get(other, other.name if other is not None else "")
    arms = {
        PLAIN: "no steering",
        STEERED: "vectors of the request, on all layers",
        STOCK: f"llama.cpp's own control vector for all requests of a server ({which})",
    }
    plan: dict[str, Any] = {"threads": n_threads, "n_gpu_layers": n_gpu_layers, "rounds": rounds, "seed": seed}
    plan |= {"parallel": PARALLEL, "prompt": PROMPT_TOKENS, "reply": REPLY_TOKENS, "server_flags": args}
    with ExitStack() as stack:
        process = stack.enter_context(ServerProcess(runtime.server))
        process.start(model, args)
        process.wait_ready()
        client = _Client(process)
        known = n_gpu_layers == 0 and client.processor_seconds() is not None
        bench = _Bench(client, seed, Costs(MEASURES + BY_PROCESSOR if known else MEASURES, arms, plan))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        # not --control-vector-scaled, whose colon is a part of a path on Windows: the file is scaled as it is
        file = folder / "stock.gguf"
        controlvector.write(bench.stock_vector(), file)
        twin = stack.enter_context(ServerProcess(other))
        twin.start(model, [*args, "--control-vector", os.fspath(file)])
        try:
            twin.wait_ready()
        except EngineError as error:
            if stock is not None:  # it was asked for
                raise
            bench.costs.notes.append(f"Not compared with llama.cpp's own control vector: {error}")
            return bench.run(None, rounds, progress)
        return bench.run(_Client(twin), rounds, progress)


class _Bench:
    def __init__(self, client: _Client, seed: int, costs: Costs) -> None:
        self.client = client
        self.costs = costs
        self.rng = np.random.default_rng(seed)
        facts = requests.get(client.url + "/steering", timeout=60).json()["model"]
        if "error" in facts:
            raise EngineError(str(facts["error"]))
        self.n_vocab = int(facts["n_vocab"])
        self.n_layer, self.n_embd = int(facts["identity"]["n_layer"]), int(facts["identity"]["n_embd"])
        self._upload()
        self.pool = ThreadPoolExecutor(PARALLEL)

    def _vector(self, first: int = 0, **more: Any) -> SteeringVector:
        v = self.rng.standard_normal((self.n_layer, self.n_embd)).astype(np.float32)
        places = {(il, "resid_post"): v[il] / np.linalg.norm(v[il]) for il in range(first, self.n_layer)}
        return SteeringVector("bench", places, dict.fromkeys(places, DOSE), **more)

    def stock_vector(self) -> SteeringVector:
        """One that llama.cpp can apply by itself: not at layer 0, and at every token."""
        return self._vector(1, default_scope="0-")

    def _upload(self) -> None:
        with TemporaryDirectory() as folder:
            for k in range(PARALLEL):
                file = Path(folder) / "v.safetensors"
                write_vector(self._vector(), file)
                self.client.post(f"/steering/vectors/bench-{k}", data=file.read_bytes())

    def prompt(self) -> list[int]:
        low, high = min(300, self.n_vocab // 4), min(20000, self.n_vocab // 2)
        return [int(t) for t in self.rng.integers(low, high, PROMPT_TOKENS)]

    def body(self, arm: str, k: int, prompt: Sequence[int]) -> dict[str, Any]:
        body = {"prompt": list(prompt), "n_predict": REPLY_TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        if arm == STOCK:  # its server knows nothing of steering
            return body
        return {**body, "steering": [{"vector": f"bench-{k}", "strength": 1.0, "scope": "all"}] if arm == STEERED else []}

    def run(self, stock: _Client | None, rounds: int, progress: Progress | None) -> Costs:
        work: dict[str, tuple[Callable[[_Client, str, Any], float], Callable[[], Any]]] = {
            "batch8": (self.batch, lambda: [self.prompt() for _ in range(PARALLEL)]),
            "single": (self.single, self.prompt),
            "ttft": (self.ttft, self.prompt),
            "read": (self.read, lambda: [self.prompt() for _ in range(READ_PROMPTS)]),
        }
        with self.pool:
            for turn in range(rounds + 1):
                for measure, (time_it, prepare) in work.items():
                    prompts = prepare()
                    clients = {PLAIN: self.client, STEERED: self.client}
                    if stock is not None and measure != "read":  # which it cannot
                        clients[STOCK] = stock
                    for arm in map(str, self.rng.permutation(list(clients))):
                        client = clients[arm]
                        before = client.processor_seconds()
                        value = time_it(client, arm, prompts)
                        after = client.processor_seconds()
                        if turn == 0:  # to warm up
                            continue
                        self.costs.add(turn - 1, measure, arm, value)
                        if before is not None and after is not None and after > before:
                            self.costs.add(turn - 1, name_by_processor(measure), arm, after - before)
                if progress is not None:
                    progress(turn + 1, rounds + 1)
        return self.costs

    # ---- the arms: each returns a speed, or a time ----

    def batch(self, client: _Client, arm: str, prompts: Sequence[Sequence[int]]) -> float:
        start = time.perf_counter()
        calls = [self.pool.submit(client.post, "/completion", self.body(arm, k, p)) for k, p in enumerate(prompts)]
        tokens = sum(call.result().json()["tokens_predicted"] for call in calls)
        return float(tokens / (time.perf_counter() - start))

    def single(self, client: _Client, arm: str, prompt: Sequence[int]) -> float:
        answer = client.post("/completion", self.body(arm, 0, prompt)).json()
        return float(answer["timings"]["predicted_per_second"])

    def ttft(self, client: _Client, arm: str, prompt: Sequence[int]) -> float:
        return client.first_token({**self.body(arm, 0, prompt), "n_predict": 1})

    def read(self, client: _Client, arm: str, prompts: Sequence[Sequence[int]]) -> float:
        start = time.perf_counter()
        if arm == STEERED:
            client.post("/steering/read", {"prompts": prompts, "positions": "mean"})
        else:
            client.post("/completion", {"prompt": prompts, "n_predict": 1, "temperature": 0, "cache_prompt": False})
        return sum(map(len, prompts)) / (time.perf_counter() - start)


def rows_of(costs: Costs) -> list[ServerRow]:
    """A row for each measure, and one for what the stock server does in it: ``stock-cvec-single`` and so on."""
    found: list[ServerRow] = []
    measures = costs.summary(costs.plan["seed"])["measures"]
    for arm, prefix in ((STEERED, ""), (STOCK, f"{STOCK}-")):
        for name in (m.name for m in MEASURES):
            measure = measures[name]
            if arm in measure["arms"]:
                by_processor = measures.get(name_by_processor(name), {"arms": {}})["arms"].get(arm)
                cpu = None if by_processor is None else by_processor["ratio"][0]
                mine = measure["arms"][arm]
                ratio, low, high, _ = mine["ratio"]
                plain = measure["arms"][PLAIN]["value"]
                found.append(ServerRow(prefix + name, ratio, (low, high), plain, mine["value"], measure["unit"], cpu))
    return found
