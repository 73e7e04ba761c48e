"""How the strength of a term changes while a reply grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import SpecError

KINDS = ("linear", "cosine")
MAX_OVER = 4096
"""Longest decay in tokens: each step is a strength of its own to the engines."""


@dataclass(frozen=True)
class Schedule:
    """A decay over the tokens of a response. Without a schedule the strength is constant.

    The state that yields the first token of the response (that of the last prompt token) has the full strength; from
    there it falls to the floor in at most 64 steps, see ``docs/grammar.md``. The native planner works out what each token
    gets. Tokens before the response have the full
    strength. A reply that comes back as part of a prompt is steered as prompt, without the schedule.

    Args:
        kind: ``linear`` or ``cosine`` (half a wave, flat at both ends).
        over: tokens until the floor is reached, 1 to 4096.
        floor: what remains then, as a fraction of the strength, 0 to 1.

    Raises:
        SpecError: anything else.
    """

    kind: str
    over: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpecError(f"unknown schedule {self.kind!r:.60}: use {' or '.join(KINDS)}, or none for a constant strength")
        if isinstance(self.over, bool) or not isinstance(self.over, int) or not 1 <= self.over <= MAX_OVER:
            raise SpecError(f"a schedule over {self.over!r:.60} tokens: give a whole number from 1 to {MAX_OVER}")
        number = isinstance(self.floor, int | float) and not isinstance(self.floor, bool)
        if not number or not 0 <= self.floor <= 1:
            raise SpecError(f"the floor of a schedule is {self.floor!r:.60}: give a part of the strength, from 0 to 1")
        object.__setattr__(self, "floor", float(self.floor) + 0.0)

    def to_json(self) -> dict[str, Any]:
        """``{"kind": "linear", "over": 64}``, with ``"floor"`` where it is not 0."""
        data: dict[str, Any] = {"kind": self.kind, "over": self.over}
        if self.floor:
            data["floor"] = self.floor
        return data

    @classmethod
    def from_json(cls, data: Any) -> Schedule | None:
        """The schedule for JSON; None for ``{"kind": "constant"}``.

        Raises:
            SpecError: it is not a schedule.
        """
        if not isinstance(data, dict):
            raise SpecError(f'the schedule is {data!r:.60}: write it as {{"kind": "linear", "over": 64, "floor": 0.2}}')
        unknown = [key for key in data if key not in ("kind", "over", "floor")]
        if unknown:
            raise SpecError(f"the schedule has the unknown key {str(unknown[0])!r:.60}")
        if data.get("kind") == "constant":
            if len(data) > 1:
                raise SpecError("a constant schedule takes neither over nor floor")
            return None
        if "over" not in data:
            raise SpecError("the schedule does not say over how many tokens")
        return cls(data.get("kind", ""), data["over"], data.get("floor", 0.0))
