"""How long fitting takes, from a loaded model to directions at all layers but the last, against repeng on the same pairs.

Both sides take turns on the same number of threads. steer-plugins also takes norms and makes its report; nothing is calibrated.
Two kinds of pairs, since much depends on what the texts have in common: ``openings`` are cut statements under two personas, as in
repeng's own examples; ``prompts`` are different prompts under different system prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from steer_plugins.bench.costs import Costs, Measure, name_by_processor
from steer_plugins.engine.base import Progress
from steer_plugins.engine.chat import ChatTemplate

from .against_repeng import Repeng

Pairs = list[tuple[str, str]]
OURS, THEIRS = "steer train", "repeng"
MEASURES = tuple(
    Measure(name, "s", THEIRS, about)
    for data, what in (
        ("openings", "cut openings under two personas"),
        ("prompts", "different prompts under different system prompts"),
    )
    for name, about in (
        (f"train, {data}", f"Fitting {what}."),
        (name_by_processor(f"train, {data}"), "The same in processor seconds, which a busy machine disturbs less."),
    )
)
ARMS = {OURS: "steer train, mean difference without calibration", THEIRS: "repeng's training with its defaults"}
STATEMENTS = (
    "The train left the station a little after noon and went along the river for most of the way",
    "My neighbour keeps bees behind the old garage and gives every family in the street a jar of honey",
    "There are three ways to get to the library and the shortest of them leads through the market",
    "Last week we painted the kitchen and put up the shelves that my brother had made in the spring",
    "People who work at night often say that the city sounds like a different place after two",
    "It takes about an hour to walk around the lake if you do not stop to look at the boats",
)


def prompt_pairs(count: int, template: ChatTemplate | None = None) -> Pairs:
    """Prompts of the trait ``mood`` under each of its system prompts, in the model's chat format where it has one."""
    from steer_plugins.training.traits import load_trait

    trait = load_trait("mood")
    found = [
        (_text(template, prompt, "", positive), _text(template, prompt, "", negative))
        for prompt in (*trait.train_prompts, *trait.heldout_prompts)
        for positive, negative in trait.system_pairs
    ]
    return found[:count]


def opening_pairs(count: int, template: ChatTemplate | None = None) -> Pairs:
    """Statements, cut after each word, as replies under two personas."""

    def text(persona: str, words: list[str]) -> str:
        ask = f"Pretend you are an extremely {persona} person who makes statements about the world."
        return _text(template, ask, " ".join(words))

    cut = [statement.split()[:n] for statement in STATEMENTS for n in range(1, len(statement.split()) + 1)]
    return [(text("happy", words), text("sad", words)) for words in cut[:count]]


def _text(template: ChatTemplate | None, user: str, reply: str, system: str = "") -> str:
    """What a model sees of a system prompt, a question and the beginning of a reply; a plain text where it has no template."""
    if template is None:
        return "\n\n".join(part for part in (system, user, reply) if part)
    question = {"role": "user", "content": user}
    messages = [{"role": "system", "content": system}, question] if system else [question]
    return template.render(messages) + reply


DATA: dict[str, Callable[[int, ChatTemplate | None], Pairs]] = {"openings": opening_pairs, "prompts": prompt_pairs}


def bench_fitting(
    costs: Costs,
    model: Path,
    repeng: Repeng,
    *,
    template: ChatTemplate | None = None,
    data: Sequence[str] = ("openings", "prompts"),
    method: str = "mean_difference",
    n_threads: int = 1,
    n_gpu_layers: int = 0,
    pairs: int = 100,
    rounds: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Time both sides on both kinds of pairs, in turn, and add what is found to ``costs``.

    Args:
        costs: of the same run; gets the measures of :data:`MEASURES`.
        template: the model's, for the texts.
        data: which kinds of pairs, of :data:`DATA`.
        method: of ours; repeng's is its default.
        pairs: of each kind; fewer where there are not so many.
        rounds: turns of each side.
        progress: called with (turns done, all turns).

    Raises:
        DataError: repeng fails. EngineError: the model cannot be read.
    """
    from steer_plugins.engine.local import LocalEngine
    from steer_plugins.training.extract import ContrastData, Pair, Side
    from steer_plugins.training.train import Training, TrainOptions

    rng = np.random.default_rng(seed)
    with LocalEngine(model, n_threads=n_threads, n_gpu_layers=n_gpu_layers, n_parallel=12) as engine:
        texts = {name: DATA[name](pairs, template) for name in data}

        def ours(pairs: Pairs) -> tuple[float, float]:
            contrasts = ContrastData("pairs", tuple(Pair(Side(p), Side(n)) for p, n in pairs), "0" * 64)
            options = TrainOptions(method=method, calibrate="none", positions="last")
            training = Training(engine, "bench", contrasts, options)
            start, cpu = time.perf_counter(), time.process_time()
            training.run()
            return time.perf_counter() - start, time.process_time() - cpu

        sides = {OURS: ours, THEIRS: repeng.train}
        done, total = 0, rounds * len(texts) * len(sides)
        ours(texts[data[0]][:2])  # makes the context
        for round_ in range(rounds):
            for name, examples in texts.items():
                for i in rng.permutation(len(sides)):
                    side = list(sides)[i]
                    clock, cpu = sides[side](examples)
                    costs.add(round_, f"train, {name}", side, clock)
                    costs.add(round_, name_by_processor(f"train, {name}"), side, cpu)
                    done += 1
                    if progress is not None:
                        progress(done, total)
    costs.measures += MEASURES
    costs.arms = {**costs.arms, **{arm: about for arm, about in ARMS.items() if arm not in costs.arms}}
    costs.plan |= {"pairs": {name: len(examples) for name, examples in texts.items()}, "fit_rounds": rounds}
