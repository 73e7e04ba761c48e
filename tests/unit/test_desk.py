"""The public ways from a wish to a request: Engine.steering, and what ServerEngine offers to hosts that send by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from steer_plugins.client import ServerFacts
from steer_plugins.client.engine import ServerEngine
from steer_plugins.errors import EngineError, ModelError, SpecError, VectorError
from steer_plugins.steering.grammar import TermSpec, parse
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library, MissingVector
from steer_plugins.store.vectorfile import write_vector
from tests.unit.fakes import FakeEngine
from tests.unit.steering_server import IDENTITY, N_EMBD, FakeServer


def vector(name: str = "mood", seed: int = 0, **options: Any) -> SteeringVector:
    rng = np.random.default_rng(seed)
    return SteeringVector(name, {(1, "resid_post"): rng.standard_normal(N_EMBD)}, identity=IDENTITY, **options)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def library(tmp_path: Path) -> Library:
    library = Library(tmp_path / "library")
    library.put(vector(), IDENTITY)
    return library


@pytest.fixture
def engine(server: FakeServer, library: Library) -> Iterator[ServerEngine]:
    with ServerEngine(server.url, library=library) as engine:
        yield engine


def ours(server: FakeServer, v: SteeringVector) -> bool:
    return f"c-{v.content_hash[:24]}" in server.vectors


# ---- what a wish means ----


def test_every_form_of_a_wish_is_the_same_steering(engine: ServerEngine) -> None:
    text = "mood:0.5@1-?response"
    wanted = Steering([Term(vector(), 0.5, layers=(1, 1), scope="response")])
    terms = parse(text)
    for wish in (text, terms, tuple(terms), terms[0].to_json(), [terms[0].to_json()], wanted, list(wanted)):
        assert engine.steering(wish) == wanted, wish
    for nothing in ("", [], None, Steering()):
        assert engine.steering(nothing) == Steering()


def test_any_engine_has_it(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.library = Library(tmp_path)
    v = SteeringVector("calm", {(0, "resid_post"): np.ones(engine.info.n_embd)}, identity=engine.info.identity)
    engine.library.put(v, engine.info.identity)
    assert engine.steering("calm:-2") == Steering([Term(v, -2.0)])


def test_the_users_library_is_the_default(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path))
    with ServerEngine(server.url) as engine:
        with pytest.raises(MissingVector):
            engine.steering("mood")
        Library(tmp_path).put(vector(), IDENTITY)
        assert len(engine.steering("mood")) == 1


def test_given_vectors_come_before_the_library(engine: ServerEngine) -> None:
    own = vector(seed=5)
    (term,) = engine.steering("mood:2", vectors={"mood": own})
    assert term.vector == own
    misfit = own.replace(identity=None, directions={(1, "resid_post"): np.ones(N_EMBD + 1)})
    with pytest.raises(VectorError, match="does not fit this model"):
        engine.steering("mood", vectors={"mood": misfit})


@pytest.mark.parametrize("name", ["./mood", "../mood", "/etc/passwd", "C:\\mood", "\\\\host\\share\\mood", "a/b/c", "Ann/Mood"])
def test_strangers_name_no_files(engine: ServerEngine, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wish in ([TermSpec(name)], [TermSpec("mood", scope="response", gate=name)], json.loads(json.dumps({"vector": name}))):
        with pytest.raises(SpecError, match="is a file: requests name vectors of the library"):
            engine.steering(wish, names_only=True)


def test_a_name_is_no_file_for_strangers(engine: ServerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("calm", "calm.safetensors"):
        write_vector(vector("calm"), tmp_path / name)
        assert len(engine.steering([TermSpec(name)])) == 1
        with pytest.raises(MissingVector):
            engine.steering([TermSpec(name)], names_only=True)
    with pytest.raises(MissingVector, match="hub pull ann/calm"):
        engine.steering("ann/calm", names_only=True)
    assert len(engine.steering("mood", names_only=True)) == 1
    with pytest.raises(VectorError, match="Odd Name"):
        engine.steering([TermSpec("Odd Name")], names_only=True)


# ---- one cache of uploads for one server ----


def test_no_engine_deletes_what_another_is_about_to_name(server: FakeServer, engine: ServerEngine) -> None:
    """A host chats through one engine and calibrates through another, whose trials push old vectors out of the server."""
    mood = engine.steering("mood:0.8")
    engine.request_fields(mood)
    with ServerEngine(server.url) as other:
        other.request_fields(mood)
        for seed in range(1, 140):
            other.request_fields(vector("trial", seed))
        fields = engine.request_fields(mood)
        assert all(term["vector"] in server.vectors for term in fields["steering"])
    assert ours(server, vector()), "the first engine still uses the server"
    engine.close()
    assert not server.vectors


def test_engines_of_a_restarted_server_know_nothing_of_the_one_before(server: FakeServer, engine: ServerEngine) -> None:
    engine.request_fields(vector())
    server.vectors.clear()
    with ServerEngine(server.url) as other:
        other.request_fields(vector())
        assert ours(server, vector())


def test_lost_vectors_are_sent_again_for_hosts_that_send_by_themselves(server: FakeServer, engine: ServerEngine) -> None:
    def post(fields: dict[str, Any]) -> requests.Response:
        return requests.post(f"{server.url}/steering/logprobs", json={"items": [{"prompt": [1], "response": [2]}], **fields})

    engine.request_fields(engine.steering("mood"))
    server.vectors.clear()
    answers = []
    for fields in engine.attempts(engine.steering("mood:0.5")):
        answers.append(post(fields).status_code)
        if answers[-1] == 200:
            break
    assert answers == [400, 200]
    # what is refused for another reason is not sent again
    assert len(list(engine.attempts(engine.steering("mood")))) == 1


# ---- the rest of the desk ----


def test_a_running_request_is_changed(server: FakeServer, engine: ServerEngine) -> None:
    server.running["textgen-1"] = []
    assert engine.change("textgen-1", engine.steering("mood:0.3")) == 0
    assert server.running["textgen-1"][0]["strength"] == 0.3
    server.vectors.clear()
    assert engine.change("textgen-1", vector()) == 0 and ours(server, vector())
    for status in (404, 409):
        server.refuse["/steering/requests/"] = (status, "it has ended, or waits")
        assert engine.change("textgen-1", None) is None
    server.refuse["/steering/requests/"] = (400, "a gate that the request did not begin with")
    with pytest.raises(SpecError, match="did not begin with"):
        engine.change("textgen-1", None)
    server.refuse.clear()
    engine.change("../vectors/x?y", None)
    assert server.log[-1][1] == "/steering/requests/..%2Fvectors%2Fx%3Fy"


def test_what_is_wrong_is_seen_without_the_server(server: FakeServer, engine: ServerEngine) -> None:
    asked = len(server.log)
    engine.check(vector())
    with pytest.raises(VectorError, match="does not fit"):
        engine.check(SteeringVector("mood", {(9, "resid_post"): np.ones(N_EMBD)}))
    assert len(server.log) == asked


def test_facts(server: FakeServer, engine: ServerEngine) -> None:
    facts = engine.facts
    assert facts.info == engine.info and facts.url == server.url and facts.n_slots == 3 and facts.problem == ""
    assert facts.thinking == ("<think>", "</think>") and facts.tags == {"open": "<think>", "close": "</think>"}
    assert facts.device == "CPU" and not facts.on_gpu and facts.has_chat_template
    server.facts["model"] |= {
        "n_gpu_layers": 99,
        "devices": [
            {"name": "CUDA0", "description": "RTX 4090", "type": "gpu"},
            {"name": "BLAS", "description": "OpenBLAS", "type": "accelerator"},
            {"name": "CPU", "description": "x86", "type": "cpu"},
        ],
    }
    assert ServerFacts.ask(server.url).device == "CUDA0 (RTX 4090)" and ServerFacts.ask(server.url).on_gpu


def test_a_model_that_cannot_be_steered_has_facts_all_the_same(server: FakeServer) -> None:
    server.facts["model"]["error"] = "the architecture 'odd' was never tested"
    facts = ServerFacts.ask(server.url)
    assert facts.info is None and "never tested" in facts.problem and facts.n_ctx == 128
    with pytest.raises(ModelError, match="never tested"):
        ServerEngine(server.url)
    server.raw["/steering"] = (404, b"{}")
    with pytest.raises(EngineError, match="cannot steer"):
        ServerFacts.ask(server.url)
