"""A random walk through all that touches a cache. After every step an answer is what a server without caches gives.

STEER_WALK_STEPS makes the walks longer, STEER_WALK_SEED makes them others.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.steering.gate import Gate
from steer_plugins.steering.vector import SteeringVector
from tests.server.conftest import PROMPT, Server, direction, make_responsive, make_vector
from tests.server.test_cache import LONG, probabilities

STEPS = int(os.environ.get("STEER_WALK_STEPS", "30"))
SEED = os.environ.get("STEER_WALK_SEED", "")
EXACT = ("--no-kv-unified", "-fa", "off", "-ctk", "f32", "-ctv", "f32")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "one slot": ("llama", ("--parallel", "1", "-c", "512", "--cache-ram", "0", "--context-shift")),
    "host cache": ("llama", ("--parallel", "1", "-c", "512", "--cache-ram", "64")),
    "slots": ("llama", ("--parallel", "3", "-c", "1536", "--cache-ram", "64", "--no-cont-batching")),
    "unified": ("llama", ("--parallel", "3", "-c", "1536", "--cache-ram", "64", "--kv-unified", "-b", "32", "-ub", "16")),
    "checkpoints": ("deepseek4", ("--parallel", "2", "-c", "1024", "--cache-ram", "64")),
    "recurrent": ("qwen3next", ("--parallel", "2", "-c", "1024", "--cache-ram", "64")),
    "sliding window": ("gemma3", ("--parallel", "2", "-c", "1024", "--cache-ram", "0")),
    "sliding window, host cache": ("gemma3", ("--parallel", "2", "-c", "1024", "--cache-ram", "64")),
}  # fmt: skip


class Walk:
    """Two servers with the same vectors: one whose caches are used in all ways, and one that computes everything anew."""

    def __init__(self, server: Server, fresh: Server, folder: Path, rng: random.Random, *, tolerance: float) -> None:
        self.server, self.fresh, self.folder, self.rng, self.tolerance = server, fresh, folder, rng, tolerance
        self.texts = [server.tokens(t) for t in (LONG, PROMPT, "Seven green parrots argued about the price of a telescope. " * 2)]
        self.extra = server.tokens(" and then it rained on the way home, as it always does")[1:]
        self.done: list[str] = []
        self.cached = self.compared = 0
        self.vectors()
        condition = SteeringVector("g", {(1, "resid_post"): direction(server, 77)})
        for one in (server, fresh):
            assert one.put("g", Gate(condition, 0.0).to_vector(), folder).status_code == 200

    def vectors(self) -> None:
        """Other directions under the same names."""
        seed = self.rng.randrange(3)
        for name, op in (("v", "add"), ("w", "project")):
            for one in (self.server, self.fresh):
                assert one.put(name, make_vector(one, seed=seed, op=op), self.folder).status_code == 200
        for one in (self.server, self.fresh):
            assert one.put("r", make_responsive(one, seed=seed), self.folder).status_code == 200

    def terms(self) -> list[dict[str, Any]]:
        scopes = ["all", "prompt", "response", "0-", "3-9", "20-", "all", "response"]
        terms = []
        for _ in range(self.rng.choice((0, 0, 1, 1, 2))):
            term = {
                "vector": self.rng.choice("vwr"),
                "strength": self.rng.choice((-1.0, 0.5, 1.0)),
                "scope": self.rng.choice(scopes),
            }
            if term["vector"] != "r" and self.rng.random() < 0.2:
                term |= {"op": self.rng.choice(("floor", "cap")), "level": self.rng.choice((-0.5, 0.0, 0.5)), "strength": 1.0}
            if term["scope"] != "prompt" and self.rng.random() < 0.3:
                term["schedule"] = {"kind": "linear", "over": self.rng.randint(1, 6), "floor": 0.25}
            if term["scope"] == "response" and self.rng.random() < 0.2:
                term["gate"] = "g"
            terms.append(term)
        return terms

    def prompt(self) -> list[int]:
        tokens = self.rng.choice(self.texts[-5:])
        if self.rng.random() < 0.3:
            tokens = tokens[: self.rng.randint(3, len(tokens))]
        if self.rng.random() < 0.5:
            tokens = tokens + self.extra[: self.rng.randint(1, len(self.extra))]
        if self.rng.random() < 0.1 and len(tokens) > 20:
            tokens = tokens[:1] + tokens[8:]
        return tokens[:160]

    # ---- steps ----

    def complete(self) -> None:
        self.check(self.prompt(), self.terms())

    def check(self, prompt: list[int], terms: list[dict[str, Any]]) -> None:
        n = self.rng.randint(1, 8)
        got = self.server.complete(prompt, terms, n, n_probs=1)
        want = self.fresh.complete(prompt, terms, n, n_probs=1, cache_prompt=False)
        self.compare(got, want, (prompt, terms))
        self.texts.append(prompt + got["tokens"])

    def compare(self, got: dict[str, Any], want: dict[str, Any], what: Any) -> None:
        self.cached += got["cached"]
        self.compared += 1
        assert got["tokens"] == want["tokens"], (what, got["cached"], self.done)
        assert np.allclose(probabilities(got), probabilities(want), atol=self.tolerance), (what, got["cached"], self.done)

    def together(self) -> None:
        jobs = [(self.prompt(), self.terms()) for _ in range(3)]
        found = self.server.many([partial(self.server.complete, p, t, 4, n_probs=1) for p, t in jobs])
        for (prompt, terms), got in zip(jobs, found, strict=True):
            self.compare(got, self.fresh.complete(prompt, terms, 4, n_probs=1, cache_prompt=False), (prompt, terms))

    def too_long(self) -> None:
        prompt = (self.prompt() * 2000)[:2000]
        self.server.error("/completion", {"prompt": prompt, "steering": self.terms(), "n_predict": 2})

    def hang_up(self) -> None:
        body = {"prompt": self.prompt(), "n_predict": 300, "temperature": 0, "ignore_eos": True, "steering": self.terms()}
        answer = self.server.stream("/completion", body)
        lines = answer.iter_lines()
        for _ in range(self.rng.randint(0, 6)):
            next(lines)
        answer.close()

    def live(self) -> None:
        prompt, n = self.prompt(), self.rng.randint(40, 120)
        named = {"request_id": f"r{len(self.done)}", "return_tokens": True, "ignore_eos": True}
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "steering": self.terms(), **named}
        tokens: list[int] = []
        changes = self.rng.randint(1, 4)
        for line in self.server.stream("/completion", body).iter_lines():
            if line.startswith(b"data: "):
                tokens += json.loads(line[6:]).get("tokens", [])
                if changes:
                    changes -= 1
                    terms = [t for t in self.terms() if "gate" not in t]
                    self.server.post(f"/steering/requests/{named['request_id']}", {"steering": terms})
        self.texts.append(prompt + tokens[: self.rng.randint(0, len(tokens))])
        self.check(self.texts[-1][:160], self.terms())

    def read(self) -> None:
        body = {"prompts": [self.prompt() for _ in range(2)], "layers": [1], "positions": "mean", "steering": self.terms()}
        got, want = (one.read(**body)[1] for one in (self.server, self.fresh))
        assert all(np.allclose(got[key], want[key], atol=0.02) for key in got), (body, self.done)

    def score(self) -> None:
        body = {"items": [{"prompt": self.prompt(), "response": self.extra}], "steering": self.terms()}
        got, want = (one.ok("/steering/logprobs", body)["logprobs"][0] for one in (self.server, self.fresh))
        assert np.allclose(got, want, atol=self.tolerance), (body, self.done)

    def several(self) -> None:
        terms = [t for t in self.terms() if "gate" not in t]
        n = min(2, self.server.model["n_slots"])
        body = {"prompt": self.prompt(), "n_predict": 4, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        answer = self.server.ok("/completion", {**body, "n_cmpl": n, "steering": terms})
        want = self.fresh.complete(body["prompt"], terms, 4, cache_prompt=False)["tokens"]
        assert all(a["tokens"] == want for a in (answer if n > 1 else [answer])), (body, terms, self.done)

    def files(self) -> None:
        slot = self.rng.randrange(self.server.model["n_slots"])
        action = self.rng.choice(("erase", "save", "save", "restore"))
        answer = self.server.post(f"/slots/{slot}?action={action}", {"filename": "slot.bin"})
        assert answer.status_code in (200, 400), answer.text

    def run(self, steps: int) -> None:
        kinds: list[Callable[[], None]] = [self.complete] * 6 + [self.together] * 2 + [self.live] * 2
        kinds += [self.too_long, self.hang_up, self.read, self.score, self.several, self.files, self.files, self.vectors]
        for _ in range(steps):
            step = self.rng.choice(kinds)
            self.done.append(step.__name__)
            step()


# Some seeds find an unsteered reply beside steered ones whose log probabilities are off by up to 0.05, with the host's prompt
# cache and context checkpoints together; without either none did. README tells it under Limits.
OPEN = pytest.mark.xfail(reason="a restored prompt with checkpoints of a sliding window may be stale", strict=False)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=OPEN) if k == "sliding window, host cache" else k for k in KINDS])
def test_walk(own: Any, tmp_path: Path, kind: str) -> None:
    arch, flags = KINDS[kind]
    exact = EXACT if "--kv-unified" not in flags else EXACT[1:]
    server = own(arch, *flags, *exact, "--slot-save-path", str(tmp_path))
    fresh = own(arch, "--parallel", "1", "-c", "512", "--cache-ram", "0", *EXACT)
    walk = Walk(server, fresh, tmp_path, random.Random(kind + SEED), tolerance=3e-3)
    walk.run(STEPS)
    for _ in range(
        8
    ):  # what runs side by side ends in another order each time, so a walk may need longer to come by its caches again
        if walk.cached <= walk.compared:
            walk.run(10)
    assert walk.compared > STEPS / 3 and walk.cached > walk.compared  # the caches were in use
