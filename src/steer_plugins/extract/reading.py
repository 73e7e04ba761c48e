"""Reads what a contrast is fitted to: both sides of each pair, and how long hidden states are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..engine.base import Engine, GenerateRequest, Progress
from ..errors import DataError
from .base import POSITIONS, Contrast, ContrastData, FitOptions, Pair, Side

NORM_TEXTS = 16
"""The median norm is taken over the tokens of so many texts, half of each pole: more would not move a median."""

NORM_BYTES = 64_000_000
"""Hidden states held at once while the norms are taken."""


@dataclass(frozen=True)
class ReadingPlan:
    """What reading costs, in tokens: prompt tokens computed, and response tokens generated."""

    read: int
    generated: int


def plan_reading(engine: Engine, data: ContrastData, options: FitOptions) -> ReadingPlan:
    """What :func:`read_contrast` will compute, as if no prefix were shared. Raises as :func:`read_contrast`."""
    _check(data, options)
    sides = [side for pair in data.pairs for side in (pair.positive, pair.negative)]
    lengths = [len(engine.tokenize(side.prompt, thinking=options.thinking)) for side in sides]
    generated = 0
    if options.positions == "response":
        missing = [i for i, side in enumerate(sides) if _generates(side)]
        generated = len(missing) * options.response_tokens
        # what was generated is read once more, after its prompt
        lengths += [options.response_tokens] * len(missing)
        lengths += [len(s.response or "") // 3 for s in sides if s.response is not None]
    per_text = sum(lengths) / max(1, len(sides))
    return ReadingPlan(int(sum(lengths) + per_text * min(NORM_TEXTS, len(sides))), generated)


def read_contrast(engine: Engine, data: ContrastData, options: FitOptions, *, progress: Progress | None = None) -> Contrast:
    """Hidden states of both sides of all pairs. ``progress`` counts texts.

    ``last``: the last prompt token, or the last token of a text. ``response``: the mean over the response tokens. They are
    the given ones, or for chats without an answer a greedy reply; a plain text is all response but its position 0.
    A pair whose generated reply is empty is left out.

    Raises:
        DataError: a pair whose sides differ in their answers only and ``last``; no pair with a response is left.
    """
    _check(data, options)
    pairs = list(data.pairs)
    if options.positions == "response":
        pairs = _answered(engine, pairs, options)
    sides = [pair.positive for pair in pairs] + [pair.negative for pair in pairs]
    norm_sides = _spread(sides, len(pairs))
    total = len(sides) + len(norm_sides)

    def counted(offset: int) -> Progress | None:
        return None if progress is None else lambda done, _: progress(offset + done, total)

    rows = _read_sides(engine, sides, options, counted(0))
    norms = _median_norms(engine, norm_sides, options, counted(len(sides)))
    n = len(pairs)
    return Contrast(
        positive={il: np.stack([row[il] for row in rows[:n]]) for il in options.layers},
        negative={il: np.stack([row[il] for row in rows[n:]]) for il in options.layers},
        norms=norms,
    )


def _check(data: ContrastData, options: FitOptions) -> None:
    if options.positions not in POSITIONS:
        raise DataError(f"Unknown positions '{options.positions}': use {' or '.join(POSITIONS)}.")
    if options.positions == "last":
        for pair in data.pairs:
            if pair.same_prompt:
                where = f"Line {pair.line}" if pair.line else "A pair"
                raise DataError(
                    f"{where} has the same prompt on both sides, so its last token tells nothing: use --positions response."
                )


def _generates(side: Side) -> bool:
    return side.response is None and not isinstance(side.prompt, str)


def _answered(engine: Engine, pairs: Sequence[Pair], options: FitOptions) -> list[Pair]:
    """Pairs whose chats all have a response; what is missing is generated greedily."""
    sides = [side for pair in pairs for side in (pair.positive, pair.negative)]
    missing = [i for i, side in enumerate(sides) if _generates(side)]
    requests = [GenerateRequest(sides[i].prompt, max_tokens=options.response_tokens, thinking=options.thinking) for i in missing]
    for i, reply in zip(missing, engine.generate_many(requests), strict=True):
        sides[i] = replace(sides[i], response=reply.text)
    kept = []
    for k, pair in enumerate(pairs):
        positive, negative = sides[2 * k], sides[2 * k + 1]
        if all(side.response is None or side.response.strip() for side in (positive, negative)):
            kept.append(Pair(positive, negative, pair.line))
    if not kept:
        raise DataError("The model answers no pair with any text: give the answers in the pairs, or use --positions last.")
    return kept


def _read_sides(
    engine: Engine, sides: Sequence[Side], options: FitOptions, progress: Progress | None
) -> list[dict[int, np.ndarray]]:
    """One row for each side and layer, in the order of ``sides``."""
    rows: list[dict[int, np.ndarray]] = [{} for _ in sides]
    answered = [i for i, s in enumerate(sides) if s.response is not None and options.positions == "response"]
    others = [i for i in range(len(sides)) if i not in set(answered)]
    if answered:
        found = engine.read_pairs(
            [(sides[i].prompt, sides[i].response or "") for i in answered],
            layers=options.layers,
            site=options.site,
            positions="response_mean",
            thinking=options.thinking,
            progress=progress,
        )
        for i, one in zip(answered, found, strict=True):
            rows[i] = {il: value[0] for il, value in one.values.items()}
    if others:
        found = engine.read(
            [sides[i].prompt for i in others],
            layers=options.layers,
            site=options.site,
            positions="last" if options.positions == "last" else "mean",
            thinking=options.thinking,
            progress=_after(progress, len(answered)),
        )
        for i, one in zip(others, found, strict=True):
            rows[i] = {il: value[0] for il, value in one.values.items()}
    return rows


def _spread(sides: Sequence[Side], n_pairs: int) -> list[Side]:
    """Up to NORM_TEXTS sides, evenly over the pairs, half of them positive."""
    half = min(NORM_TEXTS // 2, n_pairs)
    picks = [i * n_pairs // half for i in range(half)]
    return [sides[i] for i in picks] + [sides[n_pairs + i] for i in picks]


def _median_norms(engine: Engine, sides: Sequence[Side], options: FitOptions, progress: Progress | None) -> dict[int, float]:
    """Median length of hidden states over all tokens but position 0, in float64."""
    longest = max(len(engine.tokenize(side.prompt, thinking=options.thinking)) for side in sides)
    per_text = longest * len(options.layers) * engine.info.n_embd * 4
    step = max(1, min(len(sides), NORM_BYTES // max(1, per_text)))
    lengths: dict[int, list[np.ndarray]] = {il: [] for il in options.layers}
    for start in range(0, len(sides), step):
        for one in _read_whole(engine, sides[start : start + step], options):
            for il, value in one.items():
                lengths[il].append(np.linalg.norm(value[1:].astype(np.float64), axis=1))
        if progress is not None:
            progress(min(start + step, len(sides)), len(sides))
    norms = {}
    for il, parts in lengths.items():
        joined = np.concatenate(parts)
        norms[il] = float(np.median(joined)) if joined.size else float("nan")
        if not np.isfinite(norms[il]) or norms[il] <= 0.0:
            raise DataError(f"The hidden states at layer {il} have no usable length: the texts are too short to read.")
    return norms


def _read_whole(engine: Engine, sides: Sequence[Side], options: FitOptions) -> list[dict[int, np.ndarray]]:
    read: Callable[..., list] = engine.read
    items: list = [side.prompt for side in sides]
    if options.positions == "response" and all(side.response is not None for side in sides):
        read, items = engine.read_pairs, [(side.prompt, side.response) for side in sides]
    found = read(items, layers=options.layers, site=options.site, positions="all", thinking=options.thinking)
    return [one.values for one in found]


def _after(progress: Progress | None, offset: int) -> Progress | None:
    return None if progress is None else lambda done, total: progress(offset + done, offset + total)
