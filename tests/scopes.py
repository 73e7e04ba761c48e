"""The rules of scopes and schedules a second time, from the words of docs/grammar.md: what the native planner is held against."""

from __future__ import annotations

import math


def factor(kind: str, over: int, floor: float, n: int) -> float:
    """What is left of a strength where response token ``n`` is decided; a schedule has at most 64 steps."""
    if kind == "constant" or n <= 0:
        return 1.0
    if n >= over:
        return floor
    held = math.ceil(over / 64)
    part = (n // held * held) / over
    return floor + (1.0 - floor) * (1.0 - part if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * part)))


def acts(scope: str, position: int, n_prompt: int, *, thinking: bool = False, tool: bool = False) -> bool:
    """Whether a term with this scope acts at a position, given the phase of the response there."""
    first, dash, last = scope.partition("-")
    if dash:
        return int(first) <= position and (not last or position <= int(last))
    response = position >= max(1, n_prompt - 1)
    return {
        "all": position >= 1,
        "prompt": position >= 1 and not response,
        "response": response,
        "thinking": response and thinking,
        "answer": response and not thinking and not tool,
    }[scope]
