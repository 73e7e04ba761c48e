"""Features of autoencoders in the library, by number and by name, through the grammar."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from steer_plugins import Library
from steer_plugins.concepts import Feature, FeatureIndex, SparseCode
from steer_plugins.errors import SteerError, VectorError
from steer_plugins.steering.grammar import format_terms, parse
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.features import split_name
from tests.unit.fakes import IDENTITY, N_EMBD, FakeEngine

N = 1200
ROWS = np.random.default_rng(0).standard_normal((N, N_EMBD)).astype(np.float32)
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    zeros = np.zeros(N, np.float32)
    code = SparseCode(ROWS.T.copy(), zeros, ROWS, np.zeros(N_EMBD, np.float32), zeros, layer=3)
    folder = tmp_path / IDENTITY.key / "sae" / "talk"
    code.save(folder)
    names = {5: "smell", 7: "night sky", 8: "night", 9: "night"}
    features = tuple(Feature(i, names.get(i, ""), named=i == 7) for i in range(N))
    FeatureIndex(IDENTITY, 3, 50.0, features).save(folder)
    return Library(tmp_path)


def engine(library: Library) -> FakeEngine:
    made = FakeEngine()
    made.library = library
    return made


@pytest.mark.parametrize(
    ("text", "number", "strength"),
    [
        ("talk#5:0.5", 5, 0.5),
        ("talk#smell", 5, 1.0),
        ("talk#1100:-2", 1100, -2.0),
        ('"talk#5"', 5, 1.0),
        ("talk#night-sky", 7, 1.0),
    ],
)
def test_a_feature_is_its_decoder_row_in_median_norms(library: Library, text: str, number: int, strength: float) -> None:
    (term,) = engine(library).steering(text, names_only=True)
    assert term.strength == strength and term.stream is None
    assert np.allclose(term.vector.directions[3, "resid_post"], ROWS[number], atol=1e-6)
    assert term.vector.scales[3, "resid_post"] == pytest.approx(0.4 * 50.0)
    assert term.effective_scope == "response"


def test_sums_of_features(library: Library) -> None:
    steering = engine(library).steering("talk#5:0.5 - talk#8 + talk#smell@3")
    assert [t.strength for t in steering] == [0.5, -1.0, 1.0]


def test_a_vector_of_that_name_keeps_its_streams(library: Library) -> None:
    library.put(SteeringVector("talk", {(3, "resid_post"): np.ones(N_EMBD)}), IDENTITY)
    (term,) = engine(library).steering("talk:0.5#2")
    assert term.stream == 2 and term.vector.name == "talk"
    (term,) = engine(library).steering('"talk#2":0.5')
    assert term.stream is None


@pytest.mark.parametrize("text", ["talk#night:0.5", "talk#none", "other#smell", "talk#5000", "mood#2:0.5"])
def test_what_is_not_there_is_named(library: Library, text: str) -> None:
    with pytest.raises(VectorError) as caught:
        engine(library).steering(text)
    assert text.split(":")[0].split("#")[1] in str(caught.value) or "no autoencoder" in str(caught.value)


@pytest.mark.parametrize("text", ["talk#smell:0.5", "talk#1100", '"talk#5":0.5', "talk#2:0.5", "talk:0.5#2", "talk#2"])
def test_texts_and_terms_turn_into_each_other(text: str) -> None:
    terms = parse(text)
    assert parse(format_terms(terms)) == terms


def test_names_that_are_no_features() -> None:
    assert split_name("talk#5") == ("talk", "5") and split_name("a/b#5") is None and split_name("#5") is None
    assert split_name("../x#y") is None and split_name("talk#") is None


def test_a_spoilt_index_is_a_sentence(library: Library) -> None:
    path = library.root / IDENTITY.key / "sae" / "talk" / "index.json"
    for content in ("", "[]", json.dumps({"features": 3})):
        path.write_text(content)
        with pytest.raises(SteerError):
            engine(library).steering("talk#smell")
