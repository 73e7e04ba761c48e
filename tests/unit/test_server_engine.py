"""ServerEngine against a stand-in for the server: the wire, the vectors over there, and everything that can go wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from steer_plugins.client import vectors as remote_vectors
from steer_plugins.client.activations import decode_read
from steer_plugins.client.connection import is_loopback, normal_url
from steer_plugins.client.engine import ServerEngine
from steer_plugins.engine import GenerateRequest
from steer_plugins.errors import DataError, EngineError, ModelError, SpecError, SteerError, VectorError
from steer_plugins.steering.terms import Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library, MissingVector
from tests.unit.steering_server import BOS, IDENTITY, N_EMBD, N_LAYER, FakeServer, encode, eventually

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def engine(server: FakeServer) -> Iterator[ServerEngine]:
    with ServerEngine(server.url) as made:
        yield made


def vector(seed: int = 0, *, name: str = "mood", layers: tuple[int, ...] = (1, 2), **more: Any) -> SteeringVector:
    rng = np.random.default_rng(seed)
    directions = {(il, "resid_post"): rng.standard_normal(N_EMBD).astype(np.float32) for il in layers}
    return SteeringVector(name, directions, **{"default_scope": "response", **more})


# ---- facts and text ----


def test_facts(engine: ServerEngine, server: FakeServer) -> None:
    info = engine.info
    assert (info.identity, info.n_layer, info.n_ctx, info.n_vocab, info.name) == (IDENTITY, N_LAYER, 128, 260, "fake")
    assert info.sites == ("resid_post",) and info.last_layer_outputs_only and info.has_chat_template
    assert engine.n_slots == 3 and engine.url == server.url and engine.status()["protocol"] == 1


def test_text(engine: ServerEngine, server: FakeServer) -> None:
    assert engine.tokenize("a<think>") == [BOS, 4 + ord("a"), 2]
    assert engine.tokenize([5, 6]) == [5, 6]
    # the template brings its own BOS, and its own default where nothing is said of thinking
    assert engine.tokenize(CHAT) == encode("<s>[user]hi[assistant]<think>")
    assert engine.tokenize(CHAT, thinking=False) == encode("<s>[user]hi[assistant]")
    closed = [*CHAT, {"role": "assistant", "content": "yes"}]
    assert engine.tokenize(closed, add_generation_prompt=False) == encode("<s>[user]hi[assistant]yes")
    assert not server.bodies("/apply-template")
    everything = list(range(4, 260))
    assert engine.detokenize(everything) == bytes(range(256)).decode(errors="replace")
    assert engine.detokenize([0, 1, 2, *encode("é<b>", special=False), 3]) == "é<b>"
    n = len(server.bodies("/tokenize"))
    assert engine.detokenize([0, 2, 70, 71]) == "BC" and len(server.bodies("/tokenize")) == n, "pieces are asked for once"
    assert engine.detokenize([]) == ""


def test_bad_prompts(engine: ServerEngine, server: FakeServer) -> None:
    for prompt, sentence in (([], "empty"), ([260], "260 is outside"), ([-1], "outside"), ([{"role": "user"}], "'content'")):
        with pytest.raises(DataError, match=sentence):
            engine.tokenize(prompt)
    with pytest.raises(DataError, match="does not fit the context of 128"):
        engine.generate([9] * 128)
    server.facts["model"]["has_chat_template"] = False
    with ServerEngine(server.url) as other, pytest.raises(DataError, match="fake carries no chat template"):
        other.tokenize(CHAT)


# ---- replies ----


def test_a_reply(engine: ServerEngine, server: FakeServer) -> None:
    pieces: list[str] = []
    reply = engine.generate("go", max_tokens=9, on_piece=pieces.append)
    assert (reply.text, reply.finish_reason) == ("the quick", "length") and "".join(pieces) == reply.text and len(pieces) == 9
    assert reply.tokens == encode("the quick") and reply.prompt_tokens == [BOS, *encode("go")]
    body = server.bodies("/completion")[0]
    assert body["steering"] == [] and body["prompt"] == reply.prompt_tokens and body["n_predict"] == 9
    assert "steering_tags" not in body and body["temperature"] == 0.0
    assert engine.generate("go", max_tokens=9, steering=vector()).text == "THE QUICK"
    # the context bounds a reply
    assert len(engine.generate([9] * 120, max_tokens=50).tokens) == 8


def test_the_end_of_a_reply(engine: ServerEngine, server: FakeServer) -> None:
    server.reply = b"abc\x01"
    reply = engine.generate("go")
    assert (reply.text, reply.tokens, reply.finish_reason) == ("abc", encode("abc"), "stop")
    server.reply = "naïve 日本".encode()
    for n in range(1, len(server.reply)):
        reply = engine.generate("go", max_tokens=n)
        assert reply.tokens == [4 + b for b in server.reply[:n]] and reply.text == server.reply[:n].decode(errors="replace")
    server.reply = b"one two three"
    reply = engine.generate("go", max_tokens=20, stop=["", "tw"])
    assert (reply.text, reply.finish_reason, reply.tokens) == ("one ", "stop", encode("one tw"))
    # what might have become a stop string comes in the end
    pieces: list[str] = []
    reply = engine.generate("go", max_tokens=6, stop=["two words"], on_piece=pieces.append)
    assert reply.text == "one tw" == "".join(pieces) and reply.finish_reason == "length"


def test_lost_tokens_are_an_error(engine: ServerEngine, server: FakeServer) -> None:
    server.keep_tokens, server.reply = True, "é".encode()
    with pytest.raises(EngineError, match="did not send 1 tokens of a reply"):
        engine.generate("go", max_tokens=2)


def test_many_replies(engine: ServerEngine, server: FakeServer) -> None:
    v = vector()
    requests = [GenerateRequest(f"p{i}", v if i % 2 else None, max_tokens=3 + i) for i in range(9)]
    seen: list[tuple[int, int]] = []
    found = engine.generate_many(requests, progress=lambda done, total: seen.append((done, total)))
    want = "the quick brown fox"
    for i, reply in enumerate(found):
        assert reply.text == (want[: 3 + i].upper() if i % 2 else want[: 3 + i])
        assert reply.prompt_tokens == [BOS, *encode(f"p{i}")]
    assert seen == [(i, 9) for i in range(1, 10)] and engine.generate_many([]) == []
    assert len(server.bodies("/steering/vectors/")) == 1
    assert len({body["request_id"] for body in server.bodies("/completion")}) == 9


def test_as_many_at_once_as_there_are_slots(engine: ServerEngine, server: FakeServer) -> None:
    server.gate = threading.Semaphore(0)
    most: list[int] = []
    thread = threading.Thread(target=engine.generate_many, args=([GenerateRequest("x", max_tokens=1)] * 7,))
    thread.start()
    for i in range(7):
        eventually(lambda: len(server.running) == min(3, 7 - i))  # noqa: B023
        most.append(len(server.running))
        server.gate.release()
        eventually(lambda: len(server.bodies("/completion")) == min(7, 4 + i))  # noqa: B023
    thread.join(20)
    assert not thread.is_alive() and max(most) == 3


def test_one_failure_ends_them_all(engine: ServerEngine, server: FakeServer) -> None:
    """The replies that still run are cut off, and those that wait never start."""
    server.gate = threading.Semaphore(0)
    requests = [GenerateRequest("x", max_tokens=100)] * 2 + [GenerateRequest("x", vector(), max_tokens=100)] * 8
    server.refuse["/steering/vectors"] = (400, "not today")
    with pytest.raises(VectorError, match="not today"):
        engine.generate_many(requests)
    eventually(lambda: not server.running)
    assert len(server.bodies("/completion")) <= 2


def test_live_change(engine: ServerEngine, server: FakeServer) -> None:
    server.gate = threading.Semaphore(0)
    with pytest.raises(EngineError, match="nothing to steer"):
        engine.steer_running(None)
    stream = engine.stream(GenerateRequest("go", max_tokens=9))
    pieces = iter(stream)
    server.gate.release(3)
    text = "".join(next(pieces) for _ in range(3))
    stream.steer(vector())
    server.gate.release(3)
    text += "".join(next(pieces) for _ in range(3))
    engine.steer_running(None)
    server.gate.release(100)
    text += "".join(pieces)
    assert text == "the QUick" == stream.result.text
    stream.steer(vector())  # nothing is left to be steered
    with pytest.raises(VectorError, match="names layer 7"):
        stream.steer(vector(layers=(7,)))


def test_a_change_before_the_first_token(engine: ServerEngine, server: FakeServer) -> None:
    stream = engine.stream(GenerateRequest("go", max_tokens=6))
    stream.steer(None)
    stream.steer(vector())
    server.gate = threading.Semaphore(1)
    pieces = iter(stream)
    assert next(pieces) == "t"
    server.gate.release(100)
    assert "".join(pieces) == "HE QU"


def test_cancelling_hangs_up(engine: ServerEngine, server: FakeServer) -> None:
    server.gate = threading.Semaphore(3)
    stream = engine.stream(GenerateRequest("go", max_tokens=1000))
    for i, _ in enumerate(stream):
        if i == 2:
            stream.cancel()
    assert (stream.result.text, stream.result.finish_reason) == ("the", "cancelled")
    eventually(lambda: server.hung_up == [stream.request_id])
    # from another thread, while the server is silent
    other = engine.stream(GenerateRequest("go", max_tokens=1000))
    thread = threading.Thread(target=other.run)
    thread.start()
    eventually(lambda: other.request_id in server.running and other._events is not None)
    other.cancel()
    thread.join(20)
    assert not thread.is_alive() and other.result.finish_reason == "cancelled"
    eventually(lambda: other.request_id in server.hung_up)
    # a reply that is simply dropped
    server.gate.release()
    dropped = engine.stream(GenerateRequest("go", max_tokens=1000))
    pieces = iter(dropped)
    next(pieces)
    events = dropped._events
    pieces.close()  # type: ignore[attr-defined]
    eventually(lambda: dropped.request_id in server.hung_up)
    assert events is not None, "not closed for want of references"
    server.gate = None
    assert engine.generate("go", max_tokens=3).text == "the"


# ---- vectors ----


def test_vectors_are_sent_once(engine: ServerEngine, server: FakeServer) -> None:
    v = vector(default_scope="all", op="add")
    name = f"c-{v.content_hash[:24]}"
    engine.generate("x", max_tokens=1, steering=Term(v, 0.5, layers=(1, 9), scope="2-5"))
    engine.read(["x"], steering=Term(v, -1.0, op="project", stream=0))
    engine.logprobs([("x", "y")], steering=v.replace(name="other", default_scope="prompt"))
    assert server.vectors == {name: v.content_hash} and len(server.bodies("/steering/vectors/")) == 1
    assert server.bodies("/completion")[0]["steering"] == [
        {"vector": name, "strength": 0.5, "op": "add", "scope": "2-5", "layers": [1, 9]}
    ]
    assert server.bodies("/steering/read")[0]["steering"] == [
        {"vector": name, "strength": -1.0, "op": "project", "scope": "all", "stream": 0}
    ]
    assert server.bodies("/steering/logprobs")[0]["steering"] == [
        {"vector": name, "strength": 1.0, "op": "add", "scope": "prompt"}
    ]


def test_what_is_there_is_not_sent_again(server: FakeServer) -> None:
    v, w = vector(1), vector(2)
    server.vectors = {f"c-{v.content_hash[:24]}": v.content_hash, "mood": w.content_hash}
    with ServerEngine(server.url) as engine:
        engine.generate("x", max_tokens=1, steering=[v, w])
        # a name that anybody may give to another vector tomorrow is not relied on
        assert [w.content_hash] == [h for n, h in server.vectors.items() if n == f"c-{w.content_hash[:24]}"]
        assert len(server.bodies("/steering/vectors/")) == 1
        # nor a name of ours that holds something else
        x = vector(3)
        server.vectors[f"c-{x.content_hash[:24]}"] = w.content_hash
        with ServerEngine(server.url) as other:
            other.generate("x", max_tokens=1, steering=x)
            assert server.vectors[f"c-{x.content_hash[:24]}"] == x.content_hash
        assert not server.deleted(), "another engine may be about to name it"
    assert sorted(server.deleted()) == sorted(f"c-{u.content_hash[:24]}" for u in (x, w)), "what others put there stays"


def test_lost_vectors_are_sent_again(engine: ServerEngine, server: FakeServer) -> None:
    v, w = vector(1), vector(2)
    calls: list[Callable[[], Any]] = [
        lambda: engine.generate("x", max_tokens=3, steering=[v, w]).text,
        lambda: engine.read(["x"], steering=v)[0].values[0][0, 3],
        lambda: engine.logprobs([("x", "y")], steering=v)[0][0],
        lambda: engine.generate_many([GenerateRequest("x", v, max_tokens=2)])[0].text,
    ]
    want = [call() for call in calls]
    for call, expected in zip(calls, want, strict=True):
        server.vectors.clear()  # it was restarted
        assert call() == expected
    assert want[0] == "THE"
    # a 400 for another reason is not tried again
    n = len(server.bodies("/completion"))
    server.refuse["/completion"] = (400, "scope 'answer' needs tags")
    with pytest.raises(SpecError, match="needs tags"):
        engine.generate("x", steering=v)
    assert len(server.bodies("/completion")) == n + 1
    # and a server that forgets at once is asked twice, not for ever
    server.refuse = {"/completion": (400, "there is no vector")}
    server.vectors.clear()
    with pytest.raises(SpecError, match="there is no vector"):
        engine.generate("x", steering=v)
    assert len(server.bodies("/completion")) == n + 3


def test_vectors_do_not_pile_up(engine: ServerEngine, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_vectors, "MAX_OWN", 8)
    first = vector(0)
    for seed in range(30):
        engine.generate("x", max_tokens=1, steering=[vector(seed), first])
        assert len(server.vectors) <= 8
    assert f"c-{first.content_hash[:24]}" in server.vectors
    sent = len(server.bodies("/steering/vectors/"))
    assert sent == 30, "what is used again and again stays"
    engine.generate("x", max_tokens=1, steering=[vector(29), first])
    assert len(server.bodies("/steering/vectors/")) == sent
    # others have filled the server
    server.max_vectors = len(server.vectors)
    assert engine.generate("x", max_tokens=3, steering=vector(99)).text == "THE"
    engine.close()
    assert server.vectors == {}
    server.max_vectors = 0
    with ServerEngine(server.url) as other, pytest.raises(VectorError, match="vector 'mood': more than 0 vectors"):
        other.generate("x", steering=first)


def test_thinking(engine: ServerEngine, server: FakeServer) -> None:
    v = vector()
    for scope in ("thinking", "answer"):
        engine.generate("x", max_tokens=1, steering=Term(v, scope=scope))
        assert server.bodies("/completion")[-1]["steering_tags"] == {"open": "<think>", "close": "</think>"}
    server.facts["model"]["think_open"] = server.facts["model"]["think_close"] = None
    with ServerEngine(server.url) as other:
        other.generate("x", max_tokens=1, steering=Term(v, scope="answer"))
        assert server.bodies("/completion")[-1]["steering"][0]["scope"] == "response"
        for call in (lambda s: other.generate("x", steering=s), lambda s: other.read(["x"], steering=s)):
            with pytest.raises(SpecError, match="scope 'thinking' of 'mood' needs a model with <think> tags"):
                call(Term(v, scope="thinking"))


def test_vectors_of_other_models_stay_here(engine: ServerEngine, server: FakeServer) -> None:
    wrong = [
        (vector(layers=(4,)), "names layer 4"),
        (SteeringVector("v", {(1, "resid_post"): np.ones(5)}), "n_embd 5"),
        (SteeringVector("v", {(1, "ffn_out"): np.ones(N_EMBD)}), "acts at ffn_out, which llama does not offer"),
    ]
    for v, sentence in wrong:
        with pytest.raises(VectorError, match=sentence):
            engine.stream(GenerateRequest("x", v))
        with pytest.raises(VectorError, match=sentence):
            engine.read(["x"], steering=v)
    assert server.vectors == {} and not server.bodies("/steering/vectors/")


def test_names_come_from_the_library(server: FakeServer, tmp_path: Any) -> None:
    library = Library(tmp_path)
    library.put(vector(), IDENTITY)
    with ServerEngine(server.url, library=library) as engine:
        steering = engine.steering("mood:0.5@1-?all")
        assert [(t.vector.name, t.strength, t.layers, t.scope) for t in steering] == [("mood", 0.5, (1, 2), "all")]
        with pytest.raises(MissingVector, match="steer train calm"):
            engine.steering("calm")


# ---- reading ----


def test_reading(engine: ServerEngine, server: FakeServer) -> None:
    tokens = [BOS, *encode("abc")]
    for positions, rows in (("last", [3]), ("all", [0, 1, 2, 3]), ([-1, 0, 3, 2], [0, 2, 3])):
        got = engine.read(["abc"], positions=positions, steering=Term(vector(), 0.5))[0]
        assert (got.tokens, got.n_prompt, got.positions, got.site) == (tokens, 4, rows, "resid_post")
        assert sorted(got.values) == list(range(4 if positions == "last" else 3))
        for il, value in got.values.items():
            assert value.dtype == np.float32 and value.tolist() == [[il, p, tokens[p], 0.5] for p in rows]
    mean = engine.read(["abc"], positions="mean", layers=[2, 0, 2])[0]
    assert mean.positions == [] and sorted(mean.values) == [0, 2] and mean.values[2][0, 1] == 2.0
    pair = engine.read_pairs([("ab", "cd")], positions="response")[0]
    assert (pair.tokens, pair.n_prompt, pair.positions) == ([BOS, *encode("abcd")], 3, [3, 4])
    through = engine.read(["go"], max_tokens=3, positions="response", steering=vector())[0]
    assert through.tokens == [BOS, *encode("goTHE")] and through.n_prompt == 3
    assert engine.read([]) == [] == engine.read_pairs([]) == engine.logprobs([])


def test_many_texts_go_in_portions(engine: ServerEngine, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"text {i}" for i in range(150)]
    seen: list[tuple[int, int]] = []
    got = engine.read(prompts, progress=lambda done, total: seen.append((done, total)))
    assert [g.tokens for g in got] == [[BOS, *encode(p)] for p in prompts]
    assert [len(body["prompts"]) for body in server.bodies("/steering/read")] == [64, 64, 22]
    assert seen == [(64, 150), (128, 150), (150, 150)]
    seen.clear()
    scores = engine.logprobs([(p, "ab") for p in prompts], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (150, 150) and len(scores) == 150 and scores[0].dtype == np.float64
    assert scores[7].tolist() == [-t / 10 for t in encode("ab")]
    monkeypatch.setattr("steer_plugins.client.engine.MAX_READ", 1000)
    engine.read(prompts[:4], positions="all")
    assert [len(body["prompts"]) for body in server.bodies("/steering/read")][3:] == [2, 2]


def test_what_cannot_be_read(engine: ServerEngine, server: FakeServer) -> None:
    cases: list[tuple[dict[str, Any], type[SteerError], str]] = [
        ({"layers": [4]}, SpecError, "layer 4 does not exist: this model has layers 0 to 3"),
        ({"layers": []}, SpecError, "no layer was named"),
        ({"site": "attn_out"}, SpecError, "site 'attn_out' is not available in llama"),
        ({"stream": "first"}, SpecError, "unknown stream 'first'"),
        ({"positions": "middle"}, DataError, "unknown positions"),
        ({"positions": [9]}, DataError, "do not all lie"),
        ({"positions": "response"}, DataError, "no response"),
    ]
    for options, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            engine.read(["abc"], **options)
    assert not server.bodies("/steering/read")
    server.refuse["/steering/read"] = (400, "the last layer can be read at the last token only")
    with pytest.raises(SpecError, match="^the last layer can be read"):
        engine.read(["abc"], layers=[3], positions="all")


def test_nonsense_for_hidden_states(server: FakeServer, engine: ServerEngine) -> None:
    server_bytes = save({"0.values": np.zeros((1, 1, 4), np.float32)}, {"steer": json.dumps({"format": "steer-read-v1"})})
    for body in (b"", b"x" * 50, save({"a": np.zeros(1)}), server_bytes):
        server.raw["/steering/read"] = (200, body)
        with pytest.raises(EngineError, match="hidden states cannot be read"):
            engine.read(["abc"])
    del server.raw["/steering/read"]
    good = engine._http.post_for_bytes("/steering/read", {"prompts": [[5, 6]], "site": "s", "positions": "all", "steering": []})
    tensors = load(good)
    facts = {"format": "steer-read-v1", "layers": [0, 1, 2], "n_prompt": [2]}
    assert decode_read(save(tensors, {"steer": json.dumps(facts)}), 1, site="s", average=False)[0].tokens == [5, 6]
    for wrong in ({"layers": [0]}, {"n_prompt": []}, {"format": "steer-read-v2"}, {"layers": "ab"}):
        with pytest.raises(EngineError, match="cannot be read"):
            decode_read(save(tensors, {"steer": json.dumps({**facts, **wrong})}), 1, site="s", average=False)
    server.raw["/steering/logprobs"] = (200, b'{"logprobs": [[-1]]}')
    with pytest.raises(EngineError, match="of other tokens"):
        engine.logprobs([("x", "abc")])


# ---- when things go wrong ----


def test_nobody_there(server: FakeServer) -> None:
    with FakeServer() as gone:
        url = gone.url
    with pytest.raises(EngineError, match=f"no server answers at {url}: start one with `steer serve`"):
        ServerEngine(url)
    for bad in ("", "ftp://x", "http://", "http://a b", "http://h:port", "http://h?x=1", "http://h:99999"):
        with pytest.raises(EngineError, match="is not an address of a server"):
            ServerEngine(bad)
    for api in (f"{url}/v1", f"{url}/v1/"):
        with pytest.raises(EngineError, match="leave out the /v1"):
            ServerEngine(api)
    with pytest.raises(EngineError, match="API key holds"):
        ServerEngine(server.url, api_key="a\nb")


def test_addresses() -> None:
    assert normal_url("localhost:80/") == "http://localhost:80" and normal_url(" https://h/base/ ") == "https://h/base"
    assert all(map(is_loopback, ("http://localhost:1", "http://127.3.2.1", "http://[::1]:5", "http://a.localhost")))
    assert not any(map(is_loopback, ("http://example.org", "http://10.0.0.1", "http://127.0.0.1.example.org")))


@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        ((404, b'{"error": {"code": 404, "message": "File Not Found"}}'), EngineError, "cannot steer: start one that can"),
        ((404, b"<html>"), EngineError, "cannot steer"),
        ((200, b"<html>"), EngineError, "does not answer in JSON"),
        ((200, b"[]"), EngineError, "cannot steer"),
        ((200, b'{"protocol": 2, "model": {}}'), EngineError, "version 2, and this package 1: upgrade steer-plugins"),
        ((200, b'{"protocol": 0, "model": {}}'), EngineError, "version 0, and this package 1: restart it"),
        ((200, b'{"protocol": 1, "model": {"error": "xlm is not steered"}}'), ModelError, "^xlm is not steered$"),
        ((200, b'{"protocol": 1, "model": {"identity": {}}}'), EngineError, "does not say what its model is"),
        ((200, b'{"protocol": 1, "model": {}}'), EngineError, "does not say what its model is"),
        ((302, b""), EngineError, "status 302"),
        ((500, b'{"error": {"message": "out of\\nmemory"}}'), EngineError, "failed with status 500: out of memory"),
        ((501, b'{"error": {"message": "not in router mode"}}'), EngineError, "not in router mode"),
    ],
)
def test_not_our_kind_of_server(server: FakeServer, answer: tuple[int, bytes], kind: type[SteerError], sentence: str) -> None:
    server.raw["/steering"] = answer
    with pytest.raises(kind, match=sentence) as caught:
        ServerEngine(server.url)
    assert "\n" not in str(caught.value)


def test_loading_and_keys(server: FakeServer) -> None:
    server.loading = 2
    ServerEngine(server.url).close()
    server.loading = 10**9
    with pytest.raises(EngineError, match=r"cannot answer yet \(Loading model\)"):
        ServerEngine(server.url, timeout=0.1)
    server.loading, server.api_key = 0, "secret"
    with pytest.raises(EngineError, match="wants an API key"):
        ServerEngine(server.url)
    with ServerEngine(server.url, api_key="secret") as engine:
        assert engine.generate("x", max_tokens=3).text == "the"


def test_proxies_are_for_other_machines(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with ServerEngine(server.url) as engine:
        assert engine.generate("x", max_tokens=3).text == "the"
    with pytest.raises(EngineError):  # through the proxy, that is, and there is none
        ServerEngine("http://steering.invalid")


def test_a_kept_connection_that_was_closed(engine: ServerEngine, server: FakeServer) -> None:
    """The server may close an idle connection the moment it is used again: that is nobody's fault."""
    server.slam = 1
    assert engine.generate("x", max_tokens=3).text == "the"
    server.slam = 2
    with pytest.raises(EngineError, match="was lost in the middle of an answer"):
        engine.tokenize("x")
    assert engine.generate("x", max_tokens=3).text == "the"


def test_lost_in_the_middle(engine: ServerEngine, server: FakeServer) -> None:
    for after in (0, 3):
        server.cut_after = after
        pieces: list[str] = []
        with pytest.raises(EngineError, match="was lost in the middle of an answer: see whether the server still runs"):
            engine.generate("x", on_piece=pieces.append)
        assert "".join(pieces) == "the"[:after]
    server.cut_after = None
    assert engine.generate("x", max_tokens=3).text == "the"


def test_events_that_are_errors(engine: ServerEngine, server: FakeServer) -> None:
    for body, kind, sentence in (
        (b'data: {"error": {"code": 500, "message": "decode failed"}}\n\n', EngineError, "middle of a reply: decode failed"),
        (b'error: {"code": 400, "message": "context shift"}\n\n', SpecError, "^context shift$"),
        (b"data: 7\n\n", EngineError, "not a JSON object"),
        (b"data: {\n\n", EngineError, "not a JSON object"),
        (b'data: {"content": "a", "tokens": [9]}\n\n', EngineError, "without saying so"),
    ):
        server.raw["/completion"] = (200, body)
        with pytest.raises(kind, match=sentence):
            engine.generate("x")


def test_silence(server: FakeServer) -> None:
    with ServerEngine(server.url, timeout=0.2) as engine:
        server.gate = threading.Semaphore(1)
        original = server.RequestHandlerClass._event

        def mute(self: Any, data: bytes) -> None:
            if not data.startswith(b":"):
                original(self, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server.RequestHandlerClass, "_event", mute)
            with pytest.raises(EngineError, match="did not answer in time"):
                engine.generate("x", max_tokens=5)
            server.gate.release(10)


def test_refusals_are_the_servers_sentence(engine: ServerEngine, server: FakeServer) -> None:
    for status in (400, 409, 413, 422):
        server.refuse["/completion"] = (status, "no such\x1b thing")
        with pytest.raises(SpecError, match="^no such thing$"):
            engine.generate("x")
    for options, sentence in (({"max_tokens": 0}, "max_tokens is 0"), ({"temperature": -1.0}, "temperature -1.0")):
        with pytest.raises(SpecError, match=sentence):
            engine.generate("x", **options)


def test_closed(server: FakeServer) -> None:
    engine = ServerEngine(server.url)
    engine.close()
    engine.close()
    for call in (lambda: engine.generate("x"), lambda: engine.read(["x"]), lambda: engine.tokenize("x"), engine.status):
        with pytest.raises(EngineError, match="closed: make a new one"):
            call()
    # a server that has gone takes the vectors with it
    with FakeServer() as gone:
        other = ServerEngine(gone.url)
        other.generate("x", max_tokens=1, steering=vector())
    other.close()
