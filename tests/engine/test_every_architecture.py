"""Every further architecture in the patch's table, on a tiny model whose tensors libllama itself names (any_model.py).

The formula, two sequences, splits into small batches, and that an edit reaches the logits of its own sequence only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from steer_plugins.runtime.patching import load_patch
from steer_plugins.testing import ARCHITECTURES
from tests.engine import harness as H
from tests.engine.harness import ADD, ALL, CLAMP, MEAN, PROJECT, RESID, NativeTerm, Raw, Tok

MakeRaw = Callable[..., Raw]

SMALL: dict[str, Any] = {"n_ctx": 64, "n_batch": 32, "n_seq_max": 2}
OTHERS = [name for name in load_patch().architectures() if name not in ARCHITECTURES]
# Each token attends to all others, so llama.cpp takes a batch as a whole.
DIFFUSION = ("dream", "llada", "llada-moe", "rnd1")
CASES = [(name, n) for name in OTHERS for n in (3, 32) if n == 32 or name not in DIFFUSION]


@pytest.fixture(autouse=True)
def exact(float32_cache: None) -> Iterator[None]:
    """The cache in float32."""
    yield


def two_sequences() -> list[Tok]:
    a, b = H.prompt(9, 0, seed=1), H.prompt(5, 1, seed=2)
    return [t for i in range(9) for t in (a[i : i + 1] + b[i : i + 1])]


@pytest.mark.parametrize(("arch", "n_ubatch"), CASES)
def test_formula(fresh: MakeRaw, arch: str, n_ubatch: int) -> None:
    """First, middle and last layer; each op; one of two sequences is steered and the other is not."""
    r = fresh(arch, n_ubatch=n_ubatch, **SMALL)
    toks, stream = two_sequences(), ALL if r.info.n_streams > 1 else MEAN
    layers = (0, r.n_layer // 2, r.n_layer - 1)
    mine = np.array([t.seq == 0 for t in toks])
    plain = r.read(toks, layers, RESID, stream)
    r.clear()
    logits = r.decode(toks)
    for layer in layers:
        assert np.isfinite(plain[layer]).all()
        vectors = {0: H.vector(r.n_embd, [(layer, RESID)])}
        for op, strength in ((ADD, -1.2), (PROJECT, 1.0), (CLAMP, 0.6)):
            terms = [NativeTerm(0, op, strength)]
            r.clear()
            r.steer_with(vectors, terms)
            got = r.read(toks, [layer], RESID, stream)[layer]
            want = H.edited(plain[layer], (layer, RESID), vectors, terms)
            H.close(got[mine], want[mine], H.tolerance(plain[layer], vectors, terms))
            assert np.abs(want - plain[layer])[mine].max() > 0.005, "the edit was too small to be missed"
            assert np.array_equal(got[~mine], plain[layer][~mine]), "the other sequence changed"
        r.clear()
        r.steer_with(vectors, [NativeTerm(0, ADD, -1.2)])
        moved = np.abs(r.decode(toks) - logits).max(axis=1)
        assert (moved[mine] > 1e-4).all() and (moved[~mine] == 0).all()
    r.clear()
    assert np.array_equal(r.decode(toks), logits), "as before, when nothing is steered"
