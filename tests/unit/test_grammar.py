"""The grammar: what it reads, what it refuses and where, and that text and JSON carry the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_plugins.errors import SpecError
from steer_plugins.steering.grammar import TermSpec, format_terms, from_json, parse, parse_options, steering_of
from steer_plugins.steering.schedule import Schedule
from steer_plugins.steering.vector import SteeringVector


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", []),
        ("  ", []),
        ("mood", [TermSpec("mood")]),
        ("mood:0.6", [TermSpec("mood", 0.6)]),
        ("mood:-.5e1", [TermSpec("mood", -5.0)]),
        ("-mood:0.5", [TermSpec("mood", -0.5)]),
        ("a-b:0.5 - c", [TermSpec("a-b", 0.5), TermSpec("c", -1.0)]),
        ("a+b", [TermSpec("a"), TermSpec("b")]),
        ("!refusal", [TermSpec("refusal", op="project")]),
        ("! refusal:0.5@3", [TermSpec("refusal", 0.5, (3, 3), "project")]),
        ("mood:0.4%clamp", [TermSpec("mood", 0.4, op="clamp")]),
        ("v2.1_x@10-", [TermSpec("v2.1_x", 1.0, (10, None))]),
        ("m:3#2?0-%add@1-2", [TermSpec("m", 3.0, (1, 2), "add", "0-", 2)]),
        ("m:2[linear:64]", [TermSpec("m", 2.0, schedule=Schedule("linear", 64))]),
        ("m[cosine:9:.25]?response + n", [TermSpec("m", scope="response", schedule=Schedule("cosine", 9, 0.25)), TermSpec("n")]),
        ("m:0.5{harm}", [TermSpec("m", 0.5, gate="harm")]),
        ('m{"a b/harm.safetensors"}#1', [TermSpec("m", stream=1, gate="a b/harm.safetensors")]),
        ("m[constant]@2", [TermSpec("m", layers=(2, 2))]),
        (r'"C:\\v \"x\".safetensors":0.5 + m', [TermSpec('C:\\v "x".safetensors', 0.5), TermSpec("m")]),
        (
            "mood:0.6 + succinctness:-0.3@10-20?answer + !refusal",
            [
                TermSpec("mood", 0.6),
                TermSpec("succinctness", -0.3, (10, 20), scope="answer"),
                TermSpec("refusal", op="project"),
            ],
        ),
    ],
)
def test_reads(text: str, terms: list[TermSpec]) -> None:
    assert parse(text) == terms
    assert parse(format_terms(terms)) == terms
    assert from_json(json.loads(json.dumps([t.to_json() for t in terms]))) == terms


@pytest.mark.parametrize(
    ("text", "at", "what"),
    [
        ("+ mood", 1, "name"),
        ("mood:", 6, "number"),
        ("mood:x", 6, "number"),
        ("mood:nan", 6, "number"),
        ("mood:1e999", 6, "too large"),
        ("mood: 0.5", 6, "number"),
        ("mood +", 7, "name"),
        ("mood succinctness", 6, "expected + or -"),
        ("mood@", 6, "layers"),
        ("mood@20-10", 6, "before it starts"),
        ("mood@-3", 6, "layers"),
        ("mood?later", 6, "unknown scope"),
        ("mood?20-10", 6, "ends before"),
        ("mood?", 6, "scope"),
        ("mood%twist", 6, "unknown op"),
        ("mood:1#x", 8, "stream"),
        ("mood@1@2", 7, "second layers"),
        ("!mood%add", 6, "second op"),
        ("mood{x>1}", 7, "expected }"),
        ("mood{}", 6, "name"),
        ("mood{x", 7, "expected }"),
        ("mood{x}{y}", 8, "second gate"),
        ("mood:0.5[linear]", 10, "over how many"),
        ("mood[linear:0]", 6, "from 1 to 4096"),
        ("mood[linear:4097]", 6, "from 1 to 4096"),
        ("mood[linear:9:1.5]", 6, "from 0 to 1"),
        ("mood[quadratic:9]", 6, "unknown schedule"),
        ("mood[constant:9]", 6, "neither"),
        ("mood[linear:9", 6, "expected a schedule"),
        ("mood[linear:9][linear:9]", 15, "second schedule"),
        ("mood:0.6 ? response", 10, "expected + or -"),
        ('"open', 1, "never ends"),
        ('""', 1, "empty"),
        ("m\u00f6\u00f6d", 2, "expected"),
        ("a;b", 2, "expected"),
        ("../x", 1, "name"),
    ],
)
def test_refuses_and_points_at_it(text: str, at: int, what: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"at character {at} ")) as caught:
        parse(text)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {"vector": "mood"},
        ["mood"],
        [{}],
        [{"vector": ""}],
        [{"vector": "m", "strength": "1"}],
        [{"vector": "m", "strength": True}],
        [{"vector": "m", "strength": float("nan")}],
        [{"vector": "m", "layers": [1]}],
        [{"vector": "m", "layers": [2, 1]}],
        [{"vector": "m", "layers": [-1, 1]}],
        [{"vector": "m", "layers": 3}],
        [{"vector": "m", "op": "twist"}],
        [{"vector": "m", "scope": "later"}],
        [{"vector": "m", "scope": 3}],
        [{"vector": "m", "stream": -1}],
        [{"vector": "m", "gate": {}}],
        [{"vector": "m", "gate": ""}],
        [{"vector": "m", "colour": 1}],
        [{"vector": "m", "schedule": "linear"}],
        [{"vector": "m", "schedule": {"kind": "linear"}}],
        [{"vector": "m", "schedule": {"kind": "linear", "over": 2.0}}],
        [{"vector": "m", "schedule": {"kind": "linear", "over": True}}],
        [{"vector": "m", "schedule": {"kind": "linear", "over": 2, "floor": float("nan")}}],
        [{"vector": "m", "schedule": {"kind": "linear", "over": 2, "to": 0}}],
        [{"vector": "m", "schedule": {"kind": ["linear"], "over": 2}}],
        [{"vector": "m"}] * 65,
    ],
)
def test_json_is_checked(data: object) -> None:
    with pytest.raises(SpecError):
        from_json(data)


windows = st.tuples(st.integers(0, 99), st.none() | st.integers(0, 99)).map(
    lambda w: w if w[1] is None else (min(w), max(w))  # type: ignore[type-var]
)
specs = st.builds(
    TermSpec,
    vector=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,10}", fullmatch=True) | st.text(min_size=1, max_size=12),
    strength=st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0),
    layers=st.none() | windows,
    op=st.sampled_from([None, "add", "project", "clamp", "renorm"]),
    scope=st.sampled_from([None, "all", "prompt", "response", "thinking", "answer", "0-", "5-20"]),
    stream=st.none() | st.integers(0, 999),
    gate=st.none() | st.text(min_size=1, max_size=9),
    schedule=st.none()
    | st.builds(Schedule, st.sampled_from(["linear", "cosine"]), st.integers(1, 4096), st.floats(0, 1).map(lambda x: x + 0.0)),
)


@given(st.lists(specs, max_size=5))
def test_round_trip(terms: list[TermSpec]) -> None:
    assert parse(format_terms(terms)) == terms
    assert from_json(json.loads(json.dumps([t.to_json() for t in terms]))) == terms


@given(st.text(alphabet='ab:+-!@?%#0123. "{}[]linear', max_size=20))
def test_any_text_is_read_or_refused_in_a_sentence(text: str) -> None:
    try:
        terms = parse(text)
    except SpecError as error:
        assert "\n" not in str(error)
    else:
        assert parse(format_terms(terms)) == terms


def test_the_table_of_the_docs_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs" / "grammar.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    for written, _, meant in rows:
        for text in re.findall(r"`([^`]+)`", written):
            if len(text) > 3:
                parse(text)
        first = re.findall(r"`([^`]+)`", written)[0]
        for fragment in re.findall(r"`(.+?)`", meant):
            if fragment.startswith("{"):
                assert parse(first)[0].to_json() == json.loads(fragment)
            elif fragment.startswith('"'):
                key, value = next(iter(json.loads("{" + fragment + "}").items()))
                assert parse(first)[0].to_json()[key] == value


def test_names_become_vectors() -> None:
    v = SteeringVector("mood", {(il, "resid_post"): np.ones(4) for il in range(4, 9)})
    steering = steering_of("mood:0.5@6- + !mood@4", {"mood": v}.__getitem__)
    assert [(t.strength, t.layers, t.effective_op) for t in steering] == [(0.5, (6, 8), "add"), (1.0, (4, 4), "project")]
    with pytest.raises(SpecError, match="hold none"):
        steering_of("mood@20-", {"mood": v}.__getitem__)


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("mood:0.5", TermSpec("mood", 0.5)),
        ("v.safetensors", TermSpec("v.safetensors")),
        ("my vectors/calm.safetensors:-0.5", TermSpec("my vectors/calm.safetensors", -0.5)),
        (r"C:\v\x.safetensors:2", TermSpec(r"C:\v\x.safetensors", 2.0)),
        (r"C:\v\x.safetensors", TermSpec(r"C:\v\x.safetensors")),
        ("my vec.npz:0.5", TermSpec("my vec.npz", 0.5)),
        ("größe.pt:0.5", TermSpec("größe.pt", 0.5)),
        ("größe 2.SVEC", TermSpec("größe 2.SVEC")),
        ("a b.json:-1", TermSpec("a b.json", -1.0)),
        ("~/ä.gguf:2", TermSpec("~/ä.gguf", 2.0)),
        ('"a/b.safetensors":0.5@3', TermSpec("a/b.safetensors", 0.5, (3, 3))),
    ],
)
def test_options_take_files_without_quotes(text: str, term: TermSpec) -> None:
    assert parse_options([text, "x"]) == [term, TermSpec("x")]


@pytest.mark.parametrize("text", ["", "mood:loud", "a/b.safetensors:loud", "mood:"])
def test_options_are_checked(text: str) -> None:
    with pytest.raises(SpecError):
        parse_options(["mood", text])


def test_a_path_inside_an_expression_needs_quotes() -> None:
    for text in ("./a.safetensors:1 + b", "./a.safetensors:0.5?response", "dir/a.gguf{gate}"):
        with pytest.raises(SpecError, match="write its path in quotes"):
            parse_options([text])
    assert [t.vector for t in parse_options(['"./a.safetensors":1 + b'])] == ["./a.safetensors", "b"]
