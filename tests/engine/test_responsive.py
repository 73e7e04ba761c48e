"""What reads the state before it writes: columns (linear, ReLU, JumpReLU), floors and caps. Exact against numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from steer_plugins.errors import SteerError
from tests.engine import harness as H
from tests.engine.harness import ADD, ATTN, CAP, CLAMP, FFN, FLOOR, PROJECT, RENORM, RESID, NativeTerm, Raw, Vector
from tests.engine.test_formula import check, read_layer

MakeRaw = Callable[..., Raw]
PLACES = [("llama", RESID), ("gemma3", RESID), ("deepseek4", RESID), ("deepseek4", ATTN), ("deepseek4", FFN)]
OPS = (ADD, PROJECT, CLAMP, RENORM)
COUNTS = (1, 3, 4, 5)


def middle(values: np.ndarray) -> float:
    """A number that about half of the values exceed, and none is near."""
    ordered = np.unique(values)
    gaps = np.diff(ordered)
    k = len(gaps) // 4
    best = k + int(np.argmax(gaps[k : len(gaps) - k]))
    return float((ordered[best] + ordered[best + 1]) / 2)


def columns(plain: np.ndarray, seed: int = 11, kinds: Sequence[str] = ("linear", "relu", "jump")) -> tuple[Any, ...]:
    """Columns whose knees part the states that are there, so that each is open for some tokens and closed for others."""
    h = plain.astype(np.float64).reshape(-1, plain.shape[-1])
    k = len(kinds)
    read, write = H.directions(k, h.shape[-1], seed), H.directions(k, h.shape[-1], seed + 1)
    z = h @ read.astype(np.float64).T
    bias, knee = np.zeros(k), np.full(k, -np.inf)
    for j, kind in enumerate(kinds):
        if kind == "linear":
            bias[j] = 0.7
        elif kind == "relu":
            bias[j], knee[j] = -middle(z[:, j]), 0.0
        else:
            bias[j], knee[j] = 5.0 + abs(z[:, j]).max(), middle(z[:, j]) + 5.0 + abs(z[:, j]).max()
    return read, write, np.linspace(0.8, -1.1, k), bias, knee


def responsive(plain: np.ndarray, place: tuple[int, int], *, seed: int = 11, scale: float = 2.0, **options: Any) -> Vector:
    return Vector(H.vector(plain.shape[-1], [place], seed=seed, scale=scale).places, {place: columns(plain, seed, **options)})


@pytest.mark.parametrize("which", [0, 1, -1])
@pytest.mark.parametrize("n_ubatch", [*COUNTS, 512])
@pytest.mark.parametrize(("arch", "site"), PLACES)
def test_columns(raw: MakeRaw, arch: str, site: int, n_ubatch: int, which: int) -> None:
    """Each op, at places and batch sizes; of several streams each reads and writes its own state."""
    r = raw(arch, n_ubatch=n_ubatch)
    place = which % r.n_layer, site
    toks = H.prompt(13)
    r.clear()
    plain = read_layer(r, toks, *place)
    vectors = {0: responsive(plain, place)}
    for op in OPS:
        for strength in (1.0, -0.6, 0.0):
            check(r, toks, *place, vectors, [NativeTerm(0, op, strength)], plain)


@pytest.mark.parametrize("op", [FLOOR, CAP])
@pytest.mark.parametrize("n_ubatch", [3, 512])
@pytest.mark.parametrize(("arch", "site"), PLACES)
def test_floors_and_caps(raw: MakeRaw, arch: str, site: int, n_ubatch: int, op: int) -> None:
    """Some tokens lie beyond the level and are moved to it, others are left to the bit; a scale below 0 turns it round."""
    r = raw(arch, n_ubatch=n_ubatch)
    place = 1, site
    toks = H.prompt(13)
    r.clear()
    plain = read_layer(r, toks, *place)
    for index, scale in enumerate((2.5, -2.5)):
        vectors = {index: H.vector(r.n_embd, [place], scale=scale)}
        v, s = vectors[index].places[place]
        along = plain.astype(np.float64) @ v.astype(np.float64)
        level = middle(along) / s
        for strength in (1.0, 0.5):
            check(r, toks, *place, vectors, [NativeTerm(index, op, strength, level=level)], plain)
        r.clear()
        r.steer_with(vectors, [NativeTerm(index, op, 1.0, level=level)])
        got = read_layer(r, toks, *place)
        beyond = along / s < level if op == FLOOR else along / s > level
        assert beyond.any() and not beyond.all()
        assert np.abs((got.astype(np.float64) @ v)[beyond] - level * s).max() < 1e-5
        assert np.array_equal(got[~beyond], plain[~beyond])


def test_an_interval_and_other_terms_at_once(raw: MakeRaw) -> None:
    for arch, site in PLACES:
        r = raw(arch, n_ubatch=4)
        place = 2, site
        toks = H.prompt(11)
        r.clear()
        plain = read_layer(r, toks, *place)
        vectors = {
            0: H.vector(r.n_embd, [place], scale=1.5),
            1: responsive(plain, place),
            2: responsive(plain, place, seed=31, kinds=("jump", "relu")),
            3: H.vector(r.n_embd, [place], seed=5),
        }
        along = plain.astype(np.float64) @ vectors[0].places[place][0].astype(np.float64)
        low, high = np.quantile(along, [0.3, 0.7]) / vectors[0].places[place][1]
        terms = [
            NativeTerm(0, FLOOR, 1.0, level=float(low)),
            NativeTerm(0, CAP, 1.0, level=float(high)),
            NativeTerm(1, ADD, 0.9),
            NativeTerm(2, CLAMP, -0.4),
            NativeTerm(3, PROJECT, 1.0),
            NativeTerm(3, ADD, 0.5),
        ]
        check(r, toks, *place, vectors, terms, plain)


@pytest.mark.parametrize("stream", range(4))
def test_one_stream(raw: MakeRaw, stream: int) -> None:
    r = raw("deepseek4", n_ubatch=5)
    place = 3, RESID
    toks = H.prompt(9)
    r.clear()
    plain = read_layer(r, toks, *place)
    vectors = {0: responsive(plain, place), 1: H.vector(r.n_embd, [place], seed=4)}
    along = plain[:, (stream + 1) % 4].astype(np.float64) @ vectors[1].places[place][0]
    level = middle(along) / vectors[1].places[place][1]
    terms = [NativeTerm(0, ADD, 1.2, stream=stream), NativeTerm(1, FLOOR, 1.0, stream=(stream + 1) % 4, level=level)]
    check(r, toks, *place, vectors, terms, plain)
    r.clear()
    r.steer_with(vectors, terms)
    got = read_layer(r, toks, *place)
    others = [s for s in range(4) if s not in (stream, (stream + 1) % 4)]
    assert np.array_equal(got[:, others], plain[:, others])


def test_a_clamp_of_autoencoder_features(raw: MakeRaw) -> None:
    """Encoder rows read, decoder rows write: what numpy's encoder, clamp and decoder make of the state."""
    r = raw("llama", n_ubatch=4)
    layer, n = 2, r.n_embd
    toks = H.prompt(12)
    plain = r.read(toks, [layer])[layer].astype(np.float64)
    encoder, decoder = H.directions(6, n, 51), H.directions(6, n, 52)
    lengths = np.linspace(0.5, 3.0, 6)  # decoder rows are not of unit length
    bias = -np.quantile(plain @ encoder.T.astype(np.float64), 0.5, axis=0)
    knee = np.full(6, 0.3)

    def encode(h: np.ndarray) -> np.ndarray:
        z = h @ encoder.T.astype(np.float64) + bias
        return np.where(z > knee, z, 0.0)

    target, chosen = 4.0, 3
    vector = Vector(
        {(layer, RESID): (decoder[chosen], float(lengths[chosen]))},
        {(layer, RESID): (encoder[[chosen]], decoder[[chosen]], -lengths[[chosen]], bias[[chosen]], knee[[chosen]])},
    )
    before = encode(plain)
    after = before.copy()
    after[:, chosen] = target
    want = plain + ((after - before) * lengths) @ decoder.astype(np.float64)
    r.clear()
    r.steer_with({0: vector}, [NativeTerm(0, CLAMP, target)])
    got = r.read(toks, [layer])[layer]
    H.close(got, want, 1e-4)
    assert 0 < (before[:, chosen] > 0).sum() < len(toks)
    r.clear()
    r.steer_with({0: vector}, [NativeTerm(0, PROJECT, 1.0)])  # takes the feature out
    H.close(r.read(toks, [layer])[layer], plain - np.outer(before[:, chosen] * lengths[chosen], decoder[chosen]), 1e-4)


@pytest.mark.parametrize("arch", ["llama", "deepseek4"])
@pytest.mark.parametrize("n_ubatch", [3, 4, 512])
def test_two_sequences_and_splits(raw: MakeRaw, arch: str, n_ubatch: int) -> None:
    """Interleaved tokens of four sequences: columns, a floor, a plain add, nothing; each as if it were alone."""
    r = raw(arch, n_ubatch=n_ubatch)
    place = 2, RESID
    texts = [H.prompt(7, s, seed=s + 1) for s in range(4)]
    mixed = [text[i] for i in range(7) for text in texts]
    r.clear()
    together = read_layer(r, mixed, *place)
    plain = [together[s::4] for s in range(4)]
    vectors = {0: responsive(plain[0], place), 1: H.vector(r.n_embd, [place], seed=9)}
    v, scale = vectors[1].places[place]
    level = middle(plain[1].astype(np.float64) @ v.astype(np.float64)) / scale
    terms = [[NativeTerm(0, ADD, 1.0)], [NativeTerm(1, FLOOR, 1.0, level=level)], [NativeTerm(1, ADD, 0.5)], []]
    r.clear()
    r.steer_with(vectors, [])
    for s, some in enumerate(terms):
        r.steer.set_config(s + 2, some)
        r.steer.set_range(s, 0, -1, s + 2)
    got = read_layer(r, mixed, *place)
    for s, some in enumerate(terms):
        mine = got[s::4]
        want = H.edited(plain[s], place, vectors, some)
        H.close(mine, want, H.tolerance(plain[s], vectors, some))
        assert bool(some) == (np.abs(mine - plain[s]).max() > 0.05)


def test_neighbours_do_not_feel_it(raw: MakeRaw) -> None:
    """With a responsive neighbour in the batch, those that project, add or do nothing keep their bits."""
    for arch in ("llama", "deepseek4"):
        r = raw(arch)
        place = 1, RESID
        toks = [t for s in range(4) for t in H.prompt(5, s)]
        r.clear()
        plain = read_layer(r, toks, *place)
        vectors = {0: H.vector(r.n_embd, [place], scale=4.0), 1: responsive(plain, place)}

        def run(ops: list[tuple[int, int] | None], r: Raw = r, toks: Any = toks, vectors: Any = vectors) -> np.ndarray:
            r.clear()
            r.steer_with(vectors, [])
            for s, which in enumerate(ops):
                if which is not None:
                    r.steer.set_config(s + 2, [NativeTerm(which[0], which[1], 1.0)])
                    r.steer.set_range(s, 0, -1, s + 2)
            return read_layer(r, toks, 1, RESID)

        before = run([None, (0, ADD), (0, PROJECT), None])
        after = run([(1, ADD), (0, ADD), (0, PROJECT), None])
        assert np.array_equal(after[5:], before[5:])
        assert np.abs(after[:5] - before[:5]).max() > 0.05


def test_all_layers_one_after_the_other(raw: MakeRaw) -> None:
    """What a layer reads is what the layers below have made of it."""
    for arch in ("llama", "deepseek4"):
        r = raw(arch, n_ubatch=5)
        toks = H.prompt(9)
        places = [(il, RESID) for il in range(r.n_layer)]
        plain = {}
        for place in places:
            r.clear()
            plain[place] = read_layer(r, toks, *place)
        whole = Vector(
            H.vector(r.n_embd, places, scale=1.0).places,
            {place: columns(plain[place], seed=100 + place[0]) for place in places[::2]},
        )
        for layer in range(1, r.n_layer):
            r.clear()
            r.steer_with({0: whole}, [NativeTerm(0, ADD, 0.8, il_last=layer - 1)])
            below = read_layer(r, toks, layer, RESID)
            r.clear()
            terms = [NativeTerm(0, ADD, 0.8)]
            r.steer_with({0: whole}, terms)
            got = read_layer(r, toks, layer, RESID)
            kept = {place: some for place, some in whole.columns.items() if place[0] == layer}
            here = {0: Vector({(layer, RESID): whole.places[layer, RESID]}, kept)}
            want = H.edited(below, (layer, RESID), here, terms)
            H.close(got, want, 4 * H.tolerance(below, here, terms))


def test_nothing_in_the_graph_when_nobody_responds(raw: MakeRaw) -> None:
    r = raw("llama")
    toks = H.prompt(6)
    place = 1, RESID
    r.clear()
    plain = read_layer(r, toks, *place)
    logits = r.decode(H.prompt(6, 1))
    vectors = {0: responsive(plain, place), 1: H.vector(r.n_embd, [place], seed=3)}
    r.clear()
    r.steer_with(vectors, [NativeTerm(0, ADD, 0.0)], seq=1)
    on = r.steer.stats().n_graph_on
    assert np.array_equal(r.decode(H.prompt(6, 1)), logits) and r.steer.stats().n_graph_on == on

    def nodes(terms: list[NativeTerm]) -> int:
        r.reset()
        r.steer_with(vectors, terms)
        r.decode(toks)
        return int(r.steer.stats().n_edit_nodes)

    assert nodes([NativeTerm(1, ADD, 1.0)]) == 2
    projected = nodes([NativeTerm(1, PROJECT, 1.0)])
    assert nodes([NativeTerm(0, ADD, 1.0)]) > projected > 2
    assert nodes([NativeTerm(1, FLOOR, 1.0, level=0.5)]) > projected


def test_edit_ids(raw: MakeRaw) -> None:
    """The id covers rows, gain, bias, knee and level; what cancels out is nothing."""
    r = raw("llama")
    r.clear()
    place = 1, RESID
    n = r.n_embd
    base = H.vector(n, [place], scale=1.0)
    read, write, other = H.directions(1, n, 1), H.directions(1, n, 2), H.directions(1, n, 3)
    kinds: list[tuple[Any, ...]] = [
        (read, write, [1.0], [0.5], [0.0]),
        (other, write, [1.0], [0.5], [0.0]),
        (read, other, [1.0], [0.5], [0.0]),
        (read, write, [1.5], [0.5], [0.0]),
        (read, write, [1.0], [0.6], [0.0]),
        (read, write, [1.0], [0.5], [0.1]),
        (read, write, [1.0], [0.5], [-np.inf]),
    ]
    ids = []
    for i, kind in enumerate(kinds):
        Vector(base.places, {place: kind}).put(r.steer, i)
        r.steer.set_config(i + 1, [NativeTerm(i, ADD, 1.0)])
        ids.append(r.steer.config_id(i + 1))
    base.put(r.steer, 20)
    for level, op in ((0.5, FLOOR), (0.6, FLOOR), (0.5, CAP)):
        r.steer.set_config(50, [NativeTerm(20, op, 1.0, level=level)])
        ids.append(r.steer.config_id(50))
    r.steer.set_config(50, [NativeTerm(20, FLOOR, 0.5, level=0.5)])
    ids.append(r.steer.config_id(50))
    assert 0 not in ids and len(set(ids)) == len(ids)

    def id_of(terms: list[NativeTerm]) -> int:
        r.steer.set_config(60, terms)
        return int(r.steer.config_id(60))

    assert id_of([NativeTerm(0, ADD, 0.5), NativeTerm(0, ADD, 0.5)]) == ids[0]
    Vector(base.places, {place: kinds[0]}).put(r.steer, 30)  # the same content under another number
    assert id_of([NativeTerm(30, ADD, 1.0)]) == ids[0]
    assert id_of([NativeTerm(0, ADD, 1.0), NativeTerm(30, ADD, -1.0)]) == 0
    assert not r.steer.config_acts(60, 1, RESID)


def test_changes_build_no_graph(raw: MakeRaw) -> None:
    """Other strengths and levels rewrite a row; the graph stays."""
    r = raw("llama")
    toks = H.prompt(4)
    place = 1, RESID
    r.clear()
    plain = read_layer(r, toks, *place)
    vectors = {0: responsive(plain, place), 1: H.vector(r.n_embd, [place], seed=3)}
    r.clear()
    r.steer_with(vectors, [NativeTerm(0, ADD, 1.0), NativeTerm(1, FLOOR, 1.0, level=0.1)])
    r.decode(toks)
    before = r.steer.stats()
    for strength, level in ((0.5, 0.2), (-1.0, 2.0), (0.1, -3.0)):
        r.forget()
        r.steer.set_config(1, [NativeTerm(0, ADD, strength), NativeTerm(1, FLOOR, 1.0, level=level)])
        r.decode(toks)
    after = r.steer.stats()
    assert (after.n_graph_builds, after.n_reserves) == (before.n_graph_builds, before.n_reserves)
    assert after.n_row_uploads == before.n_row_uploads + 3


def test_random_mixtures(raw: MakeRaw) -> None:
    """Seeded mixtures of everything at one place."""
    rng = np.random.default_rng(20261201)
    for _ in range(40):
        arch, site = PLACES[int(rng.integers(len(PLACES)))]
        r = raw(arch, n_ubatch=int(rng.choice([1, 3, 4, 5, 512])))
        place = int(rng.integers(r.n_layer)), site
        toks = H.prompt(int(rng.integers(1, 14)))
        r.clear()
        plain = read_layer(r, toks, *place)
        many = read_layer(r, H.prompt(30, 1), *place)
        vectors, terms = {}, []
        streams = [-1] if site != RESID or r.info.n_streams == 1 else [-1, -1, 0, 1, 2, 3]
        for k in range(int(rng.integers(1, 5))):
            kinds = [str(kind) for kind in rng.choice(["linear", "relu", "jump"], int(rng.integers(1, 5)))]
            scale = float(rng.uniform(-3, 3))
            vectors[2 * k] = responsive(many, place, seed=int(rng.integers(1 << 20)), scale=scale, kinds=kinds)
            op = int(rng.choice([ADD, ADD, PROJECT, CLAMP]))
            terms.append(NativeTerm(2 * k, op, float(rng.uniform(-1, 1)), stream=int(rng.choice(streams))))
            vectors[2 * k + 1] = H.vector(r.n_embd, [place], seed=int(rng.integers(1 << 20)), scale=scale)
            op, level = int(rng.choice([FLOOR, CAP])), float(rng.uniform(-2, 2))
            terms.append(NativeTerm(2 * k + 1, op, float(rng.uniform(0, 1)), stream=int(rng.choice(streams)), level=level))
        if near_a_jump(plain, place, vectors):
            continue
        check_any(r, toks, place, vectors, terms, plain)


def near_a_jump(plain: np.ndarray, place: tuple[int, int], vectors: dict[int, Vector]) -> bool:
    """A state so near a knee that rounding decides: there the two sides are a knee apart."""
    h = plain.astype(np.float64).reshape(-1, plain.shape[-1])
    for some in (vector.columns[place] for vector in vectors.values() if place in vector.columns):
        for read, _, _, bias, knee in zip(*some, strict=True):
            if np.isfinite(knee) and (np.abs(h @ read.astype(np.float64) + bias - knee) < 1e-4).any():
                return True
    return False


def check_any(r: Raw, toks: Any, place: tuple[int, int], vectors: Any, terms: list[NativeTerm], plain: np.ndarray) -> None:
    r.clear()
    r.steer_with(vectors, terms)
    got = read_layer(r, toks, *place)
    H.close(got, H.edited(plain, place, vectors, terms), 2 * H.tolerance(plain, vectors, terms))


def test_what_is_refused(raw: MakeRaw) -> None:
    r = raw("llama")
    r.clear()
    n = r.n_embd
    place = 1, RESID
    base = H.vector(n, [place])
    read, write = H.directions(1, n, 1), H.directions(1, n, 2)
    good: tuple[Any, ...] = (read, write, [1.0], [0.0], [0.0])
    bad: list[tuple[tuple[Any, ...], str]] = [
        ((2 * read, write, [1.0], [0.0], [0.0]), "norm 2"),
        ((read, np.zeros_like(write), [1.0], [0.0], [0.0]), "norm 0"),
        ((read * np.nan, write, [1.0], [0.0], [0.0]), "NaN"),
        ((read, write, [np.inf], [0.0], [0.0]), "gain inf"),
        ((read, write, [1.0], [1e16], [0.0]), "bias 1e\\+16"),
        ((read, write, [1.0], [0.0], [-1.0]), "knee -1"),
        ((read, write, [1.0], [0.0], [np.nan]), "knee -?nan"),
        (tuple(np.repeat(np.asarray(x), 17, axis=0) for x in good), "17 columns"),
    ]
    for columns_, sentence in bad:
        with pytest.raises(SteerError, match=sentence):
            Vector(base.places, {place: columns_}).put(r.steer, 0)
    Vector(base.places, {place: good}).put(r.steer, 0)
    base.put(r.steer, 1)
    for terms, sentence in (
        ([NativeTerm(0, FLOOR, 1.0, level=0.1)], "no floor or cap"),
        ([NativeTerm(1, FLOOR, 1.5, level=0.1)], "take 0 to 1"),
        ([NativeTerm(1, CAP, -0.5, level=0.1)], "take 0 to 1"),
        ([NativeTerm(1, CAP, 1.0, level=float("nan"))], "not finite"),
        ([NativeTerm(1, CAP, 1.0, level=1e16)], "dose of 1e\\+15"),
        ([NativeTerm(1, FLOOR, 1.0, level=0.1), NativeTerm(1, FLOOR, 1.0, level=0.2)], "floors 0.1 and 0.2"),
        ([NativeTerm(1, RENORM, 1.0), NativeTerm(1, FLOOR, 1.0, level=0.2)], "restores the length"),
        ([NativeTerm(0, ADD, 1e16)], "too large"),
        ([NativeTerm(1, 6, 1.0)], "op 6 does not exist"),
    ):
        with pytest.raises(SteerError, match=sentence):
            r.steer.set_config(1, terms)
    r.steer.set_config(1, [NativeTerm(0, ADD, 1.0)])
    Vector(base.places, {place: (write, read, [2.0], [0.5], [0.1])}).put(r.steer, 0)
    with pytest.raises(SteerError, match="has no room for how"):
        Vector(base.places, {place: tuple(np.repeat(np.asarray(x), 2, axis=0) for x in good)}).put(r.steer, 0)


def test_no_state_grows_beyond_float32(raw: MakeRaw) -> None:
    """Gains that could explode over the layers are refused; the largest that are not leave every number finite."""
    r = raw("llama")
    r.clear()
    toks = H.prompt(8)
    places = [(il, RESID) for il in range(r.n_layer)]
    read = H.directions(1, r.n_embd, 5)
    for power in range(0, 16):
        gain = 10.0**power
        explosive = Vector(
            H.vector(r.n_embd, places).places, {place: (read, read, [gain], [10.0**power], [0.0]) for place in places}
        )
        explosive.put(r.steer, power)
        try:
            r.steer.set_config(1, [NativeTerm(power, ADD, 1.0)])
        except SteerError as error:
            assert "grow beyond" in str(error)
            assert power > 1
            break
        r.forget()
        r.steer.set_range(0, 0, -1, 1)
        assert np.isfinite(r.decode(toks)).all()
    else:
        pytest.fail("a gain of 1e15 at every layer was accepted")


def test_as_many_columns_as_there_is_room_for(raw: MakeRaw) -> None:
    """64 rows read the state at most; what no config uses any longer gives its rows back."""
    r = raw("llama")
    toks = H.prompt(6)
    place = 1, RESID
    r.reset()
    plain = read_layer(r, toks, *place)
    kinds = ("linear", "relu", "jump", "relu") * 4
    vectors = {k: responsive(plain, place, seed=1000 + k, kinds=kinds) for k in range(8)}
    for k, vector in vectors.items():
        vector.put(r.steer, k)
    r.steer.set_config(1, [NativeTerm(k, ADD, 0.05) for k in range(4)])
    with pytest.raises(SteerError, match="more than 64"):
        r.steer.set_config(2, [NativeTerm(4, ADD, 0.1)])
    r.steer.clear_config(1)
    check_any(r, toks, place, vectors, [NativeTerm(k, ADD, 0.05) for k in range(4, 8)], plain)
    check_any(r, toks, place, vectors, [NativeTerm(k, ADD, 0.05) for k in (0, 7, 2, 5)], plain)
    r.reset()
