"""From a trait or pairs to a calibrated steering vector: reads, fits, calibrates. What `steer train` and hosts call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import __version__
from ..engine.base import Engine, GenerateRequest
from ..errors import DataError, SpecError, VectorError
from ..metrics import reply_tokens
from ..plugins import manager
from ..steering.vector import SCOPES, SteeringVector, check_name, layer_ranges
from .calibrate import UNCALIBRATED, Calibrated, ContrastObjective, Fitted, Objective, Sweep, TextObjective, measure_projection
from .calibrate.plan import FIRST_DOSE, LEVELS, Level, level_of, window_of, windows_of
from .extract import (
    Contrast,
    ContrastData,
    FitOptions,
    FitReport,
    FitResult,
    Method,
    Pair,
    Side,
    chat,
    fit_directions,
    hold_out,
    layers_to_read,
    plan_reading,
    read_contrast,
    report_fit,
    trait_data,
)
from .traits import Trait

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
        positions: one of :data:`~steer_plugins.training.extract.POSITIONS`; None chooses by the data. ``thinking`` turns it on.
        layers: block indices to fit and steer; None reads all but the last and lets calibration choose a window.
        calibrate: ``none``, ``quick`` or ``full``.
        scope: default scope of the vector; None lets calibration choose.
        seed: which pairs are held out.
        thinking: the chat template's switch.
        remove_neutral: take the neutral direction out, see :func:`~steer_plugins.training.extract.fit_directions`.
        baseline: fit three classes: with a trait, its prompts without a system prompt are the baseline. None does so where
            pairs have one; False leaves it out.
        op: ``add``, or ``project`` for engines that can only remove, reflect or amplify a component: the vector acts at all
            fitted layers and tokens, and calibration measures what each strength does.
        site: where to read and steer: ``resid_post``, ``attn_out`` or ``ffn_out``.
    """

    method: str = "mean_difference"
    positions: str | None = None
    layers: tuple[int, ...] | None = None
    calibrate: str = "quick"
    scope: str | None = None
    seed: int = 0
    thinking: bool | None = False
    remove_neutral: bool = False
    baseline: bool | None = None
    op: str = "add"
    site: str = "resid_post"


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


@dataclass(frozen=True)
class Fit:
    """What was read, the directions of it, and what they are worth."""

    contrast: Contrast
    result: FitResult
    report: FitReport


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
            raise SpecError(f"unknown calibration '{options.calibrate}': use {', '.join(LEVELS)}")
        if options.op not in ("add", "project"):
            raise SpecError(f"vectors are not fitted for the op '{options.op}': use add or project")
        if options.site not in engine.info.sites:
            known = ", ".join(engine.info.sites)
            raise SpecError(f"this model ({engine.info.architecture}) cannot be steered at {options.site}: it has {known}")
        if options.op == "project" and options.scope not in (None, "0-"):
            raise SpecError(
                f"a vector that projects is fitted for every token, so its scope is not {options.scope}: leave it out"
            )
        if options.scope is not None and options.scope not in (*SCOPES, "0-"):
            raise SpecError(f"unknown scope '{options.scope}': use {', '.join(SCOPES)}")
        self.level: Level | None = level_of(options.calibrate)
        self.method: Method = manager().find("methods", options.method)
        self.trait = source if isinstance(source, Trait) else None
        self.held: tuple[Pair, ...] = ()
        if isinstance(source, Trait):
            self.data = trait_data(source, baseline=bool(options.baseline))
            if source.metric is not None:
                self._metric = manager().find("metrics", source.metric)
        else:
            self.data = _with_baseline(source, options.baseline)
            if self.level is not None:
                self.data, self.held = hold_out(self.data, options.seed)
        n_layer = engine.info.n_layer
        wanted = None if options.layers is None else sorted(set(options.layers))
        if wanted is not None and not (wanted and 0 <= wanted[0] <= wanted[-1] < n_layer):
            named = layer_ranges(wanted) if wanted else "''"
            raise SpecError(f"layers {named} do not all lie in this model: it has 0 to {n_layer - 1}")
        self.window = None if wanted is None else (wanted[0], wanted[-1])
        self.fit_options = FitOptions(
            layers=layers_to_read(n_layer) if wanted is None else tuple(wanted),
            positions=options.positions or self.data.default_positions(),
            site=options.site,
            seed=options.seed,
            thinking=True if options.positions == "thinking" else options.thinking,
            remove_neutral=options.remove_neutral,
        )
        self.reading = plan_reading(engine, self.data, self.fit_options)

    def plan(self) -> TrainPlan:
        """Measure the speed on a first batch and estimate the cost."""
        engine, level = self.engine, self.level
        sides = [side for pair in self.data.pairs[:4] for side in (pair.positive, pair.negative)]
        prompts = [engine.tokenize(side.prompt, thinking=self.fit_options.thinking) for side in sides]
        engine.read(prompts[:1], layers=self.fit_options.layers)  # the first call makes the context
        start = time.perf_counter()
        engine.read(prompts, layers=self.fit_options.layers)
        per_read = (time.perf_counter() - start) / sum(len(p) for p in prompts)
        generate, score = self.reading.generated, 0
        per_generated = 0.0
        if level is not None:
            needed = reply_tokens(self._metric, 0) if self.trait is not None and self.trait.metric is not None else 0
            tokens = min(level.tokens[1], max(level.tokens[0], needed)) if needed else sum(level.tokens) / 2
            n_windows = 1 if self.window else len(windows_of(level, list(self.fit_options.layers)))
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

    def fit(self, report: Report | None = None) -> Fit:
        """Read and fit, without calibrating."""
        report = report or (lambda stage, tokens: None)
        share = self.reading.read / sum(len(pair.sides) for pair in self.data.pairs)
        last = 0

        def reading(done: int, total: int) -> None:
            nonlocal last
            report("reading", int(max(0, done - last) * share))
            last = done

        report("reading", 0)
        contrast = read_contrast(self.engine, self.data, self.fit_options, progress=reading)
        result = fit_directions(self.method, contrast, self.fit_options)
        return Fit(contrast, result, report_fit(self.method, contrast, self.fit_options, result, self.engine.info.n_layer))

    def run(self, report: Report | None = None) -> SteeringVector:
        """Train. Raises as the parts do; nothing is written anywhere."""
        return self.finish(self.fit(report), report)

    def finish(self, fit: Fit, report: Report | None = None) -> SteeringVector:
        """Calibrate what was fitted, as the options say."""
        report = report or (lambda stage, tokens: None)
        fitted = Fitted(self.name, fit.result.directions, fit.contrast.norms, self.fit_options.site)
        if self.options.op == "project":
            return self._projecting(fit, fitted, report)
        if self.level is None:
            vector, record = self._uncalibrated(fitted), None
        else:
            report("calibrating", 0)
            calibrated = self._calibrate(fitted, lambda tokens: report("calibrating", tokens))
            vector, record = calibrated.vector, calibrated.record
        provenance = self._provenance(fit, vector.layers)
        return vector.replace(identity=self.engine.info.identity, provenance=provenance, calibration=record)

    def _provenance(self, fit: Fit, layers: list[int]) -> dict[str, Any]:
        """All that it takes to repeat the fit, and the report on it."""
        strengths = fit.result.strengths
        return {
            "tool": f"steer-plugins {__version__}",
            "method": self.options.method,
            "positions": self.fit_options.positions,
            "site": self.fit_options.site,
            "source": {"kind": self.data.kind, "sha256": self.data.sha256, **self.data.extra},
            "n_pairs": fit.contrast.n_pairs,
            "n_held_out": len(self.held) if self.trait is None else len(self.trait.heldout_prompts),
            "seed": self.options.seed,
            "thinking": self.fit_options.thinking,
            "remove_neutral": self.fit_options.remove_neutral,
            "baseline": fit.contrast.baseline is not None,
            "layers": None if self.options.layers is None else list(self.fit_options.layers),
            "scope": self.options.scope,
            "op": self.options.op,
            "calibrate": self.options.calibrate,
            "model": self.engine.info.identity.label,
            "median_norms": {str(il): round(fit.contrast.norms[il], 4) for il in layers},
            "separation": {str(il): round(strengths[il], 4) for il in layers if il in strengths},
            **({"dose": {"median_norms": FIRST_DOSE, "measured": False}} if self.level is None else {}),
            **({"notes": fit.result.notes} if fit.result.notes else {}),
            "report": fit.report.to_dict(),
        }

    def _projecting(self, fit: Fit, fitted: Fitted, report: Report) -> SteeringVector:
        """All fitted layers, and what each strength was found to do."""
        keys = {(il, fitted.site): direction for il, direction in fitted.directions.items()}
        vector = SteeringVector(self.name, keys, op="project", default_scope="0-", identity=self.engine.info.identity)
        provenance = self._provenance(fit, vector.layers)
        provenance.pop("dose", None)
        if self.level is not None:
            report("calibrating", 0)
            measured = measure_projection(
                self.engine,
                vector,
                self.objective(),
                self.level,
                thinking=self.fit_options.thinking,
                advance=lambda tokens: report("calibrating", tokens),
            )
            provenance |= {"projection": measured.to_dict(), "recommended_strength": measured.best}
        return vector.replace(provenance=provenance)

    def _uncalibrated(self, fitted: Fitted) -> SteeringVector:
        """Strength 1.0 is a usual dose in residual norms: safer than a raw length, which means nothing across layers."""
        layers = sorted(fitted.directions)
        window = self.window or window_of(*UNCALIBRATED, layers)
        return fitted.vector(_within(window, layers), FIRST_DOSE, self.options.scope or "response")

    def _calibrate(self, fitted: Fitted, advance: Callable[[int], None]) -> Calibrated:
        assert self.level is not None
        sweep = Sweep(self.engine, fitted, self.objective(), self.level, thinking=self.fit_options.thinking, advance=advance)
        windows = [_within(self.window, sorted(fitted.directions))] if self.window else None
        return sweep.run(windows, [self.options.scope] if self.options.scope else None)

    def objective(self) -> Objective:
        """The trait's metric, or the log-probability contrast of what is held out."""
        if self.trait is None:
            return ContrastObjective(self.engine, self.held, thinking=self.fit_options.thinking)
        if self.trait.metric is not None:
            prompts = [chat(prompt) for prompt in self.trait.heldout_prompts]
            return TextObjective(self.trait.metric, self._metric, prompts)
        assert self.level is not None
        systems = self.trait.system_pairs
        pairs = []
        for i, prompt in enumerate(self.trait.heldout_prompts[: self.level.n_confirm]):
            positive, negative = systems[i % len(systems)]
            pairs.append(Pair(Side(chat(prompt, positive)), Side(chat(prompt, negative))))
        return ContrastObjective(self.engine, pairs, thinking=self.fit_options.thinking)


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


@dataclass(frozen=True)
class Repeat:
    """A fit that was made again. ``cosines``: ``{layer: cosine to the vector's own direction}``, None where it has none now."""

    training: Training
    fit: Fit
    identical: bool
    cosines: dict[int, float | None]


def options_of(vector: SteeringVector) -> TrainOptions:
    """The options that a vector was trained with. Raises VectorError for vectors that were not trained, but made otherwise."""
    made = vector.provenance or {}
    try:
        layers = made.get("layers")
        options = TrainOptions(
            method=_a(str, made["method"]),
            positions=_a(str, made["positions"]),
            layers=None if layers is None else tuple(_a(int, il) for il in _a(list, layers)),
            calibrate=_a(str, made.get("calibrate") or (vector.calibration or {}).get("level", "none")),
            scope=None if made.get("scope") is None else _a(str, made["scope"]),
            seed=_a(int, made["seed"]),
            thinking=None if made["thinking"] is None else _a(bool, made["thinking"]),
            remove_neutral=_a(bool, made.get("remove_neutral", False)),
            baseline=_a(bool, made.get("baseline", False)),
            op=_a(str, made.get("op", "add")),
            site=_a(str, made.get("site", "resid_post")),
        )
        _a(str, _a(dict, made["source"])["sha256"])
    except (KeyError, TypeError):
        raise VectorError(
            f"vector {vector.name!r} does not say how it was fitted, so it cannot be fitted again: use one made by steer train"
        ) from None
    return options


def check_source(vector: SteeringVector, source: Trait | ContrastData) -> None:
    """Raise DataError unless ``source`` is, byte for byte, what the vector was fitted to."""
    wanted = (vector.provenance or {})["source"]["sha256"]
    data = trait_data(source) if isinstance(source, Trait) else source
    if data.sha256 != wanted:
        what = f"the trait '{source.name}'" if isinstance(source, Trait) else f"{data.extra.get('file', 'the data')}"
        raise DataError(
            f"{what} is not what '{vector.name}' was fitted to (sha256 {data.sha256[:12]}, not {wanted[:12]}): "
            "find the old version, or fit a new vector"
        )


def train_again(
    engine: Engine, vector: SteeringVector, source: Trait | ContrastData, *, name: str | None = None, report: Report | None = None
) -> Repeat:
    """Repeat a fit from its provenance, and compare. On the same machine the directions are the same, bit for bit.

    (Other processors, thread counts or builds add up in another order.)

    Raises:
        VectorError: another model, or a vector without such a provenance. DataError: other data.
    """
    options = options_of(vector)
    vector.check_fits(engine.info.identity)
    check_source(vector, source)
    training = Training(engine, name or vector.name, source, options)
    fit = training.fit(report)
    identical, cosines = True, {}
    for (il, _), direction in vector.directions.items():
        now = fit.result.directions.get(il)
        identical = identical and now is not None and now.tobytes() == direction.tobytes()
        cosines[il] = None if now is None else float(np.dot(now.astype(np.float64), direction.astype(np.float64)))
    return Repeat(training, fit, identical, cosines)


def _a(kind: type, value: Any) -> Any:
    """``value`` if it is of that type. Raises TypeError."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError
    return value


def _with_baseline(data: ContrastData, wanted: bool | None) -> ContrastData:
    if wanted and not data.has_baseline:
        raise DataError('the pairs have no baseline: give each line a third side, "baseline", or leave --baseline out')
    if wanted is False and data.has_baseline:
        return replace(data, pairs=tuple(replace(pair, baseline=None) for pair in data.pairs))
    return data


def _within(window: tuple[int, int], layers: list[int]) -> tuple[int, int]:
    """The window, if any layer in it has a direction."""
    if not any(window[0] <= il <= window[1] for il in layers):
        raise DataError(f"layers {window[0]}-{window[1]} got no direction: the examples read the same there")
    return window
