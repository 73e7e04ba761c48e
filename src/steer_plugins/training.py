"""From a trait or pairs to a calibrated steering vector: reads, fits, calibrates. What `steer train` and hosts call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from . import __version__
from .calibrate import UNCALIBRATED, Calibrated, ContrastObjective, Fitted, Objective, Sweep, TextObjective
from .calibrate.plan import FIRST_DOSE, LEVELS, Level, level_of, window_of, windows_of
from .engine.base import Engine, GenerateRequest
from .errors import DataError, SpecError
from .extract import (
    ContrastData,
    FitOptions,
    Method,
    Pair,
    Side,
    chat,
    hold_out,
    layers_to_read,
    plan_reading,
    read_contrast,
    trait_data,
)
from .plugins import manager
from .traits import Trait
from .vector import SCOPES, SteeringVector, check_name

SCORING = 1.5
"""Scoring a token takes so many times as long as reading one: its logits are computed as well."""

Report = Callable[[str, int], None]
"""Called with (what is being done, tokens that went through the model since the last call)."""

TRIALS_PER_WINDOW = 2
"""What a search took on average; for the estimate before it."""

MEASURED_TOKENS = 8
"""Tokens of each reply that are timed for the estimate."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        method: a registered extraction method.
        positions: ``last`` or ``response``; None chooses by the data.
        layers: inclusive range to fit and steer; None reads all but the last and lets calibration choose a window.
        calibrate: ``none``, ``quick`` or ``full``.
        scope: default scope of the vector; None lets calibration choose.
        seed: which pairs are held out.
        thinking: the chat template's switch.
    """

    method: str = "mean_difference"
    positions: str | None = None
    layers: tuple[int, int] | None = None
    calibrate: str = "quick"
    scope: str | None = None
    seed: int = 0
    thinking: bool | None = False


@dataclass(frozen=True)
class TrainPlan:
    """What training will cost: tokens to read, generate and score, and seconds at the speed that was just measured.

    The sweep adapts to what it finds, so generated and scored tokens are expected values.
    """

    read: int
    generate: int
    score: int
    seconds: float

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.read + self.generate + self.score


class Training:
    """One training run. Make it (which checks everything that can be checked), :meth:`plan`, :meth:`run`.

    Raises:
        DataError: pairs that cannot be used as asked. SpecError: layers, positions or a scope that do not exist.
        SteerError: no such method or metric.
    """

    def __init__(self, engine: Engine, name: str, source: Trait | ContrastData, options: TrainOptions | None = None) -> None:
        options = options or TrainOptions()
        self.engine = engine
        self.name = check_name(name)
        self.options = options
        if options.calibrate not in LEVELS:
            raise SpecError(f"Unknown calibration '{options.calibrate}': use {', '.join(LEVELS)}.")
        if options.scope is not None and options.scope not in SCOPES:
            raise SpecError(f"Unknown scope '{options.scope}': use {', '.join(SCOPES)}.")
        self.level: Level | None = level_of(options.calibrate)
        self.method: Method = manager().find("methods", options.method)
        self.trait = source if isinstance(source, Trait) else None
        self.held: tuple[Pair, ...] = ()
        if isinstance(source, Trait):
            self.data = trait_data(source)
            if source.metric is not None:
                self._metric = manager().find("metrics", source.metric)
        elif self.level is None:
            self.data = source
        else:
            self.data, self.held = hold_out(source, options.seed)
        n_layer = engine.info.n_layer
        if options.layers is not None:
            lo, hi = options.layers
            if not 0 <= lo <= hi < n_layer:
                raise SpecError(f"Layers {lo}-{hi} do not lie in this model: it has 0 to {n_layer - 1}.")
        self.fit_options = FitOptions(
            layers=layers_to_read(n_layer, options.layers),
            positions=options.positions or self.data.default_positions(),
            seed=options.seed,
            thinking=options.thinking,
        )
        self.reading = plan_reading(engine, self.data, self.fit_options)

    def plan(self) -> TrainPlan:
        """Measure the speed on a first batch and estimate the cost."""
        engine, level = self.engine, self.level
        sides = [side for pair in self.data.pairs[:4] for side in (pair.positive, pair.negative)]
        prompts = [engine.tokenize(side.prompt, thinking=self.options.thinking) for side in sides]
        engine.read(prompts[:1], layers=self.fit_options.layers)  # the first call makes the context
        start = time.perf_counter()
        engine.read(prompts, layers=self.fit_options.layers)
        per_read = (time.perf_counter() - start) / sum(len(p) for p in prompts)
        generate, score = self.reading.generated, 0
        per_generated = 0.0
        if level is not None:
            tokens = sum(level.tokens) / 2
            n_windows = 1 if self.options.layers else len(windows_of(level, list(self.fit_options.layers)))
            n_scopes = 1 if self.options.scope else len(level.scopes)
            trials = n_windows * n_scopes * TRIALS_PER_WINDOW * 2 * level.n_search
            trials += 3 * level.n_confirm + (len(level.curve) - 3) * level.n_search + 2 * level.n_random * level.n_confirm
            generate += int(trials * tokens)
            score = int(trials * tokens)
        if generate:
            spent = []
            for n in (1, 1 + MEASURED_TOKENS):  # the prompts cost the same in both
                start = time.perf_counter()
                engine.generate_many([GenerateRequest(p, max_tokens=n) for p in prompts])
                spent.append(time.perf_counter() - start)
            per_generated = max(0.0, spent[1] - spent[0]) / (MEASURED_TOKENS * len(prompts))
        seconds = (self.reading.read + SCORING * score) * per_read + generate * per_generated
        return TrainPlan(self.reading.read, generate, score, seconds)

    def run(self, report: Report | None = None) -> SteeringVector:
        """Train. Raises as the parts do; nothing is written anywhere."""
        report = report or (lambda stage, tokens: None)
        share = self.reading.read / (2 * len(self.data.pairs))
        last = 0

        def reading(done: int, total: int) -> None:
            nonlocal last
            report("reading", int(max(0, done - last) * share))
            last = done

        report("reading", 0)
        contrast = read_contrast(self.engine, self.data, self.fit_options, progress=reading)
        fit = self.method.fit(contrast, self.fit_options)
        fitted = Fitted(self.name, fit.directions, contrast.norms, self.fit_options.site)
        if self.level is None:
            vector, record = self._uncalibrated(fitted), None
        else:
            report("calibrating", 0)
            calibrated = self._calibrate(fitted, lambda tokens: report("calibrating", tokens))
            vector, record = calibrated.vector, calibrated.record
        provenance = {
            "tool": f"steer-plugins {__version__}",
            "method": self.options.method,
            "positions": self.fit_options.positions,
            "site": self.fit_options.site,
            "source": {"kind": self.data.kind, "sha256": self.data.sha256, **self.data.extra},
            "n_pairs": contrast.n_pairs,
            "n_held_out": len(self.held) if self.trait is None else len(self.trait.heldout_prompts),
            "seed": self.options.seed,
            "thinking": self.options.thinking,
            "model": self.engine.info.identity.label,
            "median_norms": {str(il): round(contrast.norms[il], 4) for il in vector.layers},
            "separation": {str(il): round(fit.strengths[il], 4) for il in vector.layers if il in fit.strengths},
            **({"notes": fit.notes} if fit.notes else {}),
        }
        return vector.replace(identity=self.engine.info.identity, provenance=provenance, calibration=record)

    def _uncalibrated(self, fitted: Fitted) -> SteeringVector:
        layers = sorted(fitted.directions)
        window = self.options.layers or window_of(*UNCALIBRATED, layers)
        return fitted.vector(_within(window, layers), FIRST_DOSE, self.options.scope or "response")

    def _calibrate(self, fitted: Fitted, advance: Callable[[int], None]) -> Calibrated:
        assert self.level is not None
        sweep = Sweep(self.engine, fitted, self._objective(), self.level, thinking=self.options.thinking, advance=advance)
        windows = [_within(self.options.layers, sorted(fitted.directions))] if self.options.layers else None
        return sweep.run(windows, [self.options.scope] if self.options.scope else None)

    def _objective(self) -> Objective:
        """The trait's metric, or the log-probability contrast of what is held out."""
        if self.trait is None:
            return ContrastObjective(self.engine, self.held, thinking=self.options.thinking)
        if self.trait.metric is not None:
            prompts = [chat(prompt) for prompt in self.trait.heldout_prompts]
            return TextObjective(self.trait.metric, self._metric, prompts)
        assert self.level is not None
        systems = self.trait.system_pairs
        pairs = []
        for i, prompt in enumerate(self.trait.heldout_prompts[: self.level.n_confirm]):
            positive, negative = systems[i % len(systems)]
            pairs.append(Pair(Side(chat(prompt, positive)), Side(chat(prompt, negative))))
        return ContrastObjective(self.engine, pairs, thinking=self.options.thinking)


def train(
    engine: Engine,
    name: str,
    source: Trait | ContrastData,
    options: TrainOptions | None = None,
    *,
    report: Report | None = None,
) -> SteeringVector:
    """A steering vector for the engine's model; see :class:`Training` for what may be raised."""
    return Training(engine, name, source, options).run(report)


def _within(window: tuple[int, int], layers: list[int]) -> tuple[int, int]:
    """The window, if any layer in it has a direction."""
    if not any(window[0] <= il <= window[1] for il in layers):
        raise DataError(f"Layers {window[0]}-{window[1]} got no direction: the examples read the same there.")
    return window
