"""Reading hidden states: chosen layers, sites and tokens, over several ubatches, with steering or without."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.errors import EngineError
from tests.engine import harness as H
from tests.engine.harness import ADD, ALL, ATTN, CLAMP, FFN, MEAN, RESID, NativeTerm, Raw, Tok

MakeRaw = Callable[..., Raw]
ARCHS = H.CORE
# llama.cpp gathers their output rows after the last block.
WHOLE_LAST_LAYER = ("deepseek4", "gpt-oss", "qwen3next", "qwen35", "qwen35moe")


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("n_ubatch", [4, 512])
@pytest.mark.parametrize("arch", ARCHS)
def test_rows_are_what_the_graph_computes(
    llama_cpp: Any, tiny: Callable[..., Path], fresh: MakeRaw, arch: str, n_ubatch: int, steered: bool
) -> None:
    """Against llama.cpp's own evaluation callback, bit for bit: the right node, layer, site, token and stream."""
    resid = "l_last" if arch == "deepseek4" else "l_out"
    reader = fresh(arch, n_ubatch=n_ubatch)
    nodes = H.Nodes(H.llama_cpp.llama_cpp._lib, [resid, "attn_out", "ffn_out"])
    watched = fresh(arch, n_ubatch=n_ubatch, cb_eval=nodes.callback)
    n, layers = 11, list(range(reader.n_layer))
    toks = H.prompt(n)
    if steered:
        for r in (reader, watched):
            vector = H.vector(r.n_embd, [(il, RESID) for il in layers], scale=0.5)
            r.steer_with({0: vector}, [NativeTerm(0, CLAMP, 1.0)], first=2, end=9)
    nodes.values.clear()  # of the reserve passes there are none, but be sure
    logits = watched.decode(toks)
    s = reader.info.n_streams
    want = {(il, RESID): nodes.rows(f"{resid}-{il}", s, reader.n_embd) for il in layers}
    sites = [RESID]
    if arch == "deepseek4":
        sites += [ATTN, FFN]
        want |= {(il, ATTN): nodes.rows(f"attn_out-{il}", 1, reader.n_embd) for il in layers}
        want |= {(il, FFN): nodes.rows(f"ffn_out-{il}", 1, reader.n_embd) for il in layers}
    places = [(il, site) for il in layers for site in sites]
    reader.steer.set_captures([il for il, _ in places], [site for _, site in places], stream=ALL)
    reader.steer.want(0, 0, -1)
    assert np.array_equal(reader.decode(toks), logits)
    assert [int(p) for p in reader.steer.kept()[1]] == list(range(n))
    for il, site in places:
        got = reader.steer.rows(il, site, s if site == RESID else 1).reshape(n, -1, reader.n_embd)
        assert np.array_equal(got, want[il, site]), (il, site)
    if s > 1:
        reader.steer.set_captures(layers, [RESID] * len(layers), stream=MEAN)
        reader.forget()
        reader.decode(toks)
        for il in layers:
            mean = want[il, RESID].mean(axis=1, dtype=np.float64)
            H.close(reader.steer.rows(il, RESID), mean, 1e-6 * float(np.abs(want[il, RESID]).max()))


@pytest.mark.parametrize("arch", ["llama", "deepseek4"])
def test_chosen_tokens_and_layers(raw: MakeRaw, arch: str) -> None:
    """Random choices, always the same rows as reading everything. No last layer here: it has its own rule."""
    rng = random.Random(4)
    for n_ubatch in (1, 3, 4, 5, 512):
        r = raw(arch, n_ubatch=n_ubatch)
        every = list(range(r.n_layer - 1))
        toks = [*H.prompt(13, 0, seed=1), *H.prompt(6, 1, seed=2)]
        everything = r.read([toks[:13], toks[13:]], every)
        for _ in range(6):
            layers = rng.sample(every, rng.randint(1, len(every)))
            r.clear()
            r.steer.set_captures(layers, [RESID] * len(layers))
            wanted = sorted(rng.sample(range(19), rng.randint(1, 10)))
            for i in wanted:
                r.steer.want(toks[i].seq, toks[i].pos, toks[i].pos + 1)
            last_only = [Tok(t.token, t.pos, t.seq, t.pos in (12, 5)) for t in toks]
            r.decode(last_only[:13])
            r.decode(last_only[13:])
            seqs, poss = r.steer.kept()
            assert [(int(a), int(b)) for a, b in zip(seqs, poss, strict=True)] == [(toks[i].seq, toks[i].pos) for i in wanted]
            for il in layers:
                assert np.array_equal(r.steer.rows(il, RESID), everything[il][wanted])


def test_rows_add_up_until_they_are_dropped(raw: MakeRaw) -> None:
    r = raw("llama", n_ubatch=4)
    toks = H.prompt(12)
    plain = r.read(toks, [0, 2])
    r.clear()
    r.steer.set_captures([0, 2], [RESID, RESID])
    assert len(r.steer.kept()[0]) == 0 and r.steer.rows(0, RESID).shape == (0, r.n_embd)
    r.steer.want(0, 0, 6)
    r.decode(toks[:5])
    assert len(r.steer.kept()[0]) == 5
    r.decode(toks[5:9])
    assert [int(p) for p in r.steer.kept()[1]] == list(range(6)), "positions 6 on were not wanted"
    r.steer.want(0, 10, -1)
    r.decode(toks[9:])
    assert [int(p) for p in r.steer.kept()[1]] == [*range(6), 10, 11]
    # other ubatch boundaries than the first time: float32 noise of other batch shapes
    assert np.abs(r.steer.rows(2, RESID) - plain[2][[*range(6), 10, 11]]).max() < 1e-4
    r.steer.clear_rows()
    assert len(r.steer.kept()[0]) == 0
    r.forget()
    r.decode(toks)
    assert len(r.steer.kept()[0]) == 8, "captures and wishes stay when rows are dropped"
    r.steer.want(0, 0, -1, False)
    r.steer.clear_rows()
    r.forget()
    r.decode(toks)
    assert len(r.steer.kept()[0]) == 0
    # without keep, nothing is held
    r.steer.want(0, 0, -1)
    r.steer.set_captures([0, 2], [RESID, RESID], keep=False)
    r.forget()
    r.decode(toks)
    assert len(r.steer.kept()[0]) == 0
    r.steer.set_captures([0, 2], [RESID, RESID])
    r.forget()
    r.decode(toks)
    assert len(r.steer.kept()[0]) == 12
    # taking captures away drops what was read
    r.steer.set_captures([], [])
    assert len(r.steer.kept()[0]) == 0
    with pytest.raises(EngineError, match="ayer 0, resid_post is not captured"):
        r.steer.rows(0, RESID)


@pytest.mark.parametrize("arch", [a for a in ARCHS if a not in WHOLE_LAST_LAYER])
@pytest.mark.parametrize("n_ubatch", [5, 512])
def test_last_layer_holds_outputs_only(raw: MakeRaw, arch: str, n_ubatch: int) -> None:
    """A wanted token that is no output is an error of its sequence, with a sentence; the others are computed and read."""
    r = raw(arch, n_ubatch=n_ubatch)
    assert r.info.last_layer_outputs_only
    top = r.n_layer - 1
    toks = H.prompt(12)
    want = r.read(toks, [0, top])
    logits = r.decode(H.prompt(3, 1))
    r.clear()
    few = [Tok(t.token, t.pos, 0, t.pos in (3, 11)) for t in toks]
    r.steer.set_captures([0, top], [RESID, RESID])
    r.steer.want(0, 3, 4)
    r.steer.want(0, 7, 8)
    assert r.try_decode(few) == 0
    assert f"layer {top} holds output tokens only: position 7 of sequence 0 is no output" in r.steer.sequence_error()
    assert r.steer.sequence_error() is None, "told once"
    assert [int(p) for p in r.steer.kept()[1]] == [3]
    r.clear()
    assert np.array_equal(r.decode(H.prompt(3, 1)), logits)
    r.clear()
    r.steer.want(0, 3, 4)
    r.steer.want(0, 11, 12)
    r.decode(few)
    assert [int(p) for p in r.steer.kept()[1]] == [3, 11]
    for il in (0, top):
        # fewer outputs: the last block and the head are computed on other shapes
        assert np.abs(r.steer.rows(il, RESID) - want[il][[3, 11]]).max() < 1e-4


def test_deepseek4_last_layer_is_read_at_any_token(raw: MakeRaw) -> None:
    r = raw("deepseek4", n_ubatch=5)
    assert not r.info.last_layer_outputs_only
    top = r.n_layer - 1
    toks = H.prompt(12)
    want = r.read(toks, [top], RESID, ALL)[top]
    r.clear()
    none = [Tok(t.token, t.pos, 0, False) for t in toks]
    assert np.abs(r.read(none, [top], RESID, ALL)[top] - want).max() < 1e-4


@pytest.mark.parametrize("arch", ARCHS)
def test_no_outputs_at_all(raw: MakeRaw, arch: str) -> None:
    """A prompt chunk without any output: layers below the last are read and edited all the same."""
    for n_ubatch in (5, 512):
        r = raw(arch, n_ubatch=n_ubatch)
        toks = H.prompt(9)
        none = [Tok(t.token, t.pos, 0, False) for t in toks]
        layers = list(range(r.n_layer - 1))
        places = [(il, RESID) for il in range(r.n_layer)]
        r.steer_with({0: H.vector(r.n_embd, places, scale=0.5)}, [NativeTerm(0, CLAMP, 1.0)])
        want = r.read(toks, layers)
        r.forget()
        r.steer.clear_rows()
        got = r.read(none, layers)
        for il in layers:
            assert np.abs(got[il] - want[il]).max() < 1e-4
        # and what they left in the KV cache serves the next token
        tail = [Tok(77, 9)]
        after = r.decode(tail)
        r.forget()
        r.steer.set_captures([], [])
        r.decode(toks)
        assert np.abs(r.decode(tail) - after).max() < 1e-3


def test_fewer_rows_than_wanted(raw: MakeRaw) -> None:
    r = raw("llama", n_ubatch=8)
    toks = H.prompt(16)
    want = r.read(toks, [1])[1]
    r.clear()
    r.steer.set_captures([1], [RESID], n_rows=3)
    r.steer.want(0, 0, 3)
    r.steer.want(0, 8, 12)
    assert r.try_decode(toks) == 0
    assert "more than 3 tokens of one ubatch are to be read" in r.steer.sequence_error(0)
    assert [int(p) for p in r.steer.kept()[1]] == [0, 1, 2, 8, 9, 10], "what there was room for"
    assert r.steer.rows(1, RESID).shape[0] == 6
    r.clear()
    r.steer.want(0, 5, 8)
    r.steer.want(0, 13, 16)
    r.decode(toks)
    assert np.array_equal(r.steer.rows(1, RESID), want[[5, 6, 7, 13, 14, 15]])
    # more rows than a ubatch has are not allocated
    before = r.steer.stats().n_device_bytes
    r.steer.set_captures([1], [RESID], n_rows=2_000_000_000)
    assert r.steer.stats().n_device_bytes < before + 100 * r.n_embd * 4
    r.forget()
    r.decode(toks)
    assert np.array_equal(r.steer.rows(1, RESID), want[[5, 6, 7, 13, 14, 15]])


def test_shared_tokens_are_read_for_whoever_wants_them(raw: MakeRaw) -> None:
    """A token of two sequences is read when either wants it."""
    for wisher in (0, 1):
        r = raw("llama", kv_unified=True)
        r.steer.set_captures([1], [RESID])
        r.steer.want(wisher, 0, -1)
        assert r.try_decode([(t.token, t.pos, (0, 1), True) for t in H.prompt(4)]) == 0
        seqs, poss = r.steer.kept()
        assert [int(p) for p in poss] == [0, 1, 2, 3], wisher


def test_steering_one_layer_and_reading_others(raw: MakeRaw) -> None:
    """Captures and edits at different places and sites of one graph do not get in one another's way."""
    r = raw("deepseek4", n_ubatch=5)
    toks = H.prompt(11)
    places = [(il, site) for il in range(r.n_layer) for site in (RESID, ATTN, FFN)]
    r.steer_with({0: H.vector(r.n_embd, [(2, RESID), (4, FFN)], scale=1.0)}, [NativeTerm(0, ADD, 1.0)])
    r.steer.set_captures([il for il, _ in places], [s for _, s in places])
    r.steer.want(0, 0, -1)
    r.decode(toks)
    everything = {at: r.steer.rows(*at) for at in places}
    for at in places:
        r.forget()
        r.steer.clear_rows()
        r.steer.set_captures([at[0]], [at[1]])
        r.decode(toks)
        assert np.array_equal(r.steer.rows(*at), everything[at]), at


def test_captures_of_one_context_at_a_time(raw: MakeRaw) -> None:
    """Each new set replaces the former one; rows of other layers are gone."""
    r = raw("llama")
    toks = H.prompt(5)
    want = r.read(toks, [0, 1, 2])
    for layers in ([0], [1, 2], [2], [0, 1, 2], [2, 0]):
        r.clear()
        got = r.read(toks, layers)
        for il in layers:
            assert np.array_equal(got[il], want[il])
    r.steer.set_captures([2], [RESID])
    for il in (0, 1):
        with pytest.raises(EngineError, match=f"ayer {il}, resid_post is not captured"):
            r.steer.rows(il, RESID)
