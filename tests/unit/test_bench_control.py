"""``steer bench control`` on an engine whose replies follow rules: what is measured, and on which prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.results_page import against_prompt
from steer_plugins.bench.arms import ARMS, case_of, message, random_vector, shuffled_vector
from steer_plugins.bench.control import QUICK, SWING, TURN_TOKENS, Control, ControlPlan, divergence
from steer_plugins.bench.replies import SCORED_TOKENS
from steer_plugins.bench.stats import harmonic_mean
from steer_plugins.bench.summary import summary_rows
from steer_plugins.errors import DataError, VectorError
from steer_plugins.metrics import Metric
from steer_plugins.steering.vector import SteeringVector

from .bench_world import FAMILY, NOUNS, PLAN, TRAIT, World, case, found, happiness, run, vector
from .fakes import IDENTITY, N_EMBD, FakeEngine

# ---- the run ----


def test_halves_are_disjoint_and_drawn_with_the_seed() -> None:
    control = Control(World(), [], [FAMILY], PLAN)
    choose, score = control.halves(FAMILY)
    assert len(choose) == len(score) == 5 and not {t.id for t in choose} & {t.id for t in score}
    assert control.halves(FAMILY) == (choose, score)
    other = Control(World(), [], [FAMILY], replace(PLAN, seed=1)).halves(FAMILY)
    assert {t.id for t in other[0]} != {t.id for t in choose}
    fewer = Control(World(), [], [FAMILY], replace(PLAN, prompts=4)).halves(FAMILY)
    assert [len(half) for half in fewer] == [2, 2]


def test_the_strength_is_the_best_before_the_cliff() -> None:
    part = found(run())["families"]["nouns"]
    # the pull is the strength: 1.0 falls off the cliff at 0.9, 0.5 has twice the effect of 0.25
    assert part["strength"] == {"steer": 0.5, "both": 0.5}
    assert found(run(World(cliff=5.0)))["families"]["nouns"]["strength"]["steer"] == 1.0
    assert found(run(World(cliff=0.3)))["families"]["nouns"]["strength"]["steer"] == 0.25


def test_the_strength_is_chosen_on_one_half_and_scored_on_the_other() -> None:
    choose, score = Control(World(), [], [FAMILY], PLAN).halves(FAMILY)

    class Split(World):
        """Half of the prompts, those that are scored, are all noise."""

        def _reply(self, prompt: str, pull: float, dose: float, max_tokens: int) -> tuple[str, str]:
            bad = any(t.id in prompt for t in score)
            return ("noise", "stop") if bad and pull else super()._reply(prompt, pull, dose, max_tokens)

    results = run(Split())
    part = found(results)["families"]["nouns"]
    assert part["strength"]["steer"] == 0.5 and part["arms"]["steer"]["greedy"]["success"][0] == 0.0
    halves = {
        half: {r["task"] for r in results.rows if r["kind"] == "reply" and r["half"] == half} for half in ("choose", "score")
    }
    assert halves == {"choose": {t.id for t in choose}, "score": {t.id for t in score}}
    assert all(r["decoding"] == "greedy" for r in results.rows if r["kind"] == "reply" and r["half"] == "choose")


def test_what_the_strengths_are_chosen_from() -> None:
    rows = [r for r in run().rows if r["kind"] == "reply" and r["half"] == "choose"]
    tried = {arm: {r["strength"] for r in rows if r["arm"] == arm} for arm in ("prompt", "strong prompt", "steer", "both")}
    # the prompt does a part of the work
    assert tried == {"prompt": {0.0}, "strong prompt": {0.0}, "steer": {0.25, 0.5, 1.0}, "both": {0.125, 0.25, 0.5}}


def test_fewer_prompts_can_be_scored() -> None:
    results = run(plan=replace(PLAN, score_prompts=3, choose_prompts=2))
    assert found(results)["families"]["nouns"]["arms"]["steer"]["greedy"]["score"][3] == 3
    assert found(results)["dose"]["full"][SWING]["effect"][3] == 3
    _, score = Control(World(), [], [FAMILY], PLAN).halves(FAMILY)
    scored = {r["task"] for r in results.rows if r["kind"] in ("reply", "dose") and r["half"] == "score"}
    assert scored == {t.id for t in score[:3]}


def test_the_perplexity_is_that_of_a_reply_s_beginning() -> None:
    class Long(World):
        def _reply(self, prompt: str, pull: float, dose: float, max_tokens: int) -> tuple[str, str]:
            text, reason = super()._reply(prompt, pull, dose, max_tokens)
            return text + " and so on" * 20, reason

    engine = Long()
    run(engine, replace(PLAN, choices=0, neutral=0))
    assert {len(text) for _, text in engine.scored} == {SCORED_TOKENS}


def test_the_prompt_is_chosen_on_one_half_for_both_sides() -> None:
    choose, _ = Control(World(), [], [FAMILY], PLAN).halves(FAMILY)

    class Shouted(World):
        """The strong prompt works on the prompts that choose alone."""

        def _reply(self, prompt: str, pull: float, dose: float, max_tokens: int) -> tuple[str, str]:
            works = "most important" not in prompt or any(t.id in prompt for t in choose)
            text, reason = super()._reply(prompt, pull, dose, max_tokens)
            return (text + "+" * ("important" in prompt) if works else "thing"), reason

    part = found(run(Shouted()))
    family = part["families"]["nouns"]
    assert part["prompt"] == family["versus"]["greedy"]["best prompt"] == "strong prompt"
    tokens = {arm: family["arms"][arm]["greedy"]["context_tokens"][0] for arm in ("prompt", "strong prompt", "both")}
    assert tokens["both"] == tokens["strong prompt"] > tokens["prompt"]
    # the better one of the scored half would have been the other
    assert family["arms"]["prompt"]["greedy"]["score"][0] > family["arms"]["strong prompt"]["greedy"]["score"][0] == 0.0
    assert set(part["persistence"]) == {"plain", "strong prompt", "steer", "both"} < set(part["side_effects"])
    equal = found(run())
    assert equal["prompt"] == equal["families"]["nouns"]["versus"]["greedy"]["best prompt"] == "prompt"


def test_arms() -> None:
    results = run()
    part = found(results)["families"]["nouns"]["arms"]
    metrics = {arm: part[arm]["greedy"]["metric"][0] for arm in part}
    assert metrics == {"plain": 0.0, "prompt": 0.5, "strong prompt": 0.5, "steer": 0.5, "both": 1.0, "random": metrics["random"]}
    assert part["steer"]["greedy"]["effect"] == [0.5, 0.5, 0.5, 5] and part["plain"]["greedy"]["effect"][0] == 0.0
    assert part["plain"]["greedy"]["success"] == [1.0, 1.0, 1.0, 5]
    system = len("<s>Be gleeful.")
    assert part["prompt"]["greedy"]["context_tokens"][0] == part["both"]["greedy"]["context_tokens"][0] == system
    assert part["steer"]["greedy"]["context_tokens"][0] == 0.0 and part["strong prompt"]["greedy"]["context_tokens"][0] > 100
    assert part["plain"]["greedy"]["measures"]["letters"][0] == pytest.approx(len("The  .") + 5, abs=1.5)
    versus = found(results)["families"]["nouns"]["versus"]["greedy"]
    assert versus["both - prompt"][1] > 0 and versus["steer - prompt"][:3] == [0.0, 0.0, 0.0]
    assert {r["arm"] for r in results.rows if r["kind"] == "reply"} == set(ARMS) - {"shuffled"}


def test_rows_add_up() -> None:
    for row in run().rows:
        if row["kind"] == "reply":
            assert row["score"] == pytest.approx(harmonic_mean([(1 + row["metric"]) / 2, row["success"], row["fluency"]]))
            assert 0 <= row["fluency"] <= 1 and row["metric"] == happiness(row["text"])
            assert (row["strength"] != 0) == (row["arm"] in ("steer", "both", "random"))


def test_the_other_pole() -> None:
    results = run(sign=-1)
    part = found(results)
    assert part["pole"] == "glum" and part["families"]["nouns"]["arms"]["both"]["greedy"]["metric"][0] == 1.0
    assert "--" in next(r for r in results.rows if r.get("arm") == "steer" and r["strength"] == 0.5)["text"]
    points = {p["strength"]: p["metric"][0] for p in part["dose"]["points"]}
    assert points[0.6] > 0 > points[-0.6]  # the curve goes towards the positive pole, whatever is wanted


def test_runs_are_paired_by_seed() -> None:
    engine = World()
    run(engine)
    sampled = [r for r in engine.generated if r.temperature == PLAN.temperature]
    by_task: dict[str, set[int]] = {}
    for request in sampled:
        noun = next(n for n in NOUNS if n in str(request.prompt))
        by_task.setdefault(noun, set()).add(request.seed)
    assert len(sampled) > 5 and all(len(seeds) == 1 for seeds in by_task.values())
    assert len(set.union(*by_task.values())) == len(by_task)
    assert {r.temperature for r in engine.generated} == {0.0, PLAN.temperature, 1.0}
    greedy = World()
    run(greedy, replace(PLAN, sampled=False))
    assert {r.temperature for r in greedy.generated} == {0.0, 1.0}


def test_the_same_seed_gives_the_same_results() -> None:
    one, two = run(), run()
    assert one == two and json.dumps(one.summary) == json.dumps(two.summary)
    assert run(plan=replace(PLAN, seed=7)).summary != one.summary


def test_floor() -> None:
    class Lost(World):
        def _reply(self, *arguments: Any) -> tuple[str, str]:
            return "no idea", "stop"

    results = run(Lost())
    assert results.summary["families"]["nouns"]["plain"]["floor"] is True and found(results)["families"]["nouns"]["floor"]
    row = summary_rows(results.summary)[0]
    assert row[:2] == ("glee (gleeful)", "nouns") and set(row[2:]) == {"floor"}
    assert not run().summary["families"]["nouns"]["plain"]["floor"]


def test_fluency_falls_with_perplexity_and_repetition() -> None:
    def fluency(text: str, nll: float) -> float:
        class Fluent(World):
            def _reply(self, prompt: str, pull: float, dose: float, max_tokens: int) -> tuple[str, str]:
                return (text, "stop") if pull else super()._reply(prompt, pull, dose, max_tokens)

            def logprobs(self, items: Any, **more: Any) -> Any:
                return [
                    np.full(len(a), -(nll if self.detokenize(list(map(ord, a)) if isinstance(a, str) else a) == text else 1.0))
                    for _, a in items
                ]

        return float(found(run(Fluent()))["families"]["nouns"]["arms"]["steer"]["greedy"]["fluency"][0])

    assert fluency("a bcd ef", 1.0) == 1.0
    assert fluency("a bcd ef", 1.0 + np.log(1.4)) == 1.0
    assert fluency("a bcd ef", 1.0 + np.log(3.0)) == pytest.approx(0.5, abs=1e-3)
    assert fluency("ab ab ab ab ab ab", 1.0) < 0.4
    assert fluency("", 1.0) == 0.0


def test_dose_and_response() -> None:
    dose = found(run(World(cliff=5.0)))["dose"]
    assert len(dose["points"]) >= 7 and dose["spearman"] == pytest.approx(1.0) and dose["family"] == "nouns"
    points = {p["strength"]: p for p in dose["points"]}
    assert points[0.0]["effect"][0] == 0.0 and points[1.0]["effect"][0] == 1.0 and points[-1.0]["metric"][0] == -1.0
    assert points[1.0]["perplexity"] == pytest.approx(1.0)
    full = dose["full"]["+1"]
    assert full["excludes_zero"] and full["effect"][0] == 1.0
    assert full["times_random"] is None or full["times_random"] >= 1.0


def test_random_vectors_are_pooled_by_prompt() -> None:
    """Two opposite vectors do something each, and nothing together: what counts is how far each goes."""
    both = (vector(), vector().scaled(-1.0))
    full = found(run(World(cliff=5.0), randoms=both))["dose"]["full"]
    for key, effect in (("-1", -1.0), ("+1", 1.0), (SWING, 2.0)):
        assert full[key]["effect"][0] == effect and full[key]["excludes_zero"]
        assert full[key]["random"][0] == 0.0 and full[key]["random_size"] == abs(effect) and full[key]["times_random"] == 1.0
    idle = vector().scaled(0.1)
    assert found(run(World(cliff=5.0), randoms=(idle,)))["dose"]["full"][SWING]["times_random"] is None
    assert case(randoms=both).random_arms == ("random", "random 2")
    assert case(randoms=both).steering("random 2", 0.5).terms[0].vector is both[1]


def test_conversations_keep_their_history() -> None:
    engine = World()
    results = run(engine)
    turns = found(results)["persistence"]
    assert {arm: [t[3] for t in values] for arm, values in turns.items()} == dict.fromkeys(
        ("plain", "prompt", "steer", "both"), [2] * 3
    )
    assert turns["steer"][0][0] == turns["steer"][2][0] == 0.5 and turns["plain"][2][0] == 0.0
    longest = max((r.prompt for r in engine.generated), key=len)
    roles = [m["role"] for m in longest]
    assert roles == ["system", *["user", "assistant"] * 2, "user"]
    assert len([r for r in results.rows if r["kind"] == "turn"]) == 4 * 2 * 3


def test_conversations_end_with_the_context() -> None:
    engine = World()
    engine.info = replace(engine.info, n_ctx=60)
    turns = found(run(engine))["persistence"]
    assert all(len(values) <= 1 for values in turns.values())


def test_side_effects() -> None:
    class Sided(World):
        """Steering makes every text less likely by its dose, and the second ending the likeliest."""

        def logprobs(self, items: Any, *, steering: Any = None, **more: Any) -> Any:
            _, dose = self._pull(steering)
            values = []
            for i, (prompt, _) in enumerate(items):
                choice = "Complete the sentence" in str(prompt)
                best = (1 if dose else 0) if choice else None
                values.append(np.full(1, -1.0 - dose - (0.5 if choice and i % 4 != best else 0.0)))
            return values

    effects = found(run(Sided()))["side_effects"]
    assert effects["strength"] == 0.5
    assert effects["plain"]["accuracy"][0] == effects["prompt"]["accuracy"][0] == 1.0
    assert effects["steer"]["accuracy"][0] == 0.0 and effects["steer"]["accuracy_change"][0] == -1.0
    # two tokens, even odds against odds of 1 to e^pull
    expected = np.log(0.5) - np.mean([0.0, 0.5]) + np.logaddexp(0.0, 0.5)
    assert effects["steer"]["kl"][0] == pytest.approx(expected, abs=1e-4) and effects["prompt"]["kl"][0] == 0.0
    assert "kl" not in effects["plain"]
    sided = Sided()
    sided.has_distributions = False
    assert all("kl" not in effect for effect in found(run(sided))["side_effects"].values() if isinstance(effect, dict))


def test_divergence() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.normal(size=(5, 1000)).astype(np.float32) for _ in range(2))
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (p, q))
    exact = np.sum(np.exp(p.astype(np.float64)) * (p.astype(np.float64) - q), axis=1).mean()
    assert divergence(p, q) == pytest.approx(exact, rel=1e-4) and divergence(p, p) == 0.0
    # the least difference that float32 can hold is still not below 0
    assert 0.0 <= divergence(p, np.nextafter(p, np.float32(0))) < 1e-6


def test_models_without_a_chat_template() -> None:
    engine = World(chat=False)
    assert message(engine, "Hi", None) == "Hi\n\n" and message(engine, "Hi", "Be kind.") == "Be kind.\n\nHi\n\n"
    assert message(World(), "Hi", "Be kind.")[0] == {"role": "system", "content": "Be kind."}
    assert found(run(engine))["families"]["nouns"]["arms"]["prompt"]["greedy"]["metric"][0] == 0.5


def test_families_of_other_traits_are_left_out() -> None:
    other = replace(FAMILY, name="other", traits=("mood",))
    results = Control(World(), [case()], [FAMILY, other], PLAN).run()
    assert list(found(results)["families"]) == ["nouns"] == list(results.summary["families"])
    none = Control(World(), [case()], [other], PLAN).run()
    assert found(none)["families"] == {} and found(none)["dose"] == {"points": [], "spearman": None}


def test_quick_has_at_least_seven_strengths() -> None:
    for plan in (QUICK, ControlPlan()):
        assert len(set(plan.curve)) >= 7
    assert ControlPlan().prompts >= 60


# ---- control vectors ----


def test_random_vectors_have_the_same_norms() -> None:
    own = vector()
    random = random_vector(own, 1)
    assert random.scales == own.scales and random.layers == own.layers
    assert random.content_hash != own.content_hash == vector().content_hash
    assert random_vector(own, 1).content_hash == random.content_hash != random_vector(own, 2).content_hash


def test_shuffled_labels() -> None:
    class Noisy(FakeEngine):
        """Each prompt has a direction of its own, and a common one for its pole."""

        def _states(self, text: str, n: int, layer: int) -> np.ndarray:
            rows = super()._states(text, n, layer)
            rng = np.random.default_rng(sum(map(ord, text)))
            rows[1:] = (
                0.3 * rng.standard_normal(N_EMBD) + (2.0 * ("gleeful" in text) - 2.0 * ("glum" in text)) * np.eye(N_EMBD)[0]
            )
            return rows

    trait = replace(TRAIT, train_prompts=tuple(f"Prompt {chr(65 + i)}{i}." for i in range(20)))
    own = vector(identity=IDENTITY)
    made = shuffled_vector(Noisy(), trait, own, 3, None)
    assert made is not None and made.scales == own.scales and made.name == "shuffled"
    # with the labels as they are the fit finds the axis; half of them flipped cancel it
    assert abs(float(made.directions[3, "resid_post"][0])) < 0.9
    again = shuffled_vector(Noisy(), trait, own, 3, None)
    assert again is not None and again.content_hash == made.content_hash
    elsewhere = SteeringVector("glee", {(3, "ffn_out"): np.eye(4, dtype=np.float32)[0]})
    assert shuffled_vector(Noisy(), trait, elsewhere, 3, None) is None


def test_cases() -> None:
    made = case_of(FakeEngine(), TRAIT, vector(identity=IDENTITY), seed=1, n_pairs=2)
    assert made.metric.name == "mood" and made.pole == "gleeful"
    # all prompts of this trait read the same there, so there is nothing to shuffle
    assert made.shuffled is None and "shuffled" not in made.arms
    assert case(sign=-1).system("prompt") == "Be glum." and case().system("steer") is None
    assert case().system("strong prompt").count("Be gleeful.") == 2  # type: ignore[union-attr]
    with pytest.raises(VectorError, match="names no metric"):
        case_of(FakeEngine(), replace(TRAIT, metric=None), vector())
    with pytest.raises(VectorError, match="another fine-tune"):
        case_of(FakeEngine(), TRAIT, vector(identity=replace(IDENTITY, norms_sha256="c" * 64)))


# ---- length, cost, and traits side by side ----


def metric_of(tokens: int) -> Metric:
    return Metric("joy", "", happiness, "up", "down", tokens=tokens)


@pytest.mark.parametrize(("stretch", "tokens", "longest"), [(True, 40, 40), (True, 8, 16), (False, 40, 16)])
def test_replies_become_as_long_as_the_metric_needs(stretch: bool, tokens: int, longest: int) -> None:
    engine = World()
    control = Control(engine, [case(metric=metric_of(tokens))], [replace(FAMILY, stretch=stretch)], PLAN)
    control.run()
    asked = {r.max_tokens for r in engine.generated if r.steering and r.max_tokens != TURN_TOKENS}
    assert asked == {longest}


def test_the_fluent_perplexity_is_that_of_plain_replies_of_the_same_length() -> None:
    class Longer(World):
        """Long replies are likelier, token by token: three times, and no less fluent for that."""

        def _reply(self, prompt: str, pull: float, dose: float, max_tokens: int) -> tuple[str, str]:
            return super()._reply(prompt, pull, dose, max_tokens)[0] + "abcdefghij klmnopqrst" * (max_tokens > 16), "stop"

        def logprobs(self, items: Any, **more: Any) -> Any:
            return [np.full(len(a), -1.0 - np.log(3.0) * (len(a) < 30)) for _, a in items]

    part = found(run(Longer(), metric=metric_of(40)))["families"]["nouns"]["arms"]
    assert part["plain"]["greedy"]["fluency"][0] == part["steer"]["greedy"]["fluency"][0] == 1.0


def test_a_floor_costs_nothing() -> None:
    class Lost(World):
        def _reply(self, *arguments: Any) -> tuple[str, str]:
            return "no idea", "stop"

    plan = replace(PLAN, conversations=0)
    engine, able = Lost(), World()
    part = found(run(engine, plan))["families"]["nouns"]
    run(able, plan)
    assert list(part["arms"]) == ["plain"] and part["strength"] == {} and len(engine.generated) < len(able.generated) / 2
    assert against_prompt(run(Lost()).summary, "both")["floor"] == [("glee", "nouns", [])]


def test_caps() -> None:
    plan = replace(PLAN, choose_prompts=3, sampled_prompts=2, curve_prompts=2, control_prompts=1, random_prompts=4, max_tokens=7)
    engine = World(cliff=5.0)
    rows = [row for row in run(engine, plan).rows if row["kind"] in ("reply", "dose")]
    assert {r.max_tokens for r in engine.generated} - {TURN_TOKENS, 32} == {7}

    def tasks(**wanted: Any) -> int:
        return len({row["task"] for row in rows if all(row[key] == value for key, value in wanted.items())})

    assert tasks(kind="reply", half="choose", arm="steer") == 3 and tasks(kind="reply", decoding="sampled", arm="steer") == 2
    assert tasks(kind="reply", half="score", decoding="greedy", arm="steer") == 5
    assert not tasks(kind="reply", decoding="sampled", arm="random")
    assert tasks(kind="dose", strength=0.3) == 2 and tasks(kind="dose", strength=1.0, arm="steer") == 5
    assert tasks(kind="dose", arm="random") == 4 and tasks(kind="reply", arm="random") == 1


def test_plain_replies_are_shared() -> None:
    engine = World()
    plan = replace(PLAN, sampled=False, conversations=0)
    names = ("glee", "joy", "fun")
    Control(engine, [case(trait=replace(TRAIT, name=name)) for name in names], [FAMILY], plan).run()
    plain = [
        str(r.prompt) for r in engine.generated if not r.steering and "<system>" not in str(r.prompt) and r.temperature == 0.0
    ]
    plain = [p for p in plain if "role': 'system" not in p and any(f"about a {noun}." in p for noun in NOUNS)]
    assert len(plain) == len(set(plain)) == PLAN.prompts


def test_traits_side_by_side_give_the_same_results() -> None:
    cases = [case(trait=replace(TRAIT, name=name)) for name in ("glee", "joy", "fun")]
    one = Control(World(), cases, [FAMILY], PLAN).run()
    engines = [World(), World(), World()]
    for engine in engines:
        engine._nll = engines[0]._nll  # the fake model's memory of how likely its texts are
    many = Control(engines[0], cases, [FAMILY], PLAN, helpers=engines[1:]).run()
    assert many == one and list(many.summary["traits"]) == ["glee", "joy", "fun"]

    class Broken(World):
        def _reply(self, prompt: str, pull: float, dose: float, max_tokens: int) -> tuple[str, str]:
            if pull:
                raise DataError("broken")
            return super()._reply(prompt, pull, dose, max_tokens)

    with pytest.raises(DataError, match="broken"):
        Control(Broken(), cases, [FAMILY], PLAN, helpers=[Broken()]).run()
