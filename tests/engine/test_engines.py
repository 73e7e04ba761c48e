"""What every engine must do, on tiny models: reading, generating, scoring; in process and over HTTP, with the same tests.

Where the two cannot do the same, the tests say so: see ``readable`` of the last layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins import native
from steer_plugins.client.engine import ServerEngine
from steer_plugins.engine import GenerateRequest
from steer_plugins.engine.local import LocalEngine
from steer_plugins.errors import DataError, EngineError, SpecError, SteerError, VectorError
from steer_plugins.steering.combine import CorrelatedWarning, combine
from steer_plugins.steering.schedule import Schedule
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector
from tests.engine import harness as H
from tests.engine.engines import BOTH, LONG, MORE_NOISE, NOISE, PROMPT, ServedEngine, moved, near, open_engine, readable, vector
from tests.scopes import factor

pytestmark = pytest.mark.usefixtures("float32_cache")


@pytest.fixture(scope="module", params=["local", "server"])
def engines(
    request: pytest.FixtureRequest, float32_cache: None, tiny: Callable[..., Path], runtime: Any
) -> Iterator[Callable[..., Any]]:
    """Engines of one kind, shared by this module's tests: ``engines("llama")``."""
    if request.param == "server" and runtime.server is None:
        pytest.skip(f"the runtime {runtime.path} has no llama-server: build one with `steer build`")
    made: dict[Any, Any] = {}

    def get(arch: str, **options: Any) -> Any:
        key = (arch, *sorted(options.items()))
        if key not in made:
            path = tiny(arch)
            made[key] = (
                open_engine(path, **options) if request.param == "local" else ServedEngine(runtime.server, path, **options)
            )
        return made[key]

    yield get
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize("arch", [*BOTH, "gemma3", "qwen3next"])
def test_reading_many_prompts_at_once(engines: Any, arch: str) -> None:
    """Prompts with common beginnings: each reads as it does alone, and as in a bare context."""
    engine = engines(arch)
    endings = ["", "Then", "Then rain came", "Nobody spoke of the war.", "Then rain came down on the quay", "x"]
    prompts = [LONG + e for e in endings] + [LONG * 2 + e for e in endings[1:3]] + ["x y z", "something else entirely"]
    for positions in ("last", "all", [1, -1]):
        together = engine.read(prompts, positions=positions)
        for prompt, one in zip(prompts, together, strict=True):
            alone = engine.read([prompt], positions=positions)[0]
            assert (alone.tokens, alone.positions, alone.n_prompt) == (one.tokens, one.positions, one.n_prompt)
            assert list(one.values) == readable(engine, positions)
            for il in one.values:
                near(one.values[il], alone.values[il], MORE_NOISE.get(arch, NOISE))
    raw = H.Raw(Path(engine.info.path))
    for one in engine.read(prompts, positions="all"):
        raw.clear()
        rows = raw.read([H.Tok(t, p) for p, t in enumerate(one.tokens)], list(one.values))
        for il, want in rows.items():
            near(one.values[il], want, MORE_NOISE.get(arch, NOISE))
    raw.close()


@pytest.mark.parametrize("arch", BOTH)
def test_positions(engines: Any, arch: str) -> None:
    engine = engines(arch)
    item = (PROMPT, " cold and wet again")
    n_prompt = len(engine.tokenize(PROMPT))
    everything = engine.read_pairs([item], positions="all")[0]
    n = len(everything.tokens)
    assert everything.positions == list(range(n)) and everything.n_prompt == n_prompt < n
    for positions, rows in (
        ("last", [n - 1]),
        ("response", list(range(n_prompt, n))),
        ([0], [0]),
        ([3, -1, 1, 3], [1, 3, n - 1]),
        ([-n], [0]),
    ):
        got = engine.read_pairs([item], positions=positions)[0]
        assert got.positions == rows and got.tokens == everything.tokens and list(got.values) == readable(engine, positions)
        for il in everything.values:
            near(got.values[il], everything.values[il][rows])
    for positions, first in (("mean", 1), ("response_mean", n_prompt)):
        got = engine.read_pairs([item], positions=positions)[0]
        assert got.positions == []
        for il in readable(engine, positions):
            near(got.values[il], everything.values[il][first:].mean(axis=0, keepdims=True, dtype=np.float64))
    default = engine.read_pairs([item])[0]
    near(default.values[0], engine.read_pairs([item], positions="response_mean")[0].values[0])
    one = engine.read([PROMPT], layers=[2, 0, 2])[0]
    assert sorted(one.values) == [0, 2] and one.values[0].dtype == np.float32
    assert engine.read([]) == [] and engine.read_pairs([]) == []
    assert sorted(engine.read([PROMPT])[0].values) == list(range(engine.info.n_layer)), "the last token has all layers"


def test_read_through_a_generated_reply(engines: Any) -> None:
    engine = engines("llama")
    v = vector(engine)
    for steering in (None, Term(v, 1.5)):
        reply = engine.generate(PROMPT, max_tokens=7, steering=steering)
        got = engine.read([PROMPT], max_tokens=7, positions="response", steering=steering)[0]
        assert got.tokens == reply.prompt_tokens + reply.tokens
        want = engine.read_pairs([(PROMPT, reply.tokens)], positions="response", steering=steering)[0]
        assert got.positions == want.positions
        for il in got.values:
            near(got.values[il], want.values[il])


def test_streams_and_sites(engines: Any) -> None:
    engine = engines("deepseek4")
    mean = engine.read([PROMPT], positions="all")[0]
    every = engine.read([PROMPT], positions="all", stream="all")[0]
    n = len(mean.tokens)
    assert list(every.values) == readable(engine, "all")
    for il in every.values:
        assert every.values[il].shape == (n, 4, engine.info.n_embd)
        near(every.values[il].mean(axis=1), mean.values[il], 1e-5)
    for site in ("attn_out", "ffn_out"):
        one = engine.read([PROMPT], positions="all", site=site, stream="all")[0]
        assert one.values[2].shape == (n, engine.info.n_embd) and one.site == site
        assert np.abs(one.values[2] - mean.values[2]).max() > 0.1


@pytest.mark.parametrize(
    ("arch", "site"), [("llama", "resid_post"), ("deepseek4", "resid_post"), ("deepseek4", "attn_out"), ("deepseek4", "ffn_out")]
)
@pytest.mark.parametrize("op", ["add", "project", "clamp", "renorm"])
def test_steered_reading_is_the_formula(engines: Any, arch: str, site: str, op: str) -> None:
    """Through the whole engine: vector, term, scope; at one layer, for texts of several lengths at once."""
    engine = engines(arch)
    layer = 2
    v = vector(engine, (layer,), site=site, op=op, dose=6.0)
    prompts = [PROMPT, LONG + "and", "x y"]
    stream = "all" if site == "resid_post" and engine.info.n_streams > 1 else "mean"
    plain = engine.read(prompts, positions="all", site=site, layers=[layer], stream=stream)
    for strength in (1.0, -0.5, 0.0):
        got = engine.read(prompts, positions="all", site=site, layers=[layer], stream=stream, steering=Term(v, strength))
        for a, b in zip(got, plain, strict=True):
            h = b.values[layer].astype(np.float64)
            direction = v.directions[layer, site].astype(np.float64)
            along = (h @ direction)[..., None] * direction
            scale = v.scales[layer, site]
            delta = {
                "add": strength * scale * direction + 0 * h,
                "project": -strength * along,
                "clamp": (strength * scale * direction - along) if strength else 0 * h,
                "renorm": kept_length(h, strength * scale * direction) - h,
            }[op]
            delta[0] = 0  # position 0 is left alone by scope all
            near(a.values[layer], h + delta)


def kept_length(h: np.ndarray, step: np.ndarray) -> np.ndarray:
    moved = h + step
    return moved * (np.linalg.norm(h, axis=-1, keepdims=True) / np.linalg.norm(moved, axis=-1, keepdims=True))


def test_scopes_act_where_they_say(engines: Any) -> None:
    engine = engines("llama")
    item = (PROMPT, " cold and wet again")
    layer = 1
    v = vector(engine, (layer,), dose=5.0)
    plain = engine.read_pairs([item], positions="all", layers=[layer])[0]
    n, n_prompt = len(plain.tokens), plain.n_prompt
    dose = moved(engine, v, layer)
    expected = {
        "all": range(1, n),
        "prompt": range(1, n_prompt - 1),
        "response": range(n_prompt - 1, n),
        "answer": range(n_prompt - 1, n),
        "0-": range(0, n),
        "0-0": range(0, 1),
        "2-4": range(2, 5),
        f"{n - 1}-": range(n - 1, n),
        "500-": range(0),
    }
    for scope, where in expected.items():
        got = engine.read_pairs([item], positions="all", layers=[layer], steering=Term(v, 1.0, scope=scope))[0]
        want = plain.values[layer].astype(np.float64)
        want[list(where)] += dose
        near(got.values[layer], want)
    # several terms with scopes of their own
    w = vector(engine, (layer,), seed=5)
    terms = [Term(v, 1.0, scope="prompt"), Term(w, -2.0, scope="response"), Term(v, 0.5, scope="2-2")]
    got = engine.read_pairs([item], positions="all", layers=[layer], steering=terms)[0]
    want = plain.values[layer].astype(np.float64)
    want[1 : n_prompt - 1] += dose
    want[n_prompt - 1 :] += -2.0 * moved(engine, w, layer)
    want[2] += 0.5 * dose
    near(got.values[layer], want)


def test_cancelling_terms(engines: Any) -> None:
    """v over all its layers and -v over some: what cancels is not missed by the probe for silent layers."""
    engine = engines("llama")
    v = vector(engine, (0, 1, 2, 3))
    plain = engine.read([PROMPT], positions="all", layers=[0, 1])[0]
    got = engine.read([PROMPT], positions="all", layers=[0, 1], steering=[Term(v, 1.0), Term(v, -1.0, layers=(1, 3))])[0]
    want = plain.values[0].astype(np.float64)
    want[1:] += moved(engine, v, 0)
    near(got.values[0], want)
    alone = engine.generate(PROMPT, max_tokens=8, steering=Term(v, 1.0, layers=(0, 0)))
    assert engine.generate(PROMPT, max_tokens=8, steering=[Term(v, 1.0), Term(v, -1.0, layers=(1, 3))]).tokens == alone.tokens
    plain_tokens = engine.generate(PROMPT, max_tokens=8).tokens
    assert engine.generate(PROMPT, max_tokens=8, steering=[v, -v]).tokens == plain_tokens
    assert engine.generate(PROMPT, max_tokens=8, steering=v - v).tokens == plain_tokens


@pytest.mark.parametrize("arch", [*BOTH, "qwen3next"])
def test_generate_and_generate_many_agree(engines: Any, arch: str) -> None:
    """More requests than places, of unequal length and steering: each gets what it gets alone."""
    engine = engines(arch)
    v, w = vector(engine), vector(engine, (0, 3), seed=4, scope="response")
    wishes: list[Any] = [None, v, Term(v, -1.0), [Term(w, 1.5)], [v, Term(w, -1.0, scope="2-5")], Term(v, 0.0), w]
    requests = [
        GenerateRequest(prompt=p, steering=s, max_tokens=3 + 4 * (i % 3))
        for i, (p, s) in enumerate((p, s) for s in wishes for p in (PROMPT, LONG + PROMPT))
    ]
    seen: list[tuple[int, int]] = []
    many = engine.generate_many(requests, progress=lambda done, total: seen.append((done, total)))
    assert [d for d, _ in seen] == list(range(1, len(requests) + 1)) and {t for _, t in seen} == {len(requests)}
    texts = set()
    for request, got in zip(requests, many, strict=True):
        alone = engine.generate(request.prompt, steering=request.steering, max_tokens=request.max_tokens)
        assert (got.tokens, got.text, got.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
        assert got.prompt_tokens == engine.tokenize(request.prompt)
        texts.add(got.text)
    assert len(texts) >= 9, "the steerings hardly differ"
    assert engine.generate_many([]) == []


@pytest.mark.parametrize("arch", BOTH)
def test_strength_zero_is_the_plain_text(engines: Any, arch: str) -> None:
    engine = engines(arch)
    v, c = vector(engine), vector(engine, op="clamp", seed=2)
    plain = engine.generate(PROMPT, max_tokens=24)
    assert len(plain.tokens) == 24 and plain.finish_reason == "length"
    for steering in (None, Term(v, 0.0), Term(c, 0.0), [Term(v, 0.0), Term(c, -0.0)], Steering(), 0.0 * v):
        assert engine.generate(PROMPT, max_tokens=24, steering=steering).tokens == plain.tokens
    for steering in (v, -v, c, Term(v, -1.0)):
        assert engine.generate(PROMPT, max_tokens=24, steering=steering).tokens != plain.tokens
    assert (
        engine.generate(PROMPT, max_tokens=24, steering=-v).tokens
        == engine.generate(PROMPT, max_tokens=24, steering=Term(v, -1.0)).tokens
    )
    assert engine.generate(PROMPT, max_tokens=24).tokens == plain.tokens


@pytest.mark.parametrize("arch", BOTH)
def test_the_identities_hold_bit_for_bit(engines: Any, arch: str) -> None:
    """Strength 0 is no steering, k times v at 1 is v at k, and v less v is nothing: in every state, not in the text alone."""
    engine = engines(arch)
    layers = (0, 1, 2)

    def states(steering: Any) -> list[bytes]:
        found = engine.read([PROMPT], positions="all", layers=layers, steering=steering)[0]
        return [found.values[il].tobytes() for il in layers]

    v = vector(engine, (0, 2))
    plain, steered = states(None), states(Term(v, 1.7))
    assert steered != plain
    assert states(1.7 * v) == steered and states(Term(0.5 * v, 3.4)) == steered
    for nothing in (Term(v, 0.0), 0.0 * v, v - v, [v, -v], [Term(v, 0.3), Term(v, -0.3)]):
        assert states(nothing) == plain


def test_streaming_and_its_state(engines: Any) -> None:
    engine = engines("llama")
    whole = engine.generate(PROMPT, max_tokens=10)
    pieces: list[str] = []
    assert engine.generate(PROMPT, max_tokens=10, on_piece=pieces.append).tokens == whole.tokens
    assert "".join(pieces) == whole.text == engine.detokenize(whole.tokens) and len(pieces) > 3
    stream = engine.stream(GenerateRequest(PROMPT, max_tokens=10))
    for i, _ in enumerate(stream):
        if i == 2:
            if isinstance(engine, ServerEngine):  # has slots for several
                assert engine.generate(PROMPT, max_tokens=10).tokens == whole.tokens
            else:
                with pytest.raises(EngineError, match="still being generated"):
                    engine.stream(GenerateRequest(PROMPT))
            with pytest.raises(SteerError):
                engine.steer_running("loud")
            stream.cancel()
    assert stream.result.finish_reason == "cancelled" and stream.result.tokens == whole.tokens[:3]
    with pytest.raises(EngineError, match="nothing to steer"):
        engine.steer_running(None)
    # abandoned half-way: the next reply is not affected
    iterator = iter(engine.stream(GenerateRequest(PROMPT, vector(engine), max_tokens=10)))
    next(iterator)
    iterator.close()
    assert engine.generate(PROMPT, max_tokens=10).tokens == whole.tokens
    # two streams made, run one after the other
    one, two = (engine.stream(GenerateRequest(PROMPT, s, max_tokens=5)) for s in (None, vector(engine)))
    list(two)
    list(one)
    assert one.result.tokens == whole.tokens[:5] != two.result.tokens


def test_sampling_with_a_seed(engines: Any) -> None:
    engine = engines("llama")
    v = vector(engine)
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 1.3, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    texts = set()
    for seed in range(4):
        for steering in (None, v):
            first = engine.generate(PROMPT, seed=seed, steering=steering, **options)
            assert engine.generate(PROMPT, seed=seed, steering=steering, **options).tokens == first.tokens
            many = engine.generate_many([GenerateRequest(PROMPT, steering, seed=seed, **options)] * 2)
            assert many[0].tokens == many[1].tokens == first.tokens
            texts.add(first.text)
    assert len(texts) == 8
    greedy = engine.generate(PROMPT, max_tokens=16)
    assert engine.generate(PROMPT, max_tokens=16, temperature=1.0, top_k=1).tokens == greedy.tokens
    assert engine.generate(PROMPT, max_tokens=16, temperature=0.7, top_p=1e-6).tokens == greedy.tokens
    assert engine.generate(PROMPT, max_tokens=40, repeat_penalty=5.0).tokens != engine.generate(PROMPT, max_tokens=40).tokens


def test_stop_strings(engines: Any) -> None:
    engine = engines("llama")
    whole = engine.generate(PROMPT, max_tokens=24).text
    for first in range(2, len(whole) - 4, 7):
        for length in (1, 2, 4, 9):
            stop = whole[first : first + length]
            cut = whole.find(stop)
            pieces: list[str] = []
            got = engine.generate(PROMPT, max_tokens=24, stop=["not there at all", stop], on_piece=pieces.append)
            assert got.text == whole[:cut] == "".join(pieces) and got.finish_reason == "stop"
    early, late = whole[5:8], whole[12:15]
    for stops in ([early, late], [late, early]):
        assert engine.generate(PROMPT, max_tokens=24, stop=stops).text == whole[: min(whole.find(early), whole.find(late))]
    assert engine.generate(PROMPT, max_tokens=24, stop=[""]).text == whole
    # what might have become a stop string is given out in the end
    end = whole[-2:]
    pieces = []
    got = engine.generate(PROMPT, max_tokens=24, stop=[end + "\0"], on_piece=pieces.append)
    assert got.text == whole == "".join(pieces) and got.finish_reason == "length"
    requests = [GenerateRequest(PROMPT, max_tokens=24, stop=[s]) for s in (early, late, "never")]
    assert [g.text for g in engine.generate_many(requests)] == [whole[: whole.find(early)], whole[: whole.find(late)], whole]


def test_the_end_of_the_context(engines: Any) -> None:
    engine = engines("llama", n_ctx=256)
    assert engine.info.n_ctx == 256
    tokens = [50 + i % 90 for i in range(256)]
    full = engine.generate(tokens[:252], max_tokens=500)
    assert (len(full.tokens), full.finish_reason) == (4, "length")
    assert len(engine.generate(tokens[:255], max_tokens=5).tokens) == 1
    assert len(engine.generate_many([GenerateRequest(tokens[:254], max_tokens=9)])[0].tokens) == 2
    most = 255 if isinstance(engine, ServerEngine) else 256  # a server wants one place free
    assert len(engine.read([tokens[:most]], positions="all")[0].positions) == most
    assert len(engine.logprobs([(tokens[:most][:9], tokens[9:most])])[0]) == most - 9
    for call in (
        lambda: engine.generate(tokens),
        lambda: engine.generate_many([GenerateRequest("x"), GenerateRequest(tokens)]),
        lambda: engine.read([[*tokens, 50]]),
        lambda: engine.read_pairs([(tokens[:240], tokens[:25])]),
        lambda: engine.logprobs([(tokens[:240], tokens[:25])]),
    ):
        with pytest.raises(DataError, match="does not fit the context of 256: shorten it or "):
            call()
    assert len(engine.generate(tokens[:252], max_tokens=500).tokens) == 4


def test_scores_are_log_probabilities(engines: Any) -> None:
    engine = engines("llama")
    items: list[Any] = [
        (PROMPT, " cold and wet again"),
        (PROMPT, " warm"),
        (PROMPT, [60, 61, 62]),
        (LONG, " Then it rained, as it did every day of that year."),
        (LONG, "x"),
        ([70], [71, 72]),
    ]
    v = vector(engine)
    raw = H.Raw(Path(engine.info.path))
    for steering in (None, v, Term(v, -1.0, scope="response")):
        got = engine.logprobs(items, steering=steering)
        for (prompt, continuation), scores in zip(items, got, strict=True):
            head = engine.tokenize(prompt)
            tail = engine.tokenize(continuation)[1:] if isinstance(continuation, str) else continuation
            assert scores.dtype == np.float64 and len(scores) == len(tail)
            raw.clear()
            tokens = head + tail
            if steering is not None:
                placed = H.Vector({(il, 0): (v.directions[il, "resid_post"], v.scales[il, "resid_post"]) for il in v.layers})
                strength, first = (1.0, 1) if steering is v else (-1.0, max(1, len(head) - 1))
                raw.steer_with({0: placed}, [native.NativeTerm(0, 0, strength)], first=first)
            logits = raw.decode([H.Tok(t, p) for p, t in enumerate(tokens)]).astype(np.float64)
            log_p = (
                logits
                - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
                - logits.max(axis=1, keepdims=True)
            )
            near(scores, np.array([log_p[len(head) - 1 + i, t] for i, t in enumerate(tail)]))
    raw.close()
    plain = engine.logprobs(items)
    for item, scores in zip(items, plain, strict=True):
        near(engine.logprobs([item])[0], scores)
    assert engine.logprobs([]) == []


def test_progress(engines: Any) -> None:
    engine = engines("llama")
    seen: list[tuple[int, int]] = []
    engine.read([PROMPT] * 11, progress=lambda d, t: seen.append((d, t)))
    assert seen[-1] == (11, 11) and [d for d, _ in seen] == sorted({d for d, _ in seen})
    seen.clear()
    engine.logprobs([(PROMPT, " x")] * 6, progress=lambda d, t: seen.append((d, t)))
    assert seen[-1] == (6, 6)


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("scope", ["thinking", "answer", "response", "prompt", "all"])
def test_scopes_of_a_thinking_model(engines: Any, scope: str, thinking: bool | None) -> None:
    """DeepSeek V4's chat format, thinking on and off: which tokens of a prompt and a given reply are steered."""
    engine = engines("deepseek4")
    layer = 2
    prompt = engine.tokenize([{"role": "user", "content": "Is it cold?"}], thinking=thinking)
    open_tag, close_tag = engine.tokenize("<think>")[-1], engine.tokenize("</think>")[-1]
    assert prompt[-1] == (open_tag if thinking else close_tag)
    reply = [100, 101, 102, close_tag, 110, 111] if thinking else [110, 111, 112, 113]
    v = vector(engine, (layer,), scope=scope, dose=5.0)
    n, total = len(prompt), len(prompt) + len(reply)
    close_at = n + reply.index(close_tag) if thinking else n - 1
    expected = {
        "thinking": set(range(n - 1, close_at)) if thinking else set(),
        "answer": set(range(close_at, total)),
        "response": set(range(n - 1, total)),
        "prompt": set(range(1, n - 1)),
        "all": set(range(1, total)),
    }[scope]
    steered = engine.read_pairs([(prompt, reply)], positions="all", layers=[layer], steering=v)[0].values[layer]
    plain = engine.read_pairs([(prompt, reply)], positions="all", layers=[layer])[0].values[layer]
    assert {p for p in range(total) if np.abs(steered[p] - plain[p]).max() > 0.05} == expected
    for p in expected:
        near(steered[p], plain[p] + moved(engine, v, layer))
    # log probabilities move with the first token that is steered
    scores = [engine.logprobs([(prompt, reply)], steering=s)[0] for s in (None, v)]
    first = min(expected, default=total)
    change = np.abs(scores[0] - scores[1])  # of the reply's token k, which comes from position n - 1 + k
    assert (change > 0.01).tolist() == [n - 1 + k >= first for k in range(len(reply))]


def test_bad_requests(engines: Any) -> None:
    engine = engines("llama")
    deepseek = engines("deepseek4")
    want = engine.generate(PROMPT, max_tokens=6).tokens
    v, writer = vector(engine), vector(deepseek, (1,), site="ffn_out")
    other = dataclasses.replace(engine.info.identity, tokens_sha256="0" * 64)
    cases: list[tuple[Callable[[], Any], type[SteerError], str]] = [
        (lambda: engine.read([PROMPT], layers=[4]), SpecError, "layer 4 does not exist: this model has layers 0 to 3"),
        (lambda: engine.read([PROMPT], layers=[-1]), SpecError, "layer -1 does not exist"),
        (lambda: engine.read([PROMPT], layers=[]), SpecError, "no layer was named"),
        (lambda: engine.read([PROMPT], site="attn_out"), SpecError, "site 'attn_out' is not available in llama: use resid_post"),
        (lambda: deepseek.read([PROMPT], site="mlp"), SpecError, "site 'mlp' is not available in deepseek4"),
        (lambda: engine.read([PROMPT], stream="first"), SpecError, "unknown stream 'first'"),
        (lambda: engine.read([PROMPT], positions="middle"), DataError, "unknown positions 'middle'"),
        (lambda: engine.read([PROMPT], positions=[99]), DataError, "do not all lie in a text of"),
        (lambda: engine.read([PROMPT], positions=[]), DataError, "do not all lie"),
        (lambda: engine.read([PROMPT], positions="response"), DataError, "no response to read"),
        (lambda: engine.read([[50]], positions="mean"), DataError, "at least two tokens"),
        (lambda: engine.read([[]]), DataError, "the prompt is empty"),
        (lambda: engine.read([[100_000]]), DataError, "token id 100000 is outside the vocabulary"),
        (lambda: engine.generate([-1]), DataError, "token id -1 is outside the vocabulary"),
        (lambda: engine.generate([{"role": "user"}]), DataError, "message 1 of the chat needs"),
        (lambda: engine.read_pairs([(PROMPT, [100_000])]), DataError, "token id 100000 is outside the vocabulary"),
        (lambda: engine.logprobs([(PROMPT, [-7])]), DataError, "token id -7 is outside the vocabulary"),
        (lambda: engine.generate(PROMPT, max_tokens=0), SpecError, "max_tokens is 0"),
        (lambda: engine.generate_many([GenerateRequest(PROMPT, max_tokens=-1)]), SpecError, "max_tokens"),
        (lambda: engine.generate(PROMPT, temperature=-1.0), SpecError, "temperature -1.0 is out of range"),
        (lambda: engine.generate(PROMPT, temperature=float("nan")), SpecError, "temperature nan is out of range"),
        (lambda: engine.generate(PROMPT, steering="loud"), SpecError, "'loud' is not a steering"),
        (lambda: engine.generate(PROMPT, steering=Term(v, 1e300)), SteerError, "too large"),
        (lambda: engine.generate(PROMPT, steering=Term(v, 1.0, stream=1)), SteerError, "tream 1"),
        (lambda: deepseek.generate(PROMPT, steering=Term(writer, stream=1)), SteerError, "tream"),
        (lambda: engine.generate(PROMPT, steering=vector(deepseek)), VectorError, "n_embd 256"),
        (lambda: engine.generate(PROMPT, steering=vector(engine, (3, 4))), VectorError, "names layer 4"),
        (lambda: engine.generate(PROMPT, steering=vector(engine, site="attn_out")), VectorError, "attn_out"),
        (lambda: engine.generate(PROMPT, steering=v.replace(identity=other)), VectorError, "another vocabulary"),
        (lambda: engine.read([PROMPT], steering=vector(engine, (9,))), VectorError, "names layer 9"),
        (lambda: engine.logprobs([(PROMPT, " x")], steering=vector(engine, (9,))), VectorError, "names layer 9"),
    ]  # fmt: skip
    if isinstance(engine, ServerEngine):
        cases += [
            (lambda: engine.read([PROMPT], positions="all", layers=[3]), SpecError, "layer 3"),
            (lambda: engine.read_pairs([(PROMPT, "x")], layers=[0, 3]), SpecError, "layer 3"),
        ]
    else:
        cases += [
            (lambda: engine.on_read(print, layers=[3]), SpecError, "layer 3 cannot be watched: this model allows 0 to 2"),
            (lambda: engine.on_read(print, layers=[-1]), SteerError, "ayer -1"),
            (lambda: engine.on_read(print, layers=[]), SteerError, "ayer"),
            (lambda: engine.on_read(print, site="mlp"), SteerError, "mlp"),
            (lambda: engine.on_read(print, site="ffn_out"), SteerError, "ffn_out"),
            (lambda: engine.on_add(print, [vector(deepseek)]), VectorError, "n_embd 256"),
        ]
    problems = []
    for i, (call, kind, sentence) in enumerate(cases):
        try:
            call()
            problems.append(f"{i}: nothing was raised for '{sentence}'")
        except kind as error:
            if sentence not in str(error) or "\n" in str(error):
                problems.append(f"{i}: '{error}' instead of '{sentence}'")
        except Exception as error:
            problems.append(f"{i}: {error!r} instead of {kind.__name__} '{sentence}'")
        if engine.generate(PROMPT, max_tokens=6).tokens != want:
            problems.append(f"{i}: the engine is not what it was after '{sentence}'")
    assert not problems, "\n".join(problems)


def test_reading_does_not_disturb_generating(engines: Any) -> None:
    """The contexts for reading, batches and single replies know nothing of one another's steering."""
    engine = engines("llama")
    v = vector(engine)
    want = engine.generate(PROMPT, max_tokens=10).tokens
    stream = engine.stream(GenerateRequest(PROMPT, max_tokens=10))
    for i, _ in enumerate(stream):
        if i == 2:
            engine.read([PROMPT], steering=v)
        if i == 4:
            engine.generate_many([GenerateRequest(PROMPT, v, max_tokens=3)])
        if i == 6:
            engine.logprobs([(PROMPT, " x")], steering=v)
    assert stream.result.tokens == want


@pytest.mark.parametrize("arch", BOTH)
def test_projections_of_a_running_reply(engines: Any, arch: str) -> None:
    """Each token comes with the projection of the state that produced it, the steering included."""
    engine = engines(arch)
    probe = vector(engine, (1, 2), dose=3.0).replace(name="probe")
    steering = Term(vector(engine, (1,), seed=5), 0.5)
    request = GenerateRequest(prompt=PROMPT, steering=steering, probe=[probe], max_tokens=6)
    stream = engine.stream(request)
    seen = []
    for _ in stream:
        n = len(stream.result.tokens)
        seen.append((n, dict(stream.projections)))
    assert seen and all(set(p) == {"probe"} for _, p in seen)
    tokens = [*stream.result.prompt_tokens, *stream.result.tokens]
    n_prompt = len(stream.result.prompt_tokens)
    pair = (stream.result.prompt_tokens, stream.result.tokens)
    positions = list(range(n_prompt - 1, len(tokens) - 1))
    rows = engine.read_pairs([pair], layers=[1, 2], positions=positions, steering=steering)[0].values
    places = [(il, "resid_post") for il in (1, 2)]
    expected = np.mean([rows[p[0]] @ probe.directions[p].astype(np.float64) / probe.scales[p] for p in places], axis=0)
    for n, projections in seen:
        assert projections["probe"] == pytest.approx(expected[n - 1], abs=2e-3)
    assert len(engine.generate(PROMPT, max_tokens=2).tokens) > 0  # nothing is left behind


def test_vectors_made_fit_to_act_together(engines: Any) -> None:
    """The directions that orthogonalising makes are new content: what moves the states is just that, at the capped dose."""
    engine = engines("llama")
    one = vector(engine, (1,), seed=1, name="one")
    mixed = {key: d + vector(engine, (1,), seed=2).directions[key] for key, d in one.directions.items()}
    other = SteeringVector("other", mixed, {(1, "resid_post"): 3.0}, default_scope="all")
    with pytest.warns(CorrelatedWarning, match="'one' and 'other'"):
        correlated = combine([one, other])
    fit = combine([one, other], orthogonal=True, max_dose=0.5)
    plain, before, after = (
        engine.read([PROMPT], layers=[1], positions="all", steering=s)[0].values[1].astype(np.float64)
        for s in (None, correlated, fit)
    )
    near(before - plain, np.outer(np.arange(len(plain)) > 0, sum(moved(engine, t.vector, 1) for t in correlated)), 2e-3)
    want = sum(t.strength * moved(engine, t.vector, 1) for t in fit)
    near(after - plain, np.outer(np.arange(len(plain)) > 0, want), 2e-3)
    most = max(v.scales[1, "resid_post"] for v in (t.vector for t in fit))
    assert abs(np.linalg.norm((after - plain)[-1]) - 0.5 * most) < 1e-3
    assert engine.generate(PROMPT, steering=fit, max_tokens=4).tokens


@pytest.mark.parametrize("arch", BOTH)
def test_a_schedule_follows_the_response(engines: Any, arch: str) -> None:
    """Read back token by token; and a reply has the log-probabilities that its own text has when it is scored."""
    engine = engines(arch)
    v = vector(engine, (1,), dose=20.0, scope="response")
    shape = Schedule("cosine", 5, 0.25)
    response = engine.tokenize(" cold and wet again, all day long")
    item = (PROMPT, response)
    n = len(engine.tokenize(PROMPT))
    plain = engine.read_pairs([item], layers=[1], positions="all")[0].values[1].astype(np.float64)
    steered = engine.read_pairs([item], layers=[1], positions="all", steering=Term(v, 0.5, schedule=shape))[0].values[1]
    factors = np.array([0.5 * factor("cosine", 5, 0.25, p - n + 1) if p >= n - 1 else 0.0 for p in range(len(plain))])
    assert len(set(factors)) == 7
    near(steered, plain + np.outer(factors, moved(engine, v, 1)), 2e-3)

    term = Term(vector(engine, dose=60.0, scope="response"), schedule=Schedule("linear", 4))
    generated = engine.generate(PROMPT, steering=term, max_tokens=10)
    again = engine.generate_many([GenerateRequest(PROMPT, steering=term, max_tokens=10)])[0]
    assert generated.tokens == again.tokens != engine.generate(PROMPT, max_tokens=10).tokens
    # greedy: each token is the likeliest one under the schedule
    tokens = generated.tokens
    best = engine.logprobs([(PROMPT, tokens)], steering=term)[0]
    for at in (0, 3, 8):
        other = [*tokens[:at], (tokens[at] + 1) % 600 + 5]
        assert engine.logprobs([(PROMPT, other)], steering=term)[0][-1] < best[at]

    if isinstance(engine, LocalEngine):  # a live change does not begin to count anew
        found = []
        for over in (1, 2, 3, 100):
            stream = engine.stream(GenerateRequest(PROMPT, max_tokens=10))
            for n, _ in enumerate(stream):
                if n == 2:
                    stream.steer(Term(vector(engine, dose=60.0, scope="response"), schedule=Schedule("linear", over)))
            found.append(stream.result.tokens)
        plain_tokens = engine.generate(PROMPT, max_tokens=10).tokens
        assert found[0] == found[1] == found[2] == plain_tokens != found[3]
