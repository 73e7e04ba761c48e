"""Where contrasts come from: a JSONL file of pairs, or a trait."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..traits import Trait
from .base import ContrastData, Pair, Prompt, Side
from .lines import Line, lines_of, read_file

MAX_PAIRS = 100_000
HELDOUT_SHARE = 5
"""One pair in so many is held out for calibration."""

_SIDES = ("positive", "negative")
_BASELINE = "baseline"


def load_pairs(path: str | Path) -> ContrastData:
    """The pairs in a JSONL file: on each line ``{"positive": ..., "negative": ...}``.

    A side is a text, or a chat (a list of ``{"role": ..., "content": ...}``). A chat that ends with an assistant message
    is a prompt and the response to it. A third side, ``"baseline"``, leans to neither pole; all lines have one or none.
    Blank lines are skipped.

    Raises:
        DataError: one sentence with the line number: a missing, oversized or empty file, a line that is not JSON, lacks a
            side, has sides of different kinds or equal ones, or anything that is not a text or chat.
    """
    return pairs_of(read_file(path, "the pairs file"), str(path))


def pairs_of(raw: bytes, source: str) -> ContrastData:
    """:func:`load_pairs`, of the bytes of such a file; ``source`` names it in errors. Raises DataError."""
    pairs: list[Pair] = []
    for line in lines_of(raw, source):
        pairs.append(_pair(line))
        if len(pairs) > MAX_PAIRS:
            raise DataError(f"{source} holds more than {MAX_PAIRS} pairs: take a part of them")
        if (pairs[-1].baseline is None) != (pairs[0].baseline is None):
            line.refuse('differs from the lines before, some have a "baseline" and others none: make them alike')
    if not pairs:
        raise DataError(f'{source} holds no pairs: write {{"positive": ..., "negative": ...}} on each line')
    return ContrastData("pairs", tuple(pairs), hashlib.sha256(raw).hexdigest(), {"file": Path(source).name})


def trait_data(trait: Trait, *, baseline: bool = False) -> ContrastData:
    """Pairs of a trait: each training prompt under a positive and a negative system prompt, which take turns.

    ``baseline``: as a third side, the prompt without a system prompt.
    """
    systems = trait.system_pairs
    pairs = []
    for i, prompt in enumerate(trait.train_prompts):
        positive, negative = systems[i % len(systems)]
        neutral = Side(chat(prompt)) if baseline else None
        pairs.append(Pair(Side(chat(prompt, positive)), Side(chat(prompt, negative)), baseline=neutral))
    content = json.dumps(trait.to_dict(), sort_keys=True).encode()
    system = json.dumps(trait.to_dict()["system"], sort_keys=True).encode()
    extra = {"trait": trait.name, "poles": dict(trait.poles), "system_sha256": hashlib.sha256(system).hexdigest()}
    return ContrastData("trait", tuple(pairs), hashlib.sha256(content).hexdigest(), extra)


def hold_out(data: ContrastData, seed: int = 0) -> tuple[ContrastData, tuple[Pair, ...]]:
    """Split pairs into those to fit and a fifth (drawn with ``seed``, in file order) to calibrate on.

    Raises DataError for fewer than five pairs.
    """
    n = len(data.pairs)
    if n < HELDOUT_SHARE:
        raise DataError(
            f"{n} pair{'s are' if n > 1 else ' is'} too few to hold a fifth out for calibration: "
            f"give at least {HELDOUT_SHARE}, or use --calibrate none"
        )
    held = set(random.Random(seed).sample(range(n), n // HELDOUT_SHARE))
    train = tuple(pair for i, pair in enumerate(data.pairs) if i not in held)
    return (
        ContrastData(data.kind, train, data.sha256, data.extra),
        tuple(pair for i, pair in enumerate(data.pairs) if i in held),
    )


def chat(user: str, system: str | None = None) -> list[dict[str, str]]:
    """Chat messages of one user turn."""
    head = [{"role": "system", "content": system}] if system is not None else []
    return [*head, {"role": "user", "content": user}]


def _pair(line: Line) -> Pair:
    data = line.json()
    if not isinstance(data, dict):
        line.refuse(f"holds {_kind(data)}: write an object with the keys positive and negative")
    for key in _SIDES:
        if key not in data:
            line.refuse(f'lacks the side "{key}": a pair needs both')
    for key in data:
        if key not in (*_SIDES, _BASELINE):
            line.refuse(f"has the unknown key {_shown(key)}: a pair has positive and negative, or a baseline too")
    positive, negative = (side_of(data[key], key, line) for key in _SIDES)
    baseline = side_of(data[_BASELINE], _BASELINE, line) if _BASELINE in data else None
    sides = [positive, negative] + ([baseline] if baseline is not None else [])
    if len({isinstance(side.prompt, str) for side in sides}) > 1:
        line.refuse("is lopsided, one side is a text and the other a chat: make them alike")
    if len({side.response is None for side in sides}) > 1:
        line.refuse("is lopsided, one side has an assistant's answer and the other none: make them alike")
    if positive == negative:
        line.refuse("has two equal sides: they need to differ")
    return Pair(positive, negative, line.number, baseline)


def side_of(value: Any, key: str, line: Line) -> Side:
    """A prompt, and the response if there is one, of a text or a list of messages that stands under ``key``.

    Raises DataError.
    """
    if isinstance(value, str):
        return Side(_text(value, key, line))
    if not isinstance(value, list):
        line.refuse(f'"{key}" is {_kind(value)}: it should be a text or a list of messages')
    if not value:
        line.refuse(f'"{key}" is an empty chat: it needs at least a user\'s message')
    messages: list[dict[str, str]] = []
    for i, message in enumerate(value, start=1):
        where = f"{key}, message {i}"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            line.refuse(f'"{where}" should be an object with the keys role and content')
        role = _text(message["role"], f"{where}, role", line)
        messages.append({"role": role, "content": _text(message["content"], f"{where}, content", line)})
    prompt: Prompt = messages
    response = None
    if messages[-1]["role"] == "assistant":
        prompt, response = messages[:-1], messages[-1]["content"]
    if not any(message["role"] == "user" for message in prompt if isinstance(message, dict)):
        line.refuse(f'"{key}" has no user\'s message before the answer: add one')
    return Side(prompt, response)


def _text(value: Any, key: str, line: Line) -> str:
    if not isinstance(value, str):
        line.refuse(f'"{key}" is {_kind(value)}: it should be a text')
    if not value.strip():
        line.refuse(f'"{key}" is blank: write something there')
    # JSON can spell both, and neither survives the way to a model
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        line.refuse(f'"{key}" holds a NUL or half a surrogate pair: remove that character')
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else "an object"


def _shown(value: str) -> str:
    text = " ".join(value.split())
    return json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False)
