"""Strength, position and sequence changes are inputs of a graph: they rebuild nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.engine import harness as H
from tests.engine.harness import ADD, ALL, CLAMP, MEAN, PROJECT, RENORM, RESID, NativeTerm, Raw, Tok

MakeRaw = Callable[..., Raw]
STEPS = 1000


class Counted:
    """Graphs built and buffers reserved since the last look."""

    def __init__(self, r: Raw) -> None:
        self._r = r
        self._at = r.steer.stats()

    def since(self) -> tuple[int, int]:
        now, before = self._r.steer.stats(), self._at
        self._at = now
        return now.n_graph_builds - before.n_graph_builds, now.n_reserves - before.n_reserves


def strengths(n: int) -> Iterator[float]:
    rng = np.random.default_rng(1)
    return (float(x) for x in rng.uniform(0.1, 2.0, n) * rng.choice([-1, 1], n))


@pytest.mark.parametrize("op", [ADD, PROJECT, CLAMP])
def test_a_thousand_strengths_at_one_position(fresh: MakeRaw, op: int) -> None:
    """The same token over and over: not a single graph is built, and each of the thousand states is right."""
    r = fresh("llama")
    layer = 1
    vectors = {0: H.vector(r.n_embd, [(layer, RESID)])}
    toks = H.prompt(11)
    r.decode(toks[:10])
    plain = r.read([toks[10]], [layer])[layer]
    memory, remove = r.memory, H.llama_cpp.llama_memory_seq_rm
    r.steer_with(vectors, [NativeTerm(0, op, 1.0)], first=10)
    r.steer.set_captures([layer], [RESID])
    r.steer.want(0, 10, -1)
    remove(memory, 0, 10, -1)
    r.decode([toks[10]])  # the first use builds the graph
    r.steer.clear_rows()
    counted = Counted(r)
    used = [abs(s) if op == PROJECT else s for s in strengths(STEPS)]
    for strength in used:
        r.steer.set_config(1, [NativeTerm(0, op, strength)])
        remove(memory, 0, 10, -1)
        r.decode([toks[10]])
    assert counted.since() == (0, 0)
    rows = r.steer.rows(layer, RESID)
    assert rows.shape == (STEPS, r.n_embd)
    for strength, row in zip(used, rows, strict=True):
        terms = [NativeTerm(0, op, strength)]
        H.close(row, H.edited(plain, (layer, RESID), vectors, terms)[0], H.tolerance(plain, vectors, terms))


@pytest.mark.parametrize("arch", ["llama", "deepseek4"])
def test_a_thousand_strengths_over_a_thousand_tokens(fresh: MakeRaw, arch: str) -> None:
    """A long decode rebuilds as its KV cache grows; with a new strength for each token it rebuilds no oftener.

    An edit at a layer reaches later tokens above that layer only, so there each token is its plain state plus its own dose.
    """
    layer = 2
    toks = H.prompt(STEPS)
    used = list(strengths(STEPS))
    vectors = {0: H.vector(128 if arch == "llama" else 256, [(layer, RESID)], scale=0.5)}
    builds, rows = {}, {}
    for mode in ("plain", "constant", "changing"):
        r = fresh(arch, n_ctx=1024, n_seq_max=1)
        stream = ALL if r.info.n_streams > 1 else MEAN
        r.steer_with(vectors, [NativeTerm(0, ADD, 1.0)])
        if mode == "plain":
            r.steer.set_range(0, 0, -1, 0)
        r.steer.set_captures([layer], [RESID], stream=stream)
        r.steer.want(0, 0, -1)
        counted = Counted(r)
        for tok, strength in zip(toks, used, strict=True):
            if mode == "changing":
                r.steer.set_config(1, [NativeTerm(0, ADD, strength)])
            r.decode([tok])
        builds[mode] = counted.since()
        assert r.steer.stats().n_row_uploads == {"plain": 0, "constant": 1, "changing": STEPS}[mode]
        rows[mode] = r.rows_of(toks, [layer], RESID, stream)[layer]
    assert builds["plain"] == builds["constant"] == builds["changing"]
    assert builds["plain"][0] < STEPS / 50 and builds["plain"][1] == 0
    for mode, doses in (("constant", [1.0] * STEPS), ("changing", used)):
        v, scale = vectors[0].places[layer, RESID]
        move = np.outer(doses, scale * v.astype(np.float64)).reshape(STEPS, *(1,) * (rows[mode].ndim - 2), -1)
        H.close(rows[mode], rows["plain"] + move, H.tolerance(rows["plain"], vectors, [NativeTerm(0, ADD, 2.0)]))


def test_what_rebuilds_and_what_does_not(fresh: MakeRaw) -> None:
    r = fresh("llama")
    toks = iter(H.prompt(200))
    places = [(il, RESID) for il in range(3)]
    r.steer_with({0: H.vector(r.n_embd, places), 1: H.vector(r.n_embd, places, seed=2)}, [NativeTerm(0, CLAMP, 1.0)])
    r.decode([next(toks)])
    counted = Counted(r)

    def cost() -> tuple[int, int]:
        r.decode([next(toks)])
        return counted.since()

    assert cost() == (0, 0)
    # a change of range, of config, of layer window, of op, of content
    r.steer.set_config(2, [NativeTerm(0, ADD, 0.3, 1, 1), NativeTerm(1, ADD, -1.0)])
    r.steer.set_range(0, 0, -1, 2)
    assert cost() == (0, 0)
    r.steer.set_config(2, [NativeTerm(1, ADD, 2.0, 0, 0)])
    assert cost() == (0, 0)
    r.steer.set_config(2, [NativeTerm(1, PROJECT, 1.0)])  # the second projecting vector fits the room there is
    assert cost() == (0, 0)
    H.vector(r.n_embd, places[:2], seed=9).put(r.steer, 1)
    assert cost() == (0, 0)
    H.vector(r.n_embd, places[2:], seed=9).put(r.steer, 5)
    r.steer.set_config(3, [NativeTerm(5)])
    r.steer.set_range(0, 0, -1, 3)
    assert cost() == (0, 0)
    # a layer that was not there: buffers are reserved at once, in the setter
    H.vector(r.n_embd, [(3, RESID)]).put(r.steer, 6)
    assert counted.since() == (0, 1)
    assert cost() == (1, 0)
    # one batch shape to another and back, as without steering
    r.decode([next(toks), next(toks)])
    assert counted.since() == (1, 0)
    assert cost() == (1, 0)


@pytest.mark.parametrize("arch", ["llama", "deepseek4"])
def test_off_and_on(fresh: MakeRaw, arch: str) -> None:
    """Two graphs, of which llama.cpp keeps one: a switch costs one build, and staying costs none."""
    r = fresh(arch)
    toks = iter(H.prompt(100))
    r.steer_with({0: H.vector(r.n_embd, [(1, RESID)])}, [NativeTerm(0, ADD, 1.0)])
    r.decode([next(toks)])
    r.decode([next(toks)])
    counted = Counted(r)
    on = r.steer.stats().n_graph_on
    for i in range(12):
        strength = 0.0 if i % 2 == 0 else 1.0 + i
        r.steer.set_config(1, [NativeTerm(0, ADD, strength)])
        for k in range(3):
            r.decode([next(toks)])
            assert counted.since() == ((1, 0) if k == 0 else (0, 0))
    assert r.steer.stats().n_graph_on == on + 6


def test_reading_off_and_on(fresh: MakeRaw) -> None:
    r = fresh("llama")
    toks = iter(H.prompt(100))
    r.steer_with({0: H.vector(r.n_embd, [(1, RESID)])}, [NativeTerm(0, ADD, 1.0)])
    r.steer.set_captures([0, 1], [RESID, RESID])
    r.decode([next(toks)])
    r.decode([next(toks)])
    counted = Counted(r)
    for i in range(2, 50):
        wanted = (i // 5) % 2 == 1
        r.steer.want(0, i, i + 1, wanted)
        r.decode([next(toks)])
        assert counted.since() == ((1, 0) if i % 5 == 0 else (0, 0)), i
    r.steer.set_captures([0, 1], [RESID, RESID])  # the same captures again cost nothing
    assert counted.since() == (0, 0)
    r.steer.set_captures([0], [RESID])
    assert counted.since() == (0, 1)
    r.steer.set_captures([], [])
    assert counted.since() == (0, 0)


def test_a_batch_of_many_sequences_changes_hands(fresh: MakeRaw) -> None:
    """Slots of a server: each step other sequences are steered, with other strengths, in one graph."""
    r = fresh("llama", n_seq_max=6)
    vectors = {0: H.vector(r.n_embd, [(1, RESID)])}
    rng = np.random.default_rng(3)
    for seq in range(6):
        r.steer_with(vectors, [NativeTerm(0, ADD, 1.0)], config=1 + seq, seq=seq)
    r.decode([Tok(50 + seq, 0, seq) for seq in range(6)])
    counted = Counted(r)
    for step in range(1, 101):
        active = rng.random(6) < 0.5
        active[step % 6] = True
        for seq in range(6):
            r.steer.set_config(1 + seq, [NativeTerm(0, ADD, float(rng.uniform(0.5, 2.0)) * bool(active[seq]))])
        r.decode([Tok(int(rng.integers(40, 200)), step, seq) for seq in range(6)])
    builds, reserves = counted.since()
    # one build where the KV cache's length in use grows by a step (its padding), none for the 600 changes
    assert builds <= 1 and reserves == 0


def test_a_graph_does_what_its_batches_need(fresh: MakeRaw) -> None:
    """Who once projects or restores a length does not slow all that come later; those who take turns rebuild nothing."""
    r = fresh("llama")
    toks = iter(H.prompt(400))
    places = [(il, RESID) for il in range(r.n_layer)]
    H.vector(r.n_embd, places).put(r.steer, 0)
    r.steer.set_config(1, [NativeTerm(0, ADD, 1.0)])
    r.steer.set_config(2, [NativeTerm(0, PROJECT, 1.0)])
    r.steer.set_config(3, [NativeTerm(0, RENORM, 1.0)])
    r.steer.set_config(4, [NativeTerm(0, ADD, 1.0, 2, 2)])

    def nodes(config: int, times: int = 1) -> int:
        r.steer.set_range(0, 0, -1, config)
        for _ in range(times):
            r.decode([next(toks)])
        return r.steer.stats().n_edit_nodes

    assert nodes(4) == 2, "a gather and an add"
    assert nodes(1) == 1 + r.n_layer + 1, "a gather for all, and an add for each layer"
    everything = nodes(3), nodes(2)
    counted = Counted(r)
    for config in (1, 2, 3, 4) * 5:
        assert nodes(config) == max(everything)
    assert counted.since() == (0, 0), "those who take turns"
    assert nodes(4, times=70) == 2, "what nobody has needed for a while has gone"


def test_a_resident_row_waits_for_nothing(fresh: MakeRaw) -> None:
    """A steered token whose row is on the device must not hold up the pipeline."""
    r = fresh("llama")
    toks = iter(H.prompt(100))
    r.steer_with({0: H.vector(r.n_embd, [(1, RESID)])}, [NativeTerm(0, ADD, 1.0)])
    r.decode([next(toks) for _ in range(10)])
    assert r.steer.stats().n_row_waits == 1
    for _ in range(20):
        r.decode([next(toks)])
    assert r.steer.stats().n_row_waits == 1
    r.steer.set_config(1, [NativeTerm(0, ADD, 0.5)])
    r.decode([next(toks)])
    assert r.steer.stats().n_row_waits == 2
