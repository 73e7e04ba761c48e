"""Steering vectors: what is refused, arithmetic, hashes; and the identity of a model."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_plugins.errors import VectorError
from steer_plugins.steering.vector import ModelIdentity, SteeringVector, check_name, layer_ranges, scope_range

N = 16
MODEL = ModelIdentity("llama", 4, N, "a" * 64, "b" * 64, name="Tiny")

floats = st.floats(-1e3, 1e3, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)
factors = st.floats(-1e6, 1e6)


def rows(seed: int, layers=(0, 2), site="resid_post", scale=3.0) -> dict:
    rng = np.random.default_rng(seed)
    return {(layer, site): (scale * rng.normal(size=N)).astype(np.float32) for layer in layers}


def make(seed: int = 0, name: str = "mood", layers=(0, 2), **more) -> SteeringVector:
    return SteeringVector(name, rows(seed, layers), **more)


def test_raw_directions_become_unit_and_their_length_the_scale():
    raw = rows(1)
    vector = SteeringVector("mood", raw)
    for key, row in raw.items():
        assert np.linalg.norm(vector.directions[key].astype(np.float64)) == pytest.approx(1, abs=1e-7)
        assert vector.scales[key] == pytest.approx(np.linalg.norm(row.astype(np.float64)), rel=1e-12)
        np.testing.assert_allclose(vector.effective(*key), row, rtol=2e-7)


def test_given_scales_multiply_the_length():
    raw = {(1, "resid_post"): np.array([3.0, 4.0])}
    assert SteeringVector("v", raw, {(1, "resid_post"): 2.0}).scales == {(1, "resid_post"): 10.0}


def test_unit_directions_keep_their_bits():
    first = make(3)
    again = SteeringVector("mood", first.directions, first.scales)
    assert again.content_hash == first.content_hash
    for key in first.directions:
        assert again.directions[key].tobytes() == first.directions[key].tobytes()


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
def test_very_long_and_very_short_rows_are_normalised(size):
    vector = SteeringVector("v", {(0, "resid_post"): np.array([3.0, 4.0]) * size})
    np.testing.assert_allclose(vector.directions[0, "resid_post"], [0.6, 0.8], rtol=1e-6)
    assert vector.scales[0, "resid_post"] == pytest.approx(5 * size)


def test_arrays_are_copies_and_read_only():
    row = np.eye(N, dtype=np.float32)[0]
    vector = SteeringVector("v", {(0, "resid_post"): row})
    row[1] = 5
    assert vector.directions[0, "resid_post"][1] == 0
    with pytest.raises(ValueError):
        vector.directions[0, "resid_post"][0] = 2
    with pytest.raises(TypeError):
        vector.directions[1, "resid_post"] = row  # type: ignore[index]


UNIT = np.eye(N, dtype=np.float32)[0]
KEY = (0, "resid_post")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"directions": {KEY: np.full(N, np.nan)}}, "NaN or Inf"),
        ({"directions": {KEY: np.full(N, np.inf)}}, "NaN or Inf"),
        ({"directions": {KEY: np.ones((2, N))}}, "shape [2, 16]"),
        ({"directions": {KEY: np.float32(1)}}, "shape []"),
        ({"directions": {KEY: []}}, "shape [0]"),
        ({"directions": {KEY: ["a"]}}, "not an array of real numbers"),
        ({"directions": {KEY: [[1, 2], [3]]}}, "not an array of real numbers"),
        ({"directions": {KEY: np.ones(N, complex)}}, "not an array of real numbers"),
        ({"directions": {KEY: UNIT, (1, "resid_post"): np.ones(N + 1)}}, "16 and 17"),
        ({"directions": {(-1, "resid_post"): UNIT}}, "-1 is not a layer"),
        ({"directions": {(1.5, "resid_post"): UNIT}}, "1.5 is not a layer"),
        ({"directions": {(True, "resid_post"): UNIT}}, "True is not a layer"),
        ({"directions": {(0, "mlp"): UNIT}}, "unknown site 'mlp'"),
        ({"directions": {3: UNIT}}, "3 is not a (layer, site) pair"),
        ({"directions": {}}, "no direction that is not zero"),
        ({"directions": {KEY: np.zeros(N)}}, "no direction that is not zero"),
        ({"directions": {KEY: np.zeros(N)}, "scales": {KEY: 1.0}}, "layer 0 resid_post has a scale but a direction of zero"),
        ({"directions": {KEY: UNIT}, "scales": {}}, "not both"),
        ({"directions": {KEY: UNIT}, "scales": {KEY: 1, (1, "resid_post"): 1}}, "not both"),
        ({"directions": {KEY: UNIT}, "scales": {KEY: float("nan")}}, "is nan"),
        ({"directions": {KEY: UNIT}, "scales": {KEY: 10**400}}, "is inf"),
        ({"directions": {KEY: UNIT}, "scales": {KEY: "1"}}, "not a number"),
        ({"directions": {KEY: UNIT * 1e9}, "scales": {KEY: 1e308}}, "too large"),
        ({"directions": {KEY: UNIT}, "op": "multiply"}, "unknown op 'multiply'"),
        ({"directions": {KEY: UNIT}, "default_scope": "everywhere"}, "unknown scope 'everywhere'"),
        ({"directions": {KEY: UNIT}, "name": "Mood"}, "'Mood' is not a vector name"),
        ({"directions": {KEY: UNIT}, "provenance": {"x": float("nan")}}, "its provenance is not a JSON object"),
        ({"directions": {KEY: UNIT}, "calibration": [1]}, "its calibration is not a JSON object"),
        ({"directions": {KEY: np.ones(N + 1)}, "identity": MODEL}, 'n_embd 17, its model llama 4x16 "Tiny" 16'),
        ({"directions": {(4, "resid_post"): UNIT}, "identity": MODEL}, "names layer 4"),
        ({"directions": {KEY: UNIT}, "identity": "llama"}, "not a ModelIdentity"),
    ],
)
def test_bad_vectors_are_refused_in_one_sentence(arguments, words):
    with pytest.raises(VectorError) as caught:
        SteeringVector(**{"name": "mood", **arguments})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero_rows_are_dropped_since_they_do_nothing_under_any_op():
    vector = SteeringVector("v", {KEY: UNIT, (1, "resid_post"): np.zeros(N)})
    assert vector.layers == [0]


# --- names and scopes


@pytest.mark.parametrize("name", ["mood", "a", "0", "mood.v2", "a_b-c", "x" * 64, "console", "com10"])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Mood",
        ".mood",
        "-x",
        "_x",
        "a/b",
        "a\\b",
        "..",
        "a b",
        "x" * 65,
        "mood\n",
        "é",
        "a:b",
        "con",
        "nul.x",
        "lpt1",
        None,
        5,
    ],
)
def test_bad_names(name):
    with pytest.raises(VectorError):
        check_name(name)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("all", None), ("thinking", None), ("0-", (0, None)), ("3-3", (3, 3)), ("5-20", (5, 20))],
)
def test_scopes(scope, expected):
    assert scope_range(scope) == expected


@pytest.mark.parametrize("scope", ["", "ALL", "5", "-5", "5-4", "1-2-3", "a-b", "٣-", "1 - 2", None, 3])
def test_bad_scopes(scope):
    with pytest.raises(VectorError):
        scope_range(scope)


def test_layer_ranges():
    assert layer_ranges([3, 4, 5, 9]) == "3-5, 9"
    assert layer_ranges([0]) == "0"
    assert layer_ranges([]) == "none"


# --- arithmetic


@given(factors)
def test_a_multiple_has_the_same_directions_and_exactly_multiplied_scales(factor):
    vector = make(4)
    multiple = factor * vector
    for key in vector.directions:
        assert multiple.directions[key].tobytes() == vector.directions[key].tobytes()
        # What an engine computes for strength `factor`, and for strength 1 of the multiple.
        assert 1.0 * multiple.scales[key] == factor * vector.scales[key]
    assert vector * factor == multiple == vector.scaled(factor) == np.float64(factor) * vector


def test_minus_and_zero():
    vector = make(5)
    assert -vector == -1 * vector
    twice = -1 * -vector
    assert twice != vector  # the provenance says how it came to be
    assert twice.content_hash == vector.content_hash
    assert (0 * vector).is_zero and (vector - vector).is_zero and (-0.0 * vector).is_zero
    assert not vector.is_zero
    assert (0 * vector).content_hash == (-0.0 * vector).content_hash == (vector - vector).content_hash


@given(st.integers(0, 1000), st.integers(0, 1000), st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
def test_sums_are_sums_of_what_is_applied(seed, other_seed, layers):
    a, b = make(seed), make(other_seed, "terse", layers=layers)
    total, difference = a + b, a - b
    for key in set(a.directions) | set(b.directions):
        mine = a.effective(*key) if key in a.directions else np.zeros(N)
        theirs = b.effective(*key) if key in b.directions else np.zeros(N)
        np.testing.assert_allclose(total.effective(*key), mine + theirs, atol=1e-5)
        np.testing.assert_allclose(difference.effective(*key), mine - theirs, atol=1e-5)
    assert total.layers == sorted({0, 2, *layers})


def test_exact_identities():
    v, w = make(6), make(7, "terse", layers=(1,))
    assert (v + v).content_hash == (2 * v).content_hash
    assert (v - v + w).content_hash == (w + (v - v)).content_hash
    # A zero operand leaves the bits of the other alone.
    same_layers = make(8)
    assert ((v - v) + same_layers).content_hash == same_layers.content_hash
    assert (same_layers + 0 * v).content_hash == same_layers.content_hash
    # Opposite directions, stored with different bits, cancel too.
    mirrored = v.replace(directions={key: -row for key, row in v.directions.items()})
    assert (v + mirrored).is_zero
    assert np.linalg.norm((v + mirrored).directions[KEY]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make(1, op="project"), "op 'project'"),
        (make(1, default_scope="response"), "scope"),
        (SteeringVector("v", {KEY: np.ones(N + 1)}), "n_embd 16 vs 17"),
        (make(1, identity=ModelIdentity("qwen2", 4, N, "a" * 64, "b" * 64)), "architecture llama vs qwen2"),
    ],
)
def test_what_cannot_be_added(other, words):
    vector = make(0, identity=MODEL)
    for attempt in (lambda: vector + other, lambda: vector - other):
        with pytest.raises(VectorError, match=words):
            attempt()


@pytest.mark.parametrize("op", ["project", "clamp"])
def test_only_add_can_be_multiplied(op):
    with pytest.raises(VectorError, match=op):
        2 * make(0, op=op)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), True, "2", None])
def test_factors_are_finite_numbers(factor):
    with pytest.raises(VectorError):
        make() * factor


def test_strangers_are_not_operands():
    vector = make()
    for attempt in (lambda: vector + 1, lambda: vector - "x", lambda: vector * vector):
        with pytest.raises(TypeError):
            attempt()


def test_results_know_where_they_come_from_and_are_not_calibrated():
    a, b = make(1, identity=MODEL, calibration={"strength": 1}), make(2, "terse")
    total = a + b
    assert total.name == "mood-plus-terse" and (a - b).name == "mood-minus-terse"
    assert total.identity == MODEL and total.calibration is None and (2 * a).calibration is None
    assert total.provenance["sum"][1] == {"name": "terse", "factor": 1.0, "content_sha256": b.content_hash}
    assert len((a.replace(name="x" * 64) + b).name) == 64


def test_window():
    vector = make(0, layers=(0, 1, 2, 3), calibration={"a": 1}, identity=MODEL)
    window = vector.with_layers(1, 2)
    assert window.layers == [1, 2] and window.calibration is None and window.identity == MODEL
    assert window.scales[1, "resid_post"] == vector.scales[1, "resid_post"]
    assert vector.with_layers(0, 9) == vector
    with pytest.raises(VectorError, match="has 0-3"):
        vector.with_layers(4, 9)


# --- equality and hashes


def test_content_hash_is_the_documented_one():
    vector = SteeringVector("v", {(1, "ffn_out"): np.array([0.6, 0.8]), (0, "resid_post"): [1, 0]}, op="clamp")
    expected = b"steer-content-v1\0clamp\0"
    for layer, site in ((0, "resid_post"), (1, "ffn_out")):
        row, scale = vector.directions[layer, site], vector.scales[layer, site]
        expected += struct.pack("<I", layer) + site.encode() + b"\0" + struct.pack("<I2fd", 2, *row, scale)
    assert vector.content_hash == hashlib.sha256(expected).hexdigest()


def test_content_hash_sees_what_is_applied_and_nothing_else():
    vector = make(1)
    same = vector.replace(name="other", default_scope="prompt", provenance={"a": 1}, calibration={"b": 2}, identity=MODEL)
    assert same.content_hash == vector.content_hash and same != vector
    for changed in (vector.replace(op="clamp"), 2 * vector, vector.with_layers(0, 0), make(2)):
        assert changed.content_hash != vector.content_hash


def test_equality_and_hash():
    assert make(1) == make(1) and hash(make(1)) == hash(make(1))
    assert make(1) != make(1, "other") and make(1) != "mood"
    for change in ({"default_scope": "prompt"}, {"identity": MODEL}, {"provenance": {"a": 1}}, {"calibration": {}}):
        assert make(1) != make(1, **change)


def test_notes_are_json_copies():
    notes = {"seeds": (1, 2), "deep": {"a": [1]}}
    vector = make(1, provenance=notes)
    notes["deep"]["a"].append(2)
    assert vector.provenance == {"seeds": [1, 2], "deep": {"a": [1]}}
    vector.provenance["deep"]["a"].append(3)
    assert vector.provenance["deep"] == {"a": [1]}


def test_repr_is_for_people():
    assert repr(make(1)) == "<SteeringVector 'mood' add layers 0, 2 at resid_post, n_embd 16, scope all>"


# --- identity


def test_mismatch_names_the_first_difference():
    def other(**change):
        return ModelIdentity(**{**MODEL.to_dict(), **change})

    assert MODEL.mismatch(other(name="Another name")) is None
    assert MODEL.mismatch(other(architecture="qwen2", n_embd=8)) == "architecture llama vs qwen2"
    assert MODEL.mismatch(other(n_layer=5)) == "n_layer 4 vs 5"
    assert MODEL.mismatch(other(n_embd=2048)) == "n_embd 16 vs 2048"
    assert MODEL.mismatch(other(n_streams=4)) == "n_streams 1 vs 4"
    assert "vocabulary" in MODEL.mismatch(other(tokens_sha256="c" * 64))
    assert "fine-tune" in MODEL.mismatch(other(norms_sha256="c" * 64))
    assert MODEL.differs_only_in_norms(other(norms_sha256="c" * 64))
    assert not MODEL.differs_only_in_norms(other(norms_sha256="c" * 64, n_layer=5))
    assert not MODEL.differs_only_in_norms(MODEL)


def test_key_is_a_safe_folder_name_and_differs_with_the_model():
    digest = hashlib.sha256(f"llama|4|16|{'a' * 64}|{'b' * 64}".encode()).hexdigest()
    assert MODEL.key == f"llama-4x16-{digest[:12]}"
    evil = ModelIdentity("../../Etc\\x:y\n", 4, N, "a" * 64, "b" * 64)
    assert evil.key.startswith("______etc_x_y_-4x16-")
    assert evil.label == "../../Etc\\x:y 4x16"
    assert len(ModelIdentity("x" * 500, 4, N, "a" * 64, "b" * 64).key) < 64


def test_identity_round_trip_and_refusals():
    data = MODEL.to_dict()
    assert ModelIdentity.from_dict(data) == MODEL
    assert ModelIdentity.from_dict({k: v for k, v in data.items() if k not in ("name", "n_streams")}).n_streams == 1
    for change in (
        {"architecture": ""},
        {"architecture": 5},
        {"name": "x" * 1001},
        {"n_layer": 0},
        {"n_layer": True},
        {"n_embd": 16.0},
        {"n_embd": 2**31},
        {"n_streams": None},
        {"tokens_sha256": "A" * 64},
        {"norms_sha256": "a" * 63},
        {"extra": 1},
    ):
        with pytest.raises(VectorError):
            ModelIdentity.from_dict({**data, **change})
    with pytest.raises(VectorError, match="lacks 'n_embd'"):
        ModelIdentity.from_dict({k: v for k, v in data.items() if k != "n_embd"})
    with pytest.raises(VectorError):
        ModelIdentity.from_dict([])


def test_check_fits():
    def for_model(**change):
        return ModelIdentity(**{**MODEL.to_dict(), **change})

    vector = make(1, identity=MODEL)
    vector.check_fits(MODEL)
    fine_tune = for_model(norms_sha256="c" * 64)
    with pytest.raises(VectorError, match="another fine-tune.*force"):
        vector.check_fits(fine_tune)
    vector.check_fits(fine_tune, force=True)
    with pytest.raises(VectorError, match="n_layer 4 vs 5; fit it with: steer train mood$"):
        vector.check_fits(for_model(n_layer=5), force=True)
    stranger = make(1)
    stranger.check_fits(MODEL)
    with pytest.raises(VectorError, match="n_embd 16 vs 8"):
        stranger.check_fits(for_model(n_embd=8))
    with pytest.raises(VectorError, match="names layer 2, the model has 0 to 1"):
        stranger.check_fits(for_model(n_layer=2))
