"""One run: replies under the prompt, their states with it and without, a fit layer by layer, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import __version__
from ...engine.base import Engine, GenerateRequest
from ...errors import DataError, SpecError
from ...steering.columns import MAX_COLUMNS
from ...steering.terms import Term
from ...steering.vector import Key, SteeringVector, check_name, layer_ranges
from ..controls import random_vector
from ..traits import bundled_traits, load_trait
from .columns import Floats, LayerFit, fit_layer

ARMS = ("responsive", "constant", "random")
"""The vector; the same fit without columns; random rows in place of those that it writes, with the same doses and gains."""

SITE = "resid_post"
FIRST_TOKENS = 4
"""So many tokens of a reply count twice: a prompt does most where a reply begins."""
FACTORS = (0.5, 0.75, 1.0, 1.4)
"""Strengths that are tried on replies outside the fit; the best becomes strength 1."""
RESAMPLES = 2000
LEAST_GAP = 0.002
"""Nats a token; below it, a prompt has hardly changed what the model says."""

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class ImitateOptions:
    """How to imitate.

    Attributes:
        rank: columns at a layer at most, 0 to 16; 0 fits the constant alone.
        layers: block indices; None takes eight, from the lower part to the last that can be read.
        n_fit, n_tune, n_held: replies to fit to, to choose the dose on, and to judge by.
        tokens: longest reply.
        temperature: of the replies.
        seed: of the replies and of the random arm.
        thinking: the chat template's switch.
    """

    rank: int = 4
    layers: tuple[int, ...] | None = None
    n_fit: int = 32
    n_tune: int = 8
    n_held: int = 16
    tokens: int = 48
    temperature: float = 0.7
    seed: int = 0
    thinking: bool | None = False


@dataclass(frozen=True)
class Share:
    """The share of a prompt's log-likelihood gap that an arm closes at strength 1, with its 95 % interval over the replies.

    (log p of held-out replies steered - plain) / (prompted - plain). 1: as likely as under the prompt; 0: as without it.
    """

    arm: str
    share: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"arm": self.arm, **{name: round(getattr(self, name), 4) for name in ("share", "low", "high")}}


@dataclass(frozen=True)
class _Reply:
    prompted: list[int]  # ids of the chat with the system prompt
    plain: list[int]  # and without it
    tokens: list[int]
    pole: float  # 1 for the prompt, -1 for the one that it is set against


class Imitation:
    """Fits a vector whose strength 1 does what a system prompt does. Make it, which checks all that can be, then :meth:`run`.

    Args:
        engine: the model.
        name: of the vector.
        prompt: the system prompt.
        against: a second one; strength -1 then imitates it.

    Raises:
        DataError: an empty prompt, one that does not fit into the context, a model without a chat template, or one whose
            template lets no system prompt through.
        SpecError: layers or a rank that do not exist.
    """

    def __init__(
        self, engine: Engine, name: str, prompt: str, against: str | None = None, options: ImitateOptions | None = None
    ) -> None:
        self.engine, self.name = engine, check_name(name)
        self.options = options = options or ImitateOptions()
        self.prompts = [(1.0, prompt.strip())] + ([] if against is None else [(-1.0, against.strip())])
        if not engine.info.has_chat_template:
            raise DataError("this model has no chat template, so it knows no system prompt to imitate: take a chat model")
        if not 0 <= options.rank <= MAX_COLUMNS:
            raise SpecError(f"a rank of {options.rank} is not possible: 0 to {MAX_COLUMNS} columns at a layer are")
        top = engine.info.n_layer - (2 if engine.info.last_layer_outputs_only else 1)
        self.layers = self._layers(max(top, 0))
        fit, judge = user_prompts()
        self.users = [fit[: options.n_fit + options.n_tune], judge[: options.n_held]]
        for _, system in self.prompts:
            if not system:
                raise DataError("the prompt is empty, so there is nothing to imitate: say how the model should answer")
            for user in chain(*self.users):
                plain, prompted = self._ids(user, None), self._ids(user, system)
                if plain == prompted:
                    raise DataError("this model's chat template drops system prompts, so there is nothing to imitate")
                if len(prompted) + options.tokens > engine.info.n_ctx:
                    raise DataError(
                        f"the prompt takes {len(prompted)} tokens and a reply {options.tokens}, the context has "
                        f"{engine.info.n_ctx}: shorten it, or give a larger context (--n-ctx)"
                    )

    def _layers(self, top: int) -> list[int]:
        wanted = self.options.layers
        if wanted is None:
            return sorted({round(x) for x in np.linspace(min(top, round(0.15 * top)), top, 8)})
        layers = sorted(set(wanted))
        if not layers or layers[0] < 0 or layers[-1] > top:
            named = layer_ranges(layers) if layers else "''"
            raise SpecError(f"layers {named} do not all lie where this model can be read: it has 0 to {top}")
        return layers

    def _ids(self, user: str, system: str | None) -> list[int]:
        messages = [{"role": "system", "content": system}] if system is not None else []
        return self.engine.tokenize([*messages, {"role": "user", "content": user}], thinking=self.options.thinking)

    # ---- the run ----

    def run(self, report: Report | None = None) -> SteeringVector:
        """Fit and judge. ``calibration`` of the vector says what it is worth; nothing is written anywhere.

        Raises:
            DataError: too few replies, or the prompt changes next to nothing about them.
        """
        report = report or (lambda stage, done, total: None)
        replies, held = self._replies(report)
        at = len(replies) * self.options.n_fit // (self.options.n_fit + self.options.n_tune)
        fitting, tuning = replies[:at], replies[at:]
        judge, tune = _Judge(self.engine, held, self.options.thinking), _Judge(self.engine, tuning, self.options.thinking)
        if judge.gap < LEAST_GAP:
            raise DataError(
                f"the prompt makes its own replies only {judge.gap:.4f} nats a token likelier, so there is nothing to imitate: "
                "write one that the model follows"
            )
        arms: dict[str, SteeringVector] = {}
        explained: dict[int, float] = {}
        wanted = self._states(fitting, "prompted", self.layers, None)
        for arm, rank in (("constant", 0), ("responsive", self.options.rank)):
            fits = self._fit(fitting, wanted, rank, lambda done, total: report(f"fitting {arm}", done, total))  # noqa: B023
            explained = {il: round(fit.explained, 4) for il, fit in fits.items()}
            vector = self._vector(fits)
            report("dose", 0, 1)
            arms[arm] = vector.scaled(max(FACTORS, key=lambda factor: tune.share(vector.scaled(factor))[0]))  # noqa: B023
        arms["random"] = random_vector(arms["responsive"], self.options.seed)
        shares = []
        for done, arm in enumerate(ARMS):
            report("judging", done, len(ARMS))
            shares.append(Share(arm, *judge.share(arms[arm])))
        return arms["responsive"].replace(
            identity=self.engine.info.identity,
            provenance=self._provenance(fitting, {str(il): value for il, value in explained.items()}),
            calibration={
                "level": "imitation",
                "gap": round(judge.gap, 5),
                "n": len(held),
                "tokens": sum(len(r.tokens) for r in held),
                "shares": [share.to_dict() for share in shares],
            },
        )

    def _replies(self, report: Report) -> tuple[list[_Reply], list[_Reply]]:
        """Replies under each prompt: to fit and tune on, and held out."""
        options, out = self.options, []
        jobs = [(pole, user, system, held) for pole, system in self.prompts for held in (0, 1) for user in self.users[held]]
        requests = [
            GenerateRequest(
                self._ids(user, system), max_tokens=options.tokens, temperature=options.temperature, seed=options.seed + i
            )
            for i, (_, user, system, _) in enumerate(jobs)
        ]
        report("replies", 0, len(requests))
        found = self.engine.generate_many(requests, progress=lambda done, total: report("replies", done, total))
        for which in (0, 1):
            kept = [
                _Reply(self._ids(user, system), self._ids(user, None), list(reply.tokens), pole)
                for (pole, user, system, held), reply in zip(jobs, found, strict=True)
                if held == which and len(reply.tokens) >= 2
            ]
            if len(kept) < 4:
                raise DataError(f"under this prompt only {len(kept)} of {len(requests)} replies are longer than one token")
            # poles in turns, so that every part has both
            sides = [[r for r in kept if r.pole == pole] for pole, _ in self.prompts]
            out.append([r for pair in zip_longest(*sides) for r in pair if r is not None])
        return out[0], out[1]

    def _states(
        self, replies: Sequence[_Reply], side: str, layers: list[int], vector: SteeringVector | None
    ) -> dict[int, Floats]:
        """``{layer: float64 [n, n_embd]}`` of the tokens that decide each reply: the last of the prompt, and all but its last."""
        rows: list[dict[int, npt.NDArray[np.float32]]] = [{} for _ in replies]
        for pole in {r.pole for r in replies}:
            steering = None if vector is None else Term(vector, pole)
            for part in _parts([i for i, r in enumerate(replies) if r.pole == pole], 8):
                items = [(getattr(replies[i], side), replies[i].tokens) for i in part]
                read = self.engine.read_pairs(items, layers=layers, site=SITE, positions="all", steering=steering)
                for i, (ids, tokens), one in zip(part, items, read, strict=True):
                    rows[i] = {il: one.values[il][len(ids) - 1 : len(ids) - 1 + len(tokens)] for il in layers}
        return {il: np.concatenate([row[il] for row in rows]).astype(np.float64) for il in layers}

    def _fit(
        self, replies: Sequence[_Reply], wanted: dict[int, Floats], rank: int, report: Callable[[int, int], None]
    ) -> dict[int, LayerFit]:
        """Layers from first to last, each on the states that those before it leave; where nothing is left to do, none.

        Constants are fitted two layers at a time: what the lower one adds is taken to reach the upper one as it is.
        """
        lengths = [len(r.tokens) for r in replies]
        groups, poles = np.repeat(np.arange(len(replies)), lengths), np.repeat([r.pole for r in replies], lengths)[:, None]
        place = np.concatenate([np.arange(n) for n in lengths])
        weights = np.where(place < FIRST_TOKENS, 2.0, 1.0)
        fits: dict[int, LayerFit] = {}
        step = 1 if rank else 2
        for at in range(0, len(self.layers), step):
            report(at, len(self.layers))
            layers = self.layers[at : at + step]
            states = self._states(replies, "plain", layers, self._vector(fits) if fits else None)
            added = np.zeros_like(poles)
            for layer in layers:
                fit = fit_layer(states[layer], poles * (wanted[layer] - states[layer]) - added, groups, weights, rank)
                added = added + fit.constant
                if fit.columns is not None or np.abs(fit.constant).max() > 1e-9 * np.abs(states[layer]).max():
                    fits[layer] = fit
        if not fits:
            raise DataError("the prompt changes nothing about the states of its own replies, so there is nothing to imitate")
        return fits

    def _vector(self, fits: dict[int, LayerFit]) -> SteeringVector:
        directions: dict[Key, Floats] = {(il, SITE): fit.constant for il, fit in fits.items()}
        columns = {(il, SITE): fit.columns for il, fit in fits.items() if fit.columns is not None}
        return SteeringVector(self.name, directions, columns=columns, default_scope="response")

    def _provenance(self, fitting: Sequence[_Reply], explained: dict[str, float]) -> dict[str, Any]:
        options = self.options
        return {
            "tool": f"steer-plugins {__version__}",
            "method": "imitation",
            "prompt": self.prompts[0][1][:2000],
            **({"against": self.prompts[1][1][:2000]} if len(self.prompts) > 1 else {}),
            "rank": options.rank,
            "layers": self.layers,
            "n_replies": len(fitting),
            "n_tokens": sum(len(r.tokens) for r in fitting),
            "explained": explained,
            "temperature": options.temperature,
            "seed": options.seed,
            "thinking": options.thinking,
            "model": self.engine.info.identity.label,
        }


class _Judge:
    """Scores vectors by the replies of some prompts that they were not fitted to."""

    def __init__(self, engine: Engine, replies: Sequence[_Reply], thinking: bool | None) -> None:
        self._engine, self._replies = engine, list(replies)
        self._plain = self._scores("plain", None)
        self._gaps = self._scores("prompted", None) - self._plain
        #: Nats a token that the prompt's own replies are likelier under it.
        self.gap = float(self._gaps.sum() / sum(len(r.tokens) for r in replies))

    def _scores(self, side: str, vector: SteeringVector | None) -> Floats:
        """Log likelihood of each reply."""
        out = np.zeros(len(self._replies))
        for pole in {r.pole for r in self._replies}:
            some = [i for i, r in enumerate(self._replies) if r.pole == pole]
            items = [(getattr(self._replies[i], side), self._replies[i].tokens) for i in some]
            steering = None if vector is None else Term(vector, pole)
            out[some] = [float(np.sum(x)) for x in self._engine.logprobs(items, steering=steering)]
        return out

    def share(self, vector: SteeringVector) -> tuple[float, float, float]:
        """(share, low, high): what strength 1 closes of the gap, and its 95 % interval from resampled replies."""
        closed = self._scores("plain", vector) - self._plain
        drawn = np.random.default_rng(0).integers(len(closed), size=(RESAMPLES, len(closed)))
        gaps = self._gaps[drawn].sum(axis=1)
        shares = closed[drawn].sum(axis=1) / np.where(np.abs(gaps) > 1e-9, gaps, 1e-9)
        low, high = np.quantile(shares, [0.025, 0.975])
        return float(closed.sum() / self._gaps.sum()), float(low), float(high)


def user_prompts() -> tuple[list[str], list[str]]:
    """(prompts to fit on, others to judge by): what users ask, from all bundled traits in turns."""
    traits = [load_trait(name) for name in bundled_traits()]

    def mixed(lists: list[tuple[str, ...]], without: Sequence[str] = ()) -> list[str]:
        known = set(without)
        return [text for text in dict.fromkeys(t for row in zip_longest(*lists) for t in row) if text and text not in known]

    fit = mixed([trait.train_prompts for trait in traits])
    return fit, mixed([trait.heldout_prompts for trait in traits], fit)


def _parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[at : at + size] for at in range(0, len(items), size))
