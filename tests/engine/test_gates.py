"""Gates: decided on the prompt as numpy decides them, and then nothing at all or the term as it is without one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from steer_plugins.engine import GenerateRequest
from steer_plugins.engine.local import LocalEngine
from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering.gate import Gate, cosine
from steer_plugins.steering.terms import Term
from steer_plugins.steering.vector import SteeringVector
from tests.engine.engines import BOTH, LONG, PROMPT, vector
from tests.engine.test_engines import engines  # noqa: F401  # the fixture

pytestmark = pytest.mark.usefixtures("float32_cache")
OTHER = "x y z, 12 of them; nobody spoke of the war"


def condition(engine: Any, layer: int = 1, site: str = "resid_post", seed: int = 5) -> SteeringVector:
    direction = np.random.default_rng(seed).standard_normal(engine.info.n_embd).astype(np.float32)
    return SteeringVector("cond", {(layer, site): direction})


def score(engine: Any, prompt: Any, v: SteeringVector, positions: str = "mean", steering: Any = None) -> float:
    """What a gate should find, from the states of the prompt itself: all tokens but the first and the last."""
    layer, site = next(iter(v.directions))
    rows = engine.read([prompt], layers=[layer], site=site, positions="all", steering=steering)[0].values[layer]
    rows = rows.astype(np.float64)[1:-1]
    return cosine(rows.mean(axis=0) if positions == "mean" else rows[-1], v.directions[layer, site])


def gates_around(engine: Any, prompt: Any, v: SteeringVector, positions: str = "mean", **more: Any) -> list[tuple[Gate, bool]]:
    """Gates on both sides of a prompt's score, and whether they are open."""
    at = score(engine, prompt, v, positions, **more)
    assert abs(at) > 1e-4
    return [
        (Gate(v, at + step, compare, positions), (step < 0) is (compare == "above"))
        for step in (-1e-4, 1e-4)
        for compare in ("above", "below")
    ]


@pytest.mark.parametrize("positions", ["mean", "last"])
@pytest.mark.parametrize("arch", BOTH)
def test_a_gate_is_open_or_closed(engines: Any, arch: str, positions: str) -> None:  # noqa: F811
    engine = engines(arch)
    term = Term(vector(engine, dose=60.0), 1.0, scope="response")
    plain = engine.generate(PROMPT, max_tokens=10).tokens
    steered = engine.generate(PROMPT, steering=term, max_tokens=10).tokens
    assert plain != steered
    for gate, is_open in gates_around(engine, PROMPT, condition(engine), positions):
        gated = dataclasses.replace(term, gate=gate)
        want = steered if is_open else plain
        assert engine.generate(PROMPT, steering=gated, max_tokens=10).tokens == want
        again = engine.generate_many([GenerateRequest(PROMPT, gated, 10), GenerateRequest(OTHER, None, 3)])
        assert again[0].tokens == want


def test_sites_and_several_gates(engines: Any) -> None:  # noqa: F811
    """Two terms behind gates of their own, one at another site; the same gate twice."""
    engine = engines("deepseek4")
    one = Term(vector(engine, (2,), dose=60.0, scope="response", seed=1))
    two = Term(vector(engine, (1,), dose=60.0, scope="response", seed=2))
    for gate_1, open_1 in gates_around(engine, PROMPT, condition(engine, 0, "ffn_out"))[:2]:
        for gate_2, open_2 in gates_around(engine, PROMPT, condition(engine, 1), "last")[1:3]:
            want = engine.generate(PROMPT, steering=[one] * open_1 + [two] * open_2, max_tokens=8).tokens
            terms = [dataclasses.replace(one, gate=gate_1), dataclasses.replace(two, gate=gate_2)]
            assert engine.generate(PROMPT, steering=terms, max_tokens=8).tokens == want
    half = dataclasses.replace(one, strength=0.5, gate=gate_1)
    halves = engine.generate(PROMPT, steering=[half, half], max_tokens=8).tokens
    assert halves == engine.generate(PROMPT, steering=[one] * open_1, max_tokens=8).tokens


@pytest.mark.parametrize("arch", BOTH)
def test_each_text_has_its_own_decision(engines: Any, arch: str) -> None:  # noqa: F811
    """Scoring and reading: a text with an open gate is steered from its last prompt token on, the others are left alone."""
    engine = engines(arch)
    v = condition(engine)
    low, high = sorted([PROMPT, OTHER], key=lambda p: score(engine, p, v))
    middle = (score(engine, low, v) + score(engine, high, v)) / 2
    response = engine.tokenize(" cold and wet again")
    term = Term(vector(engine, (1,), dose=40.0, scope="response"))
    gated = dataclasses.replace(term, gate=Gate(v, middle))
    items = [(low, response), (high, response), (low, response[:2])]
    done: list[tuple[int, int]] = []
    found = engine.logprobs(items, steering=gated, progress=lambda n, total: done.append((n, total)))
    assert done[-1] == (3, 3)
    for item, values, steering in zip(items, found, [None, term, None], strict=True):
        assert np.allclose(values, engine.logprobs([item], steering=steering)[0], atol=2e-3)
    assert np.abs(found[0] - engine.logprobs([items[0]], steering=term)[0]).max() > 0.05
    read = engine.read_pairs(items, layers=[1], positions="all", steering=gated)
    for item, values, steering in zip(items, read, [None, term, None], strict=True):
        want = engine.read_pairs([item], layers=[1], positions="all", steering=steering)[0]
        assert values.tokens == want.tokens
        assert np.allclose(values.values[1], want.values[1], atol=2e-3)
    assert engine.logprobs([], steering=gated) == []


def test_a_gate_sees_what_other_terms_do(engines: Any) -> None:  # noqa: F811
    """It looks at the states as they are: steered by a term on the prompt."""
    engine = engines("llama")
    v = condition(engine)
    gated = Term(vector(engine, dose=60.0, scope="response"))
    for scope in ("all", "prompt", "2-4"):
        lower = Term(vector(engine, (0,), dose=30.0, seed=3), scope=scope)
        apart = abs(score(engine, PROMPT, v) - score(engine, PROMPT, v, steering=lower))
        assert apart > 1e-3, scope
        for gate, is_open in gates_around(engine, PROMPT, v, steering=lower)[::2]:
            terms = [lower, dataclasses.replace(gated, gate=gate)]
            want = engine.generate(PROMPT, steering=[lower, gated] if is_open else [lower], max_tokens=8).tokens
            assert engine.generate(PROMPT, steering=terms, max_tokens=8).tokens == want, scope


def test_a_conversation_with_a_gate(engines: Any) -> None:  # noqa: F811
    """Cached prefixes do not change a decision, and what a gated reply left behind is not taken for something else."""
    engine = engines("llama")
    v = condition(engine)
    term = Term(vector(engine, dose=40.0, scope="response"))
    tokens = engine.tokenize(LONG + PROMPT)
    for turn in range(4):
        gate, is_open = gates_around(engine, tokens, v)[turn]
        gated = dataclasses.replace(term, gate=gate)
        want = engine.generate(tokens, steering=term if is_open else None, max_tokens=6).tokens
        for _ in range(2):
            assert engine.generate(tokens, steering=gated, max_tokens=6).tokens == want
        tokens = tokens + want + engine.tokenize(" Then")


def test_gates_and_live_changes(engines: Any) -> None:  # noqa: F811
    engine = engines("llama")
    term = Term(vector(engine, dose=60.0, scope="response"))
    (above, open_a), (below, _), *_ = gates_around(engine, PROMPT, condition(engine))
    assert open_a
    if isinstance(engine, LocalEngine):

        def run(change: Any) -> list[int]:
            stream = engine.stream(GenerateRequest(PROMPT, max_tokens=12))
            for n, _ in enumerate(stream):
                if n == 2:
                    stream.steer(change)
            return stream.result.tokens

        assert run(dataclasses.replace(term, gate=above)) == run(term) != run(dataclasses.replace(term, gate=below)) == run(None)
        return
    # a server has the states of the prompt no longer: it knows the gates that the request began with
    for _ in range(10):  # a tiny model may have ended its reply before a change gets there
        stream = engine.stream(GenerateRequest(PROMPT, [dataclasses.replace(term, gate=above)], max_tokens=300))
        refused = ""
        for n, _ in enumerate(stream):
            if n == 2:
                try:
                    stream.steer(dataclasses.replace(term, gate=Gate(condition(engine, seed=9), 0.1)))
                except SteerError as error:
                    refused = str(error)
                stream.steer(dataclasses.replace(term, strength=0.5, gate=dataclasses.replace(above, threshold=0.99)))
                stream.cancel()
        if refused:
            break
    assert "began with" in refused


def test_what_gates_cannot_do(engines: Any) -> None:  # noqa: F811
    engine = engines("llama")
    term = Term(vector(engine, dose=60.0, scope="response"), gate=Gate(condition(engine), 0.0))
    with pytest.raises(SteerError, match="at least 3 tokens"):
        engine.generate(engine.tokenize(PROMPT)[:2], steering=term, max_tokens=2)
    last = Gate(condition(engine, engine.info.n_layer - 1), 0.0)
    with pytest.raises(SpecError, match="fit it at a lower layer"):
        engine.generate(PROMPT, steering=dataclasses.replace(term, gate=last), max_tokens=2)
    with pytest.raises(SteerError, match="n_embd"):
        wide = SteeringVector("wide", {(1, "resid_post"): np.ones(engine.info.n_embd + 1)})
        engine.generate(PROMPT, steering=dataclasses.replace(term, gate=Gate(wide, 0.0)), max_tokens=2)
    # a term of strength 0 needs no decision
    assert engine.generate(engine.tokenize(PROMPT)[:2], steering=dataclasses.replace(term, strength=0.0), max_tokens=2).tokens
