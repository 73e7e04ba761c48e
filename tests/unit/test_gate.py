"""Gates as data, and how they are fitted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_plugins.cli import common
from steer_plugins.cli.main import main
from steer_plugins.errors import DataError, SpecError
from steer_plugins.plugins.manager import reset
from steer_plugins.steering import formula
from steer_plugins.steering.gate import Gate
from steer_plugins.steering.grammar import parse, steering_of
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from steer_plugins.store.vectorfile import read_vector, write_vector
from steer_plugins.training.gates import _unseen_scores, best_threshold, fit_gate, load_labelled, rates
from tests.unit.fakes import IDENTITY, FakeEngine

SITE = "resid_post"
CONDITION = SteeringVector("cond", {(3, SITE): np.array([3.0, 0, 4, 0])}, {(3, SITE): 1.0})
MOOD = SteeringVector("mood", {(1, SITE): np.ones(4)}, default_scope="response")


def test_a_score_is_a_cosine() -> None:
    gate = Gate(CONDITION, 0.5)
    assert gate.score(np.array([3.0, 0, 4, 0])) == pytest.approx(1)
    assert gate.score(np.array([0, 7.0, 0, 0], np.float32)) == 0
    assert gate.score(np.array([-5.0, 0, 0, 0])) == pytest.approx(-0.6)
    assert gate.score(np.zeros(4)) == 0
    assert (gate.layer, gate.site) == (3, SITE)
    assert [gate.is_open(s) for s in (0.4, 0.5, 0.6)] == [False, False, True]
    assert [Gate(CONDITION, 0.5, "below").is_open(s) for s in (0.4, 0.5, 0.6)] == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, 0.5), "needs a SteeringVector"),
        ((SteeringVector("two", {(1, SITE): np.ones(4), (2, SITE): np.ones(4)}), 0.5), "one layer"),
        ((CONDITION, 1.5), "between -1 and 1"),
        ((CONDITION, math.nan), "between -1 and 1"),
        ((CONDITION, True), "between -1 and 1"),
        ((CONDITION, "0.5"), "between -1 and 1"),
        ((CONDITION, 0.5, "over"), "above or below"),
        ((CONDITION, 0.5, "above", "first"), "mean or last"),
    ],
)
def test_bad_gates_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        Gate(*arguments)
    assert "\n" not in str(caught.value)


def test_a_file_holds_a_gate(tmp_path: Path) -> None:
    gate = Gate(CONDITION, -0.125, "below", "last")
    write_vector(gate.to_vector(note="x"), tmp_path / "g.safetensors")
    vector = read_vector(tmp_path / "g.safetensors")
    assert Gate.of(vector).key == gate.key and vector.provenance is not None and vector.provenance["note"] == "x"
    with pytest.raises(SpecError, match="'mood' is a vector, not a gate"):
        Gate.of(MOOD)
    for bad in (3, {}, {"threshold": 0.1, "compare": "above"}, {"threshold": 2, "compare": "above", "positions": "mean"}):
        with pytest.raises(SpecError):
            Gate.of(CONDITION.replace(provenance={"gate": bad}))


def test_terms_with_gates() -> None:
    gate, other = Gate(CONDITION, 0.5), Gate(CONDITION, 0.5, "below")
    with pytest.raises(SpecError, match="response, thinking or answer, not all"):
        Term(MOOD, scope="all", gate=gate)
    with pytest.raises(SpecError, match="not a Gate"):
        Term(MOOD, gate=CONDITION)  # type: ignore[arg-type]
    steering = Steering(
        [Term(MOOD, 2.0, gate=gate), Term(MOOD, 3.0, gate=other), Term(MOOD, 4.0, scope="prompt"), Term(MOOD, 0.0, gate=gate)]
    )
    assert steering.gates == [gate, other]
    decided = steering.decided({gate.key: True, other.key: False})
    assert decided == Steering([Term(MOOD, 2.0), Term(MOOD, 4.0, scope="prompt")]) and not decided.gates
    assert steering.on_the_prompt() == Steering([Term(MOOD, 4.0, scope="all")])
    with pytest.raises(SpecError, match="decide it first"):
        formula.coefficients(steering, 1)
    assert formula.coefficients(decided, 1)[1].tolist() == [4.0, 8.0]  # the length of ones(4) is 2


def test_the_grammar_names_gates() -> None:
    vectors = {"mood": MOOD, "a/g.safetensors": Gate(CONDITION, 0.5).to_vector()}
    (term,) = steering_of('mood:0.5{"a/g.safetensors"}', vectors.__getitem__)
    assert term.gate is not None and term.gate.key == Gate(CONDITION, 0.5).key
    with pytest.raises(SpecError, match="is a vector, not a gate"):
        steering_of("mood{mood}", vectors.__getitem__)
    assert parse("mood{harm}")[0].to_json() == {"vector": "mood", "strength": 1.0, "gate": "harm"}


# --- fitting


@given(st.lists(st.tuples(st.integers(-99, 99).map(lambda i: i / 100), st.booleans()), min_size=2, max_size=12))
def test_no_other_threshold_is_better(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([s for s, _ in pairs]), np.array([label for _, label in pairs])
    best = best_threshold(scores, labels)
    opened = scores > best.threshold if best.compare == "above" else scores < best.threshold
    assert rates(opened, labels)["f1"] == pytest.approx(best.f1)
    for threshold in [-1.1, *(scores + 1e-9), *(scores - 1e-9)]:
        for guess in (scores > threshold, scores < threshold):
            assert rates(guess, labels)["f1"] <= best.f1 + 1e-12


def test_rates() -> None:
    found = rates(np.array([True, True, False, False]), np.array([True, False, True, False]))
    assert found == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert rates(np.zeros(2, bool), np.ones(2, bool))["f1"] == 0


def write(path: Path, n: int = 12, extra: str = "") -> Path:
    lines = [{"prompt": f"some {word} for {i}", "label": word == "joy"} for i in range(n) for word in ("joy", "woe")]
    path.write_text("\n".join(map(json.dumps, lines)) + extra)
    return path


@pytest.mark.parametrize("positions", ["mean", "last"])
def test_a_fit_tells_prompts_apart(tmp_path: Path, positions: str) -> None:
    engine = FakeEngine()
    data = load_labelled(write(tmp_path / "p.jsonl"))
    vector = fit_gate(engine, "joyful", data, positions=positions, layers=[4, 5])
    gate = Gate.of(vector)
    assert gate.layer in (4, 5) and gate.positions == positions and vector.identity == IDENTITY
    assert vector.provenance is not None
    assert vector.provenance["held_out"] == {"n": 6, "f1": 1.0, "precision": 1.0, "recall": 1.0}
    assert [row["layer"] for row in vector.provenance["search"]] == [4, 5]
    for word, is_open in (("joy", True), ("woe", False)):
        tokens = engine.tokenize([{"role": "user", "content": f"other {word}"}])[:-1]
        state = engine.read([tokens], layers=[gate.layer], positions=positions)[0].values[gate.layer][0]
        assert gate.is_open(gate.score(state)) is is_open
    again = fit_gate(engine, "joyful", data, positions=positions, layers=[4, 5])
    assert Gate.of(again).key == gate.key


def test_a_given_condition_may_point_the_other_way(tmp_path: Path) -> None:
    data = load_labelled(write(tmp_path / "p.jsonl"))
    woe = SteeringVector("woe", {(6, SITE): np.array([-1.0, 0, 0, 0])})
    vector = fit_gate(FakeEngine(), "joyful", data, condition=woe)
    assert Gate.of(vector).compare == "below" and Gate.of(vector).layer == 6
    assert vector.provenance is not None and vector.provenance["held_out"]["f1"] == 1.0
    with pytest.raises(SpecError, match="no layer to look at"):
        fit_gate(FakeEngine(), "joyful", data, condition=woe, layers=[2])
    with pytest.raises(SpecError, match="layer 9 cannot be looked at"):  # outputs only
        fit_gate(FakeEngine(), "joyful", data, layers=[9])


def test_labels_at_random_are_reported_as_such(tmp_path: Path) -> None:
    """What is held out shows that there was nothing to learn; scores of prompts that were fitted to would not."""
    lines = [{"prompt": "x" * (3 + i), "label": (i * 7919) % 13 < 6} for i in range(80)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    vector = fit_gate(FakeEngine(), "noise", load_labelled(tmp_path / "p.jsonl"), layers=[4])
    assert vector.provenance is not None and vector.provenance["held_out"]["f1"] < 0.8


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "line 25: is not JSON"),
        ('{"prompt": "x"}', "line 25: is not an object with the keys"),
        ('{"prompt": "x", "label": 1}', "neither true nor false"),
        ('{"prompt": "x", "label": true, "label": false}', "twice"),
        ('{"prompt": 3, "label": true}', "a text or a list of messages"),
        ('{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "label": true}', "leave it out"),
    ],
)
def test_bad_prompts_are_refused(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load_labelled(write(tmp_path / "p.jsonl", extra="\n" + line))
    assert "\n" not in str(caught.value)


def test_few_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 4 prompts labelled true: a gate needs at least 5"):
        load_labelled(write(tmp_path / "p.jsonl", 4))
    with pytest.raises(DataError, match="does not exist"):
        load_labelled(tmp_path / "missing.jsonl")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("STEER_PLUGINS", "")
    monkeypatch.setattr(common.EngineOptions, "open", lambda self, **more: FakeEngine())
    reset()
    write(tmp_path / "p.jsonl")
    assert main(["train-gate", "joyful", "--prompts", "p.jsonl", "--layers", "3-5"]) == 0
    out = capsys.readouterr().out
    assert "On 6 held-out prompts: F1 1.00" in out
    gate = Gate.of(Library().get("joyful", IDENTITY))
    assert gate.layer in (3, 4, 5)
    assert main(["train-gate", "joyful", "--prompts", "p.jsonl"]) == 1
    assert "already has" in capsys.readouterr().err
    assert main(["train-gate", "joyful", "--prompts", "p.jsonl", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["gate"]["positions"] == "mean"
    assert main(["show"]) == 0
    assert "gate" in capsys.readouterr().out
    reset()


def test_a_search_sees_scores_of_prompts_that_the_fold_has_not_seen() -> None:
    """Any labels can be told apart by a vector fitted to them where dimensions are many: noise must not look like a gate."""
    rng = np.random.default_rng(2)
    states = rng.normal(size=(40, 300))
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    labels = np.arange(40) % 2 == 0
    fitted_to_all = states @ (states[labels].mean(axis=0) - states[~labels].mean(axis=0))
    assert best_threshold(fitted_to_all, labels).f1 == 1.0
    assert best_threshold(_unseen_scores(states, labels, None, 0), labels).f1 < 0.8
