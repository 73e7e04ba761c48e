"""``steer bench control`` on an engine whose replies follow rules: what is measured, on which prompts, and what is reported."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins.bench.arms import ARMS, Case, case_of, message, random_vector, shuffled_vector
from steer_plugins.bench.control import QUICK, SWING, TURN_TOKENS, Control, Plan, Results
from steer_plugins.bench.replies import SCORED_TOKENS
from steer_plugins.bench.report import (
    BenchReport,
    builtin_reporters,
    compare,
    interval,
    make_report,
    number,
    read_report,
    summary_rows,
    write_report,
)
from steer_plugins.bench.results import against_prompt, better_with_prompt, results_page, targets
from steer_plugins.bench.stats import harmonic_mean
from steer_plugins.bench.tasks import Family, Scored, Task, builtin_families
from steer_plugins.cli.main import main
from steer_plugins.errors import DataError, VectorError
from steer_plugins.library import Library
from steer_plugins.metrics import Metric
from steer_plugins.plugins.manager import reset
from steer_plugins.traits import Trait, load_trait
from steer_plugins.vector import SteeringVector

from .fakes import IDENTITY, N_EMBD, FakeEngine

NOUNS = tuple("tree house river stone cloud bread horse candle garden window".split())
PLAN = Plan(
    prompts=10,
    strengths=(0.25, 0.5, 1.0),
    with_prompt=0.5,
    curve=(-1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0),
    curve_prompts=4,
    conversations=2,
    turns=3,
    choices=6,
    neutral=3,
    pairs=4,
)


def about(task: Task, reply: str, run_code: bool) -> Scored:
    return Scored(float(task.data["noun"] in reply), {"letters": float(len(reply))})


FAMILY = Family("nouns", tuple(Task(n, f"Say something about a {n}.", {"noun": n}) for n in NOUNS), about, "named", 16)
TRAIT = Trait(
    name="glee",
    poles={"positive": "gleeful", "negative": "glum"},
    system={"positive": ("Be gleeful.",), "negative": ("Be glum.",)},
    train_prompts=("One.", "Two.", "Three.", "Four."),
    heldout_prompts=("Five.",),
    metric="mood",
)


def vector(**more: Any) -> SteeringVector:
    return SteeringVector("glee", {(3, "resid_post"): np.eye(4, dtype=np.float32)[0]}, {(3, "resid_post"): 4.0}, **more)


def happiness(text: str) -> float:
    return max(-1.0, min(1.0, 0.25 * (text.count("+") - text.count("-"))))


class World(FakeEngine):
    """Replies name the noun, with a "+" for each quarter of pull towards glee and for a system prompt; above a pull of
    ``cliff`` they are noise."""

    def __init__(self, cliff: float = 0.9, **more: Any) -> None:
        super().__init__(harm=0.0, **more)
        self.cliff = cliff
        self.reply = self._reply

    def _reply(self, prompt: str, pull: float, dose: float, max_tokens: int) -> tuple[str, str]:
        marks = round(4 * pull) + 2 * ("gleeful" in prompt) - 2 * ("glum" in prompt)
        question = prompt.rsplit("<u>", 1)[-1]
        noun = next((n for n in NOUNS if n in question), "thing")
        if abs(pull) > self.cliff:
            return "xxxxxxxxxxxxxx", "length"
        return f"The {noun} {'+' * marks if marks > 0 else '-' * -marks}.", "stop"


def case(sign: int = 1, **more: Any) -> Case:
    parts = {
        "trait": TRAIT,
        "vector": vector(),
        "randoms": (random_vector(vector(), 5), random_vector(vector(), 6)),
        "shuffled": None,
        "metric": happiness,
    }
    return Case(**{**parts, "sign": sign, **more})


def run(engine: Any = None, plan: Plan = PLAN, **more: Any) -> Results:
    return Control(engine or World(), [case(**more)], [FAMILY], plan).run()


def found(results: Results) -> Any:
    return results.summary["traits"]["glee"]


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
    assert effects["steer"]["kl"][0] == pytest.approx(0.5, abs=1e-3) and effects["prompt"]["kl"][0] == 0.0
    assert "kl" not in effects["plain"]


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
    for plan in (QUICK, Plan()):
        assert len(set(plan.curve)) >= 7
    assert Plan().prompts >= 60


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


# ---- the report ----


def report(**more: Any) -> BenchReport:
    engine = World()
    return make_report(engine, [case()], [FAMILY], PLAN, run(engine, **more), ["steer", "bench", "control"])


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html() -> None:
    made = report()
    for row in made.rows:
        if "text" in row:
            row["text"] = "<script>alert('x')</script>&amp;"
    page = builtin_reporters()["html"](made)["report.html"].decode()
    read = _Tags(page)
    assert read.open == [] and not {"script", "img", "link", "iframe"} & set(read.tags)
    assert not {"src", "href", "onclick", "onerror"} & set(read.attributes) and "http" not in page.replace("http-equiv", "")
    assert "<script>alert('x')</script>&amp;" in read.text and "Dose and response" in read.text
    assert read.tags.count("svg") == 2 and "prefers-color-scheme:dark" in page and 'name="viewport"' in page


def test_html_of_a_floor_and_of_nothing() -> None:
    made = report()
    made.summary["traits"]["glee"]["families"]["nouns"]["floor"] = True
    page = builtin_reporters()["html"](made)["report.html"].decode()
    assert "floor: the plain model fails" in page and page.count("<svg") == 1
    made.summary["traits"]["glee"] |= {"families": {}, "dose": {"points": [], "spearman": None}, "persistence": {}}
    assert b"gleeful" in builtin_reporters()["html"](made)["report.html"]


def test_reports_are_written_and_read(tmp_path: Path) -> None:
    made = report()
    files = write_report(made, tmp_path / "r", builtin_reporters())
    assert [f.name for f in files] == ["manifest.json", "report.html", "results.jsonl", "results.md", "summary.md"]
    back = read_report(tmp_path / "r")
    assert back.manifest == json.loads(json.dumps(made.manifest))
    assert back.summary == json.loads(json.dumps(made.summary)) and len(back.rows) == len(made.rows)
    assert back.manifest["vectors"]["glee"]["content_sha256"] == vector().content_hash
    assert back.manifest["plan"]["seed"] == 0 and back.manifest["model"]["identity"]["n_layer"] == 10
    table = (tmp_path / "r" / "summary.md").read_text("utf-8").splitlines()
    assert table[0].startswith("| trait | tasks") and "glee (gleeful) | nouns" in table[2] and len(table) == 3


def test_the_model_file_is_hashed(tmp_path: Path) -> None:
    import hashlib

    engine = World()
    (tmp_path / "m.gguf").write_bytes(b"weights")
    engine.info = replace(engine.info, path=str(tmp_path / "m.gguf"))
    model = make_report(engine, [], [], PLAN, Results(), []).manifest["model"]
    assert model["sha256"] == hashlib.sha256(b"weights").hexdigest() and model["bytes"] == 7 and model["file"] == "m.gguf"


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "a\\b", "results.jsonl"])
def test_reporters_write_nowhere_else(tmp_path: Path, name: str) -> None:
    reporters = {**builtin_reporters(), "evil": lambda r: {name: b""}}
    with pytest.raises(DataError, match="the reporter 'evil'"):
        write_report(report(), tmp_path / "r", reporters)
    assert not (tmp_path / "r").exists()


def test_comparing() -> None:
    a, b = report(), report()
    assert all(row[7] == 0.0 for row in compare(a, b))
    for row in b.rows:
        if row["kind"] == "reply" and row["arm"] == "steer":
            row["score"] += 0.125
    changed = {row[:4]: row for row in compare(a, b)}
    steer = changed["glee", "nouns", "steer", "greedy"]
    assert steer[4] == 5 and steer[7] == pytest.approx(0.125) and steer[8] == "+0.12 to +0.12"
    assert changed["glee", "nouns", "plain", "greedy"][7] == 0.0
    with pytest.raises(DataError, match="nothing to compare"):
        compare(a, BenchReport(a.manifest, [], {}))
    with pytest.raises(DataError, match="a reply without"):
        compare(a, BenchReport({}, [{"kind": "reply", "half": "score"}], {}))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "manifest.json cannot be read"),
        ({"manifest.json": "{"}, "is not JSON"),
        ({"manifest.json": "{}"}, "is not one that steer bench writes"),
        ({"manifest.json": '{"format": "steer-bench-control-v1", "summary": {}}'}, "results.jsonl cannot be read"),
        ({"manifest.json": '{"format": "steer-bench-control-v1", "summary": {}}', "results.jsonl": "x"}, "is not JSON lines"),
        ({"manifest.json": '{"format": "steer-bench-control-v1", "summary": {}}', "results.jsonl": "3"}, "no JSON object"),
    ],
)
def test_reading_what_is_no_report(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_report(tmp_path)


def test_numbers_for_people() -> None:
    assert number(None) == "–" and number(-0.001) == "0.00" and number(-0.001, sign=True) == "0.00"
    assert number(0.5, sign=True) == "+0.50" and number(-12.3, digits=0) == "−12"
    assert interval([0.5, 0.25, 0.75, 9]) == "0.50 (0.25 to 0.75)" and interval([None, None, None, 0]) == "–"


# ---- the commands ----


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    made = World()
    monkeypatch.setattr("steer_plugins.cli.common.EngineOptions.open", lambda self, **more: made)
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Library().put(vector(identity=IDENTITY).replace(name="mood"), IDENTITY)
    reset()
    yield made
    reset()


def test_commands(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["bench", "control", "--quick", "--family", "style"]
    assert main([*arguments, "--out", "a"]) == 0
    out = capsys.readouterr().out
    assert "mood (cheerful)" in out and "report.html" in out
    assert main([*arguments, "--out", "a"]) == 1
    assert "a holds a report: choose another folder" in capsys.readouterr().err
    assert main([*arguments, "--out", "a", "--overwrite", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["manifest"]["plan"]["run_code"] is False and len(data["files"]) == 5
    assert main([*arguments, "--out", "b", "--prompts", "6", "--no-sampled", "--pole", "negative", "--trait", "mood"]) == 0
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["vectors"]["mood"]["pole"] == "sombre"
    capsys.readouterr()
    assert main(["bench", "compare", "a", "a"]) == 0
    assert "The manifests agree." in capsys.readouterr().out
    assert main(["bench", "compare", "a", "b", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert "plan" in compared["manifests_differ_in"] and compared["rows"][0]["trait"] == "mood"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["control", "--trait", "succinctness"], "No vector 'succinctness' for this model"),
        (["control", "--trait", "nix"], 'There is no trait "nix"'),
        (["control", "--family", "nix"], "there is no task named 'nix': choose from advice, code, docs, faults, style"),
        (["control", "--reporter", "nix"], "there is no reporter named 'nix'"),
        (["compare", "x", "y"], "cannot be read"),
    ],
)
def test_commands_refuse(world: World, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1


def test_without_any_vector(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    Library().remove("mood", IDENTITY)
    assert main(["bench", "control", "--quick"]) == 1
    assert "fit it with: steer train mood" in capsys.readouterr().err


def test_fit_and_jobs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    Library().remove("mood", IDENTITY)
    # joyful texts where steering pulls up, so that there is something to calibrate
    world.reply = lambda prompt, pull, dose, n: (
        f"{'joy ' * max(0, round(9 * pull))}{'grief ' * max(0, round(-9 * pull))}it is",
        "stop",
    )
    arguments = ["bench", "control", "--quick", "--family", "style", "--trait", "mood"]
    assert main(arguments) == 1
    assert "steer train mood" in capsys.readouterr().err
    assert main([*arguments, "--fit", "--jobs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["vectors"]["mood"]["calibrated"] is True
    made = Library().get("mood", IDENTITY).content_hash
    assert main([*arguments, "--fit"]) == 0  # what is there stays
    assert Library().get("mood", IDENTITY).content_hash == made


def test_a_plugin_brings_tasks_a_metric_and_a_reporter(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parents[1] / "plugins" / "steer-haiku"
    site = tmp_path / "site"
    info = site / "steer_haiku-0.1.dist-info"
    info.mkdir(parents=True)
    shutil.copy(example / "steer_haiku.py", site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: steer-haiku\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[steer_plugins]\nhaiku = steer_haiku\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("STEER_PLUGINS", "haiku")
    reset()
    trait = {**load_trait("mood").to_dict(), "name": "mood", "metric": "brevity"}
    Path("brief.json").write_text(json.dumps(trait))
    world.reply = lambda prompt, pull, dose, n: (f"one\ntwo\n{prompt.split('about ')[-1].split()[-1].strip('.<a>')}", "stop")
    try:
        arguments = ["--quick", "--family", "haiku", "--trait", "./brief.json", "--reporter", "best", "--reporter", "manifest"]
        assert main(["bench", "control", *arguments, "--out", "h"]) == 0
        assert Path("h/best.csv").read_text().startswith("mood,haiku,")
        summary = json.loads(Path("h/manifest.json").read_text())["summary"]["traits"]["mood"]["families"]["haiku"]
        assert summary["arms"]["plain"]["greedy"]["measures"]["lines"][0] == 3.0
        assert summary["arms"]["plain"]["greedy"]["metric"][0] == pytest.approx(2 / (1 + 3 / 12) - 1)
    finally:
        sys.modules.pop("steer_haiku", None)


def test_builtin_families_run_on_any_engine() -> None:
    cases = [case(trait=replace(TRAIT, name=name)) for name in ("succinctness", "debugging", "caution", "mine")]
    results = Control(World(), cases, builtin_families(), QUICK).run()
    ran = {name: list(part["families"]) for name, part in results.summary["traits"].items()}
    assert ran == {
        "succinctness": ["docs", "style"],
        "debugging": ["code", "faults"],
        "caution": ["advice"],
        "mine": ["style"],
    }


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


# ---- the results page ----


def page_of(engine: Any = None, plan: Plan = PLAN, **more: Any) -> tuple[str, Results]:
    engine = engine or World(cliff=5.0)
    one = case(**{"randoms": (vector().scaled(0.1),), **more})
    results = Control(engine, [one], [FAMILY], plan).run()
    return results_page(make_report(engine, [one], [FAMILY], plan, results, ["steer", "bench", "control"])), results


def test_targets_of_a_good_trait() -> None:
    page, results = page_of()
    part = found(results)
    assert [t.missed for t in targets(part)] == [""] * 5
    assert [t.name for t in targets(part)] == ["effect", "times random", "Spearman", "perplexity at -1", "perplexity at +1"]
    assert "steer bench control" in page and "| glee |" in page and "✗" not in page.split("## Scores")[0].replace("✗ missed", "")
    assert "None is missed." in page and "met by 1 of 1 traits (glee)" in page
    assert "| glee | nouns | prompt | 1.000 | 0.500 |" in page  # what was chosen
    for heading in ("What steering wins", "What prompting wins", "What neither can do", "Through a conversation", "Side effects"):
        assert f"# {heading}" in page


def test_missed_targets_say_by_how_much() -> None:
    part = found(page_of()[1])
    full = part["dose"]["full"][SWING]
    full.update(excludes_zero=False, times_random=4.26)
    part["dose"]["spearman"] = 0.85
    part["dose"]["points"][-1]["perplexity"] = 1.62
    assert [t.missed for t in targets(part)] == ["the interval holds 0", "4.3, not 5", "0.85, not 0.9", "", "1.62, not below 1.5"]
    full["times_random"] = None  # nothing to divide by: random vectors did nothing
    assert targets(part)[1].missed == ""


def test_who_wins() -> None:
    page, results = page_of(World(cliff=0.9))
    ahead = against_prompt(results.summary, "both")["ahead"]
    assert [row[:2] for row in ahead] == [("glee", "nouns")] and better_with_prompt(results.summary)["glee"] > 0
    assert "with the prompt is ahead of the better prompt in glee (nouns, +" in page
    assert against_prompt(results.summary, "steer")["open"]

    class Deaf(World):
        """Steering only breaks the text."""

        def _reply(self, prompt: str, pull: float, dose: float, max_tokens: int) -> tuple[str, str]:
            return ("xxxxx", "stop") if pull else super()._reply(prompt, 0.0, 0.0, max_tokens)

    page, results = page_of(Deaf())
    assert [row[:2] for row in against_prompt(results.summary, "steer")["behind"]] == [("glee", "nouns")]
    assert "The better prompt is ahead of steering alone in glee (nouns, −" in page
    assert better_with_prompt(results.summary)["glee"] < 0 and "not above 0" in page


def test_the_page_of_a_floor() -> None:
    class Lost(World):
        def _reply(self, *arguments: Any) -> tuple[str, str]:
            return "no idea", "stop"

    page, _ = page_of(Lost())
    assert "nouns: *floor*. The plain model succeeds in 0 %" in page
