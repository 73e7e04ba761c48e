"""Terms and steerings, their simple text form, and the formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_plugins.errors import SpecError
from steer_plugins.steering import formula
from steer_plugins.steering.terms import Steering, Term, parse_term
from steer_plugins.steering.vector import SteeringVector

N = 12
SITE = "resid_post"


def make(seed: int = 0, layers=(0, 2), name: str = "mood", **more) -> SteeringVector:
    rng = np.random.default_rng(seed)
    return SteeringVector(name, {(layer, SITE): 3 * rng.normal(size=N) for layer in layers}, **more)


def hidden(dtype=np.float64, seed=9) -> np.ndarray:
    return (10 * np.random.default_rng(seed).normal(size=(5, N))).astype(dtype)


# --- terms


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"vector": "mood"}, "needs a SteeringVector"),
        ({"strength": float("nan")}, "not a finite number"),
        ({"strength": float("inf")}, "not a finite number"),
        ({"strength": "0.5"}, "not a number"),
        ({"strength": None}, "not a number"),
        ({"strength": True}, "not a number"),
        ({"op": "multiply"}, "unknown op"),
        ({"scope": "everywhere"}, "unknown scope 'everywhere'"),
        ({"scope": "5-4"}, "ends before it starts"),
        ({"stream": -1}, "stream"),
        ({"stream": 1.5}, "stream"),
        ({"layers": (3, 9)}, "hold none of its directions: it has 0, 2"),
        ({"layers": (1, 1)}, "hold none of its directions"),
        ({"layers": (2, 0)}, "hold none of its directions"),
        ({"layers": (1,)}, "first and the last"),
        ({"layers": (-1, 2)}, "first and the last"),
        ({"layers": (0.0, 2)}, "first and the last"),
        ({"layers": 2}, "first and the last"),
    ],
)
def test_bad_terms_are_refused(arguments, words):
    with pytest.raises(SpecError) as caught:
        Term(**{"vector": make(), **arguments})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_term_falls_back_on_its_vector():
    vector = make(default_scope="response", op="clamp")
    assert (Term(vector).effective_op, Term(vector).effective_scope) == ("clamp", "response")
    term = Term(vector, np.float32(0.5), layers=[1, 5], op="add", scope="0-")
    assert (term.effective_op, term.effective_scope, term.layers, term.keys()) == ("add", "0-", (1, 5), [(2, SITE)])
    assert type(term.strength) is float
    assert hash(term) == hash(Term(vector, 0.5, layers=(1, 5), op="add", scope="0-"))


def test_steering_of_anything():
    v, w = make(1), make(2, name="terse")
    assert Steering.of(None) == Steering() and not Steering.of(None)
    assert Steering.of(v).terms == (Term(v),)
    assert Steering.of(Term(v, 0.5)).terms == (Term(v, 0.5),)
    s = Steering([Term(v), w])
    assert Steering.of(s) is s
    assert Steering.of([v, Term(w, 2), s]).terms == (Term(v), Term(w, 2), Term(v), Term(w))
    assert (Steering.of(v) + w).terms == ([v] + Steering.of(w)).terms == (Term(v), Term(w))
    assert len(s) == 2 and list(s) == [Term(v), Term(w)]
    for wrong in ("mood", 5, [v, 5], {"mood": 1}):
        with pytest.raises(SpecError):
            Steering.of(wrong)
    with pytest.raises(SpecError):
        Steering(["mood"])


def test_truth_is_whether_anything_changes():
    v = make()
    assert Steering.of(v)
    assert not Steering.of([Term(v, 0), Term(v, -0.0)])
    assert not Steering.of(v - v) and not Steering.of(0 * v)
    assert Steering.of([Term(v, 0), v])
    # A zero scale switches an add off, but not another op.
    assert Steering.of(Term(0 * v, op="project")) and Steering.of(Term(0 * v, op="clamp"))


# --- text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mood", ("mood", 1.0)),
        ("mood:0.8", ("mood", 0.8)),
        ("mood:-.5", ("mood", -0.5)),
        ("mood:+1e-1", ("mood", 0.1)),
        ("mood:0", ("mood", 0.0)),
        ("./a b.safetensors:2.", ("./a b.safetensors", 2.0)),
        ("C:\\x\\v.safetensors:-0.5", ("C:\\x\\v.safetensors", -0.5)),
        ("C:\\x\\v.safetensors", ("C:\\x\\v.safetensors", 1.0)),
        ("c:/x/v.safetensors", ("c:/x/v.safetensors", 1.0)),
        ("a:b:1", ("a:b", 1.0)),
    ],
)
def test_parse_term(text, expected):
    assert parse_term(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mood:abc", "'abc' is not a number (character 6 of 'mood:abc')"),
        ("mood:", "'' is not a number (character 6"),
        ("mood:0,8", "'0,8' is not a number"),
        ("mood:nan", "is not a number"),
        ("mood:inf", "is not a number"),
        ("mood:1_0", "is not a number"),
        ("mood: 1", "is not a number"),
        ("mood:٣", "is not a number"),
        ("mood:1e999", "'1e999' is not a finite number (character 6"),
        (":0.5", "names no vector"),
        ("", "names no vector"),
        ("  ", "names no vector"),
    ],
)
def test_parse_term_says_where(text, words):
    with pytest.raises(SpecError) as caught:
        parse_term(text)
    assert words in str(caught.value)


@given(st.text())
def test_any_text_is_a_term_or_a_spec_error(text):
    try:
        name, strength = parse_term(text)
    except SpecError:
        return
    assert name and text.startswith(name) and np.isfinite(strength)


# --- formula


def test_add_moves_by_strength_times_scale():
    v, h = make(), hidden()
    expected = h + 0.7 * v.scales[2, SITE] * v.directions[2, SITE].astype(np.float64)
    np.testing.assert_allclose(formula.steer(h, Term(v, 0.7), 2), expected, rtol=1e-12)


def test_project_removes_at_1_and_reflects_at_2_whatever_the_scale():
    v, h = 7 * make(), hidden()
    d = v.directions[2, SITE].astype(np.float64)
    np.testing.assert_allclose(formula.steer(h, Term(v, 1, op="project"), 2) @ d, 0, atol=1e-5)
    np.testing.assert_allclose(formula.steer(h, Term(v, 2, op="project"), 2) @ d, -(h @ d), atol=1e-5)
    np.testing.assert_allclose(formula.steer(h, Term(v, 0.25, op="project"), 2) @ d, 0.75 * (h @ d), atol=1e-5)


def test_renorm_keeps_the_length():
    h, v, w = hidden(), make(), make(1)
    out = formula.steer(h, [Term(v, 0.5, op="renorm"), Term(w, -2.0, op="renorm")], 2)
    moved = formula.steer(h, [Term(v, 0.5), Term(w, -2.0)], 2)
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), np.linalg.norm(h, axis=1))
    ratios = out / moved
    np.testing.assert_allclose(ratios, np.repeat(ratios[:, :1], N, axis=1))
    assert np.abs(out - h).max() > 0.1
    np.testing.assert_array_equal(formula.steer(h, Term(v, 0.0, op="renorm"), 2), h)
    with pytest.raises(SpecError, match="more than h"):
        formula.coefficients(Term(v, op="renorm"), 2)


def test_renorm_is_not_combined_with_other_ops():
    v, w = make(layers=(0, 2)), make(1, layers=(2, 3), name="calm")
    for op in ("add", "project", "clamp"):
        with pytest.raises(SpecError, match="'mood' restores the length at layer 2 .*where 'calm' acts with op"):
            Steering([Term(w, op=op), Term(v, op="renorm")])
        Steering([Term(w, op=op), Term(v, op="renorm", layers=(0, 0))])
        Steering([Term(w, 0.0, op=op), Term(v, op="renorm")])
        Steering([Term(w, op=op, stream=1), Term(v, op="renorm", stream=0)])


def test_clamp_sets_the_component():
    v, h = make(), hidden()
    d = v.directions[2, SITE].astype(np.float64)
    out = formula.steer(h, Term(v, -0.5, op="clamp"), 2)
    np.testing.assert_allclose(out @ d, -0.5 * v.scales[2, SITE], rtol=1e-5)
    np.testing.assert_allclose(out - np.outer(out @ d, d), h - np.outer(h @ d, d), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", ["add", "project", "clamp"])
def test_nothing_is_bit_identical(dtype, op):
    v, h = make(), hidden(dtype)
    h[0, 0] = -0.0
    for steering in (None, Term(v, 0, op=op), Steering()):
        assert formula.steer(h, steering, 2).tobytes() == h.tobytes()
    assert formula.steer(h, Term(v, 1, op=op), 1).tobytes() == h.tobytes()  # no direction at that layer
    assert formula.steer(h, Term(v, 1, op=op), 2, "ffn_out").tobytes() == h.tobytes()
    assert formula.steer(h, Term(v, 1, op=op, layers=(0, 1)), 2).tobytes() == h.tobytes()
    out = formula.steer(h, Term(v, 1, op=op), 2)
    assert out.dtype == dtype and not np.array_equal(out, h)


@given(st.floats(-100, 100))
def test_a_multiple_at_strength_1_is_the_vector_at_that_strength_bit_for_bit(k):
    v, h = make(), hidden(np.float32)
    mine, theirs = formula.coefficients(k * v, 2), formula.coefficients(Term(v, k), 2)
    if k == 0:
        assert theirs[0].shape == (N, 0) and not mine[1].any() and not mine[2].any()
        return
    for a, b in zip(mine, theirs, strict=True):
        assert a.tobytes() == b.tobytes()
    assert formula.steer(h, k * v, 2).tobytes() == formula.steer(h, Term(v, k), 2).tobytes()


def test_v_minus_v_changes_nothing():
    v, h = make(), hidden(np.float32)
    assert np.array_equal(formula.steer(h, v - v, 2), h)


def test_columns_follow_the_terms_and_see_the_same_hidden_state():
    v, w, h = make(1), make(2, name="terse", layers=(2,)), hidden()
    V, c, g = formula.coefficients([Term(v, 0.5), Term(v, 0.0), Term(w, 2, op="project"), Term(w, 3, op="clamp")], 2)
    assert V.shape == (N, 3) and V.dtype == np.float32
    s = v.scales[2, SITE]
    np.testing.assert_array_equal(c, [0.5 * s, 0, 3 * w.scales[2, SITE]])
    np.testing.assert_array_equal(g, [0, -2, -1])
    V64 = V.astype(np.float64)
    np.testing.assert_allclose(formula.apply(h, V, c, g), h + (c + g * (h @ V64)) @ V64.T)


def test_coefficients_of_each_token():
    v, h = make(), hidden()
    V, c, g = formula.coefficients(v, 2)
    on = np.array([0, 1, 0, 1, 1.0])[:, None]
    out = formula.apply(h, V, c * on, g * on)
    steered = formula.steer(h, v, 2)
    for token in range(5):
        np.testing.assert_allclose(out[token], (steered if on[token] else h)[token])


def test_mismatches_are_spec_errors():
    v, wide = make(), SteeringVector("wide", {(2, SITE): np.ones(N + 1)})
    with pytest.raises(SpecError, match="12, 13"):
        formula.coefficients([v, wide], 2)
    with pytest.raises(SpecError, match="n_embd 12, the directions 13"):
        formula.steer(hidden(), wide, 2)
    with pytest.raises(SpecError, match="dtype int64"):
        formula.steer(np.ones((1, N), np.int64), v, 2)
