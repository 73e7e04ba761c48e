"""Reads what a contrast is fitted to: the sides of each pair, and how long hidden states are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from ...engine.base import Activations, Engine, GenerateRequest, Progress
from ...engine.base import Prompt as EnginePrompt
from ...errors import DataError
from .base import POSITIONS, Contrast, ContrastData, FitOptions, Pair, Side

NORM_TEXTS = 16
"""The median norm is taken over the tokens of so many texts, half of each pole: more would not move a median."""

NORM_BYTES = 64_000_000
"""Hidden states held at once while the norms are taken."""

Rows = dict[int, npt.NDArray[np.float32]]
"""``{layer: float32 [n_embd]}`` of one side."""


@dataclass(frozen=True)
class ReadingPlan:
    """What reading costs, in tokens: prompt tokens computed, and response tokens generated."""

    read: int
    generated: int


@dataclass(frozen=True)
class _Item:
    """What is computed of a side, and the engine's word for the tokens that are read of it."""

    prompt: EnginePrompt
    response: str | list[int] | None
    spot: str


def plan_reading(engine: Engine, data: ContrastData, options: FitOptions) -> ReadingPlan:
    """What :func:`read_contrast` will compute, as if no prefix were shared. Raises as :func:`read_contrast`."""
    _check(data, options)
    sides = [side for pair in data.pairs for side in pair.sides]
    tokens = sum(len(engine.tokenize(side.prompt, thinking=options.thinking)) for side in sides)
    generated = 0
    if options.positions != "last":
        tokens += sum(len(side.response or "") // 3 for side in sides)
        # what was generated is read once more, after its prompt
        generated = sum(_generates(side, options) for side in sides) * options.response_tokens
    return ReadingPlan(tokens + generated, generated)


def read_contrast(engine: Engine, data: ContrastData, options: FitOptions, *, progress: Progress | None = None) -> Contrast:
    """Hidden states of both sides of all pairs, and of the baselines where there are any. ``progress`` counts texts.

    ``last``: the last prompt token, or the last token of a text. ``response``: the mean over the response tokens. They are
    the given ones, or for chats without an answer a greedy reply; a plain text is all response but its position 0.
    ``answer``: the last token of the given answer, which may be cut anywhere and may be the same on both sides (repeng reads
    so: one opening under two personas). ``thinking``: the mean over the tokens between ``<think>`` and ``</think>``, or to
    the end of a reply that was cut; given, or generated with thinking on.
    A pair whose generated reply is empty, or holds no thoughts, is left out.

    Raises:
        DataError: pairs that have nothing to read at these positions; no pair is left.
    """
    _check(data, options)
    pairs = _items_of_pairs(engine, data.pairs, options)
    n = len(pairs)
    items = [side for column in zip(*pairs, strict=True) for side in column]  # positives, negatives, baselines
    rows, norms = _read_items(engine, items, _spread(n), options, progress)
    sides = [
        {il: np.stack([row[il] for row in rows[start : start + n]]) for il in options.layers} for start in range(0, len(rows), n)
    ]
    return Contrast(positive=sides[0], negative=sides[1], norms=norms, baseline=sides[2] if len(sides) > 2 else None)


def _check(data: ContrastData, options: FitOptions) -> None:
    if options.positions not in POSITIONS:
        raise DataError(f"unknown positions '{options.positions}': use {', '.join(POSITIONS)}")
    for pair in data.pairs:
        if options.positions == "last" and pair.same_prompt:
            _refuse(pair, "has the same prompt on both sides, so its last token tells nothing: use --positions response")
        if options.positions == "answer" and any(side.response is None for side in pair.sides):
            _refuse(pair, "gives no answer to read inside: end both chats with an assistant's message")
        if options.positions == "thinking" and any(isinstance(side.prompt, str) for side in pair.sides):
            _refuse(pair, "contains plain text, which has no thinking section: write chats, or use --positions response")


def _refuse(pair: Pair, what: str) -> NoReturn:
    raise DataError(f"{f'line {pair.line}' if pair.line else 'a pair'} {what}")


def _generates(side: Side, options: FitOptions) -> bool:
    """Whether the side's response has to be generated."""
    return options.positions in ("response", "thinking") and side.response is None and not isinstance(side.prompt, str)


# ---- what is read of each side ----


def _items_of_pairs(engine: Engine, pairs: Sequence[Pair], options: FitOptions) -> list[list[_Item]]:
    """The sides of each pair that has something to read on all of them."""
    sides = [side for pair in pairs for side in pair.sides]
    missing = [i for i, side in enumerate(sides) if _generates(side, options)]
    requests = [GenerateRequest(sides[i].prompt, max_tokens=options.response_tokens, thinking=options.thinking) for i in missing]
    replies = dict(zip(missing, engine.generate_many(requests) if requests else [], strict=True))
    thoughts = _Thoughts(engine, options) if options.positions == "thinking" else None
    kept, start = [], 0
    for pair in pairs:
        found: list[_Item | None] = []
        for i, side in enumerate(pair.sides, start=start):
            reply = replies.get(i)
            if thoughts is not None:
                found.append(thoughts.item(side, None if reply is None else reply.tokens))
                if found[-1] is None and reply is None:
                    _refuse(pair, "holds an answer without <think>: give the thoughts too, or use --positions response")
            else:
                response = side.response if reply is None else reply.text
                blank = reply is not None and not reply.text.strip()
                found.append(None if blank else _item(side, response, options))
        start += len(found)
        whole = [item for item in found if item is not None]
        if len(whole) == len(found):
            kept.append(whole)
    if not kept:
        if thoughts is not None:
            raise DataError("the model thinks in no pair: use a model that thinks, or another --positions")
        raise DataError("the model answers no pair with any text: give the answers in the pairs, or use --positions last")
    return kept


def _item(side: Side, response: str | None, options: FitOptions) -> _Item:
    if options.positions == "last":
        return _Item(side.prompt, None, "last")
    if options.positions == "answer":
        return _Item(side.prompt, response, "last")
    return _Item(side.prompt, response, "mean" if response is None else "response_mean")


class _Thoughts:
    """Finds what is thought in token ids; the tags may be one token each, or spelled out."""

    def __init__(self, engine: Engine, options: FitOptions) -> None:
        self._engine = engine
        self._thinking = options.thinking
        # what precedes any text: BOS, where the model wants it
        self._bos = _common(engine.tokenize("a"), engine.tokenize("b"))
        self._open, self._close = self._raw("<think>"), self._raw("</think>")

    def item(self, side: Side, reply: list[int] | None) -> _Item | None:
        """The side with its thoughts as the response, or None if it holds none."""
        prompt = self._engine.tokenize(side.prompt, thinking=self._thinking)
        response = reply if reply is not None else self._raw(side.response or "a")
        opened = _find(response, self._open)
        if opened >= 0:
            start = opened + len(self._open)
        elif _find_last(prompt, self._open) > _find_last(prompt, self._close):
            start = 0  # the template has opened the thought
        else:
            return None
        thought = response[start:]
        closed = _find(thought, self._close)
        thought = thought[:closed] if closed >= 0 else thought
        return _Item(prompt + response[:start], thought, "response_mean") if thought else None

    def _raw(self, text: str) -> list[int]:
        return self._engine.tokenize(text)[self._bos :]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _find(tokens: Sequence[int], wanted: Sequence[int]) -> int:
    """Where ``wanted`` first stands in ``tokens``, or -1."""
    size = len(wanted)
    return next((i for i in range(len(tokens) - size + 1) if list(tokens[i : i + size]) == list(wanted)), -1)


def _find_last(tokens: Sequence[int], wanted: Sequence[int]) -> int:
    found = _find(tokens[::-1], wanted[::-1])
    return -1 if found < 0 else len(tokens) - found - len(wanted)


# ---- reading ----


def _spread(n_pairs: int) -> list[int]:
    """Up to NORM_TEXTS of the first two columns' items, evenly over the pairs, half of them positive."""
    half = min(NORM_TEXTS // 2, n_pairs)
    picks = [i * n_pairs // half for i in range(half)]
    return picks + [n_pairs + i for i in picks]


def _read_items(
    engine: Engine, items: Sequence[_Item], whole: Sequence[int], options: FitOptions, progress: Progress | None
) -> tuple[list[Rows], dict[int, float]]:
    """A row for each item and layer, and the median norms over all tokens of the items in ``whole``.

    Those are read at all tokens, which costs no time but memory, so in parts where they are many.
    """
    rows: list[Rows] = [{} for _ in items]
    lengths: dict[int, list[np.ndarray]] = {il: [] for il in options.layers}
    done = 0

    def counted(count: int, total: int) -> None:
        if progress is not None:
            progress(done + count, len(items))

    at_once = _whole_at_once(engine, [items[i] for i in whole], options)
    rest = [i for i in range(len(items)) if i not in set(whole)]
    for start in range(0, len(whole), at_once):
        part = list(whole[start : start + at_once])
        # the last part goes with all the others: what it shares with them is computed once
        indices = part + (rest if start + at_once >= len(whole) else [])
        spots = ["all"] * len(part) + [items[i].spot for i in indices[len(part) :]]
        for i, spot, one in zip(indices, spots, _read(engine, [items[i] for i in indices], spots, options, counted), strict=True):
            if spot == "all":
                for il, values in one.values.items():
                    lengths[il].append(np.linalg.norm(values[1:].astype(np.float64), axis=1))
                    rows[i][il] = _reduced(values, items[i].spot, one.n_prompt)
            else:
                rows[i] = {il: values[0] for il, values in one.values.items()}
        done += len(indices)
    return rows, {il: _median(il, parts) for il, parts in lengths.items()}


def _whole_at_once(engine: Engine, items: Sequence[_Item], options: FitOptions) -> int:
    longest = 1
    for item in items:
        response = item.response or []
        longest = max(longest, len(engine.tokenize(item.prompt, thinking=options.thinking)) + len(response))
    return max(1, min(len(items), NORM_BYTES // (longest * len(options.layers) * engine.info.n_embd * 4)))


def _read(
    engine: Engine, items: Sequence[_Item], spots: Sequence[str], options: FitOptions, progress: Progress
) -> list[Activations]:
    """Activations of each item at its spot: in one call, so that prefixes are shared, or one for each kind of item."""
    if engine.mixed_positions:
        asked: list[tuple[EnginePrompt, str | list[int]]] = [(item.prompt, item.response or []) for item in items]
        return engine.read_pairs(
            asked,
            layers=options.layers,
            site=options.site,
            positions=list(spots),  # type: ignore[arg-type]
            thinking=options.thinking,
            progress=progress,
        )
    results: list[Activations | None] = [None] * len(items)
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, (item, spot) in enumerate(zip(items, spots, strict=True)):
        kinds.setdefault((spot, item.response is not None), []).append(i)
    done = 0
    for (spot, answered), indices in kinds.items():

        def counted(count: int, total: int, before: int = done) -> None:
            progress(before + count, len(items))

        where = {"layers": options.layers, "site": options.site, "thinking": options.thinking, "progress": counted}
        if answered:
            pairs = [(items[i].prompt, items[i].response or []) for i in indices]
            found = engine.read_pairs(pairs, positions=spot, **where)  # type: ignore[arg-type]
        else:
            found = engine.read([items[i].prompt for i in indices], positions=spot, **where)  # type: ignore[arg-type]
        for i, one in zip(indices, found, strict=True):
            results[i] = one
        done += len(indices)
        progress(done, len(items))
    return [one for one in results if one is not None]


def _reduced(values: npt.NDArray[np.float32], spot: str, n_prompt: int) -> npt.NDArray[np.float32]:
    """What the engine would have returned for ``spot``, of the states of all tokens."""
    if spot == "last":
        return values[-1]
    part = values[n_prompt if spot == "response_mean" else 1 :]
    mean: npt.NDArray[np.float32] = part.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def _median(il: int, parts: Sequence[np.ndarray]) -> float:
    """Median length over all tokens but position 0, in float64. Raises DataError."""
    joined = np.concatenate(parts)
    norm = float(np.median(joined)) if joined.size else float("nan")
    if not np.isfinite(norm) or norm <= 0.0:
        raise DataError(f"the hidden states at layer {il} have no usable length: the texts are too short to read")
    return norm
