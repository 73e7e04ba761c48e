"""Steerings for vLLM: requests that EasySteer's and hotwire's own code takes, files that mean the same there, and the proxy."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import requests as http
from click.testing import CliRunner
from gguf import GGUFReader

from steer_plugins.cli.main import cli
from steer_plugins.errors import SpecError, SteerError, VectorError
from steer_plugins.hosting.running import beside, passing
from steer_plugins.hosting.translating import Translating
from steer_plugins.requests import easysteer, export, hotwire
from steer_plugins.requests.files import torch_file
from steer_plugins.steering.schedule import Schedule
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import ModelIdentity, SteeringVector
from steer_plugins.store.formats import Facts, read_any
from steer_plugins.store.library import Library

N_LAYER, N_EMBD = 4, 8
IDENTITY = ModelIdentity("llama", N_LAYER, N_EMBD, "a" * 64, "b" * 64, name="tiny")
ROWS = np.random.default_rng(3).standard_normal((N_LAYER, N_EMBD)).astype(np.float32)


def vector(name: str = "mood", layers: Any = (0, 2), site: str = "resid_post", **more: Any) -> SteeringVector:
    directions = {(il, site): ROWS[il] for il in layers}
    options = {"default_scope": "response", "identity": IDENTITY, **more}
    return SteeringVector(name, directions, {key: 1.5 for key in directions}, **options)


# ---- EasySteer ----


def test_a_request_to_easysteer(tmp_path: Path) -> None:
    found = easysteer(Steering([Term(vector(), 0.5, layers=(0, 1)), Term(vector("calm"), -1.0, scope="all")]), folder="/v/")
    first, second = found["steering"]["vectors"]
    assert found["steering"]["conflict"] == "sequential"
    assert first == {
        "source": f"/v/{export(vector(), 'easysteer', tmp_path).name}",
        "algorithm": "direct",
        "scale": 0.5,
        "layers": [0],
        "apply": {"prompt_positions": [-1], "generation": "all"},
        "name": "mood",
    }
    assert second["layers"] == [0, 2] and second["apply"] == {
        "prompt": "all",
        "exclude_prompt_positions": [0],
        "generation": "all",
    }
    assert easysteer(Steering()) == easysteer(Term(vector(), 0.0)) == {}


def read_directions(path: Path) -> dict[int, np.ndarray]:
    """As EasySteer reads them: ``direction.N``, N being the layer whose output they are for, from 0."""
    reader = GGUFReader(str(path))
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"controlvector"
    return {int(t.name.split(".")[1]): np.array(t.data) for t in reader.tensors if t.name.startswith("direction.")}


def test_its_file_means_the_same_there(tmp_path: Path) -> None:
    h = np.random.default_rng(0).standard_normal(N_EMBD)
    mood = vector()
    rows = read_directions(export(mood, "easysteer", tmp_path))
    assert sorted(rows) == [0, 2]
    for il, row in rows.items():
        want = h + 0.5 * 1.5 * np.linalg.norm(ROWS[il]) * (ROWS[il] / np.linalg.norm(ROWS[il]))
        np.testing.assert_allclose(h + 0.5 * row, want, rtol=1e-5)
    away = mood.replace(op="project")
    row = read_directions(export(away, "easysteer", tmp_path))[2].astype(np.float64)
    unit = ROWS[2] / np.linalg.norm(ROWS[2])
    np.testing.assert_allclose(h - row * (h @ row) / (row @ row), h - unit * (h @ unit), rtol=1e-5, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 2


def refused() -> Iterator[tuple[Term | list[Term], str, bool]]:
    """Terms, what is said of them, and whether hotwire refuses them as well when they act on every token."""
    for op in ("clamp", "renorm"):
        yield Term(vector(), op=op), f"has op {op}", True
    yield Term(vector(), 0.5, op="project"), "has strength 0.5", True
    yield Term(vector(site="ffn_out")), "only at resid_post", True
    yield Term(vector(), stream=1), "has a stream", True
    yield Term(vector(), schedule=Schedule("linear", 8)), "has a schedule", True
    for scope in ("thinking", "answer", "5-9"):
        yield Term(vector(), scope=scope), f"scope {scope}", False
    yield [Term(vector(), 1.0, op="project"), Term(vector("b", (2, 3)))], "both act at layer 2", False


@pytest.mark.parametrize("terms, sentence, also", list(refused()))
def test_what_they_cannot_do_is_refused(terms: Any, sentence: str, also: bool) -> None:
    with pytest.raises(SpecError, match=sentence):
        easysteer(terms)
    if also:
        with pytest.raises(SpecError):
            hotwire(Term(terms.vector, terms.strength, op=terms.op, scope="0-", stream=terms.stream, schedule=terms.schedule))


def test_easysteer_itself_takes_the_requests() -> None:
    path = os.environ.get("STEER_EASYSTEER_API")
    if not path:
        pytest.skip("STEER_EASYSTEER_API names no vllm/steer_vectors/api.py of EasySteer's vLLM")
    spec = importlib.util.spec_from_file_location("easysteer_api", path)
    assert spec is not None and spec.loader is not None
    api = importlib.util.module_from_spec(spec)
    sys.modules["easysteer_api"] = api
    spec.loader.exec_module(api)
    for scope in ("0-", "all", "prompt", "response"):
        for op in ("add", "project"):
            found = easysteer(Term(vector(), 1.0, op=op, scope=scope), folder="/vectors")["steering"]
            taken = api.SteeringSpec.model_validate(found)
            assert api.SelectSpec.from_wire(taken.vectors[0].apply.to_wire()) is not None
            assert taken.model_dump(exclude_none=True, exclude_defaults=True, mode="json")["vectors"][0]["layers"] == [0, 2]
    with pytest.raises(ValueError):  # it does look
        api.SteeringSpec.model_validate({"vectors": [{**found["vectors"][0], "apply": {"phases": ["prompt"]}}]})


# ---- hotwire ----


def test_a_request_to_hotwire(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = hotwire([Term(vector(), 0.5, scope="0-"), Term(vector("b", (1,)), -1.0, scope="0-")])
    assert list(found) == ["vllm_xargs"] and list(found["vllm_xargs"]) == ["hotwire"]
    entries = json.loads(found["vllm_xargs"]["hotwire"])
    assert [(e["layer"], e["scale"]) for e in entries] == [(0, 0.5), (2, 0.5), (1, -1.0)]
    assert {f"{e['id']}.pt" for e in entries} == {export(v, "hotwire", tmp_path).name for v in (vector(), vector("b", (1,)))}
    with pytest.raises(SpecError, match="write mood\\?0-"):
        hotwire(Term(vector()))
    with pytest.raises(SpecError, match="one vector a layer"):
        hotwire([Term(vector(), scope="0-"), Term(vector("b", (2,)), scope="0-")])
    assert hotwire(Steering()) == {}


def test_hotwire_itself_takes_the_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("hotwire") is None:
        pytest.skip("hotwire-vllm is not installed")
    if importlib.util.find_spec("torch") is None:  # it is imported, and not used by what reads requests
        monkeypatch.setitem(sys.modules, "torch", Torch("torch"))
    state = importlib.import_module("hotwire._state")
    raw = hotwire(Term(vector(), 0.5, scope="0-"))["vllm_xargs"]["hotwire"]
    spec = state.parse_spec(raw)
    registered: list[tuple[str, Any, float]] = []

    class Bank:
        def slot_of(self, key: str) -> None:
            return None

        def register(self, key: str, row: Any, scale: float) -> int:
            registered.append((key, row, scale))
            return len(registered) - 1

    server = state.SteerState.__new__(state.SteerState)
    server.bank, server.dose_policy, server.h_norms = Bank(), None, {}
    table = read_table(export(vector(), "hotwire", tmp_path))
    server.store = {spec[0]["id"]: (Table(table), -1, 1.0)}
    assert [server.slot_for(e["id"], e["layer"], e["scale"]) for e in spec] == [0, 1]
    for (_, row, scale), il in zip(registered, (0, 2), strict=True):
        np.testing.assert_allclose(scale * np.asarray(row), 0.5 * vector().effective(il, "resid_post"), rtol=1e-6)


class Torch(ModuleType):
    """Names only."""

    class Tensor:
        pass

    float32 = "float32"
    bfloat16 = "bfloat16"
    device = dtype = object


class Table(np.ndarray):
    def __new__(cls, values: np.ndarray) -> Table:
        return values.view(cls)

    def dim(self) -> int:
        return self.ndim

    def to(self, dtype: Any) -> Table:
        return self


def read_table(path: Path) -> np.ndarray:
    found = read_any(path, Facts(at="blocks"))
    table = np.zeros((N_LAYER, N_EMBD), np.float32)
    for il in found.layers:
        table[il] = found.effective(il, "resid_post")
    return table


def test_its_file_is_one_that_torch_writes(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(torch_file(ROWS))
    np.testing.assert_allclose(read_table(path), ROWS, rtol=1e-6)
    if importlib.util.find_spec("torch") is not None:
        torch = importlib.import_module("torch")
        np.testing.assert_array_equal(torch.load(path, weights_only=True).numpy(), ROWS)


def test_what_no_file_can_hold(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="plain directions at resid_post"):
        export(vector(site="ffn_out"), "easysteer", tmp_path)
    with pytest.raises(VectorError, match="op project"):
        export(vector(op="project"), "hotwire", tmp_path)
    with pytest.raises(VectorError, match="--model"):
        export(vector(identity=None), "hotwire", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(VectorError, match="cannot be made"):
        export(vector(), "easysteer", tmp_path / "file" / "below")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- commands and the proxy ----


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    library = Library()
    library.put(vector(), IDENTITY)
    return library


def test_export(library: Library, tmp_path: Path) -> None:
    run = CliRunner().invoke
    told = run(cli, ["export", "easysteer", "mood", "--out", str(tmp_path / "v"), "--server-folder", "/v", "--json"])
    facts = json.loads(told.output)
    assert Path(facts["file"]).is_file() and facts["request"]["steering"]["vectors"][0]["source"].startswith("/v/mood-")
    told = run(cli, ["export", "hotwire", "mood", "--out", str(tmp_path / "v")])
    assert told.exit_code == 0 and "write mood?0-" in told.output
    assert len(list((tmp_path / "v").iterdir())) == 2
    assert isinstance(run(cli, ["export", "hotwire", "nobody", "--out", str(tmp_path / "v")]).exception, SteerError)


class Upstream(ThreadingHTTPServer):
    """Echoes bodies; a stream is sent in pieces that no JSON parser would leave alone."""

    daemon_threads = True
    PIECES = (b'data: {"a":  1}\n\n', b": ping\n\n", b"data: [DO", b"NE]\n\n")

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("X-Test", self.headers.get("Authorization", ""))
        if b'"stream"' in body:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (*Upstream.PIECES, b""):
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_proxy_translates_and_touches_nothing_else(library: Library, upstream: Upstream, tmp_path: Path) -> None:
    change = Translating("easysteer", upstream.url, library, tmp_path / "files", identity=IDENTITY, server_folder="/v")
    with beside(passing(change)) as url:
        chat = f"{url}/v1/chat/completions"
        raw = b'{"model":"m",  "messages":[]}'
        headers = {"Content-Type": "application/json", "Authorization": "Bearer k"}
        plain = http.post(chat, data=raw, headers=headers, timeout=30)
        assert plain.content == raw and plain.headers["X-Test"] == "Bearer k"
        found = http.post(chat, json={"model": "m", "steering": "mood:0.6?all"}, timeout=30).json()
        assert found == {"model": "m", **easysteer(Term(vector(), 0.6, scope="all"), folder="/v")}
        assert [p.name for p in (tmp_path / "files").iterdir()] == [Path(found["steering"]["vectors"][0]["source"]).name]
        assert http.post(chat, json={"model": "m", "steering": []}, timeout=30).json() == {"model": "m"}
        streamed = http.post(chat, json={"stream": True, "steering": "mood"}, stream=True, timeout=30)
        assert streamed.raw.read(decode_content=False) == b"".join(Upstream.PIECES)
        for steering, sentence in {"mood:1?answer": "scope answer", "other": "no vector 'other'", '"./x.gguf"': "file"}.items():
            answer = http.post(chat, json={"steering": steering}, timeout=30)
            assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]
        odd = {"model": "m", "steering": 7}  # of routes that are not steered, nothing is looked at
        assert http.post(f"{url}/v1/embeddings", json=odd, timeout=30).json() == odd


def test_a_proxy_to_hotwire_keeps_other_arguments(library: Library, upstream: Upstream, tmp_path: Path) -> None:
    change = Translating("hotwire", upstream.url, library, tmp_path / "files", identity=IDENTITY, default="mood:0.5?0-")
    with beside(passing(change)) as url:
        found = http.post(f"{url}/v1/completions", json={"vllm_xargs": {"x": 1}}, timeout=30).json()
        assert found["vllm_xargs"] == {"x": 1, **hotwire(Term(vector(), 0.5, scope="0-"))["vllm_xargs"]}
        twice = http.post(f"{url}/v1/completions", json={"vllm_xargs": {"hotwire": "[]"}}, timeout=30)
        assert twice.status_code == 400 and "already" in twice.json()["error"]["message"]
        assert http.post(f"{url}/v1/completions", json={"steering": ""}, timeout=30).json() == {}


def test_a_server_that_is_not_there_is_said(library: Library, tmp_path: Path) -> None:
    change = Translating("easysteer", "http://127.0.0.1:9", library, tmp_path, identity=IDENTITY)
    with beside(passing(change)) as url:
        answer = http.post(f"{url}/v1/completions", json={}, timeout=30)
        assert answer.status_code == 502 and "http://127.0.0.1:9" in answer.json()["error"]["message"]
