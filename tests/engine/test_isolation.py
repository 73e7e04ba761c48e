"""One sequence must never harm another: what is asked for is refused or stays finite; what cannot be had is an error of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.errors import EngineError
from steer_plugins.steering.vector import SteeringVector
from tests.engine import harness as H
from tests.engine.engines import open_engine
from tests.engine.harness import ADD, CLAMP, PROJECT, RENORM, RESID, NativeTerm, Raw, Tok

MakeRaw = Callable[..., Raw]

FLOAT_MAX = 3.4028234663852886e38
VICTIM, ATTACKER = 1, 0

CACHES = pytest.mark.parametrize("flash, unified", [(f, u) for f in (False, True) for u in (False, True)])


def one_direction(r: Raw, scale: float = 2.0, size: float = 1.0) -> H.Vector:
    """The same direction at every layer: what each adds to it, the next can multiply."""
    v = np.float32(size) * H.directions(1, r.n_embd)[0]
    return H.Vector({(il, RESID): (v.astype(np.float32), scale) for il in range(r.n_layer)})


# Terms of vector 0 (a direction at every layer), 1 (the same, of scale 1e30) and 2 (one component slightly above 1).
BAD: dict[str, list[NativeTerm]] = {
    "project in percent": [NativeTerm(0, PROJECT, 100.0)],
    "project -1e30": [NativeTerm(0, PROJECT, -1e30)],
    "project 3.01": [NativeTerm(0, PROJECT, 3.01)],
    "project -1.01": [NativeTerm(0, PROJECT, -1.01)],
    "add 8e37": [NativeTerm(0, ADD, 8e37)],
    "add the largest float": [NativeTerm(2, ADD, FLOAT_MAX)],
    "add by its scale": [NativeTerm(1, ADD, 1.0)],
    "clamp 1e37": [NativeTerm(0, CLAMP, 1e37)],
    "clamp by its scale": [NativeTerm(1, CLAMP, -1.0)],
    "renorm 1e38": [NativeTerm(0, RENORM, 1e38)],
    "renorm 1e20": [NativeTerm(0, RENORM, 1e20)],
    "a dose that is amplified again and again": [NativeTerm(0, ADD, 5e14)] + [NativeTerm(0, PROJECT, -1.0)] * 32,
    "a dose that is mirrored again and again": [NativeTerm(0, ADD, 5e14)] + [NativeTerm(0, PROJECT, 3.0)] * 32,
    "a sum of doses": [NativeTerm(0, ADD, 5e14)] * 256,
    "infinite": [NativeTerm(0, ADD, float("inf"))],
}
EDGES: dict[str, list[NativeTerm]] = {
    "project 3": [NativeTerm(0, PROJECT, 3.0)],
    "project -1": [NativeTerm(0, PROJECT, -1.0)],
    "add 1e15": [NativeTerm(0, ADD, 5e14)],
    "clamp 1e15": [NativeTerm(0, CLAMP, -5e14)],
    "renorm 1e15": [NativeTerm(0, RENORM, 5e14)],
    "all at once": [NativeTerm(0, ADD, 5e14), NativeTerm(0, PROJECT, -1.0), NativeTerm(0, CLAMP, 1.0)],
    "projected again and again": [NativeTerm(0, PROJECT, 3.0)] * 8,
    "amplified again and again": [NativeTerm(0, PROJECT, -1.0)] * 32,
    "many": [NativeTerm(0, ADD, 1e12)] * 256,
}


def put(r: Raw) -> None:
    for index, vector in enumerate([one_direction(r), one_direction(r, scale=1e30), one_direction(r, size=1.0000005)]):
        vector.put(r.steer, index)


def decode(r: Raw, toks: Sequence[Tok]) -> np.ndarray:
    """The logits, whatever the attacker's sequence has to say of itself."""
    assert r.try_decode(toks) == 0, r.steer.error()
    return np.stack([r.logits(i) for i in range(len(toks))])


def run(r: Raw, terms: list[NativeTerm] | None) -> list[np.ndarray]:
    """A victim's logits beside an attacker, beside its cache, and after it has gone; 70 tokens, as kernels have tiles."""
    r.clear()
    if terms is not None:
        r.steer.set_config(1, terms)
        r.steer.set_range(ATTACKER, 0, -1, 1)
    seen = [decode(r, H.prompt(70, ATTACKER) + H.prompt(70, VICTIM, seed=5))[70:]]
    seen.append(decode(r, H.prompt(6, VICTIM, start=70)))
    memory, remove = r.memory, H.llama_cpp.llama_memory_seq_rm
    remove(memory, ATTACKER, -1, -1)
    r.steer.clear_sequence(ATTACKER)
    seen.append(decode(r, H.prompt(6, ATTACKER, seed=7)))  # whoever comes next gets the cells: some, the others are masked
    seen.append(decode(r, H.prompt(74, ATTACKER, start=6, seed=7)))
    return seen


@CACHES
def test_a_victim_beside_and_after(fresh: MakeRaw, flash: bool, unified: bool) -> None:
    """NaN in the cache is everybody's: masked, it is still NaN. So no term may make one."""
    r = fresh("llama", flash=flash, kv_unified=unified)
    put(r)
    plain = run(r, None)
    assert all(np.isfinite(x).all() for x in plain)
    for name, terms in {**BAD, **EDGES}.items():
        try:
            seen = run(r, terms)
        except EngineError as error:
            assert name in BAD, (name, error)
            continue
        for got, want in zip(seen, plain, strict=True):
            assert np.array_equal(got, want), name
    H.llama_cpp.llama_memory_clear(r.memory, True)


@pytest.mark.parametrize("name", BAD)
def test_what_could_overflow_is_refused(raw: MakeRaw, name: str) -> None:
    """At once, in one sentence that names the vector, and nothing has changed."""
    r = raw("llama")
    put(r)
    r.steer.set_config(1, [NativeTerm(0, ADD, 0.5)])
    before = r.steer.config_id(1)
    with pytest.raises(EngineError) as caught:
        r.steer.set_config(1, BAD[name])
    sentence = str(caught.value)
    assert sentence[0].islower() and not sentence.endswith(".") and "\n" not in sentence
    assert any(word in sentence for word in ("out of range", "too large", "not finite", "smaller strengths")), sentence
    assert r.steer.config_id(1) == before


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("arch", ["llama", "deepseek4"])
def test_what_is_allowed_stays_finite(raw: MakeRaw, arch: str, name: str) -> None:
    r = raw(arch)
    put(r)
    r.steer.set_config(1, EDGES[name])
    r.steer.set_range(0, 0, -1, 1)
    assert np.isfinite(r.decode(H.prompt(20))).all()


# Terms that come to nothing in float32, or that cancel but for the last bits of a double.
NOTHING: dict[str, list[NativeTerm]] = {
    "project 5e-324": [NativeTerm(0, PROJECT, 5e-324)],
    "project 6.6e-305": [NativeTerm(0, PROJECT, 6.6e-305)],
    "project 1e-46": [NativeTerm(0, PROJECT, 1e-46)],
    "add 5e-324": [NativeTerm(0, ADD, 5e-324)],
    "renorm 1e-300": [NativeTerm(0, RENORM, 1e-300)],
    "projections that nearly cancel": [NativeTerm(0, PROJECT, 1.0), NativeTerm(0, PROJECT, -(1.0 - 2**-52))],
    "two names of one direction": [
        NativeTerm(0, PROJECT, 1.0),
        NativeTerm(1, PROJECT, -(1.0 - 2**-50)),
        NativeTerm(1, PROJECT, -(2**-50)),
    ],
    "a sum that rounds": [NativeTerm(0, PROJECT, x) for x in (0.1, 0.2, -0.3)],
    "doses that nearly cancel": [NativeTerm(0, ADD, x) for x in (0.1, 0.2, -0.3)],
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("arch", ["llama", "deepseek4"])
def test_what_comes_to_nothing_is_no_error(raw: MakeRaw, arch: str, name: str) -> None:
    """It has no place to act at, so it must not be missed there: it ended a request with a report of a faulty architecture."""
    r = raw(arch)
    put(r)
    plain = r.decode(H.prompt(9))
    r.forget()
    r.steer.set_config(1, NOTHING[name])
    assert r.steer.config_id(1) == 0
    r.steer.set_range(0, 0, -1, 1)
    assert np.array_equal(r.decode(H.prompt(9)), plain)
    assert r.steer.sequence_error(0) is None


def test_a_stream_and_its_opposite_cancel_where_there_is_one_stream(raw: MakeRaw) -> None:
    r = raw("llama")
    put(r)
    plain = r.decode(H.prompt(9))
    r.forget()
    r.steer.set_config(1, [NativeTerm(0, PROJECT, 0.5, stream=0), NativeTerm(0, PROJECT, -0.5)])
    r.steer.set_range(0, 0, -1, 1)
    assert np.array_equal(r.decode(H.prompt(9)), plain)
    assert r.steer.sequence_error(0) is None


def test_orthogonal_projections_are_no_growth(raw: MakeRaw) -> None:
    """Removing many directions lengthens nothing, so it is not refused; mirroring nearly parallel ones is."""
    r = raw("llama")
    basis = np.linalg.qr(np.random.default_rng(3).standard_normal((r.n_embd, 40)))[0].T.astype(np.float32)
    for k, v in enumerate(basis):
        H.Vector({(il, RESID): (v, 1.0) for il in range(r.n_layer)}).put(r.steer, k)
    r.steer.set_config(1, [NativeTerm(k, PROJECT, 1.0) for k in range(40)])
    r.steer.set_range(0, 0, -1, 1)
    assert np.isfinite(r.decode(H.prompt(20))).all()


def test_the_add_callback_has_the_same_bounds(raw: MakeRaw) -> None:
    r = raw("llama")
    put(r)
    r.steer.set_config(1, [NativeTerm(0, PROJECT, 1.0)])
    for fill, message in (
        (lambda t: t.c.__setitem__((0, 0), 1e30), "too large"),
        (lambda t: t.c.__setitem__((0, 1), 1.0), "too large"),
        (lambda t: t.g.__setitem__((0, 0), -3.5), "-3 to 1 are possible"),
        (lambda t: t.g.__setitem__((0, 0), 99.0), "-3 to 1 are possible"),
    ):
        r.steer.on_add(fill)
        assert r.try_decode(H.prompt(4)) == -3
        assert message in r.steer.error()
        r.steer.on_add(None)
        r.forget()
        assert np.isfinite(r.decode(H.prompt(4))).all()
        r.forget()


def test_what_cannot_be_had_is_one_sequences_error(fresh: MakeRaw) -> None:
    """More different steerings in one batch than there are rows: the sequence is told, and its neighbour's logits are its own."""
    r = fresh("llama", n_ctx=2048, n_batch=2048, n_ubatch=2048, n_seq_max=2)
    put(r)
    n = 1100
    victim = H.prompt(9, VICTIM, seed=5)
    many = [Tok(t.token, t.pos, ATTACKER, output=False) for t in H.prompt(n, ATTACKER)]
    plain = r.decode(many + victim)
    r.clear()
    for p in range(n):
        r.steer.set_config(1 + p, [NativeTerm(0, ADD, 0.001 * (p + 1))])
        r.steer.set_range(ATTACKER, p, p + 1, 1 + p)
    capacity = r.steer.stats().n_rows_capacity
    assert r.try_decode(many + victim) == 0
    assert r.steer.sequence_error(VICTIM) is None
    assert "different steerings meet in one batch" in (r.steer.sequence_error(ATTACKER) or "")
    got = np.stack([r.logits(n + i) for i in range(len(victim))])
    assert np.array_equal(got, plain)
    assert r.steer.stats().n_rows_capacity == capacity == 1024, "nothing was allocated in the decode"
    r.steer.clear_sequence()
    assert r.steer.stats().n_rows_capacity == 8, "an idle context gives its rows back"


@pytest.mark.parametrize("arch", ["olmo2", "exaone4"])
def test_what_does_not_stay_finite_leaves_nothing_behind(tiny: Callable[..., Path], arch: str, llama_cpp: Any) -> None:
    """These bring the state itself into their float16 cache, where a dose that float32 holds is too much: NaN must not stay."""
    with open_engine(tiny(arch)) as engine:
        layers = range(engine.info.n_layer)
        v = SteeringVector("far", {(il, "resid_post"): H.directions(1, engine.info.n_embd)[0] for il in layers}).scaled(1e7)
        text, item = "the river was cold", ("the river was cold", " and wet")
        plain = engine.generate(text, max_tokens=6).tokens
        scores = engine.logprobs([item])[0]
        for _ in range(2):
            with pytest.raises(EngineError, match="does not stay finite under such a steering: use a smaller strength"):
                engine.generate(text, steering=v, max_tokens=4)
            with pytest.raises(EngineError, match="does not stay finite"):
                engine.logprobs([item], steering=v)
            assert engine.generate(text, max_tokens=6).tokens == plain
            assert np.array_equal(engine.logprobs([item])[0], scores)
