"""Fitting vectors in the background, what is fitted, and the pictures of it."""

from __future__ import annotations

import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from steer_plugins_textgen import charts, jobs

from steer_plugins.errors import DataError, SpecError, SteerError
from steer_plugins.report import svg
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from steer_plugins.training.traits import bundled_traits, load_trait
from tests.unit.steering_server import IDENTITY
from tests.unit.textgen_webui import StandIn


def vector(name: str = "mood", **more: Any) -> SteeringVector:
    return SteeringVector(name, {(1, "resid_post"): [0.0, 0.0, 0.0, 1.0]}, {(1, "resid_post"): 2.0}, **more)


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    StandIn(monkeypatch, tmp_path)
    return SimpleNamespace(library=Library(tmp_path / "library"), info=SimpleNamespace(identity=IDENTITY), engine=object())


class Training:
    """In place of the real one: ``release`` lets it go on, ``fault`` is what it raises."""

    release = threading.Event()
    fault: Exception | None = None

    def __init__(self, engine: Any, name: str, source: Any, options: Any) -> None:
        self.name, self.rough = name, options.calibrate == "none"

    def plan(self) -> Any:
        return SimpleNamespace(tokens=100, seconds=1.0)

    def fit(self, report: Any) -> str:
        report("reading", 40)
        assert self.release.wait(20)
        return "fit"

    def finish(self, fit: str, report: Any = None) -> SteeringVector:
        if self.rough:
            return vector(self.name)
        report("calibrating", 60)
        if self.fault:
            raise self.fault
        return vector(self.name)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    Training.release, Training.fault = threading.Event(), None
    monkeypatch.setattr(jobs, "Training", Training)
    return jobs.Trainer()


def finish(trainer: jobs.Trainer) -> None:
    Training.release.set()
    worker = trainer._worker
    if worker is not None:
        worker.join(20)
    assert not trainer.active


def test_vectors_are_fitted_one_after_the_other(link: Any, trainer: jobs.Trainer) -> None:
    made: list[str] = []
    trainer.on_done = lambda job: made.append(job.name)
    first = trainer.add(link, "mood", load_trait("mood"))
    second = trainer.add(link, "calm", load_trait("mood"))
    with pytest.raises(SpecError, match="already"):
        trainer.add(link, "calm", load_trait("mood"))
    finish(trainer)
    assert (first.state, second.state) == ("done", "done") and made == ["mood", "calm"]
    assert [entry.name for entry in link.library.list(IDENTITY)] == ["calm", "mood"]
    assert jobs.missing_traits(link) == [name for name in bundled_traits() if name != "mood"]
    with pytest.raises(SpecError, match="library has 'mood'"):
        trainer.add(link, "mood", load_trait("mood"))
    trainer.add(link, "mood", load_trait("mood"), overwrite=True)
    finish(trainer)


def test_cancelling(link: Any, trainer: jobs.Trainer) -> None:
    running, waiting = (trainer.add(link, name, load_trait("mood")) for name in ("a", "b"))
    trainer.cancel()
    finish(trainer)
    assert (running.state, waiting.state) == ("cancelled", "cancelled")
    assert link.library.list(IDENTITY) == []


@pytest.mark.parametrize("fault", [SteerError("the server is gone"), KeyError("a bug")])
def test_a_failure_is_told_and_the_next_one_goes_on(link: Any, trainer: jobs.Trainer, fault: Exception) -> None:
    Training.fault = fault
    job = trainer.add(link, "a", load_trait("mood"))
    finish(trainer)
    assert job.state == "failed" and str(fault) in job.error
    Training.fault = None
    job = trainer.add(link, "b", load_trait("mood"))
    finish(trainer)
    assert job.state == "done"


def test_the_share_never_says_too_much(link: Any) -> None:
    job = jobs.TrainJob("a", load_trait("mood"), "quick", False, link, total=10, tokens=50)
    assert job.share == 0.99
    job.state = "done"
    assert job.share == 1.0


def test_descriptions_become_a_trait() -> None:
    trait = jobs.trait_of("kind", "warm and kind\n\nfriendly", "cold\nhostile", 12)
    assert len(trait.train_prompts) == 12 and len(trait.heldout_prompts) == jobs.N_HELDOUT
    assert not set(trait.train_prompts) & set(trait.heldout_prompts)
    assert trait.poles == {"positive": "warm and kind", "negative": "cold"}
    pairs = trait.system_pairs
    assert len(pairs) == 4 and "warm and kind" in pairs[0][0] and "cold" in pairs[0][1] and "friendly" in pairs[-1][0]
    assert trait == jobs.trait_of("kind", "warm and kind\nfriendly", "cold\nhostile", 12)
    assert jobs.max_prompts() >= 100


@pytest.mark.parametrize(
    ("positive", "negative", "named"),
    [("", "b", "positive box is empty"), ("a", " \n ", "negative box is empty"), ("a\nb", "c", "line 1 goes with line 1")],
)
def test_wrong_boxes_are_named(positive: str, negative: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        jobs.trait_of("kind", positive, negative, 8)
    with pytest.raises(DataError, match=named):
        jobs.pairs_of(positive, negative)


def test_prompt_lists_become_pairs() -> None:
    data = jobs.pairs_of("a\nb", "c\nd")
    assert len(data.pairs) == 2
    assert [m["content"] for pair in data.pairs for side in (pair.positive, pair.negative) for m in side.prompt] == list("acbd")
    assert data.sha256 == jobs.pairs_of("a\n\n b", "c\nd").sha256 != jobs.pairs_of("a\nb", "c\ne").sha256


# ---- pictures ----

REPORT = {"layers": [{"layer": il, "separation": il / 3, "ordered": 0.5 + il / 20} for il in range(8)]}
CALIBRATION = {
    "objective": {"kind": "metric", "name": "mood <b>", "unit": "score"},
    "curve": [{"strength": s, "score": s / 2} for s in (-1.0, 0.0, 1.0)],
    "plain": {"perplexity": 2.0},
    "rows": [{"stage": "curve", "strength": s, "perplexity": 2.0 + s * s} for s in (-1.0, 0.0, 1.0)]
    + [{"stage": "search", "strength": 1.0, "perplexity": 9.0}, {"stage": "curve", "strength": 0.5, "perplexity": None}],
    "guard": {"perplexity_ratio": 1.5},
    "effect": 1.0,
    "effect_se": 0.05,
}


def test_charts_are_well_formed_and_show_each_point() -> None:
    fitted = vector(provenance={"report": REPORT}, calibration=CALIBRATION)
    for drawn, n in ((charts.report_chart(fitted), 16), (charts.curve_chart(fitted), 6)):
        root = ElementTree.fromstring(drawn)
        assert len(root.findall(".//circle")) == n
        for circle in root.iter("circle"):
            assert 0 <= float(circle.get("cx", "")) <= svg.WIDTH and 0 <= float(circle.get("cy", "")) <= svg.HEIGHT
    assert "mood &lt;b&gt;" in charts.curve_chart(fitted) and "<b>" not in charts.curve_chart(fitted)
    assert "± 0.05" in charts.summary(fitted)


@pytest.mark.parametrize("report", [None, 3, {"layers": 4}, {"layers": [{"layer": "x"}]}, {"layers": []}])
def test_vectors_without_a_report_have_no_picture(report: Any) -> None:
    plain = vector(provenance={"report": report}, calibration={"curve": 3})
    assert charts.report_chart(plain) == charts.curve_chart(plain) == ""
    assert charts.summary(vector()).endswith("strength 1 is a guess.")


def test_a_flat_line_can_be_drawn() -> None:
    drawn = svg.lines([svg.Series("s", [(1.0, 2.0)])], label="t", x_label="x")
    assert ElementTree.fromstring(drawn) is not None


def test_the_queue_has_an_end(link: Any, trainer: jobs.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_JOBS", 2)
    monkeypatch.setattr(trainer, "_worker", threading.current_thread())  # busy elsewhere: everything waits
    for name in ("one", "two"):
        trainer.add(link, name, jobs.pairs_of("a", "b"))
    with pytest.raises(SpecError, match="2 vectors wait"):
        trainer.add(link, "three", jobs.pairs_of("a", "b"))
