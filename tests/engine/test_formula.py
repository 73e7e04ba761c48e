"""The hidden state read with steering is the formula applied to the hidden state read without: each op, site, stream
rule, layer and batch shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.engine import harness as H
from tests.engine.harness import ADD, ALL, ATTN, CLAMP, FFN, MEAN, PROJECT, RESID, NativeTerm, Raw, Tok, Vector

MakeRaw = Callable[..., Raw]

# Token counts around the number of streams: an edit that takes the stream axis for the token axis passes at 4 only.
COUNTS = (1, 3, 4, 5)
PLACES = [("llama", RESID), ("deepseek4", RESID), ("deepseek4", ATTN), ("deepseek4", FFN)]
ARCHS = H.CORE
OTHERS = [arch for arch in ARCHS if arch not in ("llama", "deepseek4")]


def read_layer(raw: Raw, toks: Sequence[Tok] | Sequence[Sequence[Tok]], layer: int, site: int) -> np.ndarray:
    """[n, n_embd], or every stream of resid_post where there are several."""
    stream = ALL if site == RESID and raw.info.n_streams > 1 else MEAN
    return raw.read(toks, [layer], site, stream)[layer]


def check(
    raw: Raw,
    toks: Sequence[Tok] | Sequence[Sequence[Tok]],
    layer: int,
    site: int,
    vectors: dict[int, Vector],
    terms: list[NativeTerm],
    plain: np.ndarray | None = None,
) -> np.ndarray:
    """Compare one steered read with the formula; ``plain`` saves reading it again. The vectors act at one layer only."""
    if plain is None:
        raw.clear()
        plain = read_layer(raw, toks, layer, site)
    raw.clear()
    raw.steer_with(vectors, terms)
    before = raw.steer.fired(layer, site)
    got = read_layer(raw, toks, layer, site)
    want = H.edited(plain, (layer, site), vectors, terms)
    H.close(got, want, H.tolerance(plain, vectors, terms))
    if any(t.strength != 0 for t in terms):
        assert float(np.abs(want - plain).max()) > 0.05, "the edit was too small to be missed"
        assert raw.steer.fired(layer, site) > before
    else:
        assert np.array_equal(got, plain)
    return plain


@pytest.mark.parametrize("which", ["first", "middle", "last"])
@pytest.mark.parametrize("n_ubatch", [*COUNTS, 512])
@pytest.mark.parametrize(("arch", "site"), PLACES)
def test_one_term(raw: MakeRaw, arch: str, site: int, n_ubatch: int, which: str) -> None:
    """13 tokens: longer than the small ubatches, and a multiple of none but 1."""
    r = raw(arch, n_ubatch=n_ubatch)
    layer = {"first": 0, "middle": r.n_layer // 2, "last": r.n_layer - 1}[which]
    toks = H.prompt(13)
    vectors = {0: H.vector(r.n_embd, [(layer, site)])}
    plain = None
    for op in (ADD, PROJECT, CLAMP):
        for strength in (1.0, -0.7, 0.0):
            plain = check(r, toks, layer, site, vectors, [NativeTerm(0, op, strength)], plain)


@pytest.mark.parametrize("op", [ADD, PROJECT, CLAMP])
@pytest.mark.parametrize(("arch", "site"), PLACES)
def test_batches_of_1_3_4_5_tokens(raw: MakeRaw, arch: str, site: int, op: int) -> None:
    r = raw(arch)
    toks = H.prompt(sum(COUNTS) * 2)
    batches, at = [], 0
    for n in (*COUNTS, *reversed(COUNTS)):
        batches.append(toks[at : at + n])
        at += n
    layer = r.n_layer // 2
    check(r, batches, layer, site, {0: H.vector(r.n_embd, [(layer, site)])}, [NativeTerm(0, op, 1.3)])


@pytest.mark.parametrize("arch", OTHERS)
def test_other_architectures(raw: MakeRaw, arch: str) -> None:
    toks = H.prompt(13)
    for n_ubatch in (4, 512):
        r = raw(arch, n_ubatch=n_ubatch)
        assert r.info.sites == ("resid_post",) and r.info.n_streams == 1
        for layer in range(r.n_layer):
            vectors = {0: H.vector(r.n_embd, [(layer, RESID)])}
            plain = None
            for op in (ADD, PROJECT, CLAMP):
                plain = check(r, toks, layer, RESID, vectors, [NativeTerm(0, op, 0.9)], plain)


def read_outputs(r: Raw, toks: Sequence[Tok], layer: int) -> np.ndarray:
    """Decode and read the outputs alone: [n_outputs, n_embd], or with every stream."""
    outputs = [t for t in toks if t.output]
    stream = ALL if r.info.n_streams > 1 else MEAN
    r.steer.set_captures([layer], [RESID], stream=stream)
    for t in outputs:
        r.steer.want(t.seq, t.pos, t.pos + 1)
    r.decode(toks)
    rows: np.ndarray = r.rows_of(outputs, [layer], RESID, stream)[layer]
    r.steer.set_captures([], [])
    return rows


@pytest.mark.parametrize("n_ubatch", [5, 512])
@pytest.mark.parametrize("arch", ARCHS)
def test_output_rows_only(raw: MakeRaw, arch: str, n_ubatch: int) -> None:
    """With few outputs the last block of most models holds other rows than the rest; ubatches without any output exist."""
    r = raw(arch, n_ubatch=n_ubatch)
    top = r.n_layer - 1
    toks = [Tok(t.token, t.pos, 0, t.pos in (4, 7, 12)) for t in H.prompt(18)]
    vectors = {0: H.vector(r.n_embd, [(top, RESID)]), 1: H.vector(r.n_embd, [(top, RESID)], seed=3)}
    terms = [NativeTerm(0, PROJECT, 1.1), NativeTerm(1, ADD, -0.8)]
    plain = read_outputs(r, toks, top)
    r.clear()
    r.steer_with(vectors, terms)
    got = read_outputs(r, toks, top)
    atol = H.tolerance(plain, vectors, terms)
    H.close(got, H.edited(plain, (top, RESID), vectors, terms), atol)
    # which row belongs to which token: from position 5 on
    r.clear()
    r.steer_with(vectors, terms, first=5)
    part = read_outputs(r, toks, top)
    H.close(part[0], plain[0], atol)
    assert np.array_equal(part[1:], got[1:])


@pytest.mark.parametrize("stream", range(4))
@pytest.mark.parametrize("op", [ADD, PROJECT, CLAMP])
def test_one_stream(raw: MakeRaw, op: int, stream: int) -> None:
    for n_ubatch in (*COUNTS, 512):
        r = raw("deepseek4", n_ubatch=n_ubatch)
        layer = 3
        toks = H.prompt(9)
        vectors = {0: H.vector(r.n_embd, [(layer, RESID)])}
        terms = [NativeTerm(0, op, 1.0, stream=stream)]
        plain = check(r, toks, layer, RESID, vectors, terms)
        r.clear()
        r.steer.set_range(0, 0, -1, 1)
        got = read_layer(r, toks, layer, RESID)
        others = [s for s in range(4) if s != stream]
        if op == ADD:  # h + 0: bit-identical
            assert np.array_equal(got[:, others], plain[:, others])
            v, dose = vectors[0].places[layer, RESID]
            H.close(got[:, stream] - plain[:, stream], np.tile(dose * v, (9, 1)), H.tolerance(plain, vectors, terms))
        assert np.abs(got[:, stream] - plain[:, stream]).max() > 0.05


def test_mean_over_streams_moves_by_a_quarter(raw: MakeRaw) -> None:
    r = raw("deepseek4")
    toks, layer = H.prompt(7), 2
    vectors = {0: H.vector(r.n_embd, [(layer, RESID)])}
    v, dose = vectors[0].places[layer, RESID]
    plain = r.read(toks, [layer], RESID, MEAN)[layer]
    for stream, share in ((2, 0.25), (ALL, 1.0)):
        terms = [NativeTerm(0, ADD, 1.0, stream=stream)]
        r.clear()
        r.steer_with(vectors, terms)
        got = r.read(toks, [layer], RESID, MEAN)[layer]
        # the mean is a sum of four rounded numbers: as many times the tolerance of one
        H.close(got, plain + share * dose * v.astype(np.float64), 4 * H.tolerance(plain, vectors, terms))


def test_streams_apart(raw: MakeRaw) -> None:
    """Different terms on different streams of one token, and one on all, in one config."""
    r = raw("deepseek4")
    layer = 4
    vectors = {k: H.vector(r.n_embd, [(layer, RESID)], seed=30 + k, scale=1.0 + k) for k in range(4)}
    terms = [
        NativeTerm(0, ADD, 1.0, stream=0),
        NativeTerm(1, CLAMP, 0.5, stream=3),
        NativeTerm(2, PROJECT, 1.0, stream=1),
        NativeTerm(3, ADD, -1.0),
    ]
    for n in COUNTS:
        check(r, H.prompt(n), layer, RESID, vectors, terms)


@pytest.mark.parametrize("n_vectors", [1, 5, 33])
@pytest.mark.parametrize(("arch", "site"), PLACES)
def test_many_adding_vectors(raw: MakeRaw, arch: str, site: int, n_vectors: int) -> None:
    r = raw(arch, n_ubatch=5)
    layer = 1
    vectors = {k: H.vector(r.n_embd, [(layer, site)], seed=100 + k, scale=1.0 + 0.05 * k) for k in range(n_vectors)}
    terms = [NativeTerm(k, ADD, 0.5 if k % 2 else -0.4) for k in range(n_vectors)]
    check(r, H.prompt(11), layer, site, vectors, terms)


@pytest.mark.parametrize("n_vectors", [2, 33, 64])
@pytest.mark.parametrize(("arch", "site"), PLACES)
def test_many_projecting_vectors(raw: MakeRaw, arch: str, site: int, n_vectors: int) -> None:
    r = raw(arch, n_ubatch=5)
    layer = 1
    vectors = {k: H.vector(r.n_embd, [(layer, site)], seed=200 + k) for k in range(n_vectors)}
    terms = [NativeTerm(k, PROJECT if k % 3 else CLAMP, 0.3) for k in range(n_vectors)]
    check(r, H.prompt(11), layer, site, vectors, terms)


@pytest.mark.parametrize(("arch", "site"), PLACES)
def test_mixed_ops(raw: MakeRaw, arch: str, site: int) -> None:
    r = raw(arch, n_ubatch=4)
    layer = 2
    vectors = {k: H.vector(r.n_embd, [(layer, site)], seed=300 + k) for k in (0, 3, 9, 17)}
    terms = [NativeTerm(0, ADD, 1.0), NativeTerm(3, PROJECT, 1.0), NativeTerm(9, CLAMP, -0.6), NativeTerm(17, ADD, 0.25)]
    check(r, H.prompt(10), layer, site, vectors, terms)


def test_two_terms_on_one_vector(raw: MakeRaw) -> None:
    """V^T h is of the state before the edit, so the terms do not see one another."""
    r = raw("llama")
    vectors = {0: H.vector(r.n_embd, [(1, RESID)])}
    for terms in (
        [NativeTerm(0, ADD, 1.0), NativeTerm(0, ADD, 0.5)],
        [NativeTerm(0, ADD, 1.0), NativeTerm(0, PROJECT, 1.0)],
        [NativeTerm(0, PROJECT, 0.5), NativeTerm(0, PROJECT, 0.75)],
        [NativeTerm(0, CLAMP, 1.0), NativeTerm(0, ADD, -2.0)],
    ):
        check(r, H.prompt(6), 1, RESID, vectors, terms)


def test_clamp_sets_the_component_and_project_removes_it(raw: MakeRaw) -> None:
    """The words' own meaning, without the formula."""
    r = raw("llama")
    vectors = {0: H.vector(r.n_embd, [(2, RESID)])}
    v, scale = vectors[0].places[2, RESID]
    toks = H.prompt(8)
    plain = r.read(toks, [2])[2]
    assert np.abs(plain @ v).max() > 0.3
    for op, strength, target in ((CLAMP, 1.5, 1.5 * scale), (PROJECT, 1.0, 0.0)):
        r.clear()
        r.steer_with(vectors, [NativeTerm(0, op, strength)])
        got = r.read(toks, [2])[2]
        assert np.abs(got.astype(np.float64) @ v - target).max() < 1e-5  # values of order 10 in float32
    r.clear()
    r.steer_with(vectors, [NativeTerm(0, PROJECT, 2.0)])  # reflects
    got = r.read(toks, [2])[2]
    assert np.abs(got @ v + plain @ v).max() < 2e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_all_layers_one_after_the_other(raw: MakeRaw, arch: str) -> None:
    """What a layer gets on top of edits below: read with the window ending just under it is its state before its edit."""
    r = raw(arch, n_ubatch=5)
    toks = H.prompt(9)
    vectors = {0: H.vector(r.n_embd, [(il, RESID) for il in range(r.n_layer)], scale=1.0)}
    for op in (ADD, CLAMP):
        for layer in range(1, r.n_layer):
            r.clear()
            r.steer_with(vectors, [NativeTerm(0, op, 0.8, il_last=layer - 1)])
            below = read_layer(r, toks, layer, RESID)
            r.clear()
            terms = [NativeTerm(0, op, 0.8)]
            r.steer_with(vectors, terms)
            got = read_layer(r, toks, layer, RESID)
            H.close(got, H.edited(below, (layer, RESID), vectors, terms), H.tolerance(below, vectors, terms))


def test_all_sites_of_a_layer(raw: MakeRaw) -> None:
    """deepseek4: attention output, feed-forward output and the streams of one layer, each with its own direction."""
    r = raw("deepseek4", n_ubatch=4)
    toks, layer = H.prompt(9), 3
    order = (ATTN, FFN, RESID)  # as the block passes through them
    vectors = {0: H.vector(r.n_embd, [(layer, site) for site in order])}
    for op, strength in ((ADD, 1.0), (CLAMP, 0.4)):
        for i, site in enumerate(order):
            r.clear()
            r.steer_with(vectors, [NativeTerm(0, op, strength)])
            got = read_layer(r, toks, layer, site)
            below = {1: Vector({(layer, s): vectors[0].places[layer, s] for s in order[:i]})}
            r.clear()
            if i:
                r.steer_with(below, [NativeTerm(1, op, strength)])
            before = read_layer(r, toks, layer, site)
            terms = [NativeTerm(0, op, strength)]
            H.close(got, H.edited(before, (layer, site), vectors, terms), H.tolerance(before, vectors, terms))


def test_window_edges(raw: MakeRaw) -> None:
    r = raw("llama")
    toks = H.prompt(5)
    layers = list(range(r.n_layer))
    vectors = {0: H.vector(r.n_embd, [(il, RESID) for il in layers])}
    plain = r.read(toks, layers)
    for first, last in ((-1, -1), (0, 0), (1, 2), (3, 3), (-1, 1), (2, -1), (0, 99)):
        r.clear()
        r.steer_with(vectors, [NativeTerm(0, ADD, 1.0, first, last)])
        before = {il: r.steer.fired(il, RESID) for il in layers}
        got = r.read(toks, layers)
        inside = [il for il in layers if (first < 0 or il >= first) and (last < 0 or il <= last)]
        assert [il for il in layers if r.steer.fired(il, RESID) > before[il]] == inside
        for il in range(inside[0]):
            assert np.array_equal(got[il], plain[il]), "layers below the window must not change"
        at = inside[0], RESID
        only = {0: Vector({at: vectors[0].places[at]})}
        h, terms = plain[inside[0]], [NativeTerm(0, ADD, 1.0)]
        H.close(got[inside[0]], H.edited(h, at, only, terms), H.tolerance(h, only, terms))


def test_strength_zero_and_cancelled_terms_run_the_plain_graph(raw: MakeRaw) -> None:
    for arch in ("llama", "deepseek4"):
        r = raw(arch)
        toks = H.prompt(6)
        plain = r.decode(toks)
        r.clear()
        places = [(il, RESID) for il in range(r.n_layer)]
        vectors = {0: H.vector(r.n_embd, places), 1: H.vector(r.n_embd, places)}
        for terms in (
            [NativeTerm(0, ADD, 0.0)],
            [NativeTerm(0, CLAMP, 0.0), NativeTerm(1, PROJECT, -0.0)],
            [NativeTerm(0, ADD, 0.6), NativeTerm(1, ADD, -0.6)],
            [],
        ):
            r.clear()
            r.steer_with(vectors, terms)
            on = r.steer.stats().n_graph_on
            assert np.array_equal(r.decode(toks), plain)
            assert r.steer.stats().n_graph_on == on
            assert all(r.steer.fired(il, RESID) == 0 for il in range(r.n_layer))


def test_random_steerings(raw: MakeRaw) -> None:
    """Seeded mixtures of everything at one place, over both architectures."""
    rng = np.random.default_rng(20240917)
    for _ in range(60):
        arch, site = PLACES[int(rng.integers(len(PLACES)))]
        r = raw(arch, n_ubatch=int(rng.choice([1, 3, 4, 5, 512])))
        layer = int(rng.integers(r.n_layer))
        n_vectors = int(rng.integers(1, 7))
        vectors = {
            int(k): H.vector(r.n_embd, [(layer, site)], seed=int(rng.integers(1 << 30)), scale=float(rng.uniform(-3, 3)))
            for k in rng.choice(100, n_vectors, replace=False)
        }
        streams = [ALL] if site != RESID or r.info.n_streams == 1 else [ALL, ALL, 0, 1, 2, 3]
        terms = [NativeTerm(next(iter(vectors)), ADD, 1.0)]
        for k in rng.choice(list(vectors), int(rng.integers(1, 9))):
            terms.append(
                NativeTerm(
                    int(k),
                    int(rng.integers(3)),
                    float(rng.choice([-1.0, -0.2, 0.0, 0.3, 1.5])),
                    stream=int(rng.choice(streams)),
                )
            )
        toks = H.prompt(int(rng.integers(1, 14)), seed=int(rng.integers(100)))
        plain = read_layer(r, toks, layer, site)
        r.clear()
        r.steer_with(vectors, terms)
        got = read_layer(r, toks, layer, site)
        # several projecting terms on one vector act on one another's rounding: the sum of their tolerances
        H.close(got, H.edited(plain, (layer, site), vectors, terms), H.tolerance(plain, vectors, terms) * 2)
