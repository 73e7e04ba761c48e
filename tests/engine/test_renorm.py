"""Op renorm: what is added, at the length that was there; each token and each stream on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from steer_plugins.errors import SteerError
from tests.engine import harness as H
from tests.engine.harness import ADD, ATTN, CLAMP, FFN, PROJECT, RENORM, RESID, NativeTerm, Raw
from tests.engine.test_formula import check, read_layer

MakeRaw = Callable[..., Raw]
PLACES = [("llama", RESID), ("gemma3", RESID), ("deepseek4", RESID), ("deepseek4", ATTN), ("deepseek4", FFN)]


def lengths(h: np.ndarray) -> np.ndarray:
    return np.linalg.norm(h.astype(np.float64), axis=-1)


@pytest.mark.parametrize("which", [0, 1, -1])
@pytest.mark.parametrize("n_ubatch", [1, 3, 4, 5, 512])
@pytest.mark.parametrize(("arch", "site"), PLACES)
def test_the_length_is_what_it_was(raw: MakeRaw, arch: str, site: int, n_ubatch: int, which: int) -> None:
    r = raw(arch, n_ubatch=n_ubatch)
    layer = which % r.n_layer
    toks = H.prompt(13)
    vectors = {0: H.vector(r.n_embd, [(layer, site)], scale=25.0), 1: H.vector(r.n_embd, [(layer, site)], seed=8, scale=-9.0)}
    plain = check(r, toks, layer, site, vectors, [NativeTerm(0, RENORM, 1.0)])
    check(r, toks, layer, site, vectors, [NativeTerm(0, RENORM, -0.5), NativeTerm(1, RENORM, 2.0)], plain)
    check(r, toks, layer, site, vectors, [NativeTerm(0, RENORM, 0.0)], plain)
    r.clear()
    r.steer_with(vectors, [NativeTerm(0, RENORM, 3.0)])
    got = read_layer(r, toks, layer, site)
    assert np.allclose(lengths(got), lengths(plain), rtol=1e-5)
    if site == RESID and r.info.n_streams > 1:  # one stream: the others are what they were, to the bit
        r.clear()
        r.steer_with(vectors, [NativeTerm(0, RENORM, 1.0, stream=2), NativeTerm(1, ADD, 1.0, stream=0)])
        got = read_layer(r, toks, layer, site)
        assert np.array_equal(got[:, [1, 3]], plain[:, [1, 3]])
        assert np.allclose(lengths(got[:, 2]), lengths(plain[:, 2]), rtol=1e-5)
        assert np.abs(lengths(got[:, 0]) - lengths(plain[:, 0])).max() > 0.05


@pytest.mark.parametrize("arch", ["llama", "deepseek4"])
def test_neighbours_do_not_feel_it(raw: MakeRaw, arch: str) -> None:
    """In one batch: renorm, add, project and nothing; those without renorm get the same bits as before there was any."""
    r = raw(arch)
    layer = 1
    vectors = {0: H.vector(r.n_embd, [(layer, RESID)], scale=20.0)}
    toks = [t for s in range(4) for t in H.prompt(5, s)]

    def run(ops: list[int | None]) -> np.ndarray:
        r.clear()
        r.steer_with(vectors, [])
        for s, op in enumerate(ops):
            if op is not None:
                r.steer.set_config(s + 2, [NativeTerm(0, op, 1.0)])
                r.steer.set_range(s, 0, -1, s + 2)
        return read_layer(r, toks, layer, RESID)

    before = run([None, ADD, PROJECT, None])
    plain = run([None] * 4)
    after = run([RENORM, ADD, PROJECT, None])
    assert np.array_equal(after[5:], before[5:])
    assert np.abs(after[:5] - before[:5]).max() > 0.05
    assert np.allclose(lengths(after[:5]), lengths(plain[:5]), rtol=1e-5)


def test_what_cannot_be_combined(raw: MakeRaw) -> None:
    r = raw("deepseek4")
    r.clear()
    vectors = {0: H.vector(r.n_embd, [(1, RESID), (2, RESID)]), 1: H.vector(r.n_embd, [(2, RESID)], seed=8)}
    for index, vector in vectors.items():
        vector.put(r.steer, index)
    for op in (ADD, PROJECT, CLAMP):
        with pytest.raises(SteerError, match="restores the length at layer 2"):
            r.steer.set_config(1, [NativeTerm(0, RENORM, 1.0), NativeTerm(1, op, 1.0)])
        for fine in (
            [NativeTerm(0, RENORM, 1.0, 1, 1), NativeTerm(1, op, 1.0)],
            [NativeTerm(0, RENORM, 1.0), NativeTerm(1, op, 0.0)],
            [NativeTerm(0, RENORM, 1.0, stream=0), NativeTerm(1, op, 1.0, stream=1)],
        ):
            r.steer.set_config(1, fine)


def test_edit_ids_tell_it_from_add(raw: MakeRaw) -> None:
    r = raw("llama")
    r.clear()
    H.vector(r.n_embd, [(1, RESID)]).put(r.steer, 0)
    terms: list[list[NativeTerm]] = [
        [NativeTerm(0, ADD, 1.0)],
        [NativeTerm(0, RENORM, 1.0)],
        [NativeTerm(0, RENORM, 0.5), NativeTerm(0, RENORM, 0.5)],
        [NativeTerm(0, RENORM, 1.0), NativeTerm(0, RENORM, -1.0)],
    ]
    for i, one in enumerate(terms, start=1):
        r.steer.set_config(i, one)
    add, renorm, halves, nothing = (r.steer.config_id(i) for i in range(1, 5))
    assert add != renorm == halves != 0 == nothing


def test_a_callback_may_not_add_there(raw: MakeRaw) -> None:
    r = raw("llama")
    r.clear()
    vectors = {0: H.vector(r.n_embd, [(1, RESID)])}
    r.steer_with(vectors, [NativeTerm(0, RENORM, 1.0)])

    def add(tokens: Any) -> None:
        tokens.c[:, 0] = 1.0

    r.steer.on_add(add)
    try:
        assert r.try_decode(H.prompt(3)) != 0
        assert "restores the length" in r.steer.error()
    finally:
        r.steer.on_add(None)
