"""Sparse autoencoders without a model: known dictionaries are found, files are read without trust, pages carry no markup."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_plugins.concepts import SparseCode
from steer_plugins.concepts.code import keep_largest
from steer_plugins.concepts.corpus import WINDOW, Corpus, read_text_files, windows_of
from steer_plugins.concepts.features import auroc, feature_vector, ranked
from steer_plugins.concepts.fit import CodeFit, CodeOptions
from steer_plugins.concepts.index import Context, Feature, FeatureIndex, automatic_name, describe_features
from steer_plugins.concepts.page import features_page
from steer_plugins.concepts.quality import explained_variance, firing_rates, sparse_pca
from steer_plugins.errors import DataError, SpecError, SteerError, VectorError
from tests.unit.fakes import IDENTITY

WIDTH, TRUE = 32, 40


@pytest.fixture(scope="module")
def world() -> tuple[np.ndarray, np.ndarray]:
    """(dictionary [40, 32], rows [4000, 32]): sparse sums of known directions, off centre, with noise."""
    rng = np.random.default_rng(0)
    dictionary = rng.standard_normal((TRUE, WIDTH)).astype(np.float32)
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    amounts = (rng.random((4_000, TRUE)) < 2 / TRUE) * rng.uniform(5, 15, (4_000, TRUE))
    rows = amounts @ dictionary + 0.2 * rng.standard_normal((4_000, WIDTH)) + 4.0
    return dictionary, rows.astype(np.float16)


TRAIN, HELD = np.arange(3_600), np.arange(3_600, 4_000)
OPTIONS = CodeOptions(latents=64, k=2, steps=700, batch=256)


@pytest.fixture(scope="module", params=["batchtopk", "topk"])
def trained(request: pytest.FixtureRequest, world: tuple[np.ndarray, np.ndarray]) -> SparseCode:
    fit = CodeFit(world[1], TRAIN, replace(OPTIONS, method=request.param), layer=3)
    fit.run()
    return fit.result({"made_by": "a test"})


def test_a_known_dictionary_is_found_and_the_twins_are_behind(trained: SparseCode, world: tuple[np.ndarray, np.ndarray]) -> None:
    dictionary, rows = world
    nearest = np.abs(trained.w_dec @ dictionary.T).max(axis=0)
    assert (nearest > 0.9).mean() > 0.8
    ours = explained_variance(rows, HELD, trained.reconstruct)
    l0 = firing_rates(trained, rows[HELD]).sum()
    assert 0.8 * 2 < l0 < 1.2 * 2
    random = CodeFit(rows, TRAIN, replace(OPTIONS, frozen_decoder=True), layer=3)
    random.run()
    assert ours > explained_variance(rows, HELD, sparse_pca(rows, TRAIN, 2)) + 0.1
    assert ours > explained_variance(rows, HELD, random.result().reconstruct) + 0.1


def test_the_arithmetic_is_that_of_its_docstring(trained: SparseCode, world: tuple[np.ndarray, np.ndarray]) -> None:
    rows = world[1][:50].astype(np.float32)
    z = rows.astype(np.float64) @ trained.w_enc + trained.b_enc
    if trained.k is None:
        want = np.where(z > trained.threshold, z, 0.0)
    else:
        want = np.where(z >= np.sort(z, axis=1)[:, -trained.k][:, None], np.maximum(z, 0), 0.0)
    assert np.allclose(trained.encode(rows), want, atol=1e-3)
    assert np.allclose(trained.encode(rows, [5, 2]), want[:, [5, 2]], atol=1e-3)
    assert np.allclose(trained.reconstruct(rows), want @ trained.w_dec + trained.b_dec, atol=1e-2)
    assert np.allclose(np.linalg.norm(trained.w_dec, axis=1), 1.0, atol=1e-5)


def test_a_file_gives_the_same_code_back(trained: SparseCode, tmp_path: Path) -> None:
    trained.save(tmp_path / "sae")
    again = SparseCode.load(tmp_path / "sae")
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        assert np.array_equal(getattr(again, name), getattr(trained, name)), name
    assert (again.layer, again.site, again.k, again.notes) == (3, "resid_post", trained.k, {"made_by": "a test"})


def test_a_subtracted_b_dec_is_folded(trained: SparseCode, world: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    trained.save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["apply_b_dec_to_input"] = True
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    rows = world[1][:20].astype(np.float32)
    assert np.allclose(SparseCode.load(tmp_path).encode(rows), trained.encode(rows - trained.b_dec), atol=1e-2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "gated"}, "architecture"),
        ({"normalize_activations": "layer_norm"}, "normalises"),
        ({"metadata": {}, "hook_name": None}, "hook"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused(
    trained: SparseCode, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    trained.save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | change
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(VectorError, match=says):
        SparseCode.load(tmp_path)


@pytest.mark.parametrize("spoil", ["cut", "nan", "empty", "missing"])
def test_spoilt_weights_are_refused_with_a_sentence(trained: SparseCode, tmp_path: Path, spoil: str) -> None:
    bad = replace(trained, b_enc=np.full_like(trained.b_enc, np.nan)) if spoil == "nan" else trained
    bad.save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    if spoil == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif spoil == "empty":
        weights.write_bytes(b"")
    elif spoil == "missing":
        weights.unlink()
    with pytest.raises(VectorError):
        SparseCode.load(tmp_path)


def test_an_interrupted_run_goes_on_to_the_same_result(world: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=40)
    whole = CodeFit(world[1], TRAIN, options, layer=0)
    whole.run()
    first = CodeFit(world[1], TRAIN, options, layer=0)

    def stop(step: int, steps: int, explained: float) -> None:
        if step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    first.save(tmp_path / "state")
    second = CodeFit(world[1], TRAIN, options, layer=0)
    assert second.restore(tmp_path / "state") and second.step == 17
    second.run()
    assert np.array_equal(second.result().w_enc, whole.result().w_enc)
    other = CodeFit(world[1], TRAIN, replace(options, latents=32), layer=0)
    assert not other.restore(tmp_path / "state")
    assert not other.restore(tmp_path / "nothing")


def test_silent_features_are_revived(world: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer_plugins.concepts.fit._SILENT_TOKENS", 2_000)

    def dead(revive: bool) -> float:
        fit = CodeFit(world[1], TRAIN, replace(OPTIONS, steps=200), layer=0)
        fit._state.b_enc[:32] = -1.5  # half of them hardly ever among the largest
        if not revive:
            monkeypatch.setattr(fit, "_revive", lambda *a: None)
        fit.run()
        return float((firing_rates(fit.result(), world[1]) == 0).mean())

    assert dead(True) < dead(False)


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 100, "latents": 128}, {"method": "gated"}, {"steps": 0}])
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        CodeOptions(**options)  # type: ignore[arg-type]


def test_too_few_tokens_are_refused(world: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(DataError, match="too few"):
        CodeFit(world[1], np.arange(20), OPTIONS, layer=0)


def test_keep_largest() -> None:
    values = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]], np.float32)
    assert keep_largest(values, 1).tolist() == [[3, 0, 0], [0, 5, 0]]
    assert keep_largest(values, 2).tolist() == [[3, 0, 2], [0, 5, 4]]
    assert keep_largest(values, 3) is values


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(1)
    high, low = rng.integers(0, 4, (9, 7)), rng.integers(0, 4, (6, 7))
    pairs = (high[:, None] > low).sum((0, 1)) + 0.5 * (high[:, None] == low).sum((0, 1))
    assert np.allclose(auroc(high, low), pairs / 54)


# ---- corpus ----


def test_windows_cover_the_text_up_to_a_limit() -> None:
    windows = windows_of([list(range(300)), list(range(10)), list(range(20))], 10_000, bos=[7])
    assert [len(w) for w in windows] == [128, 128, 47, 21]
    assert all(w[0] == 7 for w in windows)
    assert [t for w in windows[:3] for t in w[1:]] == list(range(300))
    assert sum(map(len, windows_of([list(range(3000))], 300))) == 384


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\n\n", "utf-8")
    (tmp_path / "b.jsonl").write_text('"three"\n{"text": "four"}\n', "utf-8")
    assert list(read_text_files([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == ["one", "two\nlines", "three", "four"]


@pytest.mark.parametrize(("content", "says"), [(b"\xff\xfe", "UTF-8"), (b'{"no": 1}', ":1 "), (b"[", ":1 is not JSON")])
def test_text_files_that_are_not(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(read_text_files([tmp_path / "x.jsonl"]))
    with pytest.raises(DataError, match="cannot read"):
        list(read_text_files([tmp_path / "none.txt"]))


def small_corpus(rows: np.ndarray) -> Corpus:
    """Rows as tokens of windows of 100, token id = place."""
    n = len(rows)
    windows = (np.arange(n) // 100).astype(np.int32)
    places = (np.arange(n) % 100 + 1).astype(np.int32)
    tokens = np.full((n // 100, WINDOW), -1, np.int32)
    tokens[:, :101] = np.arange(101)
    return Corpus(rows, places, windows, places, tokens, 30.0, "0" * 64, 3)


def test_held_out_rows_are_whole_windows(world: tuple[np.ndarray, np.ndarray]) -> None:
    corpus = small_corpus(world[1][:2400])
    train, held = corpus.split()
    assert len(train) + len(held) == 2400 and not set(train) & set(held)
    assert set(corpus.windows[held]) == {11, 23}


def test_contexts_are_where_a_feature_is_strongest(trained: SparseCode, world: tuple[np.ndarray, np.ndarray]) -> None:
    corpus = small_corpus(world[1][:2400])
    features = describe_features(trained, corpus, {t: f" w{t}".encode() for t in range(101)})
    z = trained.encode(corpus.rows.astype(np.float32))
    for f in features[:20]:
        assert f.rate == pytest.approx((z[:, f.index] > 0).mean())
        if f.contexts:
            best = int(z[:, f.index].argmax())
            assert f.contexts[0].token == f" w{corpus.places[best]}"
            assert f.contexts[0].activation == pytest.approx(z[best, f.index], rel=1e-3)
            assert f.contexts[0].text[f.contexts[0].at :].startswith(f.contexts[0].token)
            values = [c.activation for c in f.contexts]
            assert values == sorted(values, reverse=True)


# ---- index ----


def context(text: str, token: str, activation: float = 1.0) -> Context:
    return Context(text, token, text.index(token), activation)


INDEX = FeatureIndex(
    IDENTITY,
    3,
    40.0,
    (
        Feature(0, "smell", False, 0.01, 9.0, 0.5, (" scent",), (context("a sweet scent of", " scent"),)),
        Feature(1, "night", False, 0.02, 8.0, None, (), (context("in the night <b>", " night"),)),
        Feature(2, "night", False, 0.001, 8.0, 0.9, (), (context("at midnight the smell", "night"),)),
    ),
    {"l0": 3.0, "dead": 0.0, "tokens": 100, "explained_variance": 0.7, "pca_explained_variance": 0.5},
)


def test_an_index_is_read_back_as_it_was(tmp_path: Path) -> None:
    INDEX.save(tmp_path)
    assert FeatureIndex.load(tmp_path) == INDEX


def test_features_are_found_by_name_then_token_then_text() -> None:
    assert [f.index for f in INDEX.find("smell")] == [0, 2]
    assert [f.index for f in INDEX.find("NIGHT")] == [1, 2]
    assert [f.index for f in INDEX.find("scent")] == [0]
    assert INDEX.find("zebra") == []


def test_names() -> None:
    assert INDEX.get("smell").index == 0 and INDEX.get("2").index == 2
    with pytest.raises(VectorError, match="2 features are named 'night'"):
        INDEX.get("night")
    renamed = INDEX.named(1, "  night   sky ")
    assert renamed.get("night sky").index == 1 and renamed.get("night").index == 2
    assert renamed.named(1, "").get(1).name == "night"
    for bad in ("5", "a#b", "a:1", "x" * 81, "a\x1b[1m"):
        with pytest.raises(VectorError, match="cannot name"):
            INDEX.named(0, bad)
    with pytest.raises(VectorError, match="has the name"):
        renamed.named(2, "Night sky")
    with pytest.raises(VectorError, match="0 to 2"):
        INDEX.get(3)


def test_a_name_is_the_whole_word_at_the_peaks() -> None:
    assert (
        automatic_name([context("at midnight the", "night"), context("by midnight", "mid"), context("the day", " day")])
        == "midnight"
    )
    assert automatic_name([context("a , b", ",")]) == ""
    assert automatic_name([]) == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"format": "x"}', b"\xff", b"[" * 100_000]
    + [
        json.dumps(
            {"format": "steer-sae-index-v1", "identity": None, "layer": 1, "median_norm": v, "features": [], "about": {}}
        ).encode()
        for v in ("1", None)
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(SteerError):
        FeatureIndex.load(tmp_path)


def test_orders() -> None:
    assert [f.index for f, _ in ranked(INDEX, "rate")] == [1, 0, 2]
    assert [f.index for f, _ in ranked(INDEX, "effect")] == [2, 0, 1]
    assert [(f.index, s) for f, s in ranked(INDEX, "auroc", np.array([0.4, 0.9, 0.2]))] == [(1, 0.9), (2, 0.2), (0, 0.4)]
    with pytest.raises(SpecError, match="needs a contrast"):
        ranked(INDEX, "auroc")
    with pytest.raises(SpecError, match="unknown order"):
        ranked(INDEX, "size")


def test_a_feature_as_a_vector(trained: SparseCode) -> None:
    vector = feature_vector(trained, Feature(5), "f5", dose=12.0)
    assert vector.scales == {(3, "resid_post"): pytest.approx(12.0)}
    assert np.allclose(vector.directions[3, "resid_post"], trained.w_dec[5], atol=1e-6)


def test_the_page_escapes_and_stands_alone() -> None:
    page = features_page(INDEX, "talk<script>")
    assert "<b>" not in page and "talk&lt;script&gt;" in page and "<mark> night</mark> &lt;b&gt;" in page
    assert "http" not in page and "src=" not in page
    assert "0.700" in page and "0.500" in page
