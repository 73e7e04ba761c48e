"""The shared cases on the server: its own routes refuse and accept, and states move as its client's are asked to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.client.engine import ServerEngine
from tests import cases
from tests.server.conftest import Server

EXACT = ("--parallel", "1", "-c", "512", "--no-kv-unified", "-fa", "off", "-ctk", "f32", "-ctv", "f32")


@pytest.fixture(scope="module")
def servers(server_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """A server for each template, with the table's vectors."""
    folder = tmp_path_factory.mktemp("cases")
    made: dict[str, Server] = {}

    def get(template: str) -> Server:
        if template not in made:
            server = made[template] = Server(server_binary, cases.tiny(template, folder), *EXACT)
            for name, vector in cases.vectors(server.n_embd).items():
                assert server.put(name, vector, folder).status_code == 200
        return made[template]

    yield get
    for server in made.values():
        server.process.stop()


@pytest.fixture(scope="module")
def engines(servers: Callable[[str], Server]) -> Iterator[Callable[[str], ServerEngine]]:
    made: dict[str, ServerEngine] = {}

    def get(template: str) -> ServerEngine:
        if template not in made:
            made[template] = ServerEngine(servers(template).url)
        return made[template]

    yield get
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize("case", cases.cases("terms", "server"))
def test_terms(servers: Callable[[str], Server], case: dict[str, Any]) -> None:
    server = servers("never")
    body = {"prompts": [cases.ids(["a", "b", "c"])], "layers": [1], "steering": case["steering"]}
    if "refused" in case:
        return cases.says(server.error("/steering/read", body), case["refused"])
    answer = server.post("/steering/read", body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("case", cases.cases("positions", "server"))
def test_positions(engines: Callable[[str], ServerEngine], case: dict[str, Any]) -> None:
    cases.check_positions(engines(case["template"]), case)


@pytest.mark.parametrize("case", cases.cases("layers", "server"))
def test_layers(engines: Callable[[str], ServerEngine], case: dict[str, Any]) -> None:
    cases.check_layers(engines("never"), case)


@pytest.mark.parametrize("case", cases.cases("chats", "server"))
def test_chats(engines: Callable[[str], ServerEngine], case: dict[str, Any]) -> None:
    cases.check_chat(engines(case["template"]), case)


@pytest.mark.parametrize("case", cases.cases("chats", "routes"))
def test_chat_route(servers: Callable[[str], Server], case: dict[str, Any]) -> None:
    """The first token of a reply tells whether the last one of the prompt was steered."""
    if case["template"] == "channels":
        pytest.skip("the server cannot parse what a random model writes in channels")
    server = servers(case["template"])
    body: dict[str, Any] = {"messages": case["messages"], "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 4}
    if case["thinking"] is not None:
        body["chat_template_kwargs"] = {"enable_thinking": case["thinking"]}
    steered = {**body, "steering": case["steering"]}
    if "refused" in case:
        return cases.says(server.error("/v1/chat/completions", steered), case["refused"])
    plain, moved = (_first(server.ok("/v1/chat/completions", one)) for one in (body, steered))
    same = plain.keys() == moved.keys() and all(math.isclose(plain[t], moved[t], abs_tol=1e-4) for t in plain)
    assert same == (case["from_last"][0][0] == 0)


def _first(answer: dict[str, Any]) -> dict[str, float]:
    (first, *_) = answer["choices"][0]["logprobs"]["content"]
    return {one["token"]: one["logprob"] for one in first["top_logprobs"]}
