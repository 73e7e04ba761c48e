"""``steer bench control``: prompting against steering, on tasks that a program can score, with no judge model.

For each trait and family of tasks the arms (:mod:`.arms`) answer the same prompts. A reply gets three parts between 0 and
1: *trait* ((1 + metric) / 2), *task* (the family's success) and *fluency*; its score is their harmonic mean, so that one broken
part breaks it (AxBench). The better of two prompts and the strength are chosen on one half of the prompts and everything that
is reported is measured on the other. Everything is drawn from one seed.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.base import Engine, GenerateRequest, Prompt
from ..training.calibrate import mean_perplexity
from .arms import IDLE, PROMPTS, Case, message
from .plan import QUICK, ControlPlan, Results
from .replies import Ask, Replies, Report
from .stats import Estimate, estimate, paired, spearman
from .tasks import Family, data_lines, read_choices
from .workers import side_by_side

__all__ = ["FLOOR", "QUICK", "SWING", "Control", "ControlPlan", "Results"]

FLOOR = 0.05
"""A family whose plain replies succeed less often than this is beyond the model: a "floor" and no number."""
SWING = "-1 to +1"
"""The key of the effect from full strength at one pole to full strength at the other."""
TURN_TOKENS = 32
"""Longest reply of a conversation."""


class Control(Replies):
    """One run of the benchmark: :meth:`run` returns its results.

    Raises what the engine raises; nothing is written.
    """

    def __init__(
        self,
        engine: Engine,
        cases: Sequence[Case],
        families: Sequence[Family],
        plan: ControlPlan,
        report: Report | None = None,
        helpers: Sequence[Engine] = (),
    ) -> None:
        """``helpers``: more engines of the same model, which take a trait each at the same time. They change no result."""
        super().__init__(engine, plan, report or (lambda stage, n: None))
        self.cases, self.families, self.helpers = list(cases), list(families), list(helpers)
        self._plain: dict[str, Any] = {}  # what all traits share: neutral replies, choices, turns by family
        self.results = Results()

    def run(self) -> Results:
        """Everything: first what the traits share, then trait by trait. Families that fit no trait are left out."""
        talks = {parts[-1].name: (case, parts[-1]) for case in self.cases if (parts := self._families_of(case))}
        self.families = [f for f in self.families if any(f.fits(case.name) for case in self.cases)]
        workers: list[Control] = []
        for engine in (self.engine, *self.helpers):
            worker = copy.copy(self)  # the caches are shared
            worker.engine = engine
            workers.append(worker)
        plain: list[Callable[[Control], Any]] = [
            lambda worker: worker._neutral(),
            lambda worker: worker._choices(worker.cases[0], "plain", 0.0),
        ]
        if self.cases:
            found = side_by_side(workers, lambda worker, job: job(worker), plain)
            self._plain.update(zip(("neutral", "choices"), found, strict=True))
        floors = dict(side_by_side(workers, lambda worker, family: (family.name, worker._floor(family)), self.families))
        turns = side_by_side(workers, lambda worker, talk: worker._conversations(*talk, ("plain",), 0.0)["plain"], talks.values())
        self._plain["turns"] = dict(zip(talks, turns, strict=True))

        def work(worker: Control, case: Case) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            worker.results = Results()
            return worker._case(case, floors), worker.results.rows

        found = side_by_side(workers, work, self.cases, self._length)
        self.results.rows = [row for _, rows in found for row in rows]
        self.results.summary = {
            "families": {f.name: {"success": f.success, "tasks": len(f.tasks), "plain": floors[f.name]} for f in self.families},
            "traits": {case.name: part for case, (part, _) in zip(self.cases, found, strict=True)},
        }
        return self.results

    def _length(self, case: Case) -> int:
        """About how long a case takes, compared with others: tokens of a reply in each of its families."""
        return sum(self.longest(case, family) for family in self._families_of(case))

    # ---- stages ----

    @property
    def _decodings(self) -> tuple[str, ...]:
        return ("greedy", "sampled") if self.plan.sampled else ("greedy",)

    def _floor(self, family: Family) -> dict[str, Any]:
        """The plain arm, which says whether the model can do these tasks at all."""
        choose, score = self.used(family, "greedy")
        asks = [Ask(family, task, "plain", 0.0, "greedy", "all", self.longest(None, family)) for task in choose + score]
        self._generate(None, asks, f"plain {family.name}")
        found = estimate([self.row(None, ask)["success"] for ask in asks], self.plan.seed)
        return {"success": found.to_list(), "floor": found.mean is None or found.mean < FLOOR}

    def _case(self, case: Case, floors: dict[str, Any]) -> dict[str, Any]:
        families = self._families_of(case)
        case = self._with_prompt(case, [family for family in families if not floors[family.name]["floor"]])
        found = {family.name: self._family(case, family, floors[family.name]["floor"]) for family in families}
        chosen = [part["strength"]["steer"] for part in found.values() if not part["floor"]]
        strongest = max(chosen, default=1.0)
        return {
            "pole": case.pole,
            "sign": case.sign,
            "prompt": case.prompted,
            "vector": case.vector.content_hash,
            "families": found,
            "dose": self._dose(case, families),
            "persistence": self._persistence(case, families, strongest),
            "side_effects": {"strength": strongest, **self._side_effects(case, strongest)},
        }

    def _families_of(self, case: Case) -> list[Family]:
        return [family for family in self.families if family.fits(case.name)]

    def _family(self, case: Case, family: Family, floor: bool) -> dict[str, Any]:
        if floor:  # nothing to compare, so nothing is run
            plain = self._replied(case, family, ("plain",), {}, "greedy")
            return {"floor": True, "strength": {}, "arms": {"plain": {"greedy": self._arm(plain, plain)}}, "versus": {}}
        strengths = self._choose(case, family)
        strengths |= {arm: strengths["steer"] for arm in ("random", "shuffled")}
        found: dict[str, dict[str, Any]] = {}
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for decoding in self._decodings:
            ran = [arm for arm in case.arms if decoding == "greedy" or arm not in IDLE]
            for row in self._replied(case, family, ran, strengths, decoding):
                rows.setdefault((row["arm"], decoding), []).append(row)
        for (arm, decoding), part in rows.items():
            found.setdefault(arm, {})[decoding] = self._arm(part, rows["plain", decoding][: len(part)])
        return {
            "floor": False,
            "strength": {arm: strengths[arm] for arm in ("steer", "both")},
            "arms": found,
            "versus": {d: _versus(rows, d, case.prompted, self.plan.seed) for d in self._decodings},
        }

    def _replied(
        self, case: Case, family: Family, arms: Sequence[str], strengths: dict[str, float], decoding: str
    ) -> list[dict[str, Any]]:
        """Rows of the scored half, which go into the results."""
        longest, tasks = self.longest(case, family), self.used(family, decoding)[1]
        asks = [
            Ask(family, task, arm, strengths.get(arm, 0.0), decoding, "score", longest)
            for arm in arms
            for task in (tasks[: self.plan.control_prompts] if arm in IDLE else tasks)
        ]
        rows = self.answer(case, asks, f"{case.name}, {family.name}")
        self.results.rows += rows
        return rows

    def _with_prompt(self, case: Case, families: Sequence[Family]) -> Case:
        """The case with the prompt that has the better mean score over all families; of equal ones the first."""
        scores: dict[str, list[float]] = {arm: [] for arm in PROMPTS}
        for family in families:
            for row in self._chosen_from(case, family, [(arm, 0.0) for arm in PROMPTS], "prompt"):
                scores[row["arm"]].append(row["score"])
        return replace(case, prompted=max(PROMPTS, key=lambda arm: statistics.fmean(scores[arm]))) if families else case

    def _choose(self, case: Case, family: Family) -> dict[str, float]:
        """For ``steer`` and ``both`` the strength with the best mean score; of equal ones the smallest."""
        alone = sorted(self.plan.strengths)
        strengths = {"steer": alone, "both": [self.plan.with_prompt * s for s in alone]}
        rows = self._chosen_from(case, family, [(arm, s) for arm, own in strengths.items() for s in own], "strength")

        def mean(arm: str, strength: float) -> float:
            return statistics.fmean(r["score"] for r in rows if r["arm"] == arm and r["strength"] == strength)

        return {arm: max(own, key=lambda s: mean(arm, s)) for arm, own in strengths.items()}

    def _chosen_from(self, case: Case, family: Family, arms: Sequence[tuple[str, float]], what: str) -> list[dict[str, Any]]:
        """Rows of the half that chooses, for arms at strengths."""
        longest, tasks = self.longest(case, family), self.used(family, "greedy")[0]
        asks = [Ask(family, task, arm, strength, "greedy", "choose", longest) for arm, strength in arms for task in tasks]
        rows = self.answer(case, asks, f"{case.name}, {family.name}: {what}")
        self.results.rows += rows
        return rows

    def _arm(self, rows: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Means with intervals, of an arm on the scored half."""
        seed = self.plan.seed
        names = {"metric": "metric", "success": "success", "fluency": "fluency", "score": "score", "repeats": "repeats"}
        found = {name: estimate([row[key] for row in rows], seed).to_list() for name, key in names.items()}
        found["effect"] = paired([r["metric"] for r in rows], [r["metric"] for r in plain], seed).to_list()
        extra = [r["prompt_tokens"] - p["prompt_tokens"] for r, p in zip(rows, plain, strict=True)]
        found["context_tokens"] = estimate(extra, seed).to_list()
        perplexity = mean_perplexity(row["perplexity"] for row in rows)
        measures = {name: estimate([r["measures"][name] for r in rows], seed).to_list() for name in rows[0]["measures"]}
        return {**found, "perplexity": perplexity, "measures": measures}

    def _dose(self, case: Case, families: Sequence[Family]) -> dict[str, Any]:
        """The metric over strengths, towards the positive pole, on prompts of the last family; and random vectors at +-1."""
        if not families:
            return {"points": [], "spearman": None}
        family = families[-1]
        longest, tasks = self.longest(case, family), self.used(family, "greedy")[1]
        stage = f"{case.name}: dose"

        def asks(arm: str, strength: float) -> list[Ask]:
            whole = arm == "steer" and abs(strength) in (0.0, 1.0)
            used = tasks if whole else tasks[: self.plan.curve_prompts if arm == "steer" else self.plan.random_prompts]
            fluent = arm == "steer"  # of random vectors only the effect is wanted
            return [Ask(family, task, arm, case.sign * strength, "greedy", "score", longest, fluent) for task in used]

        strengths = sorted({*self.plan.curve, -1.0, 0.0, 1.0})
        # all at once: the fewer and larger the calls, the better filled the batches
        everything = [a for s in strengths for a in asks("steer", s)]
        everything += [a for s in (-1.0, 1.0) for arm in case.random_arms for a in asks(arm, s)]
        self.results.rows += [{**row, "kind": "dose"} for row in self.answer(case, everything, stage)]

        def rows(arm: str, strength: float) -> list[dict[str, Any]]:
            return [self.row(case, ask) for ask in asks(arm, strength)]

        zero = rows("steer", 0.0)
        points: list[dict[str, Any]] = []
        for strength in strengths:
            found = rows("steer", strength)
            steered, plain = (mean_perplexity(row["perplexity"] for row in part) for part in (found, zero[: len(found)]))
            points.append(
                {
                    "strength": strength,
                    "metric": estimate([case.sign * row["metric"] for row in found], self.plan.seed).to_list(),
                    "effect": self._effect(case, found, zero[: len(found)]).to_list(),
                    "perplexity": steered / plain if steered and plain else None,
                    "repeats": statistics.fmean(row["repeats"] for row in found),
                }
            )
        effects = {}
        for name, up, down in (("-1", -1.0, 0.0), ("+1", 1.0, 0.0), (SWING, 1.0, -1.0)):
            own = self._effect(case, rows("steer", up), rows("steer", down))
            ends = [(rows(arm, up), rows(arm, down) if down else zero) for arm in case.random_arms]
            pooled = self._effect(case, *(_pooled(runs) for runs in zip(*ends, strict=True)))
            size = statistics.fmean(abs(self._effect(case, *end).mean or 0.0) for end in ends)
            effects[name] = {
                "effect": own.to_list(),
                "random": pooled.to_list(),
                "random_size": round(size, 4),
                "excludes_zero": own.excludes_zero,
                "times_random": abs(own.mean / size) if own.mean is not None and size else None,
            }
        # over the prompts that all points share
        common = {p["strength"]: [r["metric"] for r in rows("steer", p["strength"])[: self.plan.curve_prompts]] for p in points}
        rank = spearman(list(common), [case.sign * statistics.fmean(values) for values in common.values()])
        return {"family": family.name, "points": points, "spearman": rank, "full": effects}

    def _effect(self, case: Case, rows: Sequence[dict[str, Any]], zero: Sequence[dict[str, Any]]) -> Estimate:
        """Paired; random vectors ran on some of the prompts only."""
        n = min(len(rows), len(zero))
        return paired([case.sign * r["metric"] for r in rows[:n]], [case.sign * r["metric"] for r in zero[:n]], self.plan.seed)

    def _persistence(self, case: Case, families: Sequence[Family], strength: float) -> dict[str, Any]:
        """The metric at each turn of conversations whose system prompt stands at the beginning alone."""
        found: dict[str, Any] = {}
        if not families:
            return found
        family = families[-1]
        spoken = {"plain": self._plain["turns"][family.name]}
        spoken |= self._conversations(case, family, (case.prompted, "steer", "both"), strength)
        for arm, talks in spoken.items():
            turns = []
            for turn, replies in enumerate(talks):
                values = [case.score(text) for text in replies.values()]
                turns.append(estimate(values, self.plan.seed).to_list())
                for (c, text), value in zip(replies.items(), values, strict=True):
                    row = {"kind": "turn", "trait": case.name, "arm": arm, "conversation": c, "turn": turn, "text": text}
                    self.results.rows.append({**row, "metric": value})
            found[arm] = turns
        return found

    def _conversations(self, case: Case, family: Family, arms: Sequence[str], strength: float) -> dict[str, list[dict[int, str]]]:
        """For each arm the replies by conversation, for each turn; conversations end where the context does."""
        questions = [task.prompt for task in family.tasks]
        order = np.random.default_rng(self.plan.seed + 1).permutation(len(questions))
        histories: dict[tuple[str, int], list[dict[str, str]]] = {
            (arm, c): [] for arm in arms for c in range(self.plan.conversations)
        }
        found: dict[str, list[dict[int, str]]] = {arm: [] for arm in arms}
        for turn in range(self.plan.turns):
            asked = [str(questions[order[(c * self.plan.turns + turn) % len(order)]]) for c in range(self.plan.conversations)]
            prompts = {
                (arm, c): message(self.engine, asked[c], case.system(arm), history) for (arm, c), history in histories.items()
            }
            prompts = {key: prompt for key, prompt in prompts.items() if self._fits(prompt)}
            requests = [
                GenerateRequest(prompt, case.steering(arm, strength), max_tokens=TURN_TOKENS)
                for (arm, _), prompt in prompts.items()
            ]
            for arm in {arm: None for arm, _ in prompts}:
                found[arm].append({})
            for (arm, c), reply in zip(prompts, self.engine.generate_many(requests), strict=True):
                histories[arm, c] += [{"role": "user", "content": asked[c]}, {"role": "assistant", "content": reply.text}]
                found[arm][-1][c] = reply.text
            self._report(f"{case.name}: conversation", len(requests))
        return found

    def _fits(self, prompt: Prompt) -> bool:
        return len(self.engine.tokenize(prompt)) + TURN_TOKENS < self.engine.info.n_ctx

    def _side_effects(self, case: Case, strength: float) -> dict[str, Any]:
        """Multiple choice by log-probability, and how far the next tokens of neutral replies are from the plain model's (where
        the engine tells whole distributions), for each arm."""
        questions = read_choices()[: self.plan.choices]
        neutral, plain = self._plain["neutral"], self._plain["choices"]
        found: dict[str, Any] = {}
        for arm in ("plain", case.prompted, "steer", "both", "random"):
            right = plain if arm == "plain" else self._choices(case, arm, strength)
            for (start, _), value in zip(questions, right, strict=True):
                self.results.rows.append({"kind": "choice", "trait": case.name, "arm": arm, "question": start, "right": value})
            part = {"accuracy": estimate(right, self.plan.seed).to_list()}
            part["accuracy_change"] = paired(right, plain, self.plan.seed).to_list()
            if neutral and arm != "plain":
                moved = self.engine.distributions(
                    [(message(self.engine, text, case.system(arm)), tokens) for text, tokens, _ in neutral],
                    steering=case.steering(arm, strength),
                )
                kl = [divergence(before, other) for (_, _, before), other in zip(neutral, moved, strict=True)]
                part["kl"] = estimate(kl, self.plan.seed).to_list()
            found[arm] = part
        return found

    def _choices(self, case: Case, arm: str, strength: float) -> list[float]:
        """1 for each question whose right ending is the likeliest, else 0."""
        questions = read_choices()[: self.plan.choices]
        # whole sentences: a chat model says them again, and what they share cancels
        items = [
            (message(self.engine, f"Complete the sentence: {start} ...", case.system(arm)), f"{start} {ending}.")
            for start, endings in questions
            for ending in endings
        ]
        sums = [float(values.sum()) for values in self.engine.logprobs(items, steering=case.steering(arm, strength))]
        right = []
        for _, endings in questions:
            scores, sums = sums[: len(endings)], sums[len(endings) :]
            right.append(float(int(np.argmax(scores)) == 0))
        self._report(f"{case.name}: side effects", len(items))
        return right

    def _neutral(self) -> list[tuple[str, list[int], Any]]:
        """Neutral requests, replies drawn from the plain model as it is, and what it expects at each of their tokens."""
        if not self.engine.has_distributions:
            return []
        texts = data_lines("neutral.txt")[: self.plan.neutral]
        prompts = [message(self.engine, text, None) for text in texts]
        replies = self.engine.generate_many(
            [
                GenerateRequest(p, max_tokens=32, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=self.plan.seed + i)
                for i, p in enumerate(prompts)
            ]
        )
        there = [(t, p, r.tokens) for t, p, r in zip(texts, prompts, replies, strict=True) if r.tokens]
        plain = self.engine.distributions([(p, tokens) for _, p, tokens in there]) if there else []
        return [(t, tokens, values) for (t, _, tokens), values in zip(there, plain, strict=True)]


def divergence(plain: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """KL(plain ‖ other) in nats, mean over positions; both are natural log probabilities [n_positions, n_vocab]. Never below 0:
    it is summed over the vocabulary, not estimated from the tokens that were drawn (Kullback and Leibler 1951)."""
    p, q = (one.astype(np.float64) for one in (plain, other))
    # terms that are each at least 0, whatever the rounding: p log(p/q) - p + q
    terms = np.exp(p) * (p - q) - np.exp(p) + np.exp(q)
    return float(np.maximum(terms, 0.0).sum(axis=1).mean())


def _pooled(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each prompt, with the mean metric of several runs."""
    return [{"metric": statistics.fmean(row["metric"] for row in same)} for same in zip(*runs, strict=True)]


def _versus(rows: dict[tuple[str, str], list[dict[str, Any]]], decoding: str, best: str, seed: int) -> dict[str, Any]:
    """Differences of scores on the same prompts. ``best``: the prompt to compare with."""

    def scores(arm: str) -> list[float]:
        return [row["score"] for row in rows[arm, decoding]]

    found: dict[str, Any] = {"best prompt": best}
    for arm in (arm for arm in ("steer", "both", "random") if (arm, decoding) in rows):
        found[f"{arm} - prompt"] = paired(scores(arm), scores(best)[: len(scores(arm))], seed).to_list()
    found["steer - plain"] = paired(scores("steer"), scores("plain"), seed).to_list()
    return found
