"""Responsive vectors, floors and caps as values: what is kept, what is refused, their files, text and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.errors import SpecError, VectorError
from steer_plugins.steering import formula
from steer_plugins.steering.columns import LINEAR, MAX_COLUMNS, Columns
from steer_plugins.steering.combine import dose, orthogonalise
from steer_plugins.steering.gate import Gate
from steer_plugins.steering.grammar import TermSpec, format_terms, from_json, parse, steering_of
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.foreign.common import losses
from steer_plugins.store.formats import STEER_VECTOR, format_of
from steer_plugins.store.vectorfile import FORMATS, read_vector, write_vector
from steer_plugins.training.calibrate.existing import Proportions
from steer_plugins.training.controls import random_vector

N = 12
PLACE = (2, "resid_post")


def rows(k: int, seed: int) -> np.ndarray:
    v = np.random.default_rng(seed).standard_normal((k, N))
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


def columns(k: int = 3, seed: int = 1) -> Columns:
    return Columns(rows(k, seed), rows(k, seed + 1), np.linspace(1, -1.5, k), np.linspace(-0.2, 0.4, k), [LINEAR, 0.0, 0.3][:k])


def vector(name: str = "v", **options: Any) -> SteeringVector:
    directions = {PLACE: rows(1, 7)[0], (4, "resid_post"): rows(1, 8)[0]}
    return SteeringVector(name, directions, dict.fromkeys(directions, 2.0), **{"columns": {PLACE: columns()}, **options})


def plain(name: str = "p", scale: float = 2.0) -> SteeringVector:
    return SteeringVector(name, {PLACE: rows(1, 7)[0]}, {PLACE: scale})


def hidden(n: int = 40) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((n, N)) * 2


def added(v: SteeringVector, h: np.ndarray) -> np.ndarray:
    """What the columns of a vector add at strength 1, written out."""
    c = v.columns[PLACE]
    total = np.zeros_like(h)
    for j in range(len(c)):
        for i, state in enumerate(h):
            z = state @ c.read[j].astype(np.float64) + c.bias[j]
            if z > c.knee[j]:
                total[i] += c.gain[j] * z * c.write[j].astype(np.float64)
    return total


def test_the_formula_of_each_op() -> None:
    h, v = hidden(), vector()
    d, moved = 2.0 * v.directions[PLACE].astype(np.float64), added(v, hidden())
    assert 0 < (np.abs(moved).max(axis=1) > 0).sum()
    np.testing.assert_allclose(formula.steer(h, Term(v, 0.7), 2), h + 0.7 * d + 0.7 * moved)
    np.testing.assert_allclose(formula.steer(h, Term(v, 0.7, op="project"), 2), h + 0.7 * moved)
    np.testing.assert_allclose(formula.steer(h, Term(v, 0.7, op="clamp"), 2), h + 0.7 * d + moved)
    after = h + 0.7 * d + 0.7 * moved
    length = np.linalg.norm(h, axis=1, keepdims=True) / np.linalg.norm(after, axis=1, keepdims=True)
    np.testing.assert_allclose(formula.steer(h, Term(v, 0.7, op="renorm"), 2), after * length)
    np.testing.assert_array_equal(formula.steer(h, Term(v, 0.0, op="clamp"), 2), h)
    np.testing.assert_allclose(formula.steer(h, Term(v, 1.0, op="clamp"), 4) @ v.directions[4, "resid_post"], 2.0, atol=1e-5)
    with pytest.raises(SpecError, match=r"use formula\.edit"):
        formula.coefficients(v, 2)


@pytest.mark.parametrize("scale", [2.0, -2.0])
def test_floors_and_caps_hold_the_component(scale: float) -> None:
    h, v = hidden(), plain(scale=scale)
    d = v.directions[PLACE].astype(np.float64)
    units = h @ d / scale
    floor = formula.steer(h, Term(v, op="floor", level=0.1), 2) @ d / scale
    cap = formula.steer(h, Term(v, op="cap", level=0.1), 2) @ d / scale
    np.testing.assert_allclose(floor, np.maximum(units, 0.1), atol=1e-6)
    np.testing.assert_allclose(cap, np.minimum(units, 0.1), atol=1e-6)
    both = formula.steer(h, [Term(v, op="floor", level=-0.1), Term(v, op="cap", level=0.2)], 2) @ d / scale
    np.testing.assert_allclose(both, np.clip(units, -0.1, 0.2), atol=1e-6)
    half = formula.steer(h, Term(v, 0.5, op="floor", level=0.1), 2) @ d / scale
    np.testing.assert_allclose(half, units + 0.5 * (np.maximum(units, 0.1) - units), atol=1e-6)
    untouched = units > 0.1
    assert formula.steer(h, Term(v, op="floor", level=0.1), 2)[untouched].tobytes() == h[untouched].tobytes()


def test_rows_of_another_length_mean_the_same() -> None:
    """Lengths go into gain, bias and knee; rows of length 1 keep their bits."""
    h, c = hidden(), columns()
    long = Columns(3.0 * c.read, 0.5 * c.write, 2.0 / 3.0 * c.gain, 3.0 * c.bias, 3.0 * c.knee)
    for name in ("read", "write", "gain", "bias", "knee"):
        np.testing.assert_allclose(getattr(long, name), getattr(c, name), rtol=1e-6)
    np.testing.assert_allclose(c.response(h), long.response(h), atol=1e-5)
    turned = Columns(np.asfortranarray(3.0 * c.read), np.asfortranarray(c.write), c.gain)
    assert turned.read.flags.c_contiguous and turned.write.flags.c_contiguous  # as files take them
    again = Columns(c.read, c.write, c.gain, c.bias, c.knee)
    assert again.read.tobytes() == c.read.tobytes() and again.content() == c.content()


def test_arithmetic() -> None:
    h, v = hidden(), vector()
    np.testing.assert_allclose(formula.steer(h, 0.5 * v, 2), formula.steer(h, Term(v, 0.5), 2))
    w = vector("w", columns={PLACE: columns(2, 20)})
    total = v + w - plain()
    np.testing.assert_allclose(formula.steer(h, total, 2), formula.steer(h, [v, w, Term(plain(), -1.0)], 2), atol=1e-6)
    assert len(total.columns[PLACE]) == 5
    with pytest.raises(VectorError, match=f"{MAX_COLUMNS} are the limit"):
        v + v + v + v + v + v
    assert (v.with_layers(4, 4).columns, v.with_layers(2, 2).columns[PLACE]) == ({}, v.columns[PLACE])
    assert "responsive" in repr(v) and "responsive" not in repr(plain())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"read": np.zeros((3, N))}, "read is zero"),
        ({"write": np.full((3, N), np.nan)}, "NaN or Inf"),
        ({"write": rows(2, 1)}, "shape"),
        ({"gain": np.inf}, "gain that is not finite"),
        ({"gain": [1.0, 2.0]}, "give a number for each"),
        ({"bias": 1e16}, "a bias beyond"),
        ({"knee": -1.0}, "a knee below 0"),
        ({"knee": np.nan}, "not a number"),
        ({"read": rows(17, 1), "write": rows(17, 2)}, "17 columns"),
    ],
)
def test_what_columns_refuse(change: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"read": rows(3, 1), "write": rows(3, 2), "gain": 1.0, "bias": 0.0, "knee": 0.0}
    Columns(**given)
    with pytest.raises(VectorError, match=sentence):
        Columns(**{**given, **change})


def test_what_vectors_and_terms_refuse() -> None:
    v = vector()
    with pytest.raises(VectorError, match="no direction there"):
        SteeringVector("v", {PLACE: rows(1, 7)[0]}, columns={(3, "resid_post"): columns()})
    with pytest.raises(VectorError, match="have 5 numbers"):
        SteeringVector("v", {PLACE: rows(1, 7)[0]}, columns={PLACE: Columns(np.eye(5)[:1], np.eye(5)[:1], 1.0)})
    with pytest.raises(VectorError, match="unknown op 'floor'"):
        plain().replace(op="floor")
    for term, sentence in (
        (lambda: Term(plain(), op="floor"), "needs a level, such as p%floor:0.5"),
        (lambda: Term(plain(), level=0.5), "takes no level"),
        (lambda: Term(plain(), op="cap", level=float("inf")), "not a finite number"),
        (lambda: Term(plain(), 1.5, op="cap", level=0.5), "cap takes 0 to 1"),
        (lambda: Term(plain(), -1.0, op="floor", level=0.5), "floor takes 0 to 1"),
        (lambda: Term(plain(), op="floor", level=1e16), "level 1e\\+16 of 'p' is too large"),
        (lambda: Term(v, op="floor", level=0.5), "is responsive, so it has no floor"),
        (lambda: Term(v, 1e16), "too large"),
        (lambda: Gate(v.with_layers(2, 2), 0.1), "has columns"),
        (lambda: orthogonalise([plain(), v]), "cannot be orthogonalised"),
        (lambda: Steering([Term(plain(), op="cap", level=0.1), Term(plain(), op="cap", level=0.2)]), "caps 0.1 and 0.2"),
        (lambda: Steering([Term(plain(), op="renorm"), Term(plain(), op="cap", level=0.2)]), "restores the length"),
    ):
        with pytest.raises(SpecError, match=sentence):
            term()
    assert not Term(v.replace(scales=dict.fromkeys(v.scales, 0.0))).is_zero
    assert Term(v.replace(scales=dict.fromkeys(v.scales, 0.0)), layers=(4, 4)).is_zero
    assert not Term(plain(), op="floor", level=0.0).is_zero
    assert dose([Term(plain(), op="floor", level=5.0), plain()]) == pytest.approx(1.0)


def test_files(tmp_path: Path) -> None:
    v = vector()
    path = tmp_path / "v.safetensors"
    write_vector(v, path)
    back = read_vector(path)
    assert back == v and back.content_hash == v.content_hash
    for name in ("read", "write", "gain", "bias", "knee"):
        assert getattr(back.columns[PLACE], name).tobytes() == getattr(v.columns[PLACE], name).tobytes()
    assert FORMATS[1].encode() in path.read_bytes()
    write_vector(plain(), path)  # what has none stays what older readers know
    assert FORMATS[0].encode() in path.read_bytes() and b"columns" not in path.read_bytes()
    assert format_of(path) is STEER_VECTOR


def test_the_hash_covers_all_of_a_column() -> None:
    c = columns()
    others = [
        Columns(rows(3, 50), c.write, c.gain, c.bias, c.knee),
        Columns(c.read, rows(3, 50), c.gain, c.bias, c.knee),
        Columns(c.read, c.write, c.gain + 0.1, c.bias, c.knee),
        Columns(c.read, c.write, c.gain, c.bias + 0.1, c.knee),
        Columns(c.read, c.write, c.gain, c.bias, [0.0, 0.0, 0.3]),
    ]
    hashes = {vector(columns={PLACE: one}).content_hash for one in (c, *others)}
    assert len(hashes | {vector(columns={}).content_hash}) == len(others) + 2
    assert vector(columns={(4, "resid_post"): c}).content_hash not in hashes


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"steer-vector-v2", b"steer-vector-v1", "unknown field 'columns'"),
        (b'\\"bias\\":-0.2', b'\\"bias\\":-0.3', "damaged"),
        (b'\\"bias\\"', b'\\"blas\\"', "just gain, bias and knee"),
        (b'\\"knee\\":0.3', b'\\"knee\\":-.3', "not valid JSON"),
        (b'\\"gain\\":1.0', b'\\"gain\\":9e9', "damaged"),
        (b"read.2.", b"reap.2.", "unknown tensor"),
        (b"write.2.", b"write.3.", "belongs to no column"),
        (b'\\"2.resid_post\\":[', b'\\"4.resid_post\\":[', "belongs to no column"),
    ],
)
def test_damaged_files(tmp_path: Path, old: bytes, new: bytes, sentence: str) -> None:
    path = tmp_path / "v.safetensors"
    write_vector(vector(), path)
    good = path.read_bytes()
    assert old in good and len(old) == len(new)
    path.write_bytes(good.replace(old, new, 1))
    with pytest.raises(VectorError, match=sentence):
        read_vector(path)


def test_other_formats_say_what_they_lose() -> None:
    from steer_plugins.plugins import manager

    formats = manager().registry("formats")
    writers = [fmt for fmt in formats.values() if fmt.write is not None and fmt is not STEER_VECTOR]
    assert writers and not any("columns" in lost for lost in losses(vector(), STEER_VECTOR.limits))
    for fmt in writers:
        assert any("its columns" in lost for lost in losses(vector(), fmt.limits)), fmt.name


def test_controls_write_elsewhere() -> None:
    """A random twin reads as the vector does, as strongly, and writes at random."""
    v = vector()
    twin = random_vector(v, 3)
    c, other = v.columns[PLACE], twin.columns[PLACE]
    assert other.read.tobytes() == c.read.tobytes() and other.gain.tolist() == c.gain.tolist()
    assert np.abs((other.write * c.write).sum(axis=1)).max() < 0.9 and twin.scales == v.scales
    given = Proportions(v, {2: 4.0, 4: 4.0})
    whole = given.vector((2, 4), 0.5, "response")
    np.testing.assert_allclose(whole.columns[PLACE].gain, 0.5 * c.gain)  # the dose was 1 in all
    noise = given.random(0).vector((2, 4), 0.5, "response")
    np.testing.assert_allclose(noise.columns[PLACE].gain, 0.5 * c.gain)
    assert np.abs((noise.columns[PLACE].write * c.write).sum(axis=1)).max() < 0.9


def test_grammar() -> None:
    texts = {
        "x%floor:0.2": TermSpec("x", op="floor", level=0.2),
        "x%cap:-0.5": TermSpec("x", op="cap", level=-0.5),
        "x:0.5@3-6?response%floor:0[linear:8]": TermSpec("x", 0.5, (3, 6), "floor", "response", schedule=None, level=0.0),
    }
    for text, spec in texts.items():
        (found,) = parse(text)
        assert (found.vector, found.strength, found.op, found.level) == (spec.vector, spec.strength, spec.op, spec.level)
        assert parse(format_terms([found])) == [found] == from_json(json.loads(json.dumps([found.to_json()])))
    steering = steering_of("p%floor:0.2 + p%cap:0.5", {"p": plain()}.__getitem__)
    assert [(t.effective_op, t.level) for t in steering] == [("floor", 0.2), ("cap", 0.5)]
    for text, sentence in (
        ("x%floor", "expected the level of floor"),
        ("x%floor:", "expected a number"),
        ("x%cap:1e999", "too large"),
        ("x%add:0.5", "expected :strength"),
        ("x%floor:1%cap:2", "a second op"),
    ):
        with pytest.raises(SpecError, match=sentence):
            parse(text)
    for item, sentence in (
        ({"vector": "x", "op": "cap"}, "op cap needs a level"),
        ({"vector": "x", "level": 1}, "belongs to op floor or cap"),
        ({"vector": "x", "op": "cap", "level": True}, "not a finite number"),
    ):
        with pytest.raises(SpecError, match=sentence):
            from_json([item])
