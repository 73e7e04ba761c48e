"""The replies of ``steer bench control``: asked for once, kept, and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.base import Engine, GenerateRequest, Generation, Prompt
from ..metrics import repeated_ngram_share, reply_tokens
from ..steering.terms import Steering
from ..training.calibrate import mean_perplexity, perplexity
from .arms import Case, is_steered, message
from .plan import ControlPlan
from .stats import harmonic_mean
from .tasks import Family, Scored, Task

GUARD = 1.5
"""Replies whose perplexity is at most so many times the plain one count as fluent."""
SCORED_TOKENS = 64
"""The perplexity of a reply is that of its beginning: a model that goes in circles finds the rest easy, and what is repeated
counts anyway."""

Report = Callable[[str, int], None]
"""Called with what is being done and the number of texts that were done."""


@dataclass(frozen=True)
class Ask:
    """One reply that is wanted. ``fluent``: whether its fluency is, which costs another pass."""

    family: Family
    task: Task
    arm: str
    strength: float
    decoding: str
    half: str
    max_tokens: int
    fluent: bool = True


class Replies:
    """Asks an engine for the replies of all arms, each once, and scores them."""

    def __init__(self, engine: Engine, plan: ControlPlan, report: Report) -> None:
        self.engine, self.plan = engine, plan
        self._report = report
        self._replies: dict[Any, Generation] = {}
        self._perplexity: dict[Any, float | None] = {}
        self._scored: dict[tuple[str, str, str], Scored] = {}
        self._plain_perplexity: dict[tuple[str, str, int], float | None] = {}

    # ---- prompts ----

    def halves(self, family: Family) -> tuple[list[Task], list[Task]]:
        """The tasks to choose the strength on, and those to score: disjoint, drawn with the seed."""
        order = np.random.default_rng(self.plan.seed).permutation(len(family.tasks))[: max(2, self.plan.prompts)]
        middle = len(order) // 2
        first, second = ([family.tasks[i] for i in sorted(part)] for part in (order[:middle], order[middle:]))
        return first, second

    # ---- replies ----

    def answer(self, case: Case | None, asks: Sequence[Ask], stage: str) -> list[dict[str, Any]]:
        """A row for each wanted reply. What was generated before is not generated again."""
        self._generate(case, asks, stage)
        rows = [self.row(case, ask) for ask in asks]
        return rows

    def _key(self, case: Case | None, ask: Ask) -> Any:
        strength = ask.strength if is_steered(ask.arm) else 0.0
        plain = case is None or case.system(ask.arm) is None and strength == 0.0
        who = None if plain or case is None else (case.name, ask.arm)
        return ask.family.name, ask.task.id, who, strength, ask.decoding, ask.max_tokens

    def _prompt(self, case: Case | None, ask: Ask) -> Prompt:
        return message(self.engine, ask.task.prompt, None if case is None else case.system(ask.arm))

    def _request(self, case: Case | None, ask: Ask) -> GenerateRequest:
        steering = Steering() if case is None else case.steering(ask.arm, ask.strength)
        sampled = ask.decoding == "sampled"
        # the same seed for all arms of a task: the runs are paired
        seed = self.plan.seed * 1_000_003 + ask.family.tasks.index(ask.task)
        temperature = self.plan.temperature if sampled else 0.0
        return GenerateRequest(self._prompt(case, ask), steering, max_tokens=ask.max_tokens, temperature=temperature, seed=seed)

    def _generate(self, case: Case | None, asks: Sequence[Ask], stage: str) -> None:
        wanted = [(self._key(case, ask), ask) for ask in asks]
        missing = {key: ask for key, ask in wanted if key not in self._replies}
        if missing:
            replies = self.engine.generate_many([self._request(case, ask) for ask in missing.values()])
            self._replies.update(zip(missing, replies, strict=True))
            self._report(stage, len(missing))
        unscored = {key: ask for key, ask in wanted if ask.fluent and key not in self._perplexity}
        self._perplexity |= {key: None for key in unscored if not self._replies[key].tokens}
        there = [key for key in unscored if self._replies[key].tokens]
        if there:
            plain = [message(self.engine, unscored[key].task.prompt, None) for key in there]
            begun = [self._replies[key].tokens[:SCORED_TOKENS] for key in there]
            found = self.engine.logprobs(list(zip(plain, begun, strict=True)))
            self._perplexity.update(zip(there, map(perplexity, found), strict=True))

    def row(self, case: Case | None, ask: Ask) -> dict[str, Any]:
        key = self._key(case, ask)
        reply, ppl = self._replies[key], self._perplexity.get(key)
        seen = ask.family.name, ask.task.id, reply.text
        if seen not in self._scored:  # running code takes its time
            self._scored[seen] = ask.family.score(ask.task, reply.text, self.plan.run_code)
        scored = self._scored[seen]
        repeats = repeated_ngram_share(reply.tokens)
        fluency = self._fluency(ask, ppl, repeats) if ask.fluent else None
        row: dict[str, Any] = {
            "kind": "reply",
            "trait": None if case is None else case.name,
            "family": ask.family.name,
            "task": ask.task.id,
            "half": ask.half,
            "arm": ask.arm,
            "strength": ask.strength if is_steered(ask.arm) else 0.0,
            "decoding": ask.decoding,
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "tokens": len(reply.tokens),
            "prompt_tokens": len(reply.prompt_tokens),
            "perplexity": ppl,
            "repeats": repeats,
            "success": scored.success,
            "fluency": fluency,
            "measures": scored.measures,
        }
        if case is not None:
            row["metric"] = case.score(reply.text)
            row["score"] = None if fluency is None else harmonic_mean([(1 + row["metric"]) / 2, scored.success, fluency])
        return row

    def _fluency(self, ask: Ask, ppl: float | None, repeats: float) -> float:
        """1 up to :data:`GUARD` times the plain perplexity, then falling as its inverse; less what is repeated."""
        usual = self._usual(ask)
        if ppl is None:
            return 0.0
        ratio = 1.0 if usual is None else ppl / usual
        return min(1.0, GUARD / ratio) * (1.0 - repeats)

    def _usual(self, ask: Ask) -> float | None:
        """The (geometric) mean perplexity of plain replies of the same kind and length."""
        key = ask.family.name, ask.decoding, ask.max_tokens
        if key not in self._plain_perplexity:
            tasks = [task for half in self.used(ask.family, ask.decoding) for task in half]
            asks = [Ask(ask.family, task, "plain", 0.0, ask.decoding, "all", ask.max_tokens) for task in tasks]
            self._generate(None, asks, f"plain {ask.family.name}")
            self._plain_perplexity[key] = mean_perplexity(self._perplexity[self._key(None, one)] for one in asks)
        return self._plain_perplexity[key]

    def used(self, family: Family, decoding: str) -> tuple[list[Task], list[Task]]:
        """Those of both halves that the arms answer; fewer are sampled."""
        choose, score = self.halves(family)
        score = score[: self.plan.score_prompts]
        if decoding == "sampled":
            return [], score[: self.plan.sampled_prompts]
        return choose[: self.plan.choose_prompts], score

    def longest(self, case: Case | None, family: Family) -> int:
        """Tokens of the longest reply; of plain ones if there is no case."""
        longest = family.max_tokens
        if case is not None and family.stretch:
            longest = reply_tokens(case.metric, longest)
        return longest if self.plan.max_tokens is None else min(longest, self.plan.max_tokens)
