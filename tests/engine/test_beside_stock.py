"""What is particular to steering beside an unmodified library: with ``STEER_RUNTIME=stock``, as a process loads one library."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.native.stock import _columns
from tests.engine import harness as H
from tests.engine.harness import ADD, PROJECT, RESID, NativeTerm, Raw, Tok, Vector

pytestmark = pytest.mark.skipif(os.environ.get("STEER_RUNTIME") != "stock", reason="run it with STEER_RUNTIME=stock")

MakeRaw = Callable[..., Raw]


def run(r: Raw, n: int = 9) -> list[np.ndarray]:
    """A prompt, then token by token."""
    toks = H.prompt(n + 6)
    return [r.decode(toks[:n]), *(r.decode([t]) for t in toks[n:])]


def whole(r: Raw, *, first: int = 1) -> Vector:
    return H.vector(r.n_embd, [(il, RESID) for il in range(first, r.n_layer)], scale=1.3)


def test_add_has_the_bits_of_the_control_vector(fresh: MakeRaw, tiny: Callable[..., Path]) -> None:
    """First by the callback, then by the control vector itself: both are what llama.cpp computes when told."""
    bare = Raw(tiny("llama"), steer=False)
    r = fresh("llama")
    v = whole(r)
    bare.set_cvec(
        [float(x) for d, scale in v.places.values() for x in np.float32(0.7 * scale * d.astype(np.float64))], 1, r.n_layer
    )
    want = run(bare)
    r.steer_with({0: v}, [NativeTerm(0, ADD, 0.7)])
    for a, b in zip(run(r), want, strict=True):
        assert np.array_equal(a, b)
    how = r.steer.how()
    assert how["n_edits"] == r.n_layer - 1 and how["n_cvec"] == 6 and how["n_cvec_set"] == 1
    bare.close()


def test_the_control_vector_leaves_nothing_behind(fresh: MakeRaw) -> None:
    """After it has acted: nothing, another op, and a token of another sequence in the same batch are as without it."""
    r, other = fresh("llama"), fresh("llama")
    plain = run(other)
    r.steer_with({0: whole(r)}, [NativeTerm(0)])
    run(r)
    assert r.steer.how()["n_cvec"] > 0
    r.clear()
    for a, b in zip(run(r), plain, strict=True):
        assert np.array_equal(a, b)
    for one in (r, other):
        one.clear()
        one.steer_with({0: whole(r)}, [NativeTerm(0, PROJECT)])
    for a, b in zip(run(r), run(other), strict=True):
        assert np.array_equal(a, b)
    both = [Tok(t.token, t.pos, seq) for t in H.prompt(5) for seq in (0, 1)]
    rows = []
    for one in (r, other):
        one.clear()
        one.steer.set_config(1, [NativeTerm(0)])
        one.steer.set_range(1, 2, -1, 1)
        rows.append(one.decode(both))
    assert np.array_equal(*rows)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell what a process holds")
def test_ten_thousand_strengths(fresh: MakeRaw) -> None:
    r = fresh("llama")
    (prompt, token) = H.prompt(1), H.prompt(2)[1]
    r.steer_with({0: whole(r)}, [NativeTerm(0)])
    r.decode(prompt)
    held = 0
    for i in range(10_000):
        r.steer.set_config(1, [NativeTerm(0, ADD, 0.5 + 1e-4 * i)])
        H.llama_cpp.llama_memory_seq_rm(r.memory, 0, 1, -1)
        r.decode([token])
        if i == 1_000:
            held = resident()
    assert resident() - held < 4 << 20
    assert r.steer.how()["n_cvec_set"] <= 2, "its tensors are written to; to tell the library would cost it a new graph"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["add", "read"])
def test_an_exception_in_a_callback(fresh: MakeRaw, kind: str, error: BaseException) -> None:
    r = fresh("llama")
    plain = r.decode(H.prompt(4))
    r.clear()

    def fails(_: Any) -> None:
        raise error

    r.steer_with({0: whole(r)}, [NativeTerm(0)], seq=3)
    r.steer.set_captures([1], [RESID])
    r.steer.want(0, 0, -1)
    (r.steer.on_add if kind == "add" else r.steer.on_read)(fails)
    assert r.try_decode(H.prompt(4)) == -3
    with pytest.raises(type(error)):
        r.steer.raise_callback_error()
    (r.steer.on_add if kind == "add" else r.steer.on_read)(None)
    r.clear()
    assert np.array_equal(r.decode(H.prompt(4)), plain)


def test_two_contexts_and_two_threads(fresh: MakeRaw) -> None:
    """Each has its own steering, and the callback of one knows nothing of the other."""
    one = fresh("llama")
    two = one.second_context()
    for r, op in ((one, ADD), (two, PROJECT)):
        r.steer_with({0: whole(r, first=0)}, [NativeTerm(0, op)])
    want = [run(r) for r in (one, two)]
    got: list[Any] = [None, None]
    for r in (one, two):
        r.forget()

    def work(k: int, r: Raw) -> None:
        got[k] = run(r)

    threads = [threading.Thread(target=work, args=(k, r)) for k, r in enumerate((one, two))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(want[0][0], want[1][0])
    two.close()


def begin(r: Raw, toks: list[Tok]) -> int:
    c = H.llama_cpp
    batch = c.llama_batch_init(len(toks), 0, 1)
    batch.n_tokens = len(toks)
    for i, t in enumerate(toks):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = t.token, t.pos, 1, t.output
        batch.seq_id[i][0] = t.seq
    ids = ctypes.cast(batch.seq_id, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
    pos, n_ids, out = (ctypes.cast(one, ctypes.POINTER(kind)) for one, kind in _columns(batch))
    code = int(r.library.llama_steer_stock_begin(r.handle, len(toks), pos, n_ids, ids, out))
    c.llama_batch_free(batch)
    return code


def test_a_layer_that_does_not_pass_is_an_error(fresh: MakeRaw) -> None:
    """As when a graph was computed that never asked us."""
    r = fresh("llama")
    r.steer_with({0: whole(r)}, [NativeTerm(0)])
    assert begin(r, H.prompt(3)) == 0
    assert r.library.llama_steer_stock_end(r.handle, True) == 0
    error = r.steer.sequence_error(0)
    assert error is not None and "did not pass" in error and "layer 1" in error


def test_what_would_be_parted_is_refused(fresh: MakeRaw) -> None:
    r = fresh("llama", n_batch=8)
    r.steer_with({0: whole(r)}, [NativeTerm(0)])
    assert begin(r, H.prompt(9)) != 0 and "9 tokens would be computed in parts of 8" in r.steer.error()
    r = fresh("qwen3next")
    r.steer_with({0: whole(r)}, [NativeTerm(0)])
    assert r.try_decode([Tok(50, 0, 0), Tok(51, 0, 1)]) == -3 and "one after another" in r.steer.error()
    assert r.try_decode([Tok(50, 0, 0), Tok(51, 1, 0)]) == 0
