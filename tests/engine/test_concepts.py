"""Autoencoders on a tiny model: what is read, what a replaced state does, interruption, features and directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins import Library, LocalEngine
from steer_plugins.concepts import FeatureIndex, SparseCode
from steer_plugins.concepts.audit import audit
from steer_plugins.concepts.corpus import collect
from steer_plugins.concepts.difference import check_pair, difference
from steer_plugins.concepts.discover import discover
from steer_plugins.concepts.features import contrast, effects, next_logprobs
from steer_plugins.concepts.fit import CodeOptions
from steer_plugins.concepts.making import MakeOptions, find_sae, keep_published, make_sae, sae_folder, sae_names
from steer_plugins.concepts.quality import ce_recovered, states_replaced
from steer_plugins.errors import ModelError, SpecError, VectorError
from steer_plugins.training.extract import load_pairs

OPTIONS = MakeOptions(layer=1, tokens=2_500, epochs=3, fit=CodeOptions(latents=64, k=6, batch=256))
TOKENS = [3, 40, 41, 42, 90, 17, 60, 61, 5, 80]


@pytest.fixture(scope="module")
def engine(llama_cpp: Any, tiny: Callable[..., Path]) -> Iterator[LocalEngine]:
    with LocalEngine(tiny("llama"), n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def made(engine: LocalEngine, library: Library) -> tuple[FeatureIndex, Path]:
    return make_sae(engine, "tiny", OPTIONS, library), sae_folder(library, "tiny", engine.info.identity)


def test_states_on_disk_are_those_that_were_read(engine: LocalEngine, tmp_path: Path) -> None:
    windows = [[1, *range(10 + i, 40 + i)] for i in range(20)]
    corpus = collect(engine, windows, 1, tmp_path / "c")
    want = engine.read(windows, layers=[1], positions="all")
    for row, token, window, place in zip(corpus.rows, corpus.tokens, corpus.windows, corpus.places, strict=True):
        assert windows[window][place] == token
        assert np.allclose(row, want[window].values[1][place], rtol=2e-3, atol=1e-3)
    assert 0 not in corpus.places and len(corpus.rows) > 500


def test_reading_goes_on_after_an_interruption(engine: LocalEngine, tmp_path: Path) -> None:
    windows = [[1, *range(10 + i, 40 + i)] for i in range(40)]
    whole = collect(engine, windows, 1, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(engine, windows, 1, tmp_path / "cut", progress=stop)
    with open(tmp_path / "cut" / "rows.f16", "ab") as file:  # a block that was not noted
        file.write(b"half")
    seen: list[int] = []
    again = collect(engine, windows, 1, tmp_path / "cut", progress=lambda done, total: seen.append(done))
    assert seen[0] > 16 * 31 and len(seen) == 2
    assert np.array_equal(again.rows, whole.rows) and np.array_equal(again.tokens, whole.tokens)
    # other text begins anew
    assert len(collect(engine, windows[:20], 1, tmp_path / "cut").window_tokens) == 20


def test_a_state_that_is_replaced_by_itself_changes_nothing(engine: LocalEngine) -> None:
    rows = engine.read([TOKENS], layers=[1], positions="all")[0].values[1][1:-1]
    plain = engine.logprobs([(TOKENS[:1], TOKENS[1:])])[0]
    assert np.array_equal(states_replaced(engine, TOKENS, 1, rows, rows), plain)


def test_a_state_is_replaced_at_each_position(engine: LocalEngine) -> None:
    """Read back at the same layer, which is edited before it is read."""
    from steer_plugins.steering.terms import Steering, Term
    from steer_plugins.steering.vector import SteeringVector

    rows = engine.read([TOKENS], layers=[1], positions="all")[0].values[1][1:-1]
    other = np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)
    want = states_replaced(engine, TOKENS, 1, rows, other)
    terms = [
        Term(SteeringVector(f"at-{i + 1}", {(1, "resid_post"): other[i] - rows[i]}), scope=f"{i + 1}-{i + 1}")
        for i in range(len(rows))
    ]
    found = engine.read([TOKENS], layers=[1], positions="all", steering=Steering(terms))[0].values[1][1:-1]
    assert np.allclose(found, other, atol=1e-5)
    assert not np.allclose(want, engine.logprobs([(TOKENS[:1], TOKENS[1:])])[0])


def test_cross_entropy_recovered_has_its_ends(engine: LocalEngine) -> None:
    mean = engine.read([TOKENS], layers=[1], positions="mean")[0].values[1][0]
    arms = {"same": lambda h: h, "gone": lambda h: np.broadcast_to(mean, h.shape)}
    found = ce_recovered(engine, [TOKENS], 1, arms, mean=mean)
    if found["same"] is not None:  # of random weights the mean may even be better
        assert found == {"same": pytest.approx(1.0), "gone": pytest.approx(0.0)}


def test_training_from_beginning_to_end(engine: LocalEngine, library: Library, made: tuple[FeatureIndex, Path]) -> None:
    index, folder = made
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "index.json", "sae_weights.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]  # nothing half-made beside it
    assert FeatureIndex.load(folder) == index and sae_names(library, engine.info.identity) == ["tiny"]
    assert find_sae(library, "tiny", engine.info.identity) == folder == find_sae(library, str(folder), None)
    about = index.about
    assert about["explained_variance"] > about["random_explained_variance"]
    assert {
        "pca_explained_variance",
        "ce_recovered",
        "pca_ce_recovered",
        "random_ce_recovered",
        "dead",
        "l0",
        "tokens",
    } <= about.keys()
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    with pytest.raises(VectorError, match="already has the autoencoder"):
        make_sae(engine, "tiny", OPTIONS, library)
    with pytest.raises(VectorError, match="it has tiny"):
        find_sae(library, "other", engine.info.identity)


def test_a_feature_fires_where_its_contexts_say(engine: LocalEngine, made: tuple[FeatureIndex, Path]) -> None:
    index, folder = made
    code = SparseCode.load(folder)
    feature = max(index.features, key=lambda f: f.largest)
    assert feature.contexts and feature.contexts[0].activation == pytest.approx(feature.largest, rel=1e-3)
    assert feature.rate > 0
    assert code.layer == 1 and code.n_embd == engine.info.n_embd


def test_an_interrupted_training_goes_on(engine: LocalEngine, tmp_path: Path, made: tuple[FeatureIndex, Path]) -> None:
    library = Library(tmp_path)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sae(engine, "tiny", OPTIONS, library, report=stop)
    assert sae_names(library, engine.info.identity) == []
    stages: list[tuple[str, int]] = []
    make_sae(engine, "tiny", OPTIONS, library, report=lambda stage, done, total: stages.append((stage, done)))
    assert [done for stage, done in stages if stage == "training"][0] == 6
    assert not [done for stage, done in stages if stage == "reading"]
    again = SparseCode.load(sae_folder(library, "tiny", engine.info.identity))
    assert np.array_equal(again.w_dec, SparseCode.load(made[1]).w_dec)


def test_a_layer_that_cannot_be_read_whole_is_refused(engine: LocalEngine, library: Library) -> None:
    from dataclasses import replace

    with pytest.raises(SpecError, match="cannot be read at every token"):
        make_sae(engine, "deep", replace(OPTIONS, layer=engine.info.n_layer - 1), library)


def test_effects_are_the_divergence_of_the_next_token(engine: LocalEngine, made: tuple[FeatureIndex, Path]) -> None:
    from steer_plugins.steering.terms import Steering, Term
    from steer_plugins.steering.vector import SteeringVector

    index, folder = made
    code = SparseCode.load(folder)
    found = effects(engine, code, index, [3, 4], prompts=["hello there"])
    chat: list[Any] = [[{"role": "user", "content": "hello there"}]]
    plain = next_logprobs(engine, chat, None)[0]
    vector = SteeringVector("f", {(1, "resid_post"): code.w_dec[3] * 0.4 * index.median_norm}, default_scope="response")
    steered = next_logprobs(engine, chat, Steering([Term(vector)]))[0]
    assert np.exp(plain).sum() == pytest.approx(1.0, abs=1e-4)
    assert found.get(3).effect == pytest.approx(float((np.exp(steered) * (steered - plain)).sum()), rel=1e-3)
    assert found.get(4).effect is not None and found.get(5).effect is None
    assert found.get(3).effect > 0 and len(found.get(3).raises) == 5


def test_a_contrast_of_pairs(engine: LocalEngine, made: tuple[FeatureIndex, Path], tmp_path: Path) -> None:
    code = SparseCode.load(made[1])
    lines = [{"positive": f"aaaa {i} aaaa aaaa", "negative": f"zz {i} zz zz zz"} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores = contrast(engine, code, load_pairs(tmp_path / "p.jsonl"))
    assert scores.shape == (64,) and scores.max() > 0.9 and scores.min() < 0.1


@pytest.mark.parametrize("method", ["pca", "jacobian"])
def test_directions_have_samples_and_a_dose(engine: LocalEngine, method: str) -> None:
    found = discover(engine, method=method, count=2, max_tokens=4)
    assert len(found) == 2
    for one in found:
        assert np.linalg.norm(one.unit) == pytest.approx(1.0, abs=1e-5)
        assert one.dose > 0 and len(one.samples) == 3 and one.kl >= 0
        vector = one.vector("found", engine.info.identity)
        assert vector.layers == [one.layer] and vector.scales[one.layer, "resid_post"] == pytest.approx(one.dose)
    assert abs(float(found[0].unit @ found[1].unit)) < 1e-3
    assert found[0].share >= found[1].share


def test_the_jacobian_finds_what_the_rest_of_the_model_stretches(engine: LocalEngine) -> None:
    """Its first direction moves the late state more than random ones do."""
    from steer_plugins.concepts.features import PROMPTS
    from steer_plugins.steering.vector import SteeringVector

    layer, late = 0, engine.info.n_layer - 2
    first = discover(engine, method="jacobian", layer=layer, count=1, max_tokens=1)[0]
    chat: list[Any] = [[{"role": "user", "content": PROMPTS[0]}]]

    def moved(unit: np.ndarray) -> float:
        vector = SteeringVector("d", {(layer, "resid_post"): unit * 0.02}, default_scope="response")
        read = [engine.read(chat, layers=[late], positions="last", steering=sign * vector)[0] for sign in (1.0, -1.0)]
        states = [one.values[late][0] for one in read]
        return float(np.linalg.norm(states[0] - states[1]))

    rows = np.random.default_rng(5).standard_normal((8, engine.info.n_embd)).astype(np.float32)
    randoms = [moved(r / np.linalg.norm(r)) for r in rows]
    assert moved(first.unit) > max(randoms)


def test_features_as_directions_need_an_autoencoder(engine: LocalEngine) -> None:
    with pytest.raises(SpecError, match="needs an autoencoder"):
        discover(engine, method="sae")
    with pytest.raises(SpecError, match="unknown method"):
        discover(engine, method="melbo")


def test_a_difference_of_models(llama_cpp: Any, engine: LocalEngine, tiny: Callable[..., Path]) -> None:
    texts: list[Any] = [f"text number {i}" for i in range(6)]
    with LocalEngine(tiny("llama", seed=7), n_threads=1) as other:
        vector = difference(engine, other, "tuned", texts, layers=[1])
        tokens = [engine.tokenize(t) for t in texts]
        means = [
            np.mean([r.values[1][1:17].mean(axis=0) for r in e.read(tokens, layers=[1], positions="all")], axis=0)
            for e in (engine, other)
        ]
        assert np.allclose(vector.effective(1, "resid_post"), means[1] - means[0], atol=1e-4)
    with pytest.raises(ModelError, match="nothing to learn"):
        difference(engine, engine, "same", texts, layers=[1])
    with LocalEngine(tiny("qwen2"), n_threads=1) as foreign, pytest.raises(ModelError, match="architecture"):
        check_pair(engine.info.identity, foreign.info.identity)


def test_an_audit_of_a_model_against_itself_and_against_its_quantisation(
    engine: LocalEngine, made: tuple[FeatureIndex, Path], tiny: Callable[..., Path]
) -> None:
    code = SparseCode.load(made[1])
    rng = np.random.default_rng(2)
    windows = [[1, *rng.integers(10, 200, 40).tolist()] for _ in range(16)]
    same = audit(engine, code, windows, original=engine)
    assert same["median_correlation"] == pytest.approx(1.0) and same["damaged"] == 0.0
    assert same["explained_variance"] == same["original_explained_variance"]
    rows = np.concatenate([one.values[1][1:] for one in engine.read(windows, layers=[1], positions="all")])
    norms = np.linalg.norm(rows, axis=1)
    rows = rows[norms <= 3 * np.median(norms)]
    z = code.encode(rows)
    assert same["tokens"] == len(rows) and same["l0"] == pytest.approx((z > 0).sum(axis=1).mean(), rel=1e-3)
    with LocalEngine(tiny("llama", weights="q8_0"), n_threads=1) as quantised:
        other = audit(quantised, code, windows, original=engine)
    assert other["median_correlation"] < 1.0
    assert other["worst"][0]["correlation"] <= other["median_correlation"]
    with pytest.raises(VectorError, match="width"):
        from dataclasses import replace

        audit(engine, replace(code, layer=99), windows)


def test_a_published_code_is_kept_for_a_model(engine: LocalEngine, made: tuple[FeatureIndex, Path], tmp_path: Path) -> None:
    library = Library(tmp_path)
    code = SparseCode.load(made[1])
    folder = keep_published(code, "bought", engine.info.identity, library)
    assert np.array_equal(SparseCode.load(folder).w_dec, code.w_dec)
    assert len(FeatureIndex.load(folder).features) == code.n_features
    with pytest.raises(VectorError, match="already has"):
        keep_published(code, "bought", engine.info.identity, library)
