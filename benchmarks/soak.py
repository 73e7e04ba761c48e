"""A long mixed load on one steering llama-server: steered, unsteered, read, scored, changed live, cancelled and malformed.

Every answer is checked: replies against those the same server gave while it was quiet, reads against a first read, refusals for
their status. Memory is watched after a warm-up. Ends with one line, exit code 1 when anything was wrong.

    python benchmarks/soak.py --seconds 3600
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import requests

from steer_plugins import testing
from steer_plugins.client import ServerProcess
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.vectorfile import write_vector

FLAGS = ["--parallel", "6", "-c", "6144", "--no-kv-unified", "--cache-ram", "8", "-t", "1", "-tb", "1", "--no-warmup"]
PROMPTS = ["The harbour was quiet", "Seven green parrots", "Once upon a time in the old town", "It rains"]
MALFORMED: list[tuple[str, Any, int]] = [
    ("/completion", {"prompt": "a", "steering": [{"vector": "gone"}]}, 400),
    ("/completion", {"prompt": "a", "steering": "mood:1"}, 400),
    ("/completion", {"prompt": "a", "steering": [{"vector": "a", "strenght": 1}]}, 400),
    ("/steering/read", {"prompts": []}, 400),
    ("/steering/read", {"prompts": ["a"], "layers": [99]}, 400),
    ("/steering/requests/nobody", {"steering": []}, 404),
    ("/steering/vectors/..", b"x", 404),
    ("/steering/vectors/x", b"not a vector", 400),
]


class Soak:
    """The load. ``problems`` collects what went wrong, ``done`` counts what was asked."""

    def __init__(self, url: str, seed: int = 0) -> None:
        self.url = url
        self.random = random.Random(seed)
        self.problems: list[str] = []
        self.done: Counter[str] = Counter()
        self.n_embd = int(requests.get(url + "/steering", timeout=30).json()["model"]["identity"]["n_embd"])
        self.expected: dict[str, list[int]] = {}
        self.stop = threading.Event()

    # ---- words ----

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        if isinstance(body, bytes):
            kind = {"Content-Type": "application/octet-stream"}
            return requests.post(self.url + path, data=body, headers=kind, params={"replace": "true"}, timeout=120)
        return requests.post(self.url + path, json=body, timeout=120, **options)

    def vector(self, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        places = {(il, "resid_post"): rng.standard_normal(self.n_embd).astype(np.float32) for il in (1, 2)}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "v.safetensors"
            write_vector(SteeringVector("v", places, {p: 4.0 for p in places}), file)
            return file.read_bytes()

    def body(self, prompt: str, terms: Any, n: int = 24) -> dict[str, Any]:
        return {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "return_tokens": True, "steering": terms}

    def terms(self) -> Any:
        pick = self.random.choice
        one = {
            "vector": pick(["a", "b"]),
            "strength": pick([-1.0, -0.5, 0.5, 1.0]),
            "scope": pick(["all", "response", "prompt", "3-9"]),
        }
        return pick([[], [one], [{**one, "op": "project", "strength": 1.0}], [one, {"vector": "b", "strength": 0.25}]])

    def expect(self, prompt: str, terms: Any) -> list[int] | None:
        return self.expected.get(json.dumps([prompt, terms]))

    # ---- while it is quiet ----

    def learn(self) -> None:
        """Ask for what is going to be asked, one at a time, with no cache."""
        for name, seed in (("a", 1), ("b", 2)):
            assert self.post(f"/steering/vectors/{name}", self.vector(seed)).status_code == 200
        self.jobs = [(self.random.choice(PROMPTS), self.terms()) for _ in range(40)]
        for prompt, terms in self.jobs:
            answer = self.post("/completion", {**self.body(prompt, terms), "cache_prompt": False}).json()
            self.expected[json.dumps([prompt, terms])] = answer["tokens"]
        self.first_read = self.read()

    def read(self) -> np.ndarray:
        from safetensors.numpy import load

        answer = self.post("/steering/read", {"prompts": PROMPTS, "positions": "mean", "layers": [1, 2]})
        assert answer.status_code == 200, answer.text
        tensors = load(io.BytesIO(answer.content).getvalue())
        return np.stack([tensors[f"{i}.values"] for i in range(len(PROMPTS))])

    # ---- the load ----

    def complete(self) -> None:
        prompt, terms = self.random.choice(self.jobs)
        answer = self.post("/completion", self.body(prompt, terms))
        if answer.status_code != 200 or answer.json()["tokens"] != self.expect(prompt, terms):
            self.problems.append(f"a reply is wrong: {prompt!r} {terms} {answer.text[:200]}")

    def read_again(self) -> None:
        difference = np.abs(self.read() - self.first_read).max()
        if not difference < 0.1:
            self.problems.append(f"a read is off by {difference}")

    def score(self) -> None:
        prompt, terms = self.random.choice(self.jobs)
        items = [{"prompt": prompt, "response": self.expect(prompt, terms)}]
        answer = self.post("/steering/logprobs", {"items": items, "steering": terms})
        if answer.status_code != 200 or not np.isfinite(answer.json()["logprobs"][0]).all():
            self.problems.append(f"a score is wrong: {answer.text[:200]}")

    def live(self) -> None:
        """A change in the middle of a reply; what came before it is as it was."""
        prompt, terms = self.random.choice(self.jobs)
        name = f"live-{self.random.randrange(10**9)}"
        seen: list[int] = []
        told = None
        body = {**self.body(prompt, terms, 200), "stream": True, "request_id": name}
        with requests.post(self.url + "/completion", json=body, stream=True, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: "):
                    seen += json.loads(line[6:])["tokens"]
                    if told is None and len(seen) >= 3:
                        told = self.post(f"/steering/requests/{name}", {"steering": self.terms()})
        want = self.expect(prompt, terms) or []
        if told is None or told.status_code not in (200, 404) or len(seen) != 200 or seen[:3] != want[:3]:
            self.problems.append(f"a live change went wrong: {told and told.text[:200]} {len(seen)} {seen[:3]} {want[:3]}")

    def cancel(self) -> None:
        prompt, terms = self.random.choice(self.jobs)
        with requests.post(
            self.url + "/completion", json={**self.body(prompt, terms, 800), "stream": True}, stream=True, timeout=120
        ) as answer:
            for n, _ in enumerate(answer.iter_lines()):
                if n > self.random.randrange(1, 12):
                    return

    def malformed(self) -> None:
        path, body, status = self.random.choice(MALFORMED)
        answer = self.post(path, body)
        if answer.status_code != status or not answer.json()["error"]["message"]:
            self.problems.append(f"{path} answered {answer.status_code}, not {status}: {answer.text[:200]}")

    def churn(self) -> None:
        """Other vectors come and go under one name."""
        name = f"temp-{self.random.randrange(4)}"
        self.post(f"/steering/vectors/{name}", self.vector(self.random.randrange(10**6)))
        self.post(
            "/completion", self.body(self.random.choice(PROMPTS), [{"vector": name, "strength": self.random.uniform(-1, 1)}], 4)
        )
        requests.delete(f"{self.url}/steering/vectors/{name}", timeout=30)

    def worker(self) -> None:
        kinds = [
            (self.complete, 8),
            (self.read_again, 2),
            (self.score, 1),
            (self.live, 2),
            (self.cancel, 2),
            (self.malformed, 2),
            (self.churn, 2),
        ]
        while not self.stop.is_set() and len(self.problems) < 20:
            act = self.random.choices([k for k, _ in kinds], [w for _, w in kinds])[0]
            try:
                act()
                self.done[act.__name__] += 1
            except Exception as error:  # a lost connection is a finding, not the end
                self.problems.append(f"{act.__name__}: {error!r:.300}")


def resident_bytes(process: ServerProcess) -> int:
    """Resident memory of the llama-server below a :class:`ServerProcess`; 0 where /proc does not tell."""
    try:
        guard = process._child.pid  # type: ignore[union-attr]
        child = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()[0]
        return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * 4096
    except (OSError, AttributeError, IndexError):
        return 0


def run(seconds: float, threads: int = 8, seed: int = 0, server: Path | None = None) -> tuple[Soak, list[int]]:
    """Load a server on a tiny random model; returns the load and memory over time (bytes, from the end of the warm-up)."""
    with tempfile.TemporaryDirectory() as folder, ServerProcess(server) as process:
        model = testing.write("llama", Path(folder) / "llama.gguf", weights="q8_0")[0]
        process.start(model, FLAGS)
        process.wait_ready()
        soak = Soak(process.url, seed)
        soak.learn()
        workers = [threading.Thread(target=soak.worker) for _ in range(threads)]
        for w in workers:
            w.start()
        memory = []
        start = time.monotonic()
        while time.monotonic() - start < seconds and process.running and len(soak.problems) < 20:
            time.sleep(min(1.0, seconds / 20))
            if time.monotonic() - start > seconds / 3:  # the caches are full by then
                memory.append(resident_bytes(process))
        soak.stop.set()
        for w in workers:
            w.join()
        if not process.running:
            soak.problems.append("the server has ended: " + " | ".join(process.log_tail[-3:]))
        left = requests.get(process.url + "/steering", timeout=30).json()["n_requests"] if process.running else 0
        deadline = time.monotonic() + 5
        while left and time.monotonic() < deadline:
            time.sleep(0.2)
            left = requests.get(process.url + "/steering", timeout=30).json()["n_requests"]
        if left:
            soak.problems.append(f"requests are left behind: {left}")
        return soak, memory


def growth(memory: list[int]) -> float:
    """How much larger the last quarter is than the first, as a share."""
    n = max(1, len(memory) // 4)
    first, last = float(np.median(memory[:n])), float(np.median(memory[-n:]))
    return last / first - 1 if first else 0.0


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--server", type=Path, help="another llama-server than the runtime's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    soak, memory = run(options.seconds, options.threads, options.seed, options.server)
    for problem in soak.problems:
        print(problem)
    grown = growth(memory)
    weight = memory[-1] / 2**20 if memory else 0
    print(f"{dict(soak.done)}; {len(soak.problems)} problems; memory {weight:.0f} MiB, grown by {grown:.1%}")
    return 1 if soak.problems or grown > 0.1 else 0


if __name__ == "__main__":
    sys.exit(main())
