"""``steer bench control`` on a real engine: it runs through, and the same seed gives the same report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from steer_plugins.bench.arms import case_of
from steer_plugins.bench.control import Control, ControlPlan
from steer_plugins.bench.report import make_report
from steer_plugins.bench.reporters import builtin_reporters
from steer_plugins.bench.tasks import Scored, builtin_families
from steer_plugins.training.traits import load_trait
from tests.engine.engines import open_engine, vector

pytestmark = pytest.mark.usefixtures("float32_cache")

PLAN = ControlPlan(
    prompts=4,
    strengths=(0.5, 1.0),
    curve=(-1.0, 0.0, 1.0),
    curve_prompts=2,
    conversations=1,
    turns=2,
    choices=2,
    neutral=2,
    pairs=4,
    temperature=1.0,
)


def test_the_same_seed_gives_the_same_report(tiny: Callable[..., Path]) -> None:
    style = next(f for f in builtin_families() if f.name == "style")
    # a random model says nothing to the point, and below the floor no arm would be run
    families = [replace(style, max_tokens=8, score=lambda task, reply, run_code: Scored(1.0))]
    made = []
    for _ in range(2):
        with open_engine(tiny("llama"), n_ctx=1024) as engine:
            case = case_of(engine, load_trait("mood"), vector(engine, scope="response"), seed=0, n_pairs=PLAN.pairs)
            assert case.shuffled is not None
            report = make_report(engine, [case], families, PLAN, Control(engine, [case], families, PLAN).run(), ["steer"])
            made.append({name: reporter(report) for name, reporter in builtin_reporters().items()})
    assert made[0] == made[1]
    texts = {row["arm"]: row["text"] for row in report.rows if row["kind"] == "reply" and row["decoding"] == "greedy"}
    assert len(set(texts.values())) > 1 and all(
        "kl" in v for a, v in report.summary["traits"]["mood"]["side_effects"].items() if a == "steer"
    )
