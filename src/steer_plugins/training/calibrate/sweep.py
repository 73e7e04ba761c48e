"""The sweep: finds the layer window and what strength 1.0 means, on prompts that the fit has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engine.base import Engine, GenerateRequest, Generation
from ...errors import DataError
from ...steering.terms import Term
from ...steering.vector import SteeringVector
from .fluency import Fluency, Guard, measure_fluency
from .objective import Objective
from .plan import Level, windows_of

Array = npt.NDArray[Any]
Advance = Callable[[int], None]
"""Called with the number of tokens that went through the model."""


SEARCH_SLACK = 0.1
"""What the search allows above the guard's perplexity ratio: about the standard error of a ratio on its few prompts. A dose that
is too large for more prompts is made smaller there; one that the search has missed never comes back."""

LOWER_RUNGS = 3
"""How many smaller doses are tried when the score turns back before strength 1 is reached."""

_PLAIN = ("plain", "", 0.0)
"""The key of texts without steering."""


@dataclass(frozen=True)
class Fitted:
    """What is to be calibrated: unit directions and median norms by layer."""

    name: str
    directions: Mapping[int, Array]
    norms: Mapping[int, float]
    site: str = "resid_post"

    def vector(self, window: tuple[int, int], dose: float, scope: str) -> SteeringVector:
        """The vector whose strength 1.0 adds ``dose`` median norms in all, in equal parts at each layer of the window."""
        layers = [il for il in self.directions if window[0] <= il <= window[1]]
        return SteeringVector(
            self.name,
            {(il, self.site): self.directions[il] for il in layers},
            {(il, self.site): dose * self.norms[il] / len(layers) for il in layers},
            default_scope=scope,
        )

    def random(self, seed: int) -> Fitted:
        """Random directions at the same layers."""
        rng = np.random.default_rng(seed)
        found = {}
        for il, direction in self.directions.items():
            noise = rng.standard_normal(direction.shape[0])
            found[il] = (noise / np.linalg.norm(noise)).astype(np.float32)
        return Fitted(self.name, found, self.norms, self.site)


@dataclass
class SweepRow:
    """One strength of one trial, as it is stored. ``score``: mean over ``n`` prompts or pairs, with its standard error."""

    window: tuple[int, int]
    scope: str
    dose: float
    strength: float
    n: int
    score: float
    score_se: float
    fluency: Fluency
    passed: bool | None
    stage: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values, rounded to what they are worth."""
        texts = self.fluency.to_dict()
        values = {"dose": self.dose, "score": self.score, "score_se": self.score_se, "n_texts": texts.pop("n"), **texts}
        return {
            "stage": self.stage,
            "window": list(self.window),
            "scope": self.scope,
            "strength": self.strength,
            "n": self.n,
            **_rounded(values),
            "passed": self.passed,
        }


@dataclass
class Trial:
    """Both signs of one window and dose. ``scores``: by strength, one for each prompt."""

    window: tuple[int, int]
    scope: str
    rung: float
    dose: float
    passed: bool
    scores: dict[float, list[float]] = field(default_factory=dict)

    @property
    def effect(self) -> float:
        """Mean score at strength 1 minus that at -1."""
        return float(np.mean(self.scores[1.0]) - np.mean(self.scores[-1.0]))


@dataclass(frozen=True)
class Calibrated:
    """The result: ``vector`` with its scales and scope, and ``record``, the whole sweep as JSON values."""

    vector: SteeringVector
    record: dict[str, Any]


class Sweep:
    """Runs trials, and remembers what was generated so that no text is generated twice."""

    def __init__(
        self,
        engine: Engine,
        fitted: Fitted,
        objective: Objective,
        level: Level,
        *,
        guard: Guard | None = None,
        thinking: bool | None = False,
        advance: Advance | None = None,
    ) -> None:
        self.engine = engine
        self.fitted = fitted
        self.objective = objective
        self.level = level
        self.guard = guard or Guard()
        self._search_guard = replace(self.guard, perplexity_ratio=self.guard.perplexity_ratio + SEARCH_SLACK)
        self.thinking = thinking
        self._advance = advance or (lambda tokens: None)
        self.rows: list[SweepRow] = []
        self._replies: dict[tuple[str, str, float], list[Generation]] = {}
        self._logprobs: dict[tuple[str, str, float], list[Array]] = {}
        self._tokenized = [engine.tokenize(p, thinking=thinking) for p in objective.prompts[: level.n_confirm]]
        shortest, longest = level.tokens
        # replies that are much longer than the guard needs repeat themselves, with or without steering
        self.max_tokens = min(longest, max(shortest, objective.reply_tokens)) if objective.reply_tokens else longest
        self._measure_plain()

    # ---- texts ----

    def _measure_plain(self) -> None:
        """Plain texts; they also say how long the texts have to be: as the objective says, or else short ones do, unless
        replies come to their own end within the longer length, for then their length may be what differs."""
        n, key = len(self._tokenized), _PLAIN
        tested = min(n, self.level.n_search)
        replies = self._generate([None] * tested, range(tested))
        if not self.objective.reply_tokens and 4 * sum(reply.finish_reason == "stop" for reply in replies) < tested:
            self.max_tokens = self.level.tokens[0]
            replies = [self._cut(reply, self.max_tokens) for reply in replies]
        replies += self._generate([None] * (n - tested), range(tested, n))
        self._replies[key] = replies
        self._logprobs[key] = self._score(replies, range(n))

    def _cut(self, reply: Generation, length: int) -> Generation:
        if len(reply.tokens) < length or (len(reply.tokens) == length and reply.finish_reason == "length"):
            return reply
        tokens = reply.tokens[:length]
        return Generation(self.engine.detokenize(tokens), tokens, reply.prompt_tokens, "length")

    def _generate(self, steerings: Sequence[Any], prompts: Sequence[int]) -> list[Generation]:
        requests = [
            GenerateRequest(self._tokenized[i], steering=steering, max_tokens=self.max_tokens)
            for steering, i in zip(steerings, prompts, strict=True)
        ]
        replies = self.engine.generate_many(requests)
        self._advance(sum(len(r.prompt_tokens) + len(r.tokens) for r in replies))
        return replies

    def _score(self, replies: Sequence[Generation], prompts: Sequence[int]) -> list[Array]:
        """Log probabilities of replies under the unsteered model; empty ones have none."""
        there = [k for k, reply in enumerate(replies) if reply.tokens]
        items: list[Any] = [(self._tokenized[prompts[k]], replies[k].tokens) for k in there]
        found = dict(zip(there, self.engine.logprobs(items) if items else [], strict=True))
        self._advance(sum(len(p) + len(t) for p, t in items))
        return [found.get(k, np.zeros(0)) for k in range(len(replies))]

    def replies(self, vector: SteeringVector, strengths: Sequence[float], n: int) -> dict[float, list[Generation]]:
        """Greedy replies to the first ``n`` prompts at each strength; all that is missing is generated together."""
        wanted: list[tuple[float, int]] = []
        for strength in strengths:
            have = self._replies.setdefault(self._key(vector, strength), [])
            wanted += [(strength, i) for i in range(len(have), n)]
        if wanted:
            found = self._generate([Term(vector, s) for s, _ in wanted], [i for _, i in wanted])
            for (strength, _), reply in zip(wanted, found, strict=True):
                self._replies[self._key(vector, strength)].append(reply)
        return {s: self._replies[self._key(vector, s)][:n] for s in strengths}

    def logprobs(self, vector: SteeringVector, strength: float, n: int) -> list[Array]:
        """Log probabilities, under the unsteered model, of the replies that :meth:`replies` gave."""
        key = self._key(vector, strength)
        have = self._logprobs.setdefault(key, [])
        if len(have) < n:
            have += self._score(self._replies[key][len(have) : n], range(len(have), n))
        return have[:n]

    def _key(self, vector: SteeringVector, strength: float) -> tuple[str, str, float]:
        return _PLAIN if strength == 0.0 else (vector.content_hash, vector.default_scope, strength)

    # ---- trials ----

    def plain(self, n: int) -> Fluency:
        """Fluency of the plain texts of the first ``n`` prompts."""
        return measure_fluency(self._replies[_PLAIN][:n], self._logprobs[_PLAIN][:n])

    def measure(
        self,
        vector: SteeringVector,
        strengths: Sequence[float],
        n: int,
        *,
        stage: str,
        where: tuple[tuple[int, int], str, float],
        guarded: bool = True,
        needed: float = -np.inf,
    ) -> tuple[dict[float, list[float]], bool]:
        """Scores by strength, and whether all strengths pass the guard (in the search: with slack). Rows are added to the record.

        The perplexity costs a run through the model. It is left out when it could change nothing: the cheap part of the
        guard has failed, or the other sign, or the effect is below ``needed``.
        """
        n_texts = min(n, len(self._tokenized))
        limit = self._search_guard if stage == "search" else self.guard
        replies = self.replies(vector, strengths, n_texts)
        plain = self.plain(n_texts)
        cheap = {s: measure_fluency(replies[s]).cheap_passes(plain, self.guard) for s in strengths}
        scores = {s: self.objective.scores(self.engine, Term(vector, s) if s else None, replies[s], n) for s in strengths}
        self._advance(self.objective.tokens(n) * len(strengths))
        passed = all(cheap.values()) and bool(np.mean(scores[strengths[-1]]) - np.mean(scores[strengths[0]]) >= needed)
        for s in strengths:
            known = len(self._logprobs.get(self._key(vector, s), ())) >= n_texts
            logprobs = self.logprobs(vector, s, n_texts) if known or (guarded and passed) else None
            fluency = measure_fluency(replies[s], logprobs)
            passed = passed and (s == 0.0 or fluency.passes(plain, limit))
            # what is stored is measured by the guard that is stored with it, also where the search went on
            held = s == 0.0 or fluency.passes(plain, self.guard)
            shown = None if fluency.perplexity is None and cheap[s] else held
            mean, error = float(np.mean(scores[s])), _error(scores[s])
            self.rows.append(SweepRow(where[0], where[1], where[2], s, len(scores[s]), mean, error, fluency, shown, stage))
        return scores, passed

    def trial(
        self,
        window: tuple[int, int],
        scope: str,
        rung: float,
        n: int,
        stage: str = "search",
        needed: float = -np.inf,
    ) -> Trial:
        """Both signs of a window at a rung of the ladder. One whose effect is below ``needed`` does not pass."""
        dose = self.level.dose(rung)
        vector = self.fitted.vector(window, dose, scope)
        scores, passed = self.measure(vector, (-1.0, 1.0), n, stage=stage, where=(window, scope, dose), needed=needed)
        return Trial(window, scope, rung, dose, passed, scores)

    def largest_passing(self, window: tuple[int, int], scope: str, best: Trial | None) -> Trial | None:
        """The largest dose that passes, climbing or descending from the first; None if there is none worth finding.

        Effects grow with the dose, hardly faster than it. So a dose that fails and moves the score no further than
        ``best`` ends the search, and one that passes is of use only while ``best`` is in reach of two rungs.
        """
        n, rungs = self.level.n_search, self.level.rungs
        beaten = best.effect if best is not None else -np.inf
        # an effect that is not above 0 has nothing to grow
        in_reach = beaten / self.level.ratio**2 if beaten > 0 else beaten
        trial = self.trial(window, scope, 0, n, needed=in_reach)
        if trial.passed:
            while trial.rung + 1 in rungs and trial.effect >= in_reach:
                higher = self.trial(window, scope, trial.rung + 1, n)
                if not higher.passed:
                    break
                trial = higher
            return trial
        while not trial.passed:
            if trial.effect <= beaten or trial.rung - 1 not in rungs:
                return None
            trial = self.trial(window, scope, trial.rung - 1, n)
        return trial

    def run(self, windows: Sequence[tuple[int, int]] | None = None, scopes: Sequence[str] | None = None) -> Calibrated:
        """Search, confirm, measure the curve. Raises DataError when no dose of any window passes the guard."""
        level = self.level
        windows = list(windows) if windows is not None else windows_of(level, sorted(self.fitted.directions))
        found: list[Trial] = []
        best: Trial | None = None
        for scope in scopes or level.scopes:
            for window in windows:
                trial = self.largest_passing(window, scope, best)
                if trial is not None:
                    found.append(trial)
                    best = max(found, key=lambda t: t.effect)
        winner: Trial | None = None
        for candidate in sorted(found, key=lambda t: t.effect, reverse=True):
            # one that needs a smaller dose on more prompts may fall behind the next
            if winner is not None and candidate.effect <= winner.effect:
                break
            confirmed = self._confirm(candidate)
            if confirmed is not None and (winner is None or confirmed.effect > winner.effect):
                winner = confirmed
        if winner is not None:
            return self._result(*self._rising(winner))
        raise DataError(
            f"no dose of '{self.fitted.name}' keeps the text fluent while it moves it: use clearer examples, other "
            "--layers, or --calibrate none"
        )

    def _confirm(self, trial: Trial) -> Trial | None:
        """The winner on more prompts, at a smaller dose if it has to be."""
        # the search's dose may have passed narrowly on its few prompts: half a rung less comes before a whole one
        steps = [0.0, 0.5, *(k + 1.0 for k in range(len(self.level.rungs)))]
        for rung in (trial.rung - step for step in steps if trial.rung - step >= self.level.rungs[0]):
            again = self.trial(trial.window, trial.scope, rung, self.level.n_confirm, "confirm")
            if again.passed:
                return again
        return None

    def _rising(self, trial: Trial) -> tuple[Trial, dict[float, list[float]]]:
        """The dose whose curve does not turn back, and the curve: the trial's, or one a few rungs below it.

        Text can stay fluent while too large a dose moves the score less than a smaller one does. Where no smaller dose
        helps, or the direction moves the score the wrong way, the trial stays, and the record says that it is not monotone.
        """
        first = curve = self._curve(trial)
        if rises(curve) or trial.effect <= 0:
            return trial, curve
        start = len(self.rows) - len(curve)
        below = [trial.rung - k for k in range(1, LOWER_RUNGS + 1)]
        for rung in (rung for rung in below if rung >= self.level.rungs[0]):
            lower = self.trial(trial.window, trial.scope, rung, self.level.n_confirm, "confirm")
            if not lower.passed:
                continue
            before = len(self.rows)
            curve = self._curve(lower)
            if rises(curve):
                self._rename(start, before)
                return lower, curve
            self._rename(before, len(self.rows))
        return trial, first

    def _rename(self, start: int, end: int) -> None:
        """Curves that were not taken keep their rows, under another stage."""
        for row in self.rows[start:end]:
            row.stage = "turned" if row.stage == "curve" else row.stage

    def _curve(self, trial: Trial) -> dict[float, list[float]]:
        vector = self.fitted.vector(trial.window, trial.dose, trial.scope)
        where = (trial.window, trial.scope, trial.dose)
        return self.measure(vector, self.level.curve, self.level.n_search, stage="curve", where=where, guarded=False)[0]

    def _signs(self, trial: Trial) -> dict[str, Any]:
        """The guard of each sign for itself: its values at the chosen dose, and the doses at which it held and failed."""
        found: dict[str, Any] = {}
        plain = self.plain(len(trial.scores[1.0])).perplexity
        for name, strength in (("negative", -1.0), ("positive", 1.0)):
            rows = [
                row
                for row in self.rows
                if row.stage in ("search", "confirm")
                and (row.window, row.scope, row.strength) == (trial.window, trial.scope, strength)
            ]
            chosen = [row for row in rows if row.dose == trial.dose and row.stage == "confirm"][-1]
            # rows are in order, so that what more prompts said of a dose replaces what the search's few did
            verdicts = {row.dose: row.passed for row in rows if row.passed is not None}
            perplexity = chosen.fluency.perplexity
            found[name] = _rounded(
                {
                    "passed": chosen.passed,
                    "perplexity_ratio": perplexity / plain if perplexity is not None and plain else None,
                    "repeats": chosen.fluency.repeats,
                    "early_ends": chosen.fluency.early_ends,
                    "largest_passing": max((dose for dose, passed in verdicts.items() if passed), default=None),
                    "smallest_failing": min((dose for dose, passed in verdicts.items() if not passed), default=None),
                }
            )
        return found

    def _result(self, trial: Trial, curve: dict[float, list[float]]) -> Calibrated:
        level = self.level
        vector = self.fitted.vector(trial.window, trial.dose, trial.scope)
        where = (trial.window, trial.scope, trial.dose)
        means = [float(np.mean(curve[s])) for s in level.curve]
        random = []
        for seed in range(level.n_random):
            control = self.fitted.random(seed).vector(trial.window, trial.dose, trial.scope)
            scores, _ = self.measure(control, (-1.0, 1.0), level.n_confirm, stage="random", where=where, guarded=False)
            random.append(float(np.mean(scores[1.0]) - np.mean(scores[-1.0])))
        n = len(trial.scores[1.0])
        differences = np.subtract(trial.scores[1.0], trial.scores[-1.0])
        record: dict[str, Any] = {
            "method": "sweep-v1",
            "level": level.name,
            "objective": {
                "kind": self.objective.kind,
                "name": self.objective.name,
                "unit": self.objective.unit,
                "of": self.objective.of,
            },
            "window": list(trial.window),
            "scope": trial.scope,
            "dose": round(trial.dose, 6),
            "dose_unit": "median residual norms, summed over the window's layers",
            "effect": round(trial.effect, 4),
            "effect_se": round(float(np.std(differences, ddof=1) / np.sqrt(n)), 4) if n > 1 else None,
            "monotone": bool(all(b >= a for a, b in zip(means, means[1:], strict=False))),
            "monotone_within_error": rises(curve),
            "random_effects": [round(value, 4) for value in random],
            "guard": {
                "perplexity_ratio": self.guard.perplexity_ratio,
                "search_slack": SEARCH_SLACK,
                "repeats": self.guard.repeats,
                "early_ends": self.guard.early_ends,
            },
            "signs": self._signs(trial),
            "plain": _rounded(self.plain(n).to_dict()),
            "max_tokens": self.max_tokens,
            "n": n,
            "curve": [
                {"strength": s, "score": round(m, 4), "score_se": round(_error(curve[s]), 4)}
                for s, m in zip(level.curve, means, strict=True)
            ],
            "samples": self._samples(vector),
            "rows": [row.to_dict() for row in self.rows],
        }
        return Calibrated(vector, record)

    def _samples(self, vector: SteeringVector) -> list[dict[str, Any]]:
        """What the first prompt's text became, for people."""
        return [{"strength": s, "text": self._replies[self._key(vector, s)][0].text} for s in (-1.0, 0.0, 1.0)]


def rises(curve: Mapping[float, Sequence[float]]) -> bool:
    """Whether the score never falls, from one strength to the next higher one, by more than a standard error of the fall.

    ``curve``: scores by strength, one for each prompt, so that differences are taken prompt by prompt.
    """
    strengths = sorted(curve)
    for low, high in zip(strengths, strengths[1:], strict=False):
        steps = np.subtract(curve[high], curve[low])
        if float(steps.mean()) < -_error(steps):
            return False
    return True


def _error(scores: Sequence[float] | Array) -> float:
    """Standard error of the mean; 0 for a single score."""
    return float(np.std(scores, ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else 0.0


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
