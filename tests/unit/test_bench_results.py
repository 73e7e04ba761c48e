"""The page of results: targets, who wins, and floors."""

from __future__ import annotations

from typing import Any

from benchmarks.results_page import against_prompt, better_with_prompt, results_page, targets
from steer_plugins.bench.control import SWING, Control, ControlPlan, Results
from steer_plugins.bench.report import make_report

from .bench_world import FAMILY, PLAN, World, case, found, vector


def page_of(engine: Any = None, plan: ControlPlan = PLAN, **more: Any) -> tuple[str, Results]:
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
