"""``steer bench control``: prompting against steering, on tasks that a program can score, with no judge model.

For each trait and family of tasks the arms (:mod:`.arms`) answer the same prompts. A reply gets three parts between 0 and
1: *trait* ((1 + metric) / 2), *task* (the family's success) and *fluency*; its score is their harmonic mean, so that one broken
part breaks it (AxBench). The strength is chosen on one half of the prompts and everything that is reported is measured on
the other. Everything is drawn from one seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..calibrate import perplexity
from ..engine.base import Engine, GenerateRequest, Generation, Prompt
from ..metrics import repeated_ngram_share
from ..steering import Steering
from .arms import Case, is_steered, message
from .stats import Estimate, estimate, harmonic_mean, paired, spearman
from .tasks import Family, Scored, Task, data_lines, read_choices

FLOOR = 0.05
"""A family whose plain replies succeed less often than this is beyond the model: a "floor" and no number."""
GUARD = 1.5
"""Replies whose perplexity is at most so many times the plain median count as fluent (the guard of the calibration)."""
CURVE = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)

Report = Callable[[str, int], None]
"""Called with what is being done and the number of texts that were done."""


@dataclass(frozen=True)
class Plan:
    """How much to run. ``prompts``: of each family, half of them to choose the strength; ``strengths``: those to choose from.

    ``curve``: strengths of the dose-response curve; ``curve_prompts``: prompts of each point. ``sampled``: seeded sampling
    beside greedy runs. ``conversations`` of ``turns`` turns; ``choices`` and ``neutral``: questions for side effects.
    ``pairs``: examples for the vector with shuffled labels, None for all.
    """

    prompts: int = 60
    strengths: tuple[float, ...] = (0.5, 0.75, 1.0)
    curve: tuple[float, ...] = CURVE
    curve_prompts: int = 20
    sampled: bool = True
    temperature: float = 0.7
    conversations: int = 4
    turns: int = 6
    choices: int = 40
    neutral: int = 16
    pairs: int | None = None
    seed: int = 0
    run_code: bool = False


QUICK = Plan(
    prompts=8,
    strengths=(0.5, 1.0),
    curve=(-1.0, -0.66, -0.33, 0.0, 0.33, 0.66, 1.0),
    curve_prompts=3,
    conversations=1,
    turns=3,
    choices=10,
    neutral=4,
    pairs=10,
)
"""For a look, and for CI: the numbers mean little."""


@dataclass
class Results:
    """What a run found: ``rows``, one for each reply and question, and ``summary``; JSON values only."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ask:
    """One reply that is wanted."""

    family: Family
    task: Task
    arm: str
    strength: float
    decoding: str
    half: str


class Control:
    """One run of the benchmark: :meth:`run` returns its results.

    Raises what the engine raises; nothing is written.
    """

    def __init__(
        self, engine: Engine, cases: Sequence[Case], families: Sequence[Family], plan: Plan, report: Report | None = None
    ) -> None:
        self.engine, self.cases, self.families, self.plan = engine, list(cases), list(families), plan
        self._report = report or (lambda stage, n: None)
        self._replies: dict[Any, tuple[Generation, float | None]] = {}
        self._scored: dict[tuple[str, str, str], Scored] = {}
        self._plain_perplexity: dict[tuple[str, str], float] = {}
        self.results = Results()

    def run(self) -> Results:
        """Everything, trait by trait."""
        floors = {family.name: self._floor(family) for family in self.families}
        traits = {}
        for case in self.cases:
            traits[case.name] = self._case(case, floors)
        self.results.summary = {
            "families": {f.name: {"success": f.success, "tasks": len(f.tasks), "plain": floors[f.name]} for f in self.families},
            "traits": traits,
        }
        return self.results

    # ---- prompts ----

    def halves(self, family: Family) -> tuple[list[Task], list[Task]]:
        """The tasks to choose the strength on, and those to score: disjoint, drawn with the seed."""
        order = np.random.default_rng(self.plan.seed).permutation(len(family.tasks))[: max(2, self.plan.prompts)]
        middle = len(order) // 2
        first, second = ([family.tasks[i] for i in sorted(part)] for part in (order[:middle], order[middle:]))
        return first, second

    # ---- replies ----

    def _answer(self, case: Case | None, asks: Sequence[_Ask], stage: str) -> list[dict[str, Any]]:
        """A row for each wanted reply. What was generated before is not generated again."""
        self._generate(case, asks, stage)
        rows = [self._row(case, ask) for ask in asks]
        return rows

    def _key(self, case: Case | None, ask: _Ask) -> Any:
        who = None if case is None or ask.arm == "plain" else (case.name, ask.arm)
        strength = ask.strength if is_steered(ask.arm) else 0.0
        return ask.family.name, ask.task.id, who, strength, ask.decoding

    def _prompt(self, case: Case | None, ask: _Ask) -> Prompt:
        return message(self.engine, ask.task.prompt, None if case is None else case.system(ask.arm))

    def _request(self, case: Case | None, ask: _Ask) -> GenerateRequest:
        steering = Steering() if case is None else case.steering(ask.arm, ask.strength)
        sampled = ask.decoding == "sampled"
        # the same seed for all arms of a task: the runs are paired
        seed = self.plan.seed * 1_000_003 + ask.family.tasks.index(ask.task)
        temperature = self.plan.temperature if sampled else 0.0
        return GenerateRequest(
            self._prompt(case, ask), steering, max_tokens=ask.family.max_tokens, temperature=temperature, seed=seed
        )

    def _generate(self, case: Case | None, asks: Sequence[_Ask], stage: str) -> None:
        missing = {self._key(case, ask): ask for ask in asks if self._key(case, ask) not in self._replies}
        if not missing:
            return
        replies = self.engine.generate_many([self._request(case, ask) for ask in missing.values()])
        plain = [message(self.engine, ask.task.prompt, None) for ask in missing.values()]
        there = [i for i, reply in enumerate(replies) if reply.tokens]
        scored = self.engine.logprobs([(plain[i], replies[i].tokens) for i in there]) if there else []
        values = dict(zip(there, (perplexity(found) for found in scored), strict=True))
        for i, (key, reply) in enumerate(zip(missing, replies, strict=True)):
            self._replies[key] = (reply, values.get(i))
        self._report(stage, len(missing))

    def _row(self, case: Case | None, ask: _Ask) -> dict[str, Any]:
        reply, ppl = self._replies[self._key(case, ask)]
        seen = ask.family.name, ask.task.id, reply.text
        if seen not in self._scored:  # running code takes its time
            self._scored[seen] = ask.family.score(ask.task, reply.text, self.plan.run_code)
        scored = self._scored[seen]
        repeats = repeated_ngram_share(reply.tokens)
        fluency = self._fluency(ask, ppl, repeats)
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
            row["score"] = harmonic_mean([(1 + row["metric"]) / 2, scored.success, fluency])
        return row

    def _fluency(self, ask: _Ask, ppl: float | None, repeats: float) -> float:
        """1 up to :data:`GUARD` times the plain median perplexity, then falling as its inverse; less what is repeated."""
        usual = self._plain_perplexity.get((ask.family.name, ask.decoding))
        if ppl is None:
            return 0.0
        ratio = 1.0 if usual is None else ppl / usual
        return min(1.0, GUARD / ratio) * (1.0 - repeats)

    # ---- stages ----

    @property
    def _decodings(self) -> tuple[str, ...]:
        return ("greedy", "sampled") if self.plan.sampled else ("greedy",)

    def _floor(self, family: Family) -> dict[str, Any]:
        """The plain arm of all prompts, which says whether the model can do these tasks at all."""
        choose, score = self.halves(family)
        for decoding in self._decodings:
            asks = [_Ask(family, task, "plain", 0.0, decoding, "all") for task in choose + score]
            self._generate(None, asks, f"plain {family.name}")
            known = [value for ask in asks if (value := self._replies[self._key(None, ask)][1]) is not None]
            if known:
                self._plain_perplexity[family.name, decoding] = statistics.median(known)
            if decoding == "greedy":
                successes = [self._row(None, ask)["success"] for ask in asks]
        found = estimate(successes, self.plan.seed)
        return {"success": found.to_list(), "floor": found.mean is None or found.mean < FLOOR}

    def _case(self, case: Case, floors: dict[str, Any]) -> dict[str, Any]:
        families = [f for f in self.families if not f.traits or case.name in f.traits]
        found = {family.name: self._family(case, family, floors[family.name]["floor"]) for family in families}
        chosen = [part["strength"]["steer"] for part in found.values()]
        strongest = max(chosen, default=1.0)
        return {
            "pole": case.pole,
            "sign": case.sign,
            "vector": case.vector.content_hash,
            "families": found,
            "dose": self._dose(case, families),
            "persistence": self._persistence(case, strongest),
            "side_effects": {"strength": strongest, **self._side_effects(case, strongest)},
        }

    def _family(self, case: Case, family: Family, floor: bool) -> dict[str, Any]:
        choose, score = self.halves(family)
        strengths = {arm: self._choose(case, family, choose, arm) for arm in ("steer", "both")}
        strengths |= {arm: strengths["steer"] for arm in ("random", "shuffled")}
        arms: dict[str, dict[str, Any]] = {}
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for decoding in self._decodings:
            asks = [_Ask(family, t, arm, strengths.get(arm, 0.0), decoding, "score") for arm in case.arms for t in score]
            for row in self._answer(case, asks, f"{case.name}, {family.name}"):
                rows.setdefault((row["arm"], decoding), []).append(row)
                self.results.rows.append(row)
        for (arm, decoding), found in rows.items():
            arms.setdefault(arm, {})[decoding] = self._arm(found, rows["plain", decoding])
        return {
            "floor": floor,
            "strength": {arm: strengths[arm] for arm in ("steer", "both")},
            "arms": arms,
            "versus": {d: _versus(rows, d, self.plan.seed) for d in self._decodings},
        }

    def _choose(self, case: Case, family: Family, tasks: Sequence[Task], arm: str) -> float:
        """The strength with the best mean score on these prompts; of equal ones the smallest."""
        asks = [_Ask(family, task, arm, s, "greedy", "choose") for s in self.plan.strengths for task in tasks]
        rows = self._answer(case, asks, f"{case.name}, {family.name}: strength")
        self.results.rows += rows
        means = {s: statistics.fmean(r["score"] for r in rows if r["strength"] == s) for s in sorted(self.plan.strengths)}
        return max(means, key=lambda s: means[s])

    def _arm(self, rows: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Means with intervals, of an arm on the scored half."""
        seed = self.plan.seed
        names = {"metric": "metric", "success": "success", "fluency": "fluency", "score": "score", "repeats": "repeats"}
        found = {name: estimate([row[key] for row in rows], seed).to_list() for name, key in names.items()}
        found["effect"] = paired([r["metric"] for r in rows], [r["metric"] for r in plain], seed).to_list()
        extra = [r["prompt_tokens"] - p["prompt_tokens"] for r, p in zip(rows, plain, strict=True)]
        found["context_tokens"] = estimate(extra, seed).to_list()
        known = [row["perplexity"] for row in rows if row["perplexity"] is not None]
        measures = {name: estimate([r["measures"][name] for r in rows], seed).to_list() for name in rows[0]["measures"]}
        return {**found, "perplexity": statistics.median(known) if known else None, "measures": measures}

    def _dose(self, case: Case, families: Sequence[Family]) -> dict[str, Any]:
        """The metric over strengths, towards the positive pole, on prompts of the last family; and random vectors at +-1."""
        if not families:
            return {"points": [], "spearman": None}
        family = families[-1]
        tasks = self.halves(family)[1][: self.plan.curve_prompts]
        stage = f"{case.name}: dose"

        def rows(arm: str, strength: float) -> list[dict[str, Any]]:
            asks = [_Ask(family, task, arm, case.sign * strength, "greedy", "score") for task in tasks]
            found = self._answer(case, asks, stage)
            self.results.rows += [{**row, "kind": "dose"} for row in found]
            return found

        zero = rows("steer", 0.0)
        points: list[dict[str, Any]] = []
        for strength in sorted({*self.plan.curve, -1.0, 1.0}):
            found = zero if strength == 0.0 else rows("steer", strength)
            known = [row["perplexity"] for row in found if row["perplexity"] is not None]
            usual = self._plain_perplexity.get((family.name, "greedy"))
            points.append(
                {
                    "strength": strength,
                    "metric": estimate([case.sign * row["metric"] for row in found], self.plan.seed).to_list(),
                    "effect": self._effect(case, found, zero).to_list(),
                    "perplexity": statistics.median(known) / usual if known and usual else None,
                    "repeats": statistics.fmean(row["repeats"] for row in found),
                }
            )
        effects = {}
        for strength in (-1.0, 1.0):
            own = self._effect(case, rows("steer", strength), zero)
            random = self._effect(case, *self._pooled([rows(arm, strength) for arm in case.random_arms], zero))
            effects[f"{strength:+g}"] = {
                "effect": own.to_list(),
                "random": random.to_list(),
                "excludes_zero": own.excludes_zero,
                "times_random": abs(own.mean / random.mean) if own.mean is not None and random.mean else None,
            }
        rank = spearman([p["strength"] for p in points], [p["metric"][0] for p in points])
        return {"family": family.name, "points": points, "spearman": rank, "full": effects}

    @staticmethod
    def _pooled(runs: Sequence[Sequence[dict[str, Any]]], zero: Sequence[dict[str, Any]]) -> tuple[list[Any], Sequence[Any]]:
        """One row for each prompt, with the mean metric of several runs."""
        return [{"metric": statistics.fmean(row["metric"] for row in same)} for same in zip(*runs, strict=True)], zero

    def _effect(self, case: Case, rows: Sequence[dict[str, Any]], zero: Sequence[dict[str, Any]]) -> Estimate:
        return paired([case.sign * r["metric"] for r in rows], [case.sign * r["metric"] for r in zero], self.plan.seed)

    def _persistence(self, case: Case, strength: float) -> dict[str, Any]:
        """The metric at each turn of conversations whose system prompt stands at the beginning alone."""
        arms = ("plain", "prompt", "steer", "both")
        questions = [line.partition(" @ ")[0] for line in data_lines("style.txt")]
        order = np.random.default_rng(self.plan.seed + 1).permutation(len(questions))
        turns: dict[str, list[list[float]]] = {arm: [] for arm in arms}
        histories: dict[tuple[str, int], list[dict[str, str]]] = {
            (arm, c): [] for arm in arms for c in range(self.plan.conversations)
        }
        longest = 48
        for turn in range(self.plan.turns):
            asked = [str(questions[order[(c * self.plan.turns + turn) % len(order)]]) for c in range(self.plan.conversations)]
            keys = [key for key, history in histories.items() if self._fits(case, key[0], asked[key[1]], history, longest)]
            requests = [
                GenerateRequest(
                    message(self.engine, asked[c], case.system(arm), histories[arm, c]),
                    case.steering(arm, strength),
                    max_tokens=longest,
                )
                for arm, c in keys
            ]
            if not requests:
                break
            replies = self.engine.generate_many(requests)
            for arm in arms:
                turns[arm].append([])
            for (arm, c), reply in zip(keys, replies, strict=True):
                said = [{"role": "user", "content": asked[c]}, {"role": "assistant", "content": reply.text}]
                histories[arm, c] += said
                value = case.score(reply.text)
                turns[arm][turn].append(value)
                row = {"kind": "turn", "trait": case.name, "arm": arm, "conversation": c, "turn": turn, "text": reply.text}
                self.results.rows.append({**row, "metric": value})
            self._report(f"{case.name}: conversation", len(requests))
        return {arm: [estimate(values, self.plan.seed).to_list() for values in found] for arm, found in turns.items()}

    def _fits(self, case: Case, arm: str, text: str, history: list[dict[str, str]], longest: int) -> bool:
        prompt = message(self.engine, text, case.system(arm), history)
        return len(self.engine.tokenize(prompt)) + longest < self.engine.info.n_ctx

    def _side_effects(self, case: Case, strength: float) -> dict[str, Any]:
        """Multiple choice by log-probability, and how far neutral replies become less likely, for each arm."""
        questions = read_choices()[: self.plan.choices]
        neutral = self._neutral()
        right: dict[str, list[float]] = {}
        found: dict[str, Any] = {}
        for arm in ("plain", "prompt", "strong prompt", "steer", "both", "random"):
            system, steering = case.system(arm), case.steering(arm, strength)
            items = [
                (message(self.engine, f"Complete the sentence: {start} ...", system), f"{start} {ending}.")
                for start, endings in questions
                for ending in endings
            ]
            # of whole sentences: a chat model says them again, and what they share cancels
            sums = [float(values.sum()) for values in self.engine.logprobs(items, steering=steering)]
            right[arm] = []
            for start, endings in questions:
                scores, sums = sums[: len(endings)], sums[len(endings) :]
                right[arm].append(float(int(np.argmax(scores)) == 0))
                self.results.rows.append(
                    {"kind": "choice", "trait": case.name, "arm": arm, "question": start, "right": right[arm][-1]}
                )
            part = {"accuracy": estimate(right[arm], self.plan.seed).to_list()}
            part["accuracy_change"] = paired(right[arm], right["plain"], self.plan.seed).to_list()
            if neutral and arm != "plain":
                moved = self.engine.logprobs(
                    [(message(self.engine, text, system), tokens) for text, tokens, _ in neutral], steering=steering
                )
                kl = [float(np.mean(plain - other)) for (_, _, plain), other in zip(neutral, moved, strict=True)]
                part["kl"] = estimate(kl, self.plan.seed).to_list()
            found[arm] = part
            self._report(f"{case.name}: side effects", len(items))
        return found

    def _neutral(self) -> list[tuple[str, list[int], Any]]:
        """Neutral requests, replies drawn from the plain model as it is, and their log-probabilities there."""
        if not hasattr(self, "_neutral_found"):
            texts = data_lines("neutral.txt")[: self.plan.neutral]
            prompts = [message(self.engine, text, None) for text in texts]
            replies = self.engine.generate_many(
                [
                    GenerateRequest(p, max_tokens=32, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=self.plan.seed + i)
                    for i, p in enumerate(prompts)
                ]
            )
            there = [(t, p, r.tokens) for t, p, r in zip(texts, prompts, replies, strict=True) if r.tokens]
            plain = self.engine.logprobs([(p, tokens) for _, p, tokens in there]) if there else []
            self._neutral_found = [(t, tokens, values) for (t, _, tokens), values in zip(there, plain, strict=True)]
        return self._neutral_found


def _versus(rows: dict[tuple[str, str], list[dict[str, Any]]], decoding: str, seed: int) -> dict[str, Any]:
    """Differences of scores on the same prompts. The better of the two prompts is taken after the fact, in its favour."""

    def scores(arm: str) -> list[float]:
        return [row["score"] for row in rows[arm, decoding]]

    best = max(("prompt", "strong prompt"), key=lambda arm: statistics.fmean(scores(arm)))
    found: dict[str, Any] = {"best prompt": best}
    for arm in ("steer", "both", "random"):
        found[f"{arm} - prompt"] = paired(scores(arm), scores(best), seed).to_list()
    found["steer - plain"] = paired(scores("steer"), scores("plain"), seed).to_list()
    return found
