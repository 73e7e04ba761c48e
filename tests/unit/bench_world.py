"""An engine whose replies follow rules, a trait and a family of tasks, for the tests of ``steer bench control``."""

from __future__ import annotations

from typing import Any

import numpy as np

from steer_plugins.bench.arms import Case, random_vector
from steer_plugins.bench.control import Control, ControlPlan, Results
from steer_plugins.bench.tasks import Family, Scored, Task
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.training.traits import Trait

from .fakes import FakeEngine

NOUNS = tuple("tree house river stone cloud bread horse candle garden window".split())
PLAN = ControlPlan(
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


def run(engine: Any = None, plan: ControlPlan = PLAN, **more: Any) -> Results:
    return Control(engine or World(), [case(**more)], [FAMILY], plan).run()


def found(results: Results) -> Any:
    return results.summary["traits"]["glee"]
