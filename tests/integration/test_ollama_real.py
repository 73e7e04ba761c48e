"""The sidecar before a real Ollama, with the stock CLI. That daemon dies of any inference request: none may reach it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from steer_plugins import Library, testing
from steer_plugins.client import free_port
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.identity import identity_of_gguf
from steer_plugins.store.vectorfile import write_vector

from .ollama_sidecar import ROOT, need_server, ollama_env, program, real_ollama, sidecar

MESSAGES = [{"role": "user", "content": "hi"}]


@dataclass
class Setup:
    """Both programs and the stock CLI."""

    url: str
    daemon: str
    alive: Callable[[], bool]
    tmp: Path
    command: list[str]
    library: Path

    def ollama(self, *arguments: str, status: int = 0) -> str:
        """Run the stock CLI against the sidecar; what it printed."""
        env = ollama_env(self.tmp, self.url)
        done = subprocess.run(
            [*self.command, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[⠁-⣿] ?|\r", "", done.stdout + done.stderr)
        assert done.returncode == status, text
        return text

    def steer(self, *arguments: str, status: int = 0, url: str | None = None) -> str:
        """Run `steer ollama`."""
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "integrations" / "ollama")])
        env = {**os.environ, "PYTHONPATH": path, "STEER_OLLAMA_HOST": url or self.url, "STEER_LIBRARY": str(self.library)}
        env |= {"OLLAMA_HOST": self.daemon, "OLLAMA_MODELS": str(self.tmp / "store")}
        command = [sys.executable, "-m", "steer_plugins_ollama", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def write(self, name: str, text: str) -> str:
        path = self.tmp / f"{name}.mf"  # FROM x would mean a file named x
        path.write_text(text)
        return str(path)

    def generate(self, model: str, **more: object) -> str:
        body = {"model": model, "prompt": "hi", "options": {"num_predict": 8, "temperature": 0}, "stream": False, **more}
        answer = httpx.post(f"{self.url}/api/generate", json=body, trust_env=False, timeout=120)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["response"])

    def first_token(self, model: str, **more: object) -> dict[str, float]:
        """Log probabilities of the 20 likeliest first tokens."""
        body = {"model": model, "prompt": "hi", "options": {"num_predict": 8, "temperature": 0}, "stream": False}
        body |= {"logprobs": True, "top_logprobs": 20, **more}
        answer = httpx.post(f"{self.url}/api/generate", json=body, trust_env=False, timeout=120)
        assert answer.status_code == 200, answer.text
        return {one["token"]: one["logprob"] for one in answer.json()["logprobs"][0]["top_logprobs"]}


def apart(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference of log probability over the three likeliest tokens of ``one``; those not told count as the least."""
    likeliest = sorted(one, key=lambda token: -one[token])[:3]
    return max(abs(one[token] - other.get(token, min(other.values()))) for token in likeliest)


def tiny_vector(gguf: Path, name: str, seed: int) -> SteeringVector:
    identity = identity_of_gguf(gguf)
    direction = np.random.default_rng(seed).normal(size=identity.n_embd).astype(np.float32)
    direction /= np.linalg.norm(direction)
    place = (1, "resid_post")
    return SteeringVector(name, {place: direction}, {place: 60.0}, identity=identity, default_scope="all")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    tmp = tmp_path_factory.mktemp("ollama")
    command = real_ollama(tmp)
    need_server()
    gguf = testing.write("llama", tmp / "tiny.gguf")[0]
    library = Library(tmp / "library")
    for seed, name in enumerate(("mood", "kind")):
        library.put(tiny_vector(gguf, name, seed), identity_of_gguf(gguf))
    write_vector(tiny_vector(gguf, "own", 7), tmp / "own.safetensors")
    host = f"127.0.0.1:{free_port()}"
    daemon = f"http://{host}"
    with program([*command, "serve"], ollama_env(tmp, host), tmp / "daemon.log", daemon) as process:
        env = {"STEER_LIBRARY": str(library.root), "OLLAMA_MODELS": str(tmp / "store")}
        with sidecar(tmp, "--daemon", daemon, env=env) as url:
            found = Setup(url, daemon, lambda: process.poll() is None, tmp, command, library.root)
            found.write("base", f"FROM {gguf}\nPARAMETER num_ctx 256\nPARAMETER num_predict 8\nPARAMETER temperature 0\n")
            found.ollama("create", "base", "-f", str(tmp / "base.mf"))
            yield found
            assert found.alive(), "an inference request has reached the daemon"


def test_a_model_from_its_creation_to_its_end(setup: Setup) -> None:
    path = setup.write("calm", 'FROM base\nPARAMETER steering "mood:0.6"\nPARAMETER steering kind:0.3\n')
    assert "success" in setup.steer("create", "calm", "-f", path)
    assert "calm:latest" in setup.ollama("list")
    assert re.search(r'steering\s+"mood:0.6\s+\+\s+kind:0.3"', setup.ollama("show", "calm"))
    said = setup.ollama("run", "calm", "hi")
    assert said.strip() and "calm:latest" in setup.ollama("ps")
    setup.ollama("cp", "calm", "copy")
    assert re.search(r"mood:0.6", setup.ollama("show", "copy", "--parameters"))
    assert setup.ollama("run", "copy", "hi") == said
    setup.ollama("stop", "calm")
    assert "calm" not in setup.ollama("ps")
    for name in ("calm", "copy"):
        setup.ollama("rm", name)
    assert "calm" not in setup.ollama("list")
    assert setup.alive()


def test_steering_acts_and_an_unsteered_request_shares_the_process(setup: Setup) -> None:
    """Greedy texts are compared where the same tokens are computed in the same batches only.

    The tiny model's two best first tokens are 2e-5 apart. Whether the prompt is computed at once, or its last token alone and the
    rest is cached, makes 1e-3 and so another text, without any steering.
    """
    setup.steer("create", "up", "-f", setup.write("up", "FROM base\nPARAMETER steering mood"))
    off = {"options": {"steering": "", "num_predict": 8, "temperature": 0}}
    steered = setup.first_token("up")
    plain = setup.first_token("base")  # the daemon would die of it
    assert apart(plain, steered) > 0.2
    assert apart(plain, setup.first_token("up", **off)) < 0.02
    text = setup.generate("base")  # all but the last token of the prompt is cached from here on
    assert setup.generate("up") != text and setup.generate("up", **off) == text == setup.generate("base")
    models = httpx.get(f"{setup.url}/api/ps", trust_env=False).json()["models"]
    assert {m["name"] for m in models} == {"up:latest", "base:latest"} and len({m["steer_server"] for m in models}) == 1
    setup.ollama("stop", "up")
    assert setup.alive()


def test_from_a_steered_model(setup: Setup) -> None:
    setup.steer("create", "first", "-f", setup.write("first", "FROM base\nPARAMETER steering mood:0.6"))
    setup.steer("create", "adds", "-f", setup.write("adds", 'FROM first\nPARAMETER steering "+ kind:0.3"'))
    setup.steer("create", "over", "-f", setup.write("over", "FROM first\nPARAMETER steering kind:0.3"))
    setup.ollama("create", "inherits", "-f", setup.write("inherits", "FROM first\nSYSTEM Hush."))
    for name, steering in (("adds", "mood:0.6 + kind:0.3"), ("over", "kind:0.3"), ("inherits", "mood:0.6")):
        answer = httpx.post(f"{setup.url}/api/show", json={"model": name}, trust_env=False).json()
        assert answer["steering"] == steering and setup.generate(name)


def test_the_stock_cli_and_its_carrier_line(setup: Setup) -> None:
    path = setup.write("stock", 'FROM base\nLICENSE "steering: mood:0.5"\n')
    refused = setup.ollama("create", "bad", "-f", setup.write("bad", "FROM base\nPARAMETER steering mood"), status=1)
    assert "unknown parameter" in refused
    setup.ollama("create", "stock", "-f", path)
    assert re.search(r'steering\s+"mood:0.5"', setup.ollama("show", "stock"))
    # the same line, with the sidecar left out
    env = {**ollama_env(setup.tmp, setup.daemon)}
    subprocess.run([*setup.command, "create", "direct", "-f", path], env=env, check=True, capture_output=True, timeout=60)
    assert httpx.post(f"{setup.url}/api/show", json={"model": "direct"}, trust_env=False).json()["steering"] == "mood:0.5"
    assert setup.generate("direct") == setup.generate("stock")
    wrong = setup.write("wrong", 'FROM base\nLICENSE "steering: nosuch"\n')
    assert "no vector 'nosuch'" in setup.ollama("create", "wrong", "-f", wrong, status=1)
    assert "wrong" not in setup.ollama("list")


def test_vectors_that_travel_with_the_model(setup: Setup) -> None:
    path = setup.write("own", 'FROM base\nPARAMETER steering "\\"own.safetensors\\":0.8 + mood:0.2"\n')
    setup.steer("create", "own", "-f", path)
    setup.steer("create", "packed", "-f", setup.write("packed", "FROM base\nPARAMETER steering kind"), "--carry")
    said = setup.generate("own")
    (kind,) = setup.library.rglob("kind.safetensors")
    kind.unlink()
    assert setup.generate("packed")
    setup.ollama("cp", "own", "own-copy")
    setup.ollama("create", "own-child", "-f", setup.write("child", "FROM own-copy\nSYSTEM x"))
    setup.ollama("rm", "own")
    assert setup.generate("own-copy") == said and setup.generate("own-child")


def test_without_the_sidecar_the_cli_checks_itself(setup: Setup) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    path = setup.write("alone", "FROM base\nPARAMETER steering mood:0.4")
    assert "success" in setup.steer("create", "alone", "-f", path, url=nowhere)
    assert setup.generate("alone")
    wrong = setup.write("alone2", "FROM base\nPARAMETER steering nosuch")
    assert "no vector 'nosuch'" in setup.steer("create", "alone2", "-f", wrong, url=nowhere, status=1)
    wrong = setup.write("alone3", "FROM base\n\nPARAMETER steering mood:")
    assert "line 3" in setup.steer("create", "alone3", "-f", wrong, url=nowhere, status=1)
    assert "alone2" not in setup.ollama("list") and "alone3" not in setup.ollama("list")


def test_everything_at_once_and_the_daemon_lives(setup: Setup) -> None:
    """Whatever path a steered model is asked by, and whatever is wrong with the request."""
    setup.steer("create", "all", "-f", setup.write("all", "FROM base\nPARAMETER steering mood"))
    bodies = [
        {"messages": MESSAGES},
        {"prompt": "hi"},
        {"prompt": "hi", "messages": MESSAGES, "input": "hi", "max_tokens": 4},
        {},
    ]
    bodies += [{"messages": 3}, {"prompt": 3}, {"messages": MESSAGES, "options": {"top_k": "x"}}, {"messages": [{"role": "x"}]}]
    with httpx.Client(base_url=setup.url, trust_env=False, timeout=120) as client:
        for path in ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
            for body in bodies:
                answer = client.post(path, json={"model": "all", "stream": False, **body})
                assert answer.status_code in (200, 400), (path, body, answer.text)
                assert isinstance(answer.json(), dict)
    assert setup.alive()
    assert json.loads(httpx.get(f"{setup.daemon}/api/version", trust_env=False).text)["version"] == "0.9.3"
