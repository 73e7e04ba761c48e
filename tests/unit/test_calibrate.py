"""The sweep, on an engine in which the largest fluent dose and the best window can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from steer_plugins.engine.base import Generation
from steer_plugins.errors import DataError, VectorError
from steer_plugins.steering.terms import Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.training.calibrate import (
    FULL,
    QUICK,
    ContrastObjective,
    DoseObjective,
    Fitted,
    Fluency,
    Guard,
    Sweep,
    TextObjective,
    calibrate_vector,
    level_of,
    mean_perplexity,
    measure_fluency,
    perplexity,
    rises,
    window_of,
    windows_of,
)
from steer_plugins.training.calibrate.sweep import SEARCH_SLACK
from steer_plugins.training.extract import Pair, Side, chat
from tests.unit.fakes import N_LAYER, FakeEngine

# Perplexity is exp(0.7 + harm * dose), so the largest dose that the guard allows is LIMIT / harm.
LIMIT = float(np.log(Guard().perplexity_ratio))
LAYERS = range(N_LAYER - 1)
ONE_WINDOW = replace(QUICK, windows=((0.5, 0.2),))


def fitted(sign=1.0):
    """The first axis at each layer; norms grow with the layer as the fake engine's do."""
    return Fitted("up", {il: np.float32([sign, 0, 0, 0]) for il in LAYERS}, {il: il + 1.0 for il in LAYERS})


def objective(n=12):
    return TextObjective("pull", float, [chat(f"prompt {i}") for i in range(n)])


def sweep(engine=None, level=QUICK, **more):
    return Sweep(engine or FakeEngine(), fitted(), more.pop("objective", objective()), level, **more)


def doses(found, stage):
    return [row.dose for row in found.rows if row.stage == stage and row.strength == 1.0]


# ---- the plan ----


def test_windows_are_parts_of_the_depth():
    layers = list(range(29))
    assert window_of(0.5, 0.2, layers) == (12, 17)
    assert window_of(0.5, 0.4, layers) == (9, 20)
    assert window_of(0.0, 0.2, layers) == (0, 5)
    assert window_of(1.0, 0.2, layers) == (23, 28)
    assert window_of(0.5, 0.2, [0]) == (0, 0)


@pytest.mark.parametrize("n", range(1, 70))
@pytest.mark.parametrize("level", [QUICK, FULL])
def test_every_model_has_windows(level, n):
    layers = list(range(n))
    found = windows_of(level, layers)
    assert found and len(set(found)) == len(found)
    assert all(0 <= lo <= hi < n for lo, hi in found)


def test_doses_are_a_ladder():
    rungs = QUICK.rungs
    assert QUICK.dose(0) == 0.3
    assert QUICK.dose(rungs[0]) <= 0.03 and QUICK.dose(rungs[-1]) >= 3.0
    assert QUICK.dose(3) == pytest.approx(QUICK.dose(2) * QUICK.ratio)


def test_levels_have_names():
    assert (level_of("none"), level_of("quick"), level_of("full")) == (None, QUICK, FULL)


def test_a_dose_is_spread_over_the_window():
    vector = fitted().vector((2, 5), 0.8, "response")
    assert vector.layers == [2, 3, 4, 5] and vector.default_scope == "response"
    assert [vector.scales[il, "resid_post"] for il in vector.layers] == pytest.approx([0.2 * (il + 1) for il in range(2, 6)])


def test_random_directions_are_as_long():
    control = fitted().random(1)
    assert all(np.linalg.norm(d) == pytest.approx(1) for d in control.directions.values())
    assert control.vector((2, 5), 0.8, "all").scales == fitted().vector((2, 5), 0.8, "all").scales
    assert not np.array_equal(control.directions[2], fitted().random(2).directions[2])


# ---- the guard ----

PLAIN = Fluency(10, 4.0, 0.05, 0.1, 40.0)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"perplexity": 5.4}, True),
        ({"perplexity": 5.41}, False),
        ({"perplexity": 1.0}, True),
        ({"perplexity": None}, False),
        ({"repeats": 0.2}, True),
        ({"repeats": 0.21}, False),
        ({"early_ends": 0.2}, True),
        ({"early_ends": 0.21}, False),
        ({"words": 3.0}, True),
    ],
)
def test_the_guard(change, passes):
    assert replace(PLAIN, **change).passes(PLAIN, Guard()) is passes


def test_fluency_of_replies():
    replies = [
        Generation("one two", [1, 2, 1, 2, 1, 2, 1, 2], [0], "length"),
        Generation("", [], [0], "stop"),
        Generation("one", [1], [0], "stop"),
        Generation("one", [1] * 3, [0], "length"),
    ]
    found = measure_fluency(replies, [np.log([0.5, 0.125]), np.zeros(0), np.log([0.1]), np.log([0.01] * 3)])
    assert found.n == 4
    assert found.perplexity == pytest.approx(4000 ** (1 / 3))  # of 4, 10 and 100: the empty text has none
    assert found.repeats == pytest.approx((3 / 5) / 4)
    assert found.early_ends == pytest.approx(2 / 4)
    assert found.words == 1.0
    assert measure_fluency(replies).perplexity is None
    assert perplexity(np.zeros(0)) is None


def test_the_mean_perplexity_is_geometric():
    assert mean_perplexity([4.0, None, 10.0, 100.0]) == pytest.approx(4000 ** (1 / 3))  # the empty text has none
    assert mean_perplexity([None]) is None and mean_perplexity([]) is None
    plain, steered = np.array([2.0, 3.0, 8.0]), np.array([3.0, 3.3, 12.0])
    ratio = mean_perplexity(steered) / mean_perplexity(plain)
    assert ratio == pytest.approx(np.exp(np.log(steered / plain).mean()))  # that of the pairs


# ---- the search ----


@pytest.mark.parametrize("harm", [0.2, 0.5, 1.0, 1.3, 2.0, 4.0, 9.0])
def test_strength_1_is_the_largest_dose_that_passes(harm):
    result = sweep(FakeEngine(harm=harm), ONE_WINDOW).run()
    dose = result.record["dose"]
    assert dose <= LIMIT / harm < dose * QUICK.ratio * (1 + 1e-6)
    assert sum(result.vector.scales[k] / (k[0] + 1) for k in result.vector.scales) == pytest.approx(dose, rel=3e-5)
    assert result.record["effect"] == pytest.approx(2 * dose, abs=3e-4)


def test_a_vector_that_harms_nothing_gets_the_end_of_the_ladder():
    assert sweep(FakeEngine(harm=0.0), ONE_WINDOW).run().record["dose"] == pytest.approx(QUICK.dose(QUICK.rungs[-1]))


def test_both_signs_have_to_pass():
    engine = FakeEngine(harm=0.0)
    # from some negative pull on the text is one word again and again, which costs nothing in perplexity
    engine.reply = lambda prompt, pull, dose, n: (f"{pull:+.4f}{' ' * 60 if pull < -0.5 else ''}", "length")
    found = sweep(engine, ONE_WINDOW).run()
    assert found.record["dose"] <= 0.5 < found.record["dose"] * QUICK.ratio


@pytest.mark.parametrize("harmful", [-1, 1])
def test_the_perplexity_of_both_signs_counts(harmful):
    engine = FakeEngine(harm=1.0 if harmful > 0 else 0.0)
    engine.harm_down = 1.0 if harmful < 0 else 0.0
    dose = sweep(engine, ONE_WINDOW).run().record["dose"]
    assert dose <= LIMIT < dose * QUICK.ratio


def test_early_ends_count():
    engine = FakeEngine(harm=0.0)
    engine.reply = lambda prompt, pull, dose, n: (f"{pull:.3f}" if pull > 0.5 else f"{pull:.9f}", "stop")
    found = sweep(engine, ONE_WINDOW).run()
    assert found.record["dose"] <= 0.5 < found.record["dose"] * QUICK.ratio


def test_the_window_with_the_largest_effect_wins():
    for best in range(3):
        windows = windows_of(QUICK, list(LAYERS))
        gains = [1.0 + 5.0 * (windows[best][0] <= il <= windows[best][1]) for il in range(N_LAYER)]
        # windows overlap: make the others worse where they differ
        for other in windows:
            for il in range(other[0], other[1] + 1):
                if not windows[best][0] <= il <= windows[best][1]:
                    gains[il] = 0.1
        assert sweep(FakeEngine(gains=gains)).run().record["window"] == list(windows[best])


def test_the_scope_with_the_larger_effect_wins():
    class Scoped(FakeEngine):
        def _pull(self, steering):
            pull, dose = super()._pull(steering)
            scopes = [term.effective_scope for term in ([steering] if steering else [])]
            return (2 * pull if "all" in scopes else pull), dose

    level = replace(ONE_WINDOW, scopes=("response", "all"))
    found = sweep(Scoped(), level).run()
    assert found.vector.default_scope == found.record["scope"] == "all"
    assert sweep(Scoped(), level).run(scopes=["response"]).vector.default_scope == "response"


def trials_of_the_third_window(gains, harm):
    windows = windows_of(QUICK, list(LAYERS))
    assert windows == [(5, 6), (6, 7), (4, 5)]
    found = sweep(FakeEngine(gains=[gains.get(il, 0.0) for il in range(N_LAYER)], harm=harm))
    found.run()
    return sum(row.stage == "search" and row.strength == 1.0 and row.window == windows[2] for row in found.rows)


def test_a_window_that_cannot_win_costs_one_trial():
    assert trials_of_the_third_window({6: 1}, harm=0.5) == 1
    assert trials_of_the_third_window({6: 1}, harm=3.0) == 1
    # nor one that is as good as the second, but half as good as the first
    assert trials_of_the_third_window({5: 1, 6: 1}, harm=0.5) == 1
    assert trials_of_the_third_window({4: 1, 5: 1}, harm=0.5) > 1


def test_no_perplexity_is_taken_of_what_cannot_win():
    engine = FakeEngine(gains=[float(il == 6) for il in range(N_LAYER)], harm=0.5)
    found = sweep(engine)
    found.run()
    third = [row for row in found.rows if row.stage == "search" and row.window == (4, 5)]
    assert [row.fluency.perplexity for row in third] == [None, None]
    assert [row.passed for row in third] == [None, None]


def test_no_text_is_generated_twice():
    engine = FakeEngine(harm=1.0)
    sweep(engine).run()
    made = []
    for request in engine.generated:
        vector = request.steering.vector.content_hash if isinstance(request.steering, Term) else None
        made.append((tuple(request.prompt), vector, request.steering and request.steering.strength, request.max_tokens))
    assert len(made) == len(set(made))


def test_given_layers_are_the_window():
    assert sweep().run(windows=[(1, 3)]).vector.layers == [1, 2, 3]


def test_the_winner_has_to_pass_on_more_prompts_too():
    engine = FakeEngine(harm=0.0)

    def reply(prompt, pull, dose, n):
        bad = dose > 1.0 and any(f"prompt {i}" in prompt for i in range(QUICK.n_search, QUICK.n_confirm))
        return f"{pull:+.4f}{' ' * 60 if bad else ''}", "length"

    engine.reply = reply
    found = sweep(engine, ONE_WINDOW, objective=objective(QUICK.n_confirm))
    result = found.run()
    assert max(doses(found, "search")) > 1.0
    assert 1.0 / QUICK.ratio < result.record["dose"] <= 1.0
    assert result.record["n"] == QUICK.n_confirm


def test_more_prompts_have_the_last_word_on_a_dose():
    found = sweep(FakeEngine(harm=0.0), ONE_WINDOW)
    found.trial((4, 5), "response", 0, QUICK.n_search)
    trial = found.trial((4, 5), "response", 0, QUICK.n_confirm, "confirm")
    for row in found.rows:
        row.passed = row.stage == "confirm"  # as where the search's few prompts broke the guard by less than the slack
    sign = found._signs(trial)["negative"]
    assert sign["largest_passing"] == pytest.approx(trial.dose, abs=1e-4) and sign["smallest_failing"] is None


def test_a_dose_that_narrowly_fails_is_found_and_made_smaller():
    dose = QUICK.dose(2)
    harm = float(np.log(Guard().perplexity_ratio + SEARCH_SLACK / 4)) / dose
    found = sweep(FakeEngine(harm=harm), ONE_WINDOW)
    record = found.run().record
    assert record["dose"] == pytest.approx(QUICK.dose(1.5), abs=1e-6) and record["guard"]["search_slack"] == SEARCH_SLACK
    tried = [row for row in found.rows if row.dose == dose]
    assert {row.stage for row in tried} == {"search", "confirm"}
    assert not any(row.passed for row in tried)  # the record names the guard, so its rows are judged by it
    assert record["signs"]["positive"]["largest_passing"] == pytest.approx(QUICK.dose(1.5), abs=1e-4)
    assert record["signs"]["positive"]["smallest_failing"] == pytest.approx(dose, abs=1e-4)


def test_a_winner_that_has_to_be_weaker_may_fall_behind_the_next(monkeypatch):
    found, asked = sweep(), []
    made = {w: found.trial(w, "response", 0, QUICK.n_search) for w in ((0, 1), (2, 3), (4, 5))}
    for trial, effect in zip(made.values(), (3.0, 2.0, 1.5), strict=True):
        trial.scores = {-1.0: [0.0], 1.0: [effect]}

    def confirm(trial):
        asked.append(trial.window)
        lower = found.trial(trial.window, "response", -1, QUICK.n_confirm, "confirm")
        lower.scores = {-1.0: [0.0], 1.0: [{(0, 1): 1.0, (2, 3): 1.8}[trial.window]]}
        return lower

    monkeypatch.setattr(found, "largest_passing", lambda window, scope, best: made[window])
    monkeypatch.setattr(found, "_confirm", confirm)
    assert found.run(list(made), ["response"]).vector.layers == [2, 3]
    assert asked == [(0, 1), (2, 3)]  # the third cannot be better


def test_nothing_passes():
    with pytest.raises(DataError, match="no dose of 'up' .* --calibrate none"):
        sweep(FakeEngine(harm=100.0)).run()


def test_a_direction_of_the_wrong_sign_shows_a_negative_effect():
    found = Sweep(FakeEngine(), fitted(-1.0), objective(), ONE_WINDOW).run()
    assert found.record["effect"] < 0 and not found.record["monotone"]


def test_the_record_holds_the_whole_sweep():
    found = sweep(level=replace(ONE_WINDOW, n_random=2))
    record = found.run().record
    assert len(record["rows"]) == len(found.rows)
    assert {row["stage"] for row in record["rows"]} == {"search", "confirm", "curve", "random"}
    assert [point["strength"] for point in record["curve"]] == list(QUICK.curve)
    scores = [point["score"] for point in record["curve"]]
    assert scores == sorted(scores) and scores[2] == 0.0 and record["monotone"]
    assert [sample["strength"] for sample in record["samples"]] == [-1.0, 0.0, 1.0]
    assert len(record["random_effects"]) == 2
    assert all(abs(value) < record["effect"] for value in record["random_effects"])
    confirmed = [row for row in record["rows"] if row["stage"] == "confirm" and row["dose"] == record["dose"]]
    assert len(confirmed) == 2
    assert all(row["passed"] and row["perplexity"] <= 1.5 * record["plain"]["perplexity"] for row in confirmed)


def test_the_search_does_not_see_the_confirming_prompts():
    engine = FakeEngine()
    found = sweep(engine, ONE_WINDOW)
    engine.generated.clear()
    found.largest_passing((4, 5), "response", None)
    texts = {engine.detokenize(request.prompt) for request in engine.generated}
    assert texts == {engine.detokenize(engine.tokenize(chat(f"prompt {i}"))) for i in range(QUICK.n_search)}


# ---- both signs, a curve that rises ----


@pytest.mark.parametrize(("weak", "strong"), [("negative", "positive"), ("positive", "negative")])
def test_each_sign_has_its_own_guard(weak, strong):
    engine = FakeEngine(harm=1.0 if weak == "positive" else 0.1)
    engine.harm_down = 1.0 if weak == "negative" else 0.1
    record = sweep(engine, ONE_WINDOW).run().record
    signs, dose = record["signs"], record["dose"]
    assert signs["negative"]["passed"] and signs["positive"]["passed"]
    assert signs[weak]["perplexity_ratio"] == pytest.approx(np.exp(dose), rel=1e-3)
    assert signs[strong]["perplexity_ratio"] == pytest.approx(np.exp(0.1 * dose), rel=1e-3)
    assert signs[weak]["largest_passing"] == pytest.approx(dose, abs=1e-4)
    assert signs[weak]["smallest_failing"] == pytest.approx(dose * QUICK.ratio, abs=1e-4)
    assert signs[strong]["smallest_failing"] is None  # it was never the reason


def saturating(limit):
    """An engine whose pull comes back once it is beyond ``limit``, in fluent text."""
    engine = FakeEngine(harm=0.0)
    engine.reply = lambda prompt, pull, dose, n: (
        f"{np.sign(pull) * min(abs(pull), max(0, 2 * limit - abs(pull))):+.4f}",
        "length",
    )
    return engine


def test_a_dose_beyond_the_turning_point_is_taken_back():
    # at the top of the ladder the score has turned back; it has not two rungs below
    top = QUICK.dose(QUICK.rungs[-1])
    found = sweep(saturating(top * 0.65), ONE_WINDOW)
    # one trial finds the effect growing still, so begin at the top
    trial = found.trial((4, 5), "response", QUICK.rungs[-1], QUICK.n_confirm, "confirm")
    assert trial.passed
    taken, curve = found._rising(trial)
    assert trial.rung - 3 <= taken.rung < trial.rung and rises(curve)
    assert taken.effect > trial.effect
    record = found._result(taken, curve).record
    assert record["monotone"] and record["monotone_within_error"]
    assert {row["dose"] for row in record["rows"] if row["stage"] == "curve"} == {round(taken.dose, 4)}
    assert {row["dose"] for row in record["rows"] if row["stage"] == "turned"} >= {round(trial.dose, 4)}


def test_a_curve_that_turns_at_every_dose_is_said():
    engine = FakeEngine(harm=0.0)
    # plain text scores higher than any steered one
    engine.reply = lambda prompt, pull, dose, n: (f"{5.0 if pull == 0 else float(pull > 0):+.4f}", "length")
    found = sweep(engine, ONE_WINDOW)
    record = found.run().record
    assert record["effect"] == 1.0 and not record["monotone"] and not record["monotone_within_error"]
    assert record["dose"] == pytest.approx(max(doses(found, "search")))  # a smaller one would not help
    assert len([row for row in record["rows"] if row["stage"] == "curve"]) == len(QUICK.curve)


def test_a_fall_within_the_error_is_no_turn():
    assert rises({0.0: [0.0, 1.0, 2.0], 1.0: [1.0, 2.0, 3.0]})
    assert rises({0.0: [0.0, 3.0], 1.0: [3.0, -0.5]})  # falls by 0.25 on average, give or take 3.25
    assert not rises({0.0: [1.0, 2.0, 3.0], 1.0: [0.5, 1.5, 2.4]})
    assert not rises({-1.0: [0.0], 0.0: [1.0], 1.0: [0.5]})
    assert rises({1.0: [5.0], -1.0: [0.0], 0.0: [1.0]})  # strengths in any order


def test_the_curve_has_errors():
    record = sweep(level=ONE_WINDOW).run().record
    assert [point["strength"] for point in record["curve"]] == list(QUICK.curve)
    assert all(point["score_se"] == 0.0 for point in record["curve"])


def test_few_prompts_are_enough():
    assert sweep(objective=objective(1)).run().record["effect_se"] is None


# ---- how long texts are ----


def test_texts_are_short_unless_replies_end_by_themselves():
    for ends, length in ((0, QUICK.tokens[0]), (1, QUICK.tokens[0]), (2, QUICK.tokens[1])):
        engine = FakeEngine()

        def reply(prompt, pull, dose, n, ends=ends):
            short = any(f"prompt {i}" in prompt for i in range(ends))
            return ("0." + "0123456789" * 20)[: 60 if short and n > 60 else n], "stop" if short and n > 60 else "length"

        engine.reply = reply
        found = sweep(engine)
        assert found.max_tokens == length
        plain = found._replies["plain", "", 0.0]
        assert {len(r.tokens) for r in plain} <= {length, 60}
        assert all(r.text == engine.detokenize(r.tokens) for r in plain)


# ---- log-probability contrast ----

PAIR = Pair(Side(chat("hm", "be nice"), "joy"), Side(chat("hm", "be bad"), "woe"))


def test_given_answers_are_scored_without_system_prompts():
    engine = FakeEngine()
    found = ContrastObjective(engine, [PAIR])
    vector = fitted().vector((4, 5), 0.5, "all")
    scores = {s: found.scores(engine, Term(vector, s), [], 1)[0] for s in (-1.0, 0.0, 1.0)}
    assert scores == pytest.approx({-1.0: -1.0, 0.0: 0.0, 1.0: 1.0})
    asked = engine.detokenize(engine.tokenize(chat("hm")))
    assert engine.scored[:2] == [(asked, "joy"), (asked, "woe")]
    assert [engine.detokenize(prompt) for prompt in found.prompts] == [asked]


def test_missing_answers_are_generated_under_the_system_prompts():
    engine = FakeEngine()
    engine.reply = lambda prompt, pull, dose, n: ("joy" if "nice" in prompt else "woe", "stop")
    bare = Pair(Side(PAIR.positive.prompt), Side(PAIR.negative.prompt))
    found = ContrastObjective(engine, [bare])
    assert found.scores(engine, Term(fitted().vector((4, 5), 0.5, "all")), [], 1) == pytest.approx([1.0])


def test_texts_are_scored_from_where_they_part():
    engine = FakeEngine()
    found = ContrastObjective(engine, [Pair(Side("so much joy here"), Side("so much woe here"))])
    found.scores(engine, None, [], 1)
    # the fake engine's BOS is ^, and its tokenizer is not asked to tokenize ids again
    assert [text for _, text in engine.scored] == ["joy here", "woe here"]
    assert all(prompt.endswith("so much ") for prompt, _ in engine.scored)
    assert [engine.detokenize(prompt) for prompt in found.prompts] == ["^so m"]


def test_at_most_n_pairs_are_scored():
    engine = FakeEngine()
    found = ContrastObjective(engine, [PAIR, PAIR, PAIR])
    assert len(found.scores(engine, None, [], 2)) == 2
    assert len(found.scores(engine, None, [], 9)) == 3
    assert found.tokens(2) * 3 == found.tokens(3) * 2


def test_pairs_without_answers_are_refused():
    engine = FakeEngine()
    engine.reply = lambda prompt, pull, dose, n: ("", "stop")
    with pytest.raises(DataError, match="none of the held-out pairs"):
        ContrastObjective(engine, [Pair(Side(PAIR.positive.prompt), Side(PAIR.negative.prompt))])


def test_a_sweep_by_log_probability():
    objective = ContrastObjective(
        FakeEngine(), [PAIR] * 3 + [Pair(Side(chat("what", "x"), "joy"), Side(chat("what", "y"), "woe"))]
    )
    record = sweep(level=ONE_WINDOW, objective=objective).run().record
    assert record["objective"]["kind"] == "logprob-contrast"
    assert record["effect"] == pytest.approx(4 * record["dose"], rel=1e-3)


# ---- vectors from elsewhere ----


def given(op="add"):
    """A vector at layers 3 and 4 with doses of 5 and 10 hidden-state units."""
    axis = np.float32([1, 0, 0, 0])
    return SteeringVector("given", {(3, "resid_post"): axis * 5, (4, "resid_post"): axis * 10}, op=op, default_scope="response")


def test_a_vector_from_elsewhere_gets_the_largest_fluent_dose():
    engine = FakeEngine()
    found = calibrate_vector(engine, given(), DoseObjective([chat(f"prompt {i}") for i in range(20)]), QUICK)
    scales = found.vector.scales
    # proportions stay, and the record says what strength 1 adds
    assert scales[4, "resid_post"] == pytest.approx(2 * scales[3, "resid_post"])
    norms = {il: np.linalg.norm(engine.read([chat("prompt 0")], layers=[il])[0].values[il]) for il in (3, 4)}
    total = sum(scale / norms[il] for (il, _), scale in scales.items())
    assert total == pytest.approx(found.record["dose"], rel=0.05)
    # half a rung more would not pass: it is the edge
    assert found.record["signs"]["negative"]["smallest_failing"] > found.record["dose"]
    assert found.vector.calibration == found.record and found.vector.identity == engine.info.identity


def test_a_calibrated_vector_is_the_same_whatever_its_strength_was():
    prompts = [chat(f"prompt {i}") for i in range(20)]
    weak, strong = given(), given().replace(scales={key: 100 * s for key, s in given().scales.items()})
    results = [calibrate_vector(FakeEngine(), v, DoseObjective(prompts), QUICK).vector for v in (weak, strong)]
    for key, scale in results[0].scales.items():
        assert results[1].scales[key] == pytest.approx(scale)


def test_only_vectors_that_add_have_a_dose():
    with pytest.raises(VectorError, match="uses project"):
        calibrate_vector(FakeEngine(), given("project"), objective(), QUICK)
