"""While nobody asks for steering, the patched server answers as the unpatched one does, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from steer_plugins.client import ServerProcess
from steer_plugins.runtime import ensure_runtime
from tests.server.conftest import PROMPT, Server, make_vector
from tests.server.test_cache import LONG, term

FLAGS = ["--parallel", "2", "-c", "2048", "-t", "1", "-tb", "1", "--no-warmup", "--slots"]
MESSAGES = [{"role": "user", "content": "Hello there, how do you do?"}]
VOLATILE = {"timings", "id", "id_slot", "created", "generation_settings", "created_at", "completed_at", "t_start_process_prompt"}


@pytest.fixture(scope="module")
def stock_binary() -> Path:
    named = os.environ.get("STEER_STOCK_SERVER")
    binary = Path(named) if named else ensure_runtime(need_server=True).stock_server
    if binary is None or not binary.is_file():
        reason = "no unpatched llama-server to compare with: run `steer build --server --stock-twin`, or set STEER_STOCK_SERVER"
        if os.environ.get("STEER_REQUIRE_STOCK"):
            pytest.fail(reason)
        pytest.skip(reason)
    return binary


class Plain:
    """A server of either kind."""

    def __init__(self, binary: Path, model: Path) -> None:
        self.process = ServerProcess(binary)
        self.process.start(model, FLAGS)
        self.process.wait_ready(120)

    def ask(self, method: str, path: str, body: Any) -> tuple[int, str, Any]:
        answer = requests.request(method, self.process.url + path, json=body, timeout=60)
        kind = answer.headers.get("Content-Type", "")
        if "event-stream" in kind:
            import json

            lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            return answer.status_code, kind, [stable(json.loads(x)) if x.startswith("{") else x for x in lines]
        return answer.status_code, kind, stable(answer.json()) if "json" in kind else answer.text


def stable(value: Any) -> Any:
    """An answer without what differs from one moment to the next."""
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if k not in VOLATILE and not str(v).startswith(("msg_", "resp_", "rs_"))}
    return [stable(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module", params=["llama", "deepseek4"])
def pair(request: Any, server_binary: Path, stock_binary: Path, tiny_model: Callable[..., Path]) -> Iterator[tuple[Plain, Plain]]:
    made = [Plain(binary, tiny_model(request.param)) for binary in (stock_binary, server_binary)]
    yield made[0], made[1]
    for one in made:
        one.process.stop()


REQUESTS: list[tuple[str, str, Any]] = [
    ("POST", "/completion", {"prompt": PROMPT, "n_predict": 24, "temperature": 0, "n_probs": 5, "return_tokens": True}),
    ("POST", "/completion", {"prompt": PROMPT, "n_predict": 24, "temperature": 0, "n_probs": 5, "return_tokens": True}),
    ("POST", "/completion", {"prompt": LONG, "n_predict": 24, "seed": 7, "temperature": 0.9, "n_probs": 3, "stream": True}),
    ("POST", "/completion", {"prompt": [LONG, PROMPT], "n_predict": 8, "temperature": 0}),
    ("POST", "/completion", {"prompt": PROMPT, "n_predict": 4, "n_cmpl": 2, "temperature": 0}),
    ("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 3}),
    ("POST", "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "logprobs": True}),
    ("POST", "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "stream": True}),
    ("POST", "/v1/responses", {"input": "Hello", "max_output_tokens": 8, "temperature": 0}),
    ("POST", "/v1/messages", {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}),
    ("POST", "/tokenize", {"content": "one two"}),
    ("POST", "/apply-template", {"messages": MESSAGES}),
    ("GET", "/health", None),
    ("GET", "/nowhere", None),
    ("POST", "/completion", {"prompt": 5}),
    ("POST", "/v1/chat/completions", {"messages": "x"}),
    ("POST", "/v1/chat/completions/control", {"id": "x", "action": "reasoning_end"}),
    ("POST", "/embeddings", {"input": "a"}),
]


def test_unsteered_answers(pair: tuple[Plain, Plain]) -> None:
    """Asked in the same order, so that caches and slots are in the same state."""
    stock, ours = pair
    for method, path, body in REQUESTS:
        assert ours.ask(method, path, body) == stock.ask(method, path, body), (path, body)


def test_unsteered_answers_after_steered_ones(
    own: Any, stock_binary: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Steering in between leaves nothing behind."""
    stock = Plain(stock_binary, tiny_model("llama"))
    try:
        ours: Server = own("llama", *FLAGS)
        ours.put("v", make_vector(ours), tmp_path)
        for prompt in (PROMPT, LONG):
            body = {"prompt": prompt, "n_predict": 24, "temperature": 0, "n_probs": 5, "cache_prompt": False}
            for terms in (term(), term(2.0, "response"), [{"vector": "v", "op": "project"}]):
                ours.complete(prompt, terms)
            ours.read(prompts=[prompt], positions="mean")
            assert stable(ours.ok("/completion", body)) == stock.ask("POST", "/completion", body)[2]
    finally:
        stock.process.stop()
