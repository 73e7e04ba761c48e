"""Several vectors together: pairs that are named, directions made orthogonal, a cap on the dose."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import steer_plugins
from steer_plugins.cli.chat import Conversation
from steer_plugins.cli.common import Combining, combining_options
from steer_plugins.cli.main import cli
from steer_plugins.cli.serve import Staged
from steer_plugins.errors import SpecError
from steer_plugins.steering.combine import CorrelatedWarning, cap_dose, combine, correlations, dose, orthogonalise
from steer_plugins.steering.grammar import parse
from steer_plugins.steering.terms import Steering, Term
from steer_plugins.steering.vector import SteeringVector
from tests.unit.fakes import FakeEngine

N = 16
SITE = "resid_post"


def vector(name: str, seed: int = 0, layers=(1, 2), scale: float = 3.0, like: SteeringVector | None = None, **more):
    """Random directions; ``like``: with a cosine of about 0.8 to those."""
    rng = np.random.default_rng(seed)
    directions = {(il, SITE): rng.standard_normal(N) for il in layers}
    directions = {key: d / np.linalg.norm(d) for key, d in directions.items()}
    if like is not None:
        for key, d in directions.items():
            own = like.directions[key].astype(np.float64)
            d -= own * (own @ d)
            directions[key] = 0.8 * own + 0.6 * d / np.linalg.norm(d)
    return SteeringVector(name, directions, dict.fromkeys(directions, scale), **more)


MOOD = vector("mood")
WARM = vector("warm", 1, like=MOOD)
FAR = vector("far", 2, layers=(5, 6))


def cosines(steering: Steering) -> list[float]:
    found = []
    for i, one in enumerate(steering):
        for other in list(steering)[i + 1 :]:
            for key in set(one.keys()) & set(other.keys()):
                found.append(abs(float(one.vector.directions[key] @ other.vector.directions[key])))
    return found


# --- pairs


def test_a_correlated_pair_is_named() -> None:
    (found,) = correlations([FAR, 0.5 * WARM, MOOD])
    assert abs(found.cosine - 0.8) < 1e-5 and found.places == 2
    assert found.sentence.startswith("'warm' and 'mood' have a cosine of 0.80 at 2 layers, so they add up")
    assert correlations([MOOD, WARM], least=0.81) == []


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([Term(MOOD), Term(WARM, -1)], "work against each other"),
        ([Term(MOOD), Term(WARM, op="project")], "act on one and the same component"),
        ([Term(MOOD, layers=(2, 2)), Term(WARM)], "at 1 layer,"),
    ],
)
def test_what_a_pair_does_is_said(terms: list[Term], words: str) -> None:
    assert words in correlations(terms)[0].sentence


@pytest.mark.parametrize(
    "terms",
    [
        [Term(MOOD), Term(WARM, 0.0)],
        [Term(MOOD), Term(MOOD, 0.3)],
        [Term(MOOD, stream=0), Term(WARM, stream=1)],
        [Term(MOOD, layers=(1, 1)), Term(WARM, layers=(2, 2))],
        [Term(MOOD), Term(FAR)],
        [],
    ],
)
def test_terms_that_do_not_meet_are_no_pair(terms: list[Term]) -> None:
    assert correlations(terms) == [] and all(a.vector is b.vector for a, b in zip(orthogonalise(terms), terms, strict=True))


# --- orthogonal


@given(st.integers(2, 5), st.integers(0, 2**31), st.floats(0.0, 3.0))
@settings(max_examples=60, deadline=None)
def test_afterwards_all_cosines_are_zero(n: int, seed: int, alike: float) -> None:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(N)
    vectors = []
    for i in range(n):
        layers = sorted(rng.choice(6, size=3, replace=False).tolist())
        vectors.append(SteeringVector(f"v{i}", {(il, SITE): rng.standard_normal(N) + alike * common for il in layers}))
    try:
        free = orthogonalise(vectors)
    except SpecError as error:
        assert "nothing is left of it" in str(error)
        return
    assert max(cosines(free), default=0.0) < 1e-6
    assert free.terms[0].vector is vectors[0]


def test_what_is_left_is_what_the_vector_had_of_its_own() -> None:
    given_ = vector("warm", 1, like=MOOD, calibration={"method": "sweep-v1"}, op="clamp")
    free = orthogonalise([MOOD, Term(given_, -0.7, scope="response")]).terms[1]
    assert free.vector.calibration is None, "it was measured with other directions"
    assert (free.strength, free.effective_op, free.scope) == (-0.7, "clamp", "response")
    assert free.vector.provenance["orthogonalised_against"] == ["mood"]
    for key in given_.directions:
        own, common = given_.effective(*key).astype(np.float64), MOOD.directions[key].astype(np.float64)
        np.testing.assert_allclose(free.vector.effective(*key), own - common * (common @ own), atol=1e-5)


def test_only_layers_where_both_act_change() -> None:
    free = orthogonalise([Term(MOOD, layers=(2, 2)), WARM]).terms[1].vector
    assert np.array_equal(free.directions[1, SITE], WARM.directions[1, SITE])
    assert abs(float(free.directions[2, SITE] @ MOOD.directions[2, SITE])) < 1e-6


def test_a_vector_that_comes_twice_counts_once() -> None:
    third = vector("third", 3, like=MOOD)
    once = orthogonalise([MOOD, third]).terms[1].vector
    twice = orthogonalise([Term(MOOD, scope="prompt"), Term(MOOD, scope="response"), third]).terms[2].vector
    for key in once.directions:
        np.testing.assert_allclose(once.effective(*key), twice.effective(*key), atol=1e-6)


def test_a_vector_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(SpecError, match="'twin' lies along 'mood' at layer 1, so nothing is left of it: leave one out"):
        orthogonalise([MOOD, MOOD.scaled(2.0).replace(name="twin")])


# --- dose


def test_the_dose_of_what_is_known() -> None:
    one = vector("a", 4)
    other = orthogonalise([one, vector("b", 5)]).terms[1].vector.replace(scales=dict(one.scales))
    assert dose([]) == 0.0 and dose([Term(one, 0.0)]) == 0.0
    for steering, want in (
        (Term(one, -0.7), 0.7),
        ([Term(one, 0.5), Term(one, 0.5)], 1.0),
        ([Term(one), Term(one, -1.0)], 0.0),
        ([one, other], np.sqrt(2)),
        ([one, vector("c", 6, layers=(8, 9))], 2.0),
        ([Term(one, stream=0), Term(one, stream=1)], 1.0),
        ([Term(one, 0.5), Term(other, 3.0, op="project")], 0.5),
    ):
        assert dose(steering) == pytest.approx(want, rel=1e-6)


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=4), st.floats(0.01, 3.0), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_the_cap_is_exact(strengths: list[float], most: float, seed: int) -> None:
    terms = [Term(vector(f"v{i}", seed + i, scale=1.0 + i), s) for i, s in enumerate(strengths)]
    capped = cap_dose(terms, most)
    before = dose(terms)
    assert dose(capped) == pytest.approx(min(before, most), rel=1e-9)
    if before <= most:
        assert [t.strength for t in capped] == strengths
    else:
        np.testing.assert_allclose([t.strength for t in capped], np.array(strengths) * most / before, rtol=1e-9)


def test_only_what_adds_is_capped() -> None:
    capped = cap_dose([Term(MOOD, 2.0), Term(FAR, 3.0, op="project")], 1.0)
    assert [t.strength for t in capped] == [pytest.approx(1.0), 3.0]


@pytest.mark.parametrize("most", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_cap_that_is_no_dose(most: object) -> None:
    with pytest.raises(SpecError, match="the largest dose is"):
        cap_dose(MOOD, most)  # type: ignore[arg-type]


# --- all at once


def test_combine_warns_of_what_stays_correlated() -> None:
    with pytest.warns(CorrelatedWarning, match="'mood' and 'warm'"):
        assert combine([MOOD, WARM]).terms[1].vector is WARM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free = combine([MOOD, WARM], orthogonal=True, max_dose=0.5)
    assert dose(free) == pytest.approx(0.5) and max(cosines(free)) < 1e-6
    assert steer_plugins.combine is combine and steer_plugins.dose is dose


def test_the_options_name_a_pair_once_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Combining().apply(Steering([MOOD, WARM]))
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("steer: warning: 'mood' and 'warm' have a cosine of 0.80") == 1
    assert Combining(True, 0.5).apply(Steering([MOOD, WARM])) and "cosine" not in capsys.readouterr().err


def test_a_vector_without_calibration_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    note = "steer: note: 'mood' is not calibrated, so strength 1.0 is a guess\n"
    Combining().apply(Steering([Term(MOOD), Term(MOOD, 0.2)]))
    assert capsys.readouterr().err == note
    measured = MOOD.replace(calibration={"method": "sweep-v1"})
    Combining(True).apply(Steering([measured, Term(FAR, 0.0), Term(FAR, op="project")]))
    assert capsys.readouterr().err == ""


def test_the_options() -> None:
    @click.command()
    @combining_options
    def command(combining: Combining) -> None:
        click.echo(repr(combining))

    result = CliRunner().invoke(command, ["--orthogonalise", "--max-dose", "1.5"])
    assert result.output == "Combining(orthogonal=True, max_dose=1.5)\n"
    for bad in ("0", "-1", "nan", "inf", "much"):
        assert CliRunner().invoke(command, ["--max-dose", bad]).exit_code == 2, bad
    for name in ("generate", "chat", "read", "inspect", "serve"):
        text = CliRunner().invoke(cli, [name, "--help"]).output
        assert "--orthogonalise" in text and "--max-dose" in text, name


# --- surfaces


class Known:
    root = Path("nowhere")

    def __init__(self, vectors: dict[str, SteeringVector]) -> None:
        self._vectors = vectors

    def resolve(self, name: str, *args: object, **options: object) -> SteeringVector:
        return self._vectors[name]


def test_chat_keeps_both_when_the_keys_move_a_term() -> None:
    talk = Conversation(FakeEngine(), force=False, system=None, combining=Combining(True, 1.0))
    vectors = {"mood": MOOD, "warm": WARM}
    talk.engine.library = Known(vectors)
    sliders = talk.sliders_of(parse("mood:0.9 + warm:0"))
    sliders.press("down")
    for _ in range(9):
        sliders.press("right")
    steering = sliders.steering
    assert sliders.strengths == [0.9, 0.9] and max(cosines(steering)) < 1e-6
    assert dose(steering) == pytest.approx(1.0)
    sliders.press("0")
    assert not sliders.steering


def test_serve_hands_over_vectors_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = Staged.__new__(Staged)
    staged._folder, staged._force, staged._identity = tmp_path, False, MOOD.identity
    staged._vectors = {"mood": MOOD, "warm": WARM}
    plain = json.loads(staged.flags("mood:0.5 + warm@1-2?response")[3])
    assert plain == [
        {"vector": "mood", "strength": 0.5},
        {"vector": "warm", "strength": 1.0, "layers": [1, 2], "scope": "response"},
    ]
    terms = json.loads(staged.flags("mood + warm", Combining(True, 0.5))[3])
    assert terms[0]["vector"] == "mood" and terms[1]["vector"].startswith("c-")
    free = steer_plugins.read_vector(tmp_path / f"{terms[1]['vector']}.safetensors")
    fit = Steering([Term(MOOD, terms[0]["strength"]), Term(free, terms[1]["strength"])])
    assert dose(fit) == pytest.approx(0.5) and max(cosines(fit)) < 1e-6


def test_serve_has_no_use_for_them_without_a_steering() -> None:
    result = CliRunner().invoke(cli, ["serve", "--max-dose", "1"])
    assert result.exit_code != 0 and "--steering" in (result.output + str(result.exception))
