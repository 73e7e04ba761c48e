"""Who gets what: sequences, position ranges, and the edit ids by which cached tokens are told apart."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from steer_plugins.errors import EngineError
from tests.engine import harness as H
from tests.engine.harness import ADD, ALL, ATTN, CLAMP, FFN, MEAN, PROJECT, RESID, NativeTerm, Raw, Tok

MakeRaw = Callable[..., Raw]
BOTH = ("llama", "deepseek4")
MORE = (*BOTH, "qwen3next")  # recurrent layers: batches are cut into sequences of equal length


def streams(r: Raw) -> int:
    return ALL if r.info.n_streams > 1 else MEAN


@pytest.mark.parametrize("kv_unified", [False, True])
@pytest.mark.parametrize("n_ubatch", [1, 3, 4, 5, 512])
@pytest.mark.parametrize("arch", MORE)
def test_two_sequences_in_one_batch(raw: MakeRaw, arch: str, n_ubatch: int, kv_unified: bool) -> None:
    """Interleaved tokens of two sequences, steered differently: each gets its own formula, and nothing of the other's."""
    r = raw(arch, n_ubatch=n_ubatch, kv_unified=kv_unified)
    layer = r.n_layer // 2
    pairs = zip(H.prompt(7, 0, seed=1), H.prompt(7, 1, seed=2), strict=True)
    toks = [t for pair in pairs for t in pair]
    vectors = {k: H.vector(r.n_embd, [(layer, RESID)], seed=40 + k) for k in range(3)}
    mine = {0: [NativeTerm(0, ADD, 1.0)], 1: [NativeTerm(1, CLAMP, 0.5), NativeTerm(2, PROJECT, 1.0)]}
    plain = r.read(toks, [layer], RESID, streams(r))[layer]
    for steered in ({0: mine[0], 1: mine[1]}, {1: mine[0]}, {0: mine[1]}):
        r.clear()
        for seq, terms in steered.items():
            r.steer_with(vectors, terms, config=1 + seq, seq=seq)
        got = r.read(toks, [layer], RESID, streams(r))[layer]
        for seq in (0, 1):
            rows = [i for i, t in enumerate(toks) if t.seq == seq]
            terms = steered.get(seq, [])
            want = H.edited(plain[rows], (layer, RESID), vectors, terms)
            H.close(got[rows], want, H.tolerance(plain, vectors, [t for ts in mine.values() for t in ts]))


@pytest.mark.parametrize("arch", MORE)
def test_sequences_of_unequal_length(raw: MakeRaw, arch: str) -> None:
    """The batch is split into ubatches of equal sequences: rows come back in another order than they went in."""
    r = raw(arch, n_ubatch=8)
    layer = 1
    toks = [*H.prompt(9, 2, seed=3), *H.prompt(2, 0, seed=4), *H.prompt(5, 3, seed=5)]
    vectors = {k: H.vector(r.n_embd, [(layer, RESID)], seed=50 + k, scale=1.0 + k) for k in range(4)}
    plain = r.read(toks, [layer], RESID, streams(r))[layer]
    r.clear()
    for seq in (0, 2, 3):
        r.steer_with(vectors, [NativeTerm(seq, ADD, 1.0)], config=7 + seq, seq=seq)
    got = r.read(toks, [layer], RESID, streams(r))[layer]
    for i, t in enumerate(toks):
        terms = [NativeTerm(t.seq, ADD, 1.0)]
        H.close(got[i : i + 1], H.edited(plain[i : i + 1], (layer, RESID), vectors, terms), H.tolerance(plain, vectors, terms))


@pytest.mark.parametrize("n_ubatch", [3, 4, 512])
@pytest.mark.parametrize("arch", BOTH)
def test_position_range(raw: MakeRaw, arch: str, n_ubatch: int) -> None:
    """Only the tokens of the range change at that layer; they are not batch indices but positions."""
    r = raw(arch, n_ubatch=n_ubatch)
    layer = r.n_layer - 1 if arch == "deepseek4" else r.n_layer - 2
    toks = H.prompt(12)
    batches = [toks[:5], toks[5:]]
    vectors = {0: H.vector(r.n_embd, [(layer, RESID)])}
    plain = r.read(batches, [layer], RESID, streams(r))[layer]
    for first, end in ((0, 1), (3, 7), (11, 12), (4, -1), (0, -1), (40, 50)):
        r.clear()
        r.steer_with(vectors, [NativeTerm(0, CLAMP, 1.0)], first=first, end=end)
        got = r.read(batches, [layer], RESID, streams(r))[layer]
        for p in range(12):
            inside = p >= first and (end < 0 or p < end)
            want = H.edited(plain[p : p + 1], (layer, RESID), vectors, [NativeTerm(0, CLAMP, 1.0 if inside else 0.0)])
            H.close(got[p : p + 1], want, H.tolerance(plain, vectors, [NativeTerm(0, CLAMP, 1.0)]))


def test_later_ranges_win(raw: MakeRaw) -> None:
    """Random overlapping ranges against a plain list."""
    r = raw("llama")
    rng = np.random.default_rng(5)
    vectors = {k: H.vector(r.n_embd, [(1, RESID)], seed=60 + k) for k in range(4)}
    for k, vector in vectors.items():
        vector.put(r.steer, k)
        r.steer.set_config(1 + k, [NativeTerm(k, ADD, 1.0)])
    ids = [0, *(r.steer.config_id(1 + k) for k in range(4))]
    toks = H.prompt(30)
    plain = r.read(toks, [1])[1]
    for trial in range(20):
        r.clear()
        model = [0] * 30
        for _ in range(int(rng.integers(1, 12))):
            first = int(rng.integers(0, 30))
            end = -1 if rng.random() < 0.2 else int(rng.integers(first + 1, 34))
            config = int(rng.integers(0, 5))
            r.steer.set_range(0, first, end, config)
            for p in range(first, 30 if end < 0 else min(end, 30)):
                model[p] = config
        assert [r.steer.edit_id(0, p) for p in range(30)] == [ids[c] for c in model]
        if trial < 5:
            got = r.read(toks, [1])[1]
            for p, c in enumerate(model):
                terms = [NativeTerm(c - 1, ADD, 1.0)] if c else []
                H.close(
                    got[p],
                    H.edited(plain[p : p + 1], (1, RESID), vectors, terms)[0],
                    H.tolerance(plain, vectors, [NativeTerm(0)]),
                )


@pytest.mark.parametrize("arch", BOTH)
def test_ranges_persist_over_decodes_and_replays(raw: MakeRaw, arch: str) -> None:
    r = raw(arch)
    vectors = {0: H.vector(r.n_embd, [(il, RESID) for il in range(r.n_layer)], scale=1.0)}
    r.steer_with(vectors, [NativeTerm(0, ADD, 1.0)], first=2, end=6)
    toks = H.prompt(8)
    once = [r.decode([t])[0] for t in toks]
    r.forget()
    again = [r.decode([t])[0] for t in toks]
    assert np.array_equal(once, again)
    r.clear()
    plain = [r.decode([t])[0] for t in toks]
    assert np.array_equal(once[:2], plain[:2])
    assert all(not np.array_equal(a, b) for a, b in zip(once[2:], plain[2:], strict=True))


def test_replacing_a_config_changes_its_ranges(raw: MakeRaw) -> None:
    r = raw("llama")
    vectors = {0: H.vector(r.n_embd, [(1, RESID)])}
    toks = H.prompt(6)
    plain = r.read(toks, [1])[1]
    r.clear()
    r.steer_with(vectors, [NativeTerm(0, ADD, 1.0)])
    for strength in (1.0, -2.0, 0.25, 0.0, 1.0):
        r.steer.set_config(1, [NativeTerm(0, ADD, strength)])
        r.forget()
        r.steer.clear_rows()
        got = r.read(toks, [1])[1]
        H.close(
            got,
            H.edited(plain, (1, RESID), vectors, [NativeTerm(0, ADD, strength)]),
            H.tolerance(plain, vectors, [NativeTerm(0, ADD, 2.0)]),
        )
    r.steer.clear_config(1)
    r.forget()
    r.steer.clear_rows()
    assert np.array_equal(r.read(toks, [1])[1], plain)
    r.steer.set_config(1, [NativeTerm(0, ADD, 1.0)])
    assert r.steer.edit_id(0, 3) == 0, "the ranges of a cleared config do not come back with its number"


def test_edit_ids(raw: MakeRaw) -> None:
    r = raw("deepseek4")
    s = r.steer
    places = [(1, RESID), (3, RESID)]
    a, b = H.vector(r.n_embd, places, seed=1), H.vector(r.n_embd, places, seed=2)
    a.put(s, 0)
    b.put(s, 1)
    a.put(s, 17)  # the same content under another number
    one = [NativeTerm(0, ADD, 0.5)]

    def identity(*terms: NativeTerm) -> int:
        s.set_config(1, list(terms))
        value = int(s.config_id(1))
        s.set_range(0, 0, -1, 1)
        assert s.edit_id(0, 9) == value
        return value

    # nothing
    assert s.edit_id(0, 0) == s.config_id(99) == 0
    assert identity() == identity(NativeTerm(0, ADD, 0.0)) == identity(NativeTerm(0, CLAMP, 0.0)) == 0
    assert identity(NativeTerm(0, ADD, 0.5), NativeTerm(17, ADD, -0.5)) == 0
    assert identity(NativeTerm(0, PROJECT, 1.0), NativeTerm(17, PROJECT, -1.0)) == 0
    # the same edit
    base = identity(*one)
    assert base != 0
    assert identity(NativeTerm(17, ADD, 0.5)) == base
    assert identity(NativeTerm(0, ADD, 0.25), NativeTerm(17, ADD, 0.25)) == base
    assert identity(NativeTerm(0, ADD, 0.5, 0, 5)) == base
    assert identity(NativeTerm(0, ADD, 0.5), NativeTerm(1, ADD, 0.0)) == base
    two = identity(NativeTerm(0, ADD, 0.5), NativeTerm(1, ADD, 1.0))
    assert identity(NativeTerm(1, ADD, 1.0), NativeTerm(17, ADD, 0.5)) == two
    # other edits
    others = [
        identity(NativeTerm(0, ADD, 0.5000001)),
        identity(NativeTerm(0, ADD, -0.5)),
        identity(NativeTerm(1, ADD, 0.5)),
        identity(NativeTerm(0, PROJECT, 0.5)),
        identity(NativeTerm(0, PROJECT, -0.5)),
        identity(NativeTerm(0, CLAMP, 0.5)),
        identity(NativeTerm(0, ADD, 0.5, 2)),
        identity(NativeTerm(0, ADD, 0.5, -1, 2)),
        *(identity(NativeTerm(0, ADD, 0.5, stream=k)) for k in range(4)),
        two,
        base,
    ]
    assert len(set(others)) == len(others) and 0 not in others
    # the same directions at other places
    v, w = H.directions(2, r.n_embd)
    for k, places in enumerate(
        ([(1, RESID)], [(2, RESID)], [(1, ATTN)], [(1, FFN)], [(1, RESID), (2, RESID)], [(2, RESID), (1, RESID)])
    ):
        H.Vector({at: ((v, w)[i], 1.0) for i, at in enumerate(places)}).put(s, 30 + k)
    at_places = [identity(NativeTerm(30 + k, op, 0.5)) for k in range(6) for op in (ADD, PROJECT)]
    assert len({*at_places, *others}) == len(at_places) + len(others)
    # another scale is another edit, and replacing a vector changes the ids of the configs that use it
    s.set_config(1, one)
    H.vector(r.n_embd, places, seed=1, scale=2.6).put(s, 0)
    assert s.config_id(1) not in others
    a.put(s, 0)
    assert s.config_id(1) == base
    s.set_range(0, 4, 6, 0)
    assert [bool(s.edit_id(0, p)) for p in range(8)] == [True] * 4 + [False] * 2 + [True] * 2
    assert s.edit_id(1, 0) == 0
    s.clear_sequence(0)
    assert s.edit_id(0, 0) == 0


def test_tokens_shared_by_sequences(raw: MakeRaw) -> None:
    """One token of two sequences is computed once, so their steering must agree there."""
    r = raw("llama", kv_unified=True)
    vectors = {0: H.vector(r.n_embd, [(1, RESID)])}
    shared = [(t.token, t.pos, (0, 1), t.output) for t in H.prompt(4)]
    plain = r.try_decode(shared)
    assert plain == 0
    r.clear()
    r.steer_with(vectors, [NativeTerm(0, ADD, 1.0)], first=2)
    assert r.try_decode(shared) == 0
    message = r.steer.sequence_error(0)
    assert re.match(r"sequences (0 and 1|1 and 0) share the token at position 2 but not its steering", message)
    assert r.steer.sequence_error(1) == message and r.steer.sequence_error() is None
    # equal content counts, not the config's number
    r.forget()
    r.steer.set_config(2, [NativeTerm(0, ADD, 1.0)])
    r.steer.set_range(1, 2, -1, 2)
    assert r.try_decode(shared) == 0
    got = r.logits(3)
    r.clear()
    r.steer.set_range(0, 2, -1, 1)
    want = r.decode(H.prompt(4))[3]
    assert np.abs(got - want).max() < 1e-5  # other batch, same arithmetic: float32 noise at most


@pytest.mark.parametrize("arch", BOTH)
def test_more_distinct_configs_than_rows(raw: MakeRaw, arch: str) -> None:
    """More steerings in one batch than the device holds rows for: it makes room, once, and every token gets its own."""
    r = raw(arch)
    layer = 1
    n = 21
    toks = H.prompt(n)
    vectors = {k: H.vector(r.n_embd, [(layer, RESID)], seed=70 + k) for k in range(3)}
    plain = r.read(toks, [layer], RESID, streams(r))[layer]
    for k, vector in vectors.items():
        vector.put(r.steer, k)
    capacity = r.steer.stats().n_rows_capacity
    assert capacity < n

    def terms_of(p: int) -> list[NativeTerm]:
        return [NativeTerm(p % 3, (ADD, CLAMP, PROJECT)[p % 2], 0.1 * (p + 1))]

    r.clear()
    for p in range(n):
        r.steer.set_config(1 + p, terms_of(p))
    r.steer.set_range(0, 0, -1, 1)
    r.steer.set_captures([layer], [RESID], stream=streams(r))
    r.steer.want(0, 0, -1)
    r.decode(toks)  # leaves a graph of this very shape, from before there were more rows
    before = r.steer.stats().n_row_uploads
    for p in range(n):
        r.steer.set_range(0, p, p + 1, 1 + p)
    uploads = []
    for _ in range(3):
        r.forget()
        r.steer.clear_rows()
        r.decode(toks)
        got = r.rows_of(toks, [layer], RESID, streams(r))[layer]
        for p in range(n):
            want = H.edited(plain[p : p + 1], (layer, RESID), vectors, terms_of(p))
            H.close(got[p : p + 1], want, H.tolerance(plain, vectors, [NativeTerm(0, CLAMP, 2.0)]))
        assert r.steer.stats().n_rows_capacity >= n
        uploads.append(r.steer.stats().n_row_uploads - before)
    assert uploads == [n - 1] * 3, "what is resident is not written again"


def test_rows_are_reused_in_order_of_use(raw: MakeRaw) -> None:
    """Fewer live steerings than rows: going round uploads nothing; more: each is uploaded again, and stays right."""
    r = raw("llama")
    H.vector(r.n_embd, [(1, RESID)]).put(r.steer, 0)
    vector = {0: H.vector(r.n_embd, [(1, RESID)])}
    capacity = r.steer.stats().n_rows_capacity - 1  # one row stays zero
    toks = H.prompt(200)
    plain = r.read([[t] for t in toks], [1])[1]
    r.clear()
    for k in range(2 * capacity):
        r.steer.set_config(1 + k, [NativeTerm(0, ADD, 0.1 * (1 + k))])
    r.steer.set_captures([1], [RESID])
    r.steer.want(0, 0, -1)
    at = 0

    def go(k: int) -> None:
        nonlocal at
        if at:
            r.steer.set_range(0, 0, at, 0)  # what was computed needs no row
        r.steer.set_range(0, at, at + 1, 1 + k)
        r.decode([toks[at]])
        row = r.steer.rows(1, RESID)[at]
        # only layer 1 is steered and read, so what earlier tokens got changes nothing here
        H.close(row, H.edited(plain[at : at + 1], (1, RESID), vector, [NativeTerm(0, ADD, 0.1 * (1 + k))])[0], 2e-5)
        at += 1

    for k in range(capacity):
        go(k)
    uploads = r.steer.stats().n_row_uploads
    assert uploads == capacity
    for _ in range(3):
        for k in range(capacity):
            go(k)
    assert r.steer.stats().n_row_uploads == uploads
    go(capacity)  # pushes out config 0 of the round, the one used longest ago
    assert r.steer.stats().n_row_uploads == uploads + 1
    for k in range(1, capacity):
        go(k)
    assert r.steer.stats().n_row_uploads == uploads + 1
    go(0)
    assert r.steer.stats().n_row_uploads == uploads + 2
    assert r.steer.stats().n_rows_capacity == capacity + 1


def test_a_vector_is_cleared_only_when_no_config_uses_it(raw: MakeRaw) -> None:
    r = raw("llama")
    vectors = {0: H.vector(r.n_embd, [(1, RESID)]), 1: H.vector(r.n_embd, [(1, RESID)], seed=8)}
    r.steer_with(vectors, [NativeTerm(0, PROJECT, 1.0)])
    with pytest.raises(EngineError, match="vector 0 is in use"):
        r.steer.clear_vector(0)
    r.steer.set_config(1, [])
    r.steer.clear_vector(0)
    with pytest.raises(EngineError, match="vector 0 is not set"):
        r.steer.set_config(1, [NativeTerm(0)])
    # the projecting place it had is given to another vector
    plain = r.read(H.prompt(4), [1])[1]
    r.clear()
    r.steer.set_config(1, [NativeTerm(1, PROJECT, 1.0)])
    r.steer.set_range(0, 0, -1, 1)
    got = r.read(H.prompt(4), [1])[1]
    H.close(
        got,
        H.edited(plain, (1, RESID), vectors, [NativeTerm(1, PROJECT, 1.0)]),
        H.tolerance(plain, vectors, [NativeTerm(1, PROJECT)]),
    )


@pytest.mark.parametrize("arch", BOTH)
def test_vectors_replaced_between_decodes(raw: MakeRaw, arch: str) -> None:
    """Same number, other content: adding and projecting use the new one from the next decode on."""
    r = raw(arch)
    layer = 2
    toks = H.prompt(5)
    plain = r.read(toks, [layer], RESID, streams(r))[layer]
    for op in (ADD, CLAMP):
        for seed, extra in ((1, None), (2, None), (3, 3), (4, None)):  # the third brings a layer that was not there
            places = [(layer, RESID)] + ([(extra, RESID)] if extra else [])
            vectors = {0: H.vector(r.n_embd, places, seed=seed, scale=1.0 + seed)}
            r.clear()
            r.steer_with(vectors, [NativeTerm(0, op, 1.0)])
            got = r.read(toks, [layer], RESID, streams(r))[layer]
            H.close(
                got,
                H.edited(plain, (layer, RESID), vectors, [NativeTerm(0, op)]),
                H.tolerance(plain, vectors, [NativeTerm(0, op)]),
            )


def test_projecting_places_are_handed_on(raw: MakeRaw) -> None:
    """More vectors than can project at once take turns."""
    r = raw("llama")
    n = 70  # LLAMA_STEER_MAX_DYN is 64
    toks = H.prompt(3)
    vectors = {k: H.vector(r.n_embd, [(1, RESID)], seed=400 + k) for k in range(n)}
    plain = r.read(toks, [1])[1]
    for k, vector in vectors.items():
        vector.put(r.steer, k)
    for k in [*range(n), 0, 5, 69]:
        r.clear()
        r.steer.set_config(1, [NativeTerm(k, PROJECT, 1.0)])
        r.steer.set_range(0, 0, -1, 1)
        got = r.read(toks, [1])[1]
        H.close(
            got,
            H.edited(plain, (1, RESID), vectors, [NativeTerm(k, PROJECT, 1.0)]),
            H.tolerance(plain, vectors, [NativeTerm(k, PROJECT)]),
        )
    r.steer.set_config(1, [NativeTerm(0, ADD, 1.0)])
    former = r.steer.config_id(1)
    for k in range(64):
        r.steer.set_config(100 + k, [NativeTerm(k, PROJECT, 0.5)])
    with pytest.raises(EngineError, match="more than 64 directions"):
        r.steer.set_config(1, [NativeTerm(66, PROJECT, 1.0)])
    assert r.steer.config_id(1) == former, "the former content of the config stays"
    r.steer.clear_config(103)
    r.steer.set_config(1, [NativeTerm(66, PROJECT, 1.0)])


def test_unsteered_sequences_of_a_batch_stay_plain(raw: MakeRaw) -> None:
    """Four sequences, one of them steered: the logits of the others are those of a batch with no steering."""
    for arch in MORE:
        r = raw(arch)
        toks = [Tok(t.token, t.pos, seq, t.output) for seq in range(4) for t in H.prompt(5, seed=seq)]
        plain = r.decode(toks)
        r.clear()
        places = [(il, RESID) for il in range(r.n_layer)]
        r.steer_with({0: H.vector(r.n_embd, places)}, [NativeTerm(0, CLAMP, 1.0)], seq=2)
        got = r.decode(toks)
        rows = [i for i, t in enumerate(toks) if t.seq != 2]
        assert np.array_equal(got[rows], plain[rows])  # h + 0 is h, on CPU
        assert np.abs(got - plain).max() > 0.1


@pytest.mark.parametrize("arch", BOTH)
def test_each_config_is_seen_to_fire(raw: MakeRaw, arch: str) -> None:
    """A layer that another config edits proves nothing for this one."""
    r = raw(arch)
    top = r.n_layer - 1
    r.steer_with({0: H.vector(r.n_embd, [(1, RESID), (top, RESID)])}, [NativeTerm(0)], first=2)
    r.steer.set_config(2, [NativeTerm(0, ADD, 0.5, 0, 1)])
    r.steer.set_range(1, 3, -1, 2)
    assert [r.steer.config_acts(c, il, RESID) for c in (1, 2) for il in (1, top)] == [True, True, True, False]

    def fired() -> list[int]:
        return [r.steer.config_fired(c, il, RESID) for c in (1, 2) for il in (1, top)]

    r.decode(H.prompt(2))
    assert fired() == [0, 0, 0, 0] and r.steer.sequence_error() is None
    r.decode([Tok(9, 2, 0, output=False)])
    last = 0 if r.info.last_layer_outputs_only else 1  # no output, so the last layer never saw it: that is no error
    assert fired() == [1, last, 0, 0] and r.steer.sequence_error() is None
    r.decode([Tok(9, 3)])
    assert fired() == [2, last + 1, 0, 0] and r.steer.sequence_error() is None
    r.decode(H.prompt(5, seq=1))
    assert fired() == [2, last + 1, 1, 0] and r.steer.fired(1, RESID) == 3
    r.steer.set_config(1, [NativeTerm(0, ADD, 2.0)])
    assert fired() == [0, 0, 1, 0], "another config under the same number has proved nothing"
