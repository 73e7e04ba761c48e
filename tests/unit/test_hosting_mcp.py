"""`steer mcp`, driven by the real client library over standard streams and over HTTP, on a stand-in for the llama-server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

pytest.importorskip("mcp.server.mcpserver", reason="steer mcp needs the extra: pip install 'steer-plugins[mcp]'")

import anyio
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from steer_plugins.client.engine import ServerEngine
from steer_plugins.errors import DataError, SpecError
from steer_plugins.hosting.bounds import Bounds
from steer_plugins.hosting.running import beside
from steer_plugins.hosting.session import MAX_FITS, MAX_PAIRS, MAX_TEXT, Session
from steer_plugins.hosting.tools import make_app, make_server
from steer_plugins.steering.grammar import parse
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from tests.unit.steering_server import IDENTITY, N_EMBD, FakeServer, eventually


def put(library: Library, name: str, seed: int, **more: Any) -> SteeringVector:
    direction = np.random.default_rng(seed).standard_normal(N_EMBD).astype(np.float32)
    vector = SteeringVector(name, {(1, "resid_post"): direction}, identity=IDENTITY, **more)
    library.put(vector, IDENTITY)
    return vector


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "vectors"))
    library = Library()
    put(library, "mood", 1)
    put(library, "succinctness", 2, default_scope="all")
    return library


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


class Tools:
    """The tools of a running `steer mcp`, each call by a client of its own, and the address that requests go through."""

    def __init__(self, target: Callable[[], Any], through: str) -> None:
        self._target, self.through = target, through

    def __call__(self, tool: str, /, **arguments: Any) -> Any:
        """What a tool answers; its sentence where it refuses."""

        async def call() -> Any:
            async with Client(self._target()) as client:
                found = await client.call_tool(tool, arguments)
                return found.content[0].text if found.is_error else found.structured_content

        return anyio.run(call)


def command(server: FakeServer, *options: str) -> list[str]:
    return [sys.executable, "-m", "steer_plugins", "mcp", "--server", server.url, "--port", "0", *options]


@pytest.fixture
def session(server: FakeServer, library: Library) -> Iterator[Session]:
    engine = ServerEngine(server.url)
    yield Session(engine, library=library)
    engine.close()


@pytest.fixture
def tools(server: FakeServer, session: Session) -> Iterator[Tools]:
    with beside(make_app(session, tools=make_server(session))) as url:
        yield Tools(lambda: f"{url}/mcp", url)


def ask(url: str, n: int = 3, **more: Any) -> tuple[int, str]:
    """The status of a streamed completion, and its text: letters are capitals where it was steered."""
    body = {"prompt": "x", "n_predict": n, "stop": [], "stream": True, **more}
    text = ""
    with requests.post(f"{url}/completion", json=body, stream=True, timeout=30) as answer:
        for line in answer.iter_lines():
            if line.startswith(b"data: "):
                text += json.loads(line[6:]).get("content", "")
    return answer.status_code, text


@pytest.fixture
def over_http(server: FakeServer, library: Library, tmp_path: Path) -> Iterator[Tools]:
    words = command(server, "--http", "--allow", "mood:0.5", "--log", str(tmp_path / "log.jsonl"))
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    line = child.stdout.readline()
    assert line.startswith("Tools at http://127.0.0.1:"), child.stderr.read()
    url = line.split()[2].rstrip(",")
    yield Tools(lambda: url, url.removesuffix("/mcp"))
    child.terminate()
    child.communicate(timeout=20)


def test_over_http(server: FakeServer, over_http: Tools, tmp_path: Path) -> None:
    tools = over_http
    listed = tools("list_vectors")
    assert [(one["name"], one["max_strength"]) for one in listed["vectors"]] == [("mood", 0.5)] and not listed["may_fit"]
    assert ask(tools.through) == (200, "the")
    assert tools("set_steering", steering="mood:-0.4@1?response") == {"steering": "mood:-0.4@1?response", "running": 0}
    assert tools("get_steering") == {"steering": "mood:-0.4@1?response"}
    assert ask(tools.through) == (200, "THE")
    sent = server.bodies("/completion")[-1]["steering"]
    assert [(t["strength"], t["layers"], t["scope"]) for t in sent] == [(-0.4, [1, 1], "response")]
    # a request's own steering stays, and what the server answers goes through as it is
    assert ask(tools.through, steering=[], request_id="mine") == (200, "the")
    assert requests.get(f"{tools.through}/props", timeout=30).json() == requests.get(f"{server.url}/props", timeout=30).json()
    assert requests.get(f"{tools.through}/nothing", timeout=30).status_code == 404
    for steering, wrong in {
        "mood:0.6": "strength 0.6 of 'mood' is too large: from -0.5 to 0.5 may be set",
        "mood:0.3 + mood:0.3": "strength 0.6 of 'mood' is too large: from -0.5 to 0.5 may be set",
        "succinctness:0.1": "'succinctness' may not be set here: mood may be",
        "mood:": "expected a number",
    }.items():
        assert wrong in tools("set_steering", steering=steering)
    assert "--allow-fit" in tools("fit_vector", name="calm", prompt="You are calm.")
    assert tools("get_steering") == {"steering": "mood:-0.4@1?response"}
    assert tools("set_steering", steering="") == {"steering": "", "running": 0}
    assert ask(tools.through) == (200, "the") and server.bodies("/completion")[-1]["steering"] == []
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["tool"] for line in lines] == ["set_steering"] * 5 + ["fit_vector", "set_steering"]
    assert ["refused" in line for line in lines] == [False, True, True, True, True, True, False]


def test_over_standard_streams(server: FakeServer, library: Library, tmp_path: Path) -> None:
    with open(tmp_path / "err", "w+", encoding="utf-8") as err:

        async def drive() -> None:
            words = command(server, "--allow-fit")
            environment = {"STEER_LIBRARY": str(library.root), "PYTHONPATH": ":".join(p for p in sys.path if p)}
            started = StdioServerParameters(command=words[0], args=words[1:], env=environment)
            async with Client(stdio_client(started, errlog=err)) as client:
                assert {t.name for t in (await client.list_tools()).tools} == {
                    "list_vectors", "get_steering", "set_steering", "fit_vector", "read_projection",
                }  # fmt: skip
                told = await client.call_tool("set_steering", {"steering": "succinctness:1"})
                assert told.structured_content == {"steering": "succinctness", "running": 0}
                through = (tmp_path / "err").read_text("utf-8").split(" through ")[1].split()[0]
                assert await anyio.to_thread.run_sync(ask, through) == (200, "THE")
                pairs = [{"positive": f"yes {i}", "negative": f"no, it is not {i}"} for i in range(5)]
                fitted = (await client.call_tool("fit_vector", {"name": "yes", "pairs": pairs})).structured_content
                assert fitted is not None and fitted["name"] == "yes" and fitted["max_strength"] == 1.0
                assert (await client.call_tool("set_steering", {"steering": "yes:-1"})).is_error is False
                read = (await client.call_tool("read_projection", {"text": "a text", "vector": "mood"})).structured_content
                assert read is not None and list(read["projections"]) == ["mood"]

        anyio.run(drive)
    assert library.get("yes", IDENTITY).provenance["source"]["kind"] == "pairs"  # type: ignore[index]


def test_a_reply_that_is_being_written_follows(server: FakeServer, tools: Tools) -> None:
    server.gate = threading.Semaphore(2)
    found: list[tuple[int, str]] = []
    reply = threading.Thread(target=lambda: found.append(ask(tools.through, n=6)))
    reply.start()
    assert server.at_work.acquire(timeout=20)
    eventually(lambda: server.gate is not None and not server.gate._value)  # two letters are on their way
    assert tools("set_steering", steering="mood:0.5")["running"] == 1
    for _ in range(4):
        server.gate.release()
    reply.join(20)
    assert found[0][0] == 200 and found[0][1].lower() == "the qu" and found[0][1].endswith("QU")


def test_a_client_that_leaves_ends_the_request_behind(server: FakeServer, tools: Tools) -> None:
    server.gate = threading.Semaphore(1)
    body = {"prompt": "x", "n_predict": 50, "stop": [], "stream": True}
    answer = requests.post(f"{tools.through}/completion", json=body, stream=True, timeout=30)
    next(answer.iter_lines())
    answer.close()
    eventually(lambda: len(server.hung_up) == 1)
    assert tools("set_steering", steering="mood:0.5")["running"] == 0


def test_a_vector_that_the_server_lost_is_sent_again(server: FakeServer, tools: Tools) -> None:
    tools("set_steering", steering="mood:1")
    assert ask(tools.through) == (200, "THE")
    server.vectors.clear()
    assert ask(tools.through) == (200, "THE")


@pytest.mark.parametrize(
    "headers, sentence",
    [({"Host": "evil.example"}, "is not this machine"), ({"Origin": "https://evil.example"}, "may not use this server")],
)
def test_pages_of_elsewhere_stay_out(tools: Tools, headers: dict[str, str], sentence: str) -> None:
    answer = requests.post(f"{tools.through}/completion", json={"prompt": "x"}, headers=headers, timeout=30)
    assert answer.status_code == 403 and sentence in answer.json()["error"]["message"]
    assert requests.post(f"{tools.through}/mcp", json={}, headers=headers, timeout=30).status_code in (403, 421)


def test_hosts_get_names(server: FakeServer, library: Library, session: Session) -> None:
    session = Session(session.engine, library=library, to="http://127.0.0.1:5000")
    body = {"model": "m"}
    assert list(session.bodies("/v1/chat/completions", body)) == [body]
    session.set("mood:0.5?answer")
    term = {"vector": "mood", "strength": 0.5, "scope": "answer"}
    assert list(session.bodies("/v1/chat/completions", body)) == [{"model": "m", "steering": [term]}]
    assert list(session.bodies("/api/chat", {"options": {"seed": 1}})) == [{"options": {"seed": 1, "steering": [term]}}]
    for path, own in {
        "/v1/chat/completions": {"steering": ""},
        "/api/chat": {"options": {"steering": ""}},
        "/api/tags": {},
    }.items():
        assert list(session.bodies(path, own)) == [own]


@pytest.mark.parametrize("text", ["!mood:1", "mood:0.5%clamp", "mood:0.5#1", "mood?response{g}"])
def test_only_strength_and_place_may_be_set(text: str) -> None:
    with pytest.raises(SpecError, match="cannot be set here"):
        Bounds().check(parse(text))


def test_bounds_are_read_whole() -> None:
    assert Bounds.parse(["mood", "calm:0.25"], 2.0).limits == {"mood": 2.0, "calm": 0.25}
    assert Bounds.parse([]).limit("anything") == 1.0
    for wrong in ("mood:0", "mood:-1", "./mood.safetensors:1", "mood:x"):
        with pytest.raises(SpecError):
            Bounds.parse([wrong])


def test_fitting_is_bounded(session: Session) -> None:
    session.may_fit = True
    with pytest.raises(SpecError, match="there is a vector 'mood'"):
        session.fit("mood", prompt="You are cheerful.")
    with pytest.raises(DataError, match="from a prompt or from pairs"):
        session.fit("calm")
    with pytest.raises(DataError, match="too many"):
        session.fit("calm", pairs=[{"positive": "a", "negative": "b"}] * (MAX_PAIRS + 1))
    with pytest.raises(DataError, match=str(MAX_TEXT)):
        session.fit("calm", prompt="a" * (MAX_TEXT + 1))
    with pytest.raises(DataError, match="line 1 of the list of pairs|the list of pairs"):
        session.fit("calm", pairs=[{"positive": "a"}])
    session._fits = MAX_FITS
    with pytest.raises(SpecError, match="fitted in this session already"):
        session.fit("calm", prompt="You are calm.")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from steer_plugins.cli.main import cli

    monkeypatch.delenv("STEER_SERVER", raising=False)
    outcome = CliRunner().invoke(cli, ["mcp"])
    assert outcome.exit_code == 2 and "name the server" in outcome.output
    outcome = CliRunner().invoke(cli, ["mcp", "--to", "http://127.0.0.1:1"])
    assert outcome.exit_code == 1 and "--server" in str(outcome.exception)


def test_the_example_notices_that_it_rambles(server: FakeServer, session: Session, tools: Tools) -> None:
    import importlib.util

    path = Path(__file__).parents[2] / "examples" / "self_steering.py"
    spec = importlib.util.spec_from_file_location("self_steering", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["self_steering"] = example
    spec.loader.exec_module(example)
    agent = example.Agent(tools.through, words=3)

    def answer(reply: str) -> None:
        body = {"choices": [{"message": {"content": reply}}]}
        server.raw["/v1/chat/completions"] = (200, json.dumps(body).encode())
        assert anyio.run(agent.answer, "why?") == reply

    for _ in range(4):
        answer("one two three four")
    assert [round(strength, 1) for strength, _, _ in agent.history] == [0.0, 0.4, 0.8, 0.8]  # 1.2 is more than it may set
    answer("short now")
    assert session.current() == "succinctness:0.8" and [words for _, words, _ in agent.history] == [4, 4, 4, 4, 2]
    assert "steering" not in server.bodies("/v1/chat/completions")[0]
    last = server.bodies("/v1/chat/completions")[-1]["steering"]
    assert [term["strength"] for term in last] == [0.8]
