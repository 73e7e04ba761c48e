"""A patched llama-server on tiny models, and small words to talk to it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from steer_plugins import testing
from steer_plugins.client import ServerProcess
from steer_plugins.errors import SteerError
from steer_plugins.runtime import ensure_runtime
from steer_plugins.steering.columns import LINEAR, Columns
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.vectorfile import write_vector

PROMPT = "The weather in the old town is"
OCTETS = {"Content-Type": "application/octet-stream"}


class Server:
    """One llama-server and the calls that tests make of it."""

    def __init__(self, binary: Path, model: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self.process = ServerProcess(binary)
        threads = () if "-t" in args else ("-t", "1", "-tb", "1")
        self.process.start(model, ["--no-warmup", *threads, *args], env)
        try:
            self.process.wait_ready(120)
        except BaseException:
            self.process.stop()
            raise
        self.url = self.process.url
        self._local = threading.local()
        self.model = self.get("/steering").json()["model"]
        self.n_embd: int = self.model["identity"]["n_embd"]
        self.n_layer: int = self.model["identity"]["n_layer"]
        self._folder: Path | None = None

    @property
    def http(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False
        return self._local.session  # type: ignore[no-any-return]

    def get(self, path: str) -> requests.Response:
        return self.http.get(self.url + path, timeout=60)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        return self.http.post(self.url + path, json=body, timeout=120, **options)

    def stream(self, path: str, body: Any) -> requests.Response:
        """A streamed answer, on a connection of its own: llama-server closes it at the end."""
        return requests.post(self.url + path, json={**body, "stream": True}, stream=True, timeout=120)

    def ok(self, path: str, body: Any) -> Any:
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def error(self, path: str, body: Any, status: int = 400) -> str:
        """The sentence of a request that has to be refused."""
        answer = self.post(path, body)
        assert answer.status_code == status, (answer.status_code, answer.text)
        error = answer.json()["error"]
        assert error["code"] == status
        return str(error["message"])

    def put(self, name: str, vector: SteeringVector, folder: Path, **query: str) -> requests.Response:
        """Upload, in place of what another test has left under that name unless ``replace`` says otherwise."""
        file = folder / "upload.safetensors"
        write_vector(vector, file)
        return self.http.post(
            f"{self.url}/steering/vectors/{name}",
            data=file.read_bytes(),
            headers=OCTETS,
            params={"replace": "true", **query},
            timeout=60,
        )

    def complete(self, prompt: Any = PROMPT, steering: Any = None, n: int = 16, **fields: Any) -> dict[str, Any]:
        """A greedy completion; ``cached`` says how many prompt tokens came from a cache."""
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, "ignore_eos": True, **fields}
        if steering is not None:
            body["steering"] = steering
        answer: dict[str, Any] = self.ok("/completion", body)
        answer["cached"] = answer["timings"]["cache_n"]
        return answer

    def many(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run calls at the same time."""
        with ThreadPoolExecutor(len(calls)) as pool:
            return [f.result() for f in [pool.submit(c) for c in calls]]

    def read(self, **body: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Metadata and tensors of a read."""
        answer = self.post("/steering/read", body)
        assert answer.status_code == 200, answer.text
        return parse_read(answer.content)

    def tokens(self, text: str) -> list[int]:
        return list(self.ok("/tokenize", {"content": text, "add_special": True})["tokens"])


def parse_read(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The answer of /steering/read, by safetensors itself."""
    from safetensors.numpy import load

    length = int.from_bytes(data[:8], "little")
    meta = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["steer"])
    return meta, load(data)


@pytest.fixture(scope="session")
def server_binary() -> Path:
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder and not os.environ.get("STEER_RUNTIME"):
        os.environ["STEER_RUNTIME"] = folder
    try:
        binary = ensure_runtime(need_server=True).server
    except SteerError as error:
        pytest.fail(f"no llama-server to test: {error}")
    assert binary is not None
    return Path(binary)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(arch: str = "llama", **options: Any) -> Path:
        name = "-".join([arch, *(f"{k}{v}" for k, v in sorted(options.items()))])
        if name not in made:
            made[name] = testing.write(arch, folder / f"{name}.gguf", **options)[0]
        return made[name]

    return make


@pytest.fixture(scope="session")
def _servers(server_binary: Path) -> Iterator[Callable[..., Server]]:
    """At most a few at a time: the least recently asked for is stopped."""
    alive: dict[Any, Server] = {}

    def get(model: Path, *args: str) -> Server:
        key = (model, *args)
        if key in alive and not alive[key].process.running:
            del alive[key]
        if key not in alive:
            while len(alive) >= 3:
                alive.pop(next(iter(alive))).process.stop()
            alive[key] = Server(server_binary, model, *args)
        alive[key] = alive.pop(key)
        return alive[key]

    yield get
    for server in alive.values():
        server.process.stop()


EXACT = ("--parallel", "4", "-c", "2048", "--no-kv-unified", "-fa", "off", "-ctk", "f32", "-ctv", "f32")
"""Float32 everywhere, a cache for each slot: what is computed depends on the tokens only."""


@pytest.fixture
def exact(_servers: Callable[..., Server], tiny_model: Callable[..., Path]) -> Callable[..., Server]:
    """``exact("llama")``: a shared server; other flags may be given."""

    def get(arch: str = "llama", *args: str, **options: Any) -> Server:
        return _servers(tiny_model(arch, **options), *(args or EXACT))

    return get


@pytest.fixture
def own(server_binary: Path, tiny_model: Callable[..., Path]) -> Iterator[Callable[..., Server]]:
    """A server for this test alone."""
    made: list[Server] = []

    def get(arch: str = "llama", *args: str, env: dict[str, str] | None = None, **options: Any) -> Server:
        made.append(Server(server_binary, tiny_model(arch, **options), *args, env=env))
        return made[-1]

    yield get
    for server in made:
        server.process.stop()


def direction(server: Server, seed: int = 0) -> np.ndarray:
    """A random unit direction, float32 [n_embd]."""
    v = np.random.default_rng(seed).normal(size=server.n_embd)
    return (v / np.linalg.norm(v)).astype(np.float32)


def make_vector(
    server: Server, *layers: int, seed: int = 0, dose: float = 4.0, op: str = "add", scope: str = "all", site: str = "resid_post"
) -> SteeringVector:
    """A vector with another direction at each layer."""
    places = {(il, site): direction(server, seed * 1000 + il) for il in layers or (1, 2)}
    return SteeringVector("v", places, {key: dose for key in places}, op=op, default_scope=scope)


def make_responsive(server: Server, *layers: int, seed: int = 0, dose: float = 2.0, op: str = "add") -> SteeringVector:
    """The same with three columns at each layer: linear, ReLU and JumpReLU."""
    plain = make_vector(server, *layers, seed=seed, dose=dose, op=op)

    def rows(key: tuple[int, str], first: int) -> np.ndarray:
        return np.stack([direction(server, seed * 1000 + 100 * (first + j) + key[0]) for j in range(3)])

    columns = {
        key: Columns(rows(key, 1), rows(key, 4), [0.8, -1.0, 0.7], [0.3, 0.1, 0.2], [LINEAR, 0.0, 0.5])
        for key in plain.directions
    }
    return plain.replace(columns=columns)
