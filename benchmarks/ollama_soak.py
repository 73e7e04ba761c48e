"""A soak of the Ollama sidecar: concurrent chats, clients that leave, and model switches, every answer checked.

    python benchmarks/ollama_soak.py [--seconds 300] [--workers 4] [--seed 0]

Two sets of tiny random weights with three models each (steered up, steered down, plain), and room for one loaded process only, so
that the two push each other out all the time. Each reply is compared with what its model said alone. At the end no process
may be left, and the sidecar may not have grown by more than 32 MiB. It looks into /proc, so Linux; needs a steering llama-server
(`steer build`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "integrations" / "ollama"), str(ROOT)]

from steer_plugins import Library, testing  # noqa: E402
from steer_plugins.steering.vector import SteeringVector  # noqa: E402
from steer_plugins.store.identity import identity_of_gguf  # noqa: E402
from tests.integration.ollama_sidecar import FLAGS, sidecar  # noqa: E402

MARK = "STEER_OLLAMA_SOAK"
# one row at a time, in float32: what runs beside a reply cannot change it
EXACT = [*FLAGS, "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
STEERING = {"up": "soak:1", "down": "soak:-1", "plain": ""}


@dataclass
class Result:
    """What happened. ``problems``: whatever should not have."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    grown_mb: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def problem(self, text: str) -> None:
        with self.lock:
            self.problems.append(text)


def make_models(root: Path) -> list[str]:
    """Weights, vectors and Modelfiles; the models' names."""
    names = []
    library = Library(root / "library")
    for number, letter in enumerate("ab"):
        gguf = testing.write("llama", root / f"{letter}.gguf", seed=number)[0]
        identity = identity_of_gguf(gguf)
        direction = np.random.default_rng(number).normal(size=identity.n_embd).astype(np.float32)
        place = (1, "resid_post")
        unit = {place: direction / np.linalg.norm(direction)}
        library.put(SteeringVector("soak", unit, {place: 60.0}, identity=identity, default_scope="all"), identity)
        for kind, steering in STEERING.items():
            text = f'FROM {letter}\nPARAMETER temperature 0\nPARAMETER num_ctx 512\nPARAMETER steering "{steering}"\n'
            (root / f"{letter}-{kind}.modelfile").write_text(text)
            names.append(f"{letter}-{kind}")
    return names


def body_of(model: str, tokens: int = 24) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Speak, {model[0]}"}]
    return {"model": model, "messages": messages, "options": {"num_predict": tokens}, "keep_alive": "1m"}


def one(client: httpx.Client, model: str, expected: str, dice: random.Random, result: Result) -> None:
    """One request: read to its end, or left somewhere."""
    body = body_of(model)
    leave_after = dice.choice([None, None, None, 0, 1, 5])
    if dice.random() < 0.05:
        body["keep_alive"] = 0
    if leave_after == 0:  # before there is any answer
        try:
            client.post("/api/chat", json={**body, "stream": False}, timeout=httpx.Timeout(60, read=dice.uniform(0.001, 0.3)))
        except httpx.ReadTimeout:
            result.count("left before the answer")
        return
    text, done = "", False
    with client.stream("POST", "/api/chat", json=body) as answer:
        if answer.status_code != 200:
            result.problem(f"{model}: status {answer.status_code}: {answer.read().decode()[:200]}")
            return
        for number, line in enumerate(answer.iter_lines(), start=1):
            found = json.loads(line)
            if "error" in found or done or found["model"] != model:
                result.problem(f"{model}: line {number} is {line[:200]}")
                return
            text, done = text + found["message"]["content"], found["done"]
            if number == leave_after:
                result.count("left in the middle")
                return
    if not done or text != expected:
        result.problem(f"{model}: {text!r} is not {expected!r} (done: {done})")
    result.count("answers")


def processes(mark: str) -> dict[int, str]:
    """Process ids and command lines of what the sidecar started, itself included."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def memory_mb(mark: str) -> float:
    """Resident memory of the sidecar itself, MiB."""
    (pid,) = [pid for pid, command in processes(mark).items() if "steer_plugins_ollama" in command]
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def soak(root: Path, seconds: float, *, workers: int = 4, seed: int = 0) -> Result:
    """Run it; the result says what went wrong."""
    result, mark = Result(), secrets.token_hex(8)
    models = make_models(root)
    env = {MARK: mark, "STEER_LIBRARY": str(root / "library"), "OLLAMA_MAX_LOADED_MODELS": "1"}
    with sidecar(root, "--folder", str(root), env=env, flags=EXACT) as url:
        with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
            alone = {m: client.post("/api/chat", json={**body_of(m), "stream": False}).json() for m in models}
            expected = {model: answer["message"]["content"] for model, answer in alone.items()}
            if len(set(expected.values())) != len(models):
                result.problem(f"the models answer alike: {expected}")
            until = time.monotonic() + seconds
            before = 0.0

            def work(number: int) -> None:
                dice = random.Random(f"{seed} {number}")
                while time.monotonic() < until and not result.problems:
                    model = dice.choice(models)
                    try:
                        one(client, model, expected[model], dice, result)
                    except httpx.HTTPError as error:
                        result.problem(f"{model}: {type(error).__name__}: {error}")

            with ThreadPoolExecutor(workers) as pool:
                runs = [pool.submit(work, number) for number in range(workers)]
                time.sleep(min(30.0, seconds / 3))  # what is kept for reuse is there by now
                before = memory_mb(mark)
                for run in runs:
                    run.result()
            result.grown_mb = memory_mb(mark) - before
            if result.grown_mb > 32:
                result.problem(f"the sidecar has grown by {result.grown_mb:.0f} MiB")
            for model in models:
                client.post("/api/generate", json={"model": model, "keep_alive": 0})
            left = {pid: command for pid, command in processes(mark).items() if "llama-server" in command}
            if left or client.get("/api/ps").json()["models"]:
                result.problem(f"after the unload there still is {left}")
        log = (root / "sidecar.log").read_text(errors="replace")
    if processes(mark):
        result.problem(f"after the sidecar there still is {processes(mark)}")
    result.counts["loads"] = log.count(" loaded ")
    result.problems += [line for line in log.splitlines() if "Traceback" in line or "a bug" in line or " ERROR " in line][:3]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if not os.path.isdir("/proc"):
        print("this looks into /proc, which is not here")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), asked.seconds, workers=asked.workers, seed=asked.seed)
    print(", ".join(f"{what}: {n}" for what, n in sorted(result.counts.items())), f"memory: {result.grown_mb:+.1f} MiB", sep=", ")
    for problem in result.problems:
        print("PROBLEM:", problem)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
