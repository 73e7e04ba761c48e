"""The read and the add callback: what they see, what they do, and what happens when they fail."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from steer_plugins import native
from steer_plugins.engine.local import LocalEngine
from steer_plugins.errors import EngineError
from tests.engine import harness as H
from tests.engine.harness import ADD, ALL, ATTN, CLAMP, MEAN, PROJECT, RESID, NativeTerm, Raw, Tok

MakeRaw = Callable[..., Raw]
BOTH = ("llama", "deepseek4")


def streams(r: Raw) -> int:
    return ALL if r.info.n_streams > 1 else MEAN


# ---- reading ----


@pytest.mark.parametrize("n_ubatch", [1, 3, 4, 5, 512])
@pytest.mark.parametrize("arch", BOTH)
def test_read_callback_gets_the_rows(raw: MakeRaw, arch: str, n_ubatch: int) -> None:
    r = raw(arch, n_ubatch=n_ubatch)
    toks = [*H.prompt(9, 0), *H.prompt(4, 1, seed=2)]
    seen: list[native.ReadRows] = []
    r.steer.on_read(seen.append)
    layers = [2, 0]
    for stream in {MEAN, streams(r)}:
        seen.clear()
        r.clear()
        r.steer.set_captures(layers, [RESID] * 2, stream=stream)
        for seq in (0, 1):
            r.steer.want(seq, 1, -1)
        r.decode(toks[:9])
        r.decode(toks[9:])
        n_streams = r.info.n_streams if stream == ALL else 1
        for il in layers:
            mine = [rows for rows in seen if rows.layer == il]
            assert all(rows.site == "resid_post" for rows in mine)
            assert np.array_equal(np.concatenate([rows.values for rows in mine]), r.steer.rows(il, RESID, n_streams))
            assert np.array_equal(np.concatenate([rows.sequences for rows in mine]), r.steer.kept()[0])
            assert np.array_equal(np.concatenate([rows.positions for rows in mine]), r.steer.kept()[1])
        assert len(r.steer.kept()[0]) == 11, "position 0 was not wanted"
        assert len(seen) == 2 * sum(-(-n // n_ubatch) - (n_ubatch == 1) for n in (9, 4)), "once for each capture and ubatch"
    r.steer.on_read(None)
    seen.clear()
    r.forget()
    r.decode(toks)
    assert not seen


def test_read_callback_of_other_sites_without_keeping(raw: MakeRaw) -> None:
    r = raw("deepseek4")
    toks = H.prompt(5)
    want = r.read(toks, [1, 3], ATTN)
    r.clear()
    seen: dict[tuple[int, str], np.ndarray] = {}
    r.steer.on_read(lambda rows: seen.update({(rows.layer, rows.site): rows.values}))
    r.steer.set_captures([1, 3], [ATTN, ATTN], keep=False)
    r.steer.want(0, 0, -1)
    r.decode(toks)
    assert np.array_equal(seen[1, "attn_out"], want[1]) and np.array_equal(seen[3, "attn_out"], want[3])
    assert len(r.steer.kept()[0]) == 0


@pytest.mark.parametrize("kind", ["read", "add"])
@pytest.mark.parametrize("error", [ValueError("no good"), KeyboardInterrupt()])
def test_a_callback_that_raises(raw: MakeRaw, kind: str, error: BaseException) -> None:
    """The decode fails, the exception can be raised again, and the context goes on working."""
    r = raw("llama", n_ubatch=4)
    toks = H.prompt(10)
    H.vector(r.n_embd, [(1, RESID)]).put(r.steer, 0)
    r.steer.set_captures([1], [RESID])
    r.steer.want(0, 0, -1)
    plain = r.decode(toks)
    calls = 0

    def fail(_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error

    (r.steer.on_read if kind == "read" else r.steer.on_add)(fail)
    r.forget()
    r.steer.clear_rows()
    assert r.try_decode(toks) == -3
    assert calls == 2
    assert r.steer.error() == f"the {kind} callback stopped this decode"
    with pytest.raises(type(error)):
        r.steer.raise_callback_error()
    r.steer.raise_callback_error()  # once
    assert r.steer.rows(1, RESID).shape[0] == len(r.steer.kept()[0])
    r.forget()
    r.steer.clear_rows()
    assert np.array_equal(r.decode(toks), plain)
    assert len(r.steer.kept()[0]) == 10


def test_two_captures_and_a_callback_that_raises_between_them(raw: MakeRaw) -> None:
    """Rows stay level: no capture has rows that another lacks, and what is dropped is dropped everywhere."""
    r = raw("llama", n_ubatch=4)
    toks = H.prompt(8)
    want = r.read(toks, [0, 1, 2])
    r.clear()

    def fail(rows: native.ReadRows) -> None:
        if rows.layer == 1 and rows.positions[0] == 4:
            raise ValueError

    r.steer.on_read(fail)
    r.steer.set_captures([0, 1, 2], [RESID] * 3)
    r.steer.want(0, 0, -1)
    assert r.try_decode(toks) == -3
    n = len(r.steer.kept()[0])
    for il in (0, 1, 2):
        assert np.array_equal(r.steer.rows(il, RESID), want[il][:n])
    r.steer.on_read(None)
    # going on from the ubatch that failed
    r.decode(toks[4:])
    for il in (0, 1, 2):
        assert np.array_equal(r.rows_of(toks, [il])[il], want[il])


# ---- adding ----


@pytest.mark.parametrize("n_ubatch", [1, 3, 4, 5, 512])
@pytest.mark.parametrize("arch", BOTH)
def test_add_callback_adds_what_it_says(raw: MakeRaw, arch: str, n_ubatch: int) -> None:
    """c and g of each token on top of its config's, for vectors with a gap between their numbers."""
    r = raw(arch, n_ubatch=n_ubatch)
    layer = 2
    toks = [*H.prompt(9, 0), *H.prompt(5, 1, seed=2)]
    vectors = {0: H.vector(r.n_embd, [(layer, RESID)], seed=1), 4: H.vector(r.n_embd, [(layer, RESID)], seed=2, scale=1.5)}
    batches = [toks[:9], toks[9:]]
    plain = r.read(batches, [layer], RESID, streams(r))[layer]
    rng = np.random.default_rng(8)
    table = {(t.seq, t.pos): rng.uniform(-1, 1, 3) * (t.pos % 3 != 1) for t in toks}
    asked: list[tuple[int, int]] = []

    def add(tokens: native.AddTokens) -> None:
        assert tokens.c.shape == tokens.g.shape == (len(tokens.positions), 5)
        assert not tokens.c.any() and not tokens.g.any()
        for i, at in enumerate(zip(tokens.sequences, tokens.positions, strict=True)):
            key = int(at[0]), int(at[1])
            asked.append(key)
            tokens.c[i, 0], tokens.c[i, 4], tokens.g[i, 4] = table[key]

    r.clear()
    r.steer_with(vectors, [NativeTerm(0, ADD, 0.7)], seq=0)
    r.steer.set_config(2, [NativeTerm(4, PROJECT, 1.0)])  # makes vector 4 ready for g; used by sequence 1
    r.steer.set_range(1, 0, -1, 2)
    r.steer.on_add(add)
    got = r.read(batches, [layer], RESID, streams(r))[layer]
    assert sorted(asked) == sorted(table)
    own = {0: [NativeTerm(0, ADD, 0.7)], 1: [NativeTerm(4, PROJECT, 1.0)]}
    for i, t in enumerate(toks):
        c0, c4, g4 = (float(np.float32(x)) for x in table[t.seq, t.pos])
        terms = [*own[t.seq], NativeTerm(0, ADD, c0), NativeTerm(4, ADD, c4), NativeTerm(4, PROJECT, -g4)]
        want = H.edited(plain[i : i + 1], (layer, RESID), vectors, terms)
        H.close(got[i : i + 1], want, H.tolerance(plain, vectors, terms))
    r.steer.on_add(None)
    r.clear()
    assert np.array_equal(r.read(batches, [layer], RESID, streams(r))[layer], plain)


def test_add_callback_beside_a_named_stream(raw: MakeRaw) -> None:
    """What a callback adds goes to all streams, also where the config names one."""
    r = raw("deepseek4")
    toks = H.prompt(3)
    vectors = {0: H.vector(r.n_embd, [(3, RESID)], seed=1), 1: H.vector(r.n_embd, [(3, RESID)], seed=2)}
    plain = r.read(toks, [3], RESID, ALL)[3]
    r.clear()
    r.steer_with(vectors, [NativeTerm(0, ADD, 1.0, stream=1)])
    r.steer.on_add(lambda tokens: tokens.c.__setitem__((slice(None), 1), 0.5))
    got = r.read(toks, [3], RESID, ALL)[3]
    terms = [NativeTerm(0, ADD, 1.0, stream=1), NativeTerm(1, ADD, 0.5)]
    H.close(got, H.edited(plain, (3, RESID), vectors, terms), H.tolerance(plain, vectors, terms))


def test_add_callback_without_a_vector_is_not_asked(raw: MakeRaw) -> None:
    r = raw("llama")
    r.steer.on_add(lambda tokens: 1 / 0)
    r.decode(H.prompt(3))
    r.steer.raise_callback_error()


@pytest.mark.parametrize(
    ("fill", "sentence"),
    [
        (lambda t: t.c.__setitem__((0, 0), np.nan), "gave vector 0 a coefficient that is not finite"),
        (lambda t: t.g.__setitem__((2, 2), np.inf), "gave vector 2 a coefficient that is not finite"),
        (lambda t: t.c.__setitem__((1, 1), 1.0), "gave a coefficient to vector 1, which is not set"),
        (lambda t: t.g.__setitem__((1, 0), 1.0), "gave g to vector 0, which no config projects or clamps"),
    ],
)
def test_add_callback_with_bad_numbers(raw: MakeRaw, fill: Callable[[native.AddTokens], None], sentence: str) -> None:
    r = raw("llama")
    toks = H.prompt(4)
    for k in (0, 2):
        H.vector(r.n_embd, [(1, RESID)]).put(r.steer, k)
    plain = r.decode(toks)
    r.forget()
    r.steer.on_add(fill)
    assert r.try_decode(toks) == -3
    assert sentence in r.steer.error()
    r.steer.on_add(None)
    r.forget()
    assert np.array_equal(r.decode(toks), plain)


# ---- what a callback may do ----


def test_configs_and_ranges_changed_in_the_read_callback(raw: MakeRaw) -> None:
    """A closed loop: what is read of one token sets the strength of the next."""
    r = raw("llama")
    toks = H.prompt(12)
    vectors = {0: H.vector(r.n_embd, [(1, RESID)])}
    v, scale = vectors[0].places[1, RESID]
    plain = r.read([[t] for t in toks], [1])[1]
    r.clear()
    r.steer_with(vectors, [])
    used = [0.0]

    def control(rows: native.ReadRows) -> None:
        used.append(-0.5 * float(rows.values[-1] @ v) / scale)
        r.steer.set_config(1, [NativeTerm(0, ADD, used[-1])])

    r.steer.on_read(control)
    got = r.read([[t] for t in toks], [1])[1]
    for i, strength in enumerate(used[:-1]):
        H.close(got[i], plain[i] + strength * scale * v.astype(np.float64), 1e-5)
        # the loop really is closed: each strength comes from the row before, its edit included
        assert used[i + 1] == pytest.approx(-0.5 * float(got[i].astype(np.float64) @ v) / scale, abs=1e-5)
    assert max(abs(u) for u in used) > 0.1


def test_ranges_changed_in_the_add_callback_count_at_once(raw: MakeRaw) -> None:
    r = raw("llama", n_ubatch=4)
    toks = H.prompt(12)
    vectors = {0: H.vector(r.n_embd, [(1, RESID)])}
    plain = r.read(toks, [1])[1]
    r.clear()
    vectors[0].put(r.steer, 0)
    r.steer.set_config(1, [NativeTerm(0, ADD, 1.0)])

    def add(tokens: native.AddTokens) -> None:
        if tokens.positions[0] == 4:
            r.steer.set_range(0, 6, 8, 1)

    r.steer.on_add(add)
    got = r.read(toks, [1])[1]
    moved = np.abs(got - plain).max(axis=1) > 0.01
    assert list(np.flatnonzero(moved)) == [6, 7]


@pytest.mark.parametrize("kind", ["read", "add"])
def test_what_a_callback_may_not_do(raw: MakeRaw, kind: str) -> None:
    """Calls that would pull the graph or its buffers away are refused with a sentence; the decode is not harmed."""
    r = raw("llama", n_ubatch=4)
    toks = H.prompt(10)
    vector = H.vector(r.n_embd, [(1, RESID)])
    other = H.vector(r.n_embd, [(0, RESID), (2, RESID)])
    r.steer_with({0: vector, 3: vector}, [NativeTerm(0, ADD, 1.0)])
    r.steer.set_captures([1], [RESID])
    r.steer.want(0, 0, -1)
    want = r.decode(toks)
    tried: dict[str, Callable[[], None]] = {
        "a new layer": lambda: other.put(r.steer, 1),
        "a vector again": lambda: other.put(r.steer, 0),
        "the same vector": lambda: vector.put(r.steer, 0),
        "no vector": lambda: r.steer.clear_vector(3),
        "first projection": lambda: r.steer.set_config(2, [NativeTerm(0, PROJECT, 1.0)]),
        "other captures": lambda: r.steer.set_captures([0, 1], [RESID, RESID]),
        "no captures": lambda: r.steer.set_captures([], []),
        "other callback": lambda: r.steer.on_read(None),
        "another callback": lambda: r.steer.on_add(None),
        "all gone": r.steer.free,
    }
    refused: dict[str, str] = {}

    def attempt(_: object) -> None:
        for name, call in tried.items():
            try:
                call()
            except EngineError as error:
                refused[name] = str(error)

    (r.steer.on_read if kind == "read" else r.steer.on_add)(attempt)
    r.forget()
    r.steer.clear_rows()
    assert np.array_equal(r.decode(toks), want)
    r.steer.raise_callback_error()
    assert set(refused) == set(tried)
    assert all("inside a callback" in sentence for sentence in refused.values()), refused
    assert len(r.steer.kept()[0]) == 10
    (r.steer.on_read if kind == "read" else r.steer.on_add)(None)
    r.forget()
    assert np.array_equal(r.decode(toks), want)


def test_callbacks_of_two_sequences(raw: MakeRaw) -> None:
    """Both callbacks name the right (sequence, position), however the batch is cut and reordered."""
    r = raw("llama", n_ubatch=3)
    layer = 1
    toks = [Tok(int(t), p, s) for p, t in enumerate((50, 60, 70, 80)) for s in (2, 0, 3)]
    vectors = {0: H.vector(r.n_embd, [(layer, RESID)])}
    v, scale = vectors[0].places[layer, RESID]
    plain = r.read(toks, [layer])[layer]
    r.clear()
    vectors[0].put(r.steer, 0)
    seen: dict[tuple[int, int], np.ndarray] = {}

    def keep(rows: native.ReadRows) -> None:
        for s, p, row in zip(rows.sequences, rows.positions, rows.values, strict=True):
            seen[int(s), int(p)] = row

    r.steer.on_add(lambda t: t.c.__setitem__((slice(None), 0), 0.1 * (10 * t.sequences + t.positions)))
    r.steer.on_read(keep)
    r.steer.set_captures([layer], [RESID], keep=False)
    for s in (0, 2, 3):
        r.steer.want(s, 0, -1)
    r.decode(toks)
    for i, t in enumerate(toks):
        dose = np.float64(np.float32(0.1 * (10 * t.seq + t.pos))) * scale
        H.close(seen[t.seq, t.pos], plain[i] + dose * v.astype(np.float64), 2e-5)


def test_clamp_from_the_add_callback(raw: MakeRaw) -> None:
    """c = target, g = -1 in a callback is a clamp."""
    r = raw("llama")
    toks = H.prompt(6)
    vectors = {0: H.vector(r.n_embd, [(1, RESID)])}
    r.steer_with(vectors, [NativeTerm(0, CLAMP, 0.8)])
    want = r.read(toks, [1])[1]
    r.clear()

    def add(tokens: native.AddTokens) -> None:
        tokens.c[:, 0], tokens.g[:, 0] = 0.8, -1.0

    r.steer.on_add(add)
    assert np.abs(r.read(toks, [1])[1] - want).max() < 1e-5


def test_ctrl_c_waits_until_the_callback_is_done(llama_cpp: Any, tiny: Any) -> None:
    """Raised at a callback's first line it would be printed and forgotten: the reply went on, with a traceback in its middle."""
    finished: list[int] = []

    def interrupted(rows: native.ReadRows) -> None:
        if not finished:
            signal.raise_signal(signal.SIGINT)
        finished.append(rows.layer)

    with LocalEngine(tiny("llama"), n_ctx=256, n_threads=1) as engine:
        plain = engine.generate("a long day", max_tokens=3).tokens
        engine.on_read(interrupted, layers=[1])
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            engine.generate("a long day", max_tokens=3)
        assert finished == [1] and signal.getsignal(signal.SIGINT) is handler
        assert engine.generate("a long day", max_tokens=3).tokens == plain  # and the engine goes on working
        assert len(finished) > 3
