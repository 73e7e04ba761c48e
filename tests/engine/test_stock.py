"""Against the unpatched library: the same bits when nothing is steered, and the same effect as its own control vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import harness as H
from tests.engine.harness import ADD, CLAMP, RESID, NativeTerm, Raw, Tok, Vector
from tests.engine.stock_runner import run_steps

MakeRaw = Callable[..., Raw]
Stock = Callable[..., list[np.ndarray]]
ARCHS = H.CORE
PREFILL, DECODE = 21, 8


def as_step(toks: list[Tok]) -> dict[str, Any]:
    return {"tokens": [[t.token, t.pos, t.seq, t.output] for t in toks]}


def script() -> list[dict[str, Any]]:
    """A prefill with all outputs, one with the last only, two sequences at once, and decoding token by token."""
    toks = H.prompt(PREFILL + DECODE)
    last_only = [Tok(t.token, t.pos, 0, t.pos == PREFILL - 1) for t in toks[:PREFILL]]
    both = [Tok(t.token, t.pos, seq, t.output) for t in toks[:6] for seq in (0, 1)]
    one_by_one = [as_step([t]) for t in toks[PREFILL:]]
    return [
        as_step(toks[:PREFILL]),
        *one_by_one,
        {"clear": True},
        as_step(last_only),
        *one_by_one,
        {"clear": True},
        as_step(both),
    ]


@pytest.mark.parametrize("n_ubatch", [5, 512])
@pytest.mark.parametrize("arch", ARCHS)
def test_bits_without_steering(fresh: MakeRaw, stock: Stock, tiny: Callable[..., Path], arch: str, n_ubatch: int) -> None:
    r = fresh(arch, n_ubatch=n_ubatch)
    steps = script()
    want = stock(tiny(arch), steps, n_ubatch=n_ubatch)

    def same() -> bool:
        r.forget()
        got = run_steps(r, steps)
        return len(got) == len(want) and all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))

    assert same(), "before any steering call"
    places = [(il, RESID) for il in range(r.n_layer)]
    H.vector(r.n_embd, places).put(r.steer, 0)
    assert same(), "with a vector loaded and not used"
    r.steer.set_config(1, [NativeTerm(0, CLAMP, 1.0)])
    assert same(), "with a projecting config and no range"
    r.steer.set_captures(list(range(r.n_layer)), [RESID] * r.n_layer)
    assert same(), "with captures and nothing wanted"
    r.steer.set_range(3, 0, -1, 1)
    assert same(), "with another sequence steered"
    r.steer.set_range(0, 0, -1, 1)
    assert not same()
    r.steer.set_config(1, [NativeTerm(0, CLAMP, 0.0)])
    assert same(), "at strength 0"
    r.steer.set_config(1, [NativeTerm(0, ADD, 1.0)])
    assert not same()
    r.steer.set_range(0, 0, -1, 0)
    assert same(), "with the range taken back"
    r.steer.set_range(0, 0, -1, 1)
    r.steer.clear_sequence(0)
    assert same(), "with the sequence cleared"
    r.steer.on_add(lambda tokens: None)
    assert same(), "with an add callback that adds nothing"
    r.steer.on_add(None)
    r.steer.free()
    assert same(), "after llama_steer_free"
    r.steer.free()
    assert same(), "after freeing nothing"


@pytest.mark.parametrize("n_ubatch", [5, 512])
@pytest.mark.parametrize("arch", ("llama", "deepseek4"))
def test_reading_changes_no_bits(raw: MakeRaw, stock: Stock, tiny: Callable[..., Path], arch: str, n_ubatch: int) -> None:
    """Not promised on every back end, but on CPU a copy of the hidden state changes nothing."""
    steps = [as_step(H.prompt(PREFILL)), *(as_step([t]) for t in H.prompt(4, start=PREFILL))]
    want = stock(tiny(arch), steps, n_ubatch=n_ubatch)
    r = raw(arch, n_ubatch=n_ubatch)
    r.steer.set_captures(list(range(r.n_layer)), [RESID] * r.n_layer)
    r.steer.want(0, 0, -1)
    got = run_steps(r, steps)
    assert len(r.steer.kept()[0]) == PREFILL + 4
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("n_ubatch", [4, 512])
@pytest.mark.parametrize("arch", ARCHS)
def test_control_vector(raw: MakeRaw, stock: Stock, tiny: Callable[..., Path], arch: str, n_ubatch: int) -> None:
    """llama.cpp's own control vector at the same dose: bit-equal logits, as both add the same float32 numbers.

    It cannot act at layer 0; what it gets for layer il stands at index il - 1.
    """
    r = raw(arch, n_ubatch=n_ubatch)
    vector = H.vector(r.n_embd, [(il, RESID) for il in range(1, r.n_layer)], scale=1.7)
    strength = -0.6
    data = [float(x) for v, scale in vector.places.values() for x in np.float32(strength * scale * v.astype(np.float64))]
    run = [as_step(H.prompt(PREFILL)), *(as_step([t]) for t in H.prompt(3, start=PREFILL))]
    windows = ((1, r.n_layer - 1), (2, 2), (r.n_layer - 1, r.n_layer - 1))
    cvecs = [{"cvec": data, "first": first, "last": last} for first, last in windows]
    steps = [step for cvec in cvecs for step in ({"clear": True}, cvec, *run)]
    wanted = stock(tiny(arch), steps, n_ubatch=n_ubatch)
    plain = run_steps(r, run)
    for i, (first, last) in enumerate(windows):
        want = wanted[i * len(run) : (i + 1) * len(run)]
        r.reset()
        r.steer_with({0: vector}, [NativeTerm(0, ADD, strength, first, last)])
        got = run_steps(r, run)
        assert np.abs(got[0] - plain[0]).max() > 0.05
        for a, b in zip(got, want, strict=True):
            assert np.array_equal(a, b), float(np.abs(a - b).max())
        # the patched library's own control vector is untouched
        r.reset()
        for a, b in zip(run_steps(r, [cvecs[i], *run]), want, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("weights", ["q8_0", "f16"])
def test_quantised_weights(llama_cpp: Any, stock: Stock, tiny: Callable[..., Path], weights: str) -> None:
    """The same two promises on weights that are not float32."""
    path = tiny("llama", weights=weights)
    r = Raw(path)
    data = [float(x) for il in (1, 2, 3) for x in np.float32(1.5 * H.directions(4, r.n_embd)[il])]
    run = [as_step(H.prompt(PREFILL)), *(as_step([t]) for t in H.prompt(3, start=PREFILL))]
    want = stock(path, [*run, {"clear": True}, {"cvec": data, "first": 1, "last": 3}, *run])
    r.steer_with({0: Vector({(il, RESID): (H.directions(4, r.n_embd)[il], 1.5) for il in (1, 2, 3)})}, [NativeTerm(0)])
    r.steer.set_range(0, 0, -1, 0)
    got = run_steps(r, run)
    r.clear()
    r.steer.set_range(0, 0, -1, 1)
    got += run_steps(r, run)
    r.close()
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(got[0], got[len(run)])


def test_on_top_of_a_control_vector(raw: MakeRaw) -> None:
    """Both at once add up, in either order of setting them; each can go without the other."""
    r = raw("llama")
    toks = H.prompt(6)
    places = [(il, RESID) for il in range(1, r.n_layer)]
    mine, theirs = H.vector(r.n_embd, places, seed=1), H.vector(r.n_embd, places, seed=2)
    data = np.concatenate([np.float32(s * v) for v, s in theirs.places.values()])
    plain = r.read(toks, [1])[1]
    for cvec_first in (True, False):
        r.reset()
        if cvec_first:
            r.set_cvec(data, 1, 1)
        r.steer_with({0: mine}, [NativeTerm(0, CLAMP, 1.0, 1, 1)])
        if not cvec_first:
            r.set_cvec(data, 1, 1)
        got = r.read(toks, [1])[1]
        v, s = theirs.places[1, RESID]
        want = H.edited(plain + np.float32(s * v), (1, RESID), {0: mine}, [NativeTerm(0, CLAMP, 1.0)])
        H.close(got, want, 2 * H.tolerance(plain, {0: mine}, [NativeTerm(0, CLAMP)]))
        r.clear()
        H.close(r.read(toks, [1])[1], plain + np.float32(s * v), 1e-5)
        r.set_cvec(None)
        r.clear()
        assert np.array_equal(r.read(toks, [1])[1], plain)


def test_layer_0_is_ours_alone(raw: MakeRaw) -> None:
    """Layer 0 can be steered here, which the stock control vector cannot do."""
    r = raw("llama")
    toks = H.prompt(4)
    plain = r.decode(toks)
    r.clear()
    v = H.directions(1, r.n_embd)[0]
    r.steer_with({0: Vector({(0, RESID): (v, 2.0)})}, [NativeTerm(0)])
    assert np.abs(r.decode(toks) - plain).max() > 0.05
    r.reset()
    r.set_cvec(np.tile(np.float32(2.0 * v), r.n_layer - 1), 0, 0)
    assert np.array_equal(r.decode(toks), plain)
