"""Steerings applied to one native context. When and where their terms act is the native planner's to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np

from .. import native
from ..errors import EngineError, SpecError, VectorError
from ..steering.terms import Steering, Term
from ..steering.vector import ModelIdentity, SteeringVector, scope_range

UNKNOWN_EDIT = -1
"""Edit id of tokens computed under an add callback: what was applied is not known, so they are never shared."""


class ModelFacts(Protocol):
    """What has to be known of a model to steer it. ``tags``: how its thoughts are told from its answer."""

    identity: ModelIdentity
    steer: native.SteerInfo
    tags: native.Tags

    def token_text(self, token: int) -> bytes:
        """What a token prints, special ones included."""
        ...


class SteeredContext:
    """The steering of one ``llama_context``.

    Args:
        facts: the model's.
        steer: the native steering of the context.
    """

    def __init__(self, facts: ModelFacts, steer: native.SteerContext) -> None:
        self.facts = facts
        self.steer = steer
        self.edits_unknown = False
        self._pinned: list[int] = []  # vectors that a callback uses

    def pin(self, vectors: Sequence[SteeringVector]) -> list[int]:
        """Native ids of vectors that a callback uses: they stay until :meth:`unpin`, ready for their op.

        Raises:
            VectorError: a vector does not fit the model.
        """
        for vector in vectors:
            check_fits(vector, self.facts)
        for vector in vectors:
            self._pinned.append(self.steer.pin(_native(vector), native.OPS[vector.op]))
        return list(self._pinned)

    def unpin(self) -> None:
        """Let the vectors of callbacks go."""
        while self._pinned:
            self.steer.unpin(self._pinned.pop())

    def edit_of(self, sequence: int, position: int) -> int:
        """Edit id of a token that was or would be computed now."""
        return UNKNOWN_EDIT if self.edits_unknown else self.steer.edit_id(sequence, position)

    def clear_ranges(self, sequence: int) -> None:
        """Forget the steering and the reading wishes of a sequence."""
        self.steer.clear_sequence(sequence)

    def check_decoded(self) -> None:
        """After a decode: was all applied and read that should be? A silent no-op is the worst failure of steering.

        Raises:
            EngineError: a layer that was to be steered or read was never passed through, or there was no room.
        """
        message = self.steer.sequence_error()
        if message is not None:
            raise EngineError(message)


class SequenceSteering:
    """The steering of one text, token by token.

    Args:
        context: where it is applied.
        steering: what is applied; its gates are decided.
        prompt: token ids. The response begins at the last of them.

    Raises:
        SpecError: the steering cannot be applied exactly as it is written.
        VectorError: a vector does not fit the model.
    """

    def __init__(self, context: SteeredContext, steering: Steering, prompt: Sequence[int]) -> None:
        if steering.gates:
            name = next(term.vector.name for term in steering if term.gate is not None)
            raise SpecError(f"the gate of {name!r} is not decided: use an Engine, or decide it on the prompt (Steering.decided)")
        self._context = context
        self._length = len(prompt)
        facts = context.facts
        for term in steering.terms:
            check_fits(term.vector, facts)
        tags = facts.tags
        longest = max((len(tag.encode()) for tag in (*tags.open, *tags.close)), default=0)
        end = b"".join(map(facts.token_text, prompt[-longest - _SPACES :] if longest else ()))
        self._plan = native.Plan(
            context.steer.library,
            [_plan_term(term) for term in steering.terms],
            max(0, len(prompt) - 1),
            replace(tags, prompt_end=end.decode(errors="replace").replace("\0", " ")),
        )
        self._tracks = self._plan.tracks

    def feed(self, token: int) -> bool:
        """Take note of a sampled or given response token. True: another steering acts from it on."""
        position, self._length = self._length, self._length + 1
        return self._tracks and self._plan.feed(position, self._context.facts.token_text(token))

    def edits(self) -> list[int]:
        """Edit ids of the prompt and of all tokens that were fed: what each is remembered by."""
        if self._context.edits_unknown:
            return [UNKNOWN_EDIT] * self._length
        return self._context.steer.edits(self._plan, range(self._length))

    def apply(self, sequence: int, first: int = 0) -> None:
        """Let the tokens of a sequence from position ``first`` on get what the plan says, those to come included."""
        self._context.steer.apply(self._plan, sequence, first)


_SPACES = 4  # tokens of white space that may follow a tag at the end of a prompt

_natives: WeakValueDictionary[str, native.PlanVector] = WeakValueDictionary()


def _native(vector: SteeringVector) -> native.PlanVector:
    """A vector as the native side takes it; one for all plans that are alive."""
    made = _natives.get(vector.content_hash)
    if made is None:
        places = list(vector.directions)
        columns = {places.index(key): (c.read, c.write, c.gain, c.bias, c.knee) for key, c in vector.columns.items()}
        made = _natives[vector.content_hash] = native.PlanVector(
            vector.content_hash,
            [layer for layer, _ in places],
            [native.SITES[site] for _, site in places],
            np.stack([vector.directions[place] for place in places]),
            [vector.scales[place] for place in places],
            columns,
        )
    return made


def _plan_term(term: Term) -> native.PlanTerm:
    scope = term.effective_scope
    window = scope_range(scope)
    first, last = window if window is not None else (0, None)
    il_first, il_last = term.layers if term.layers is not None else (-1, -1)
    schedule = term.schedule
    return native.PlanTerm(
        vector=_native(term.vector),
        strength=0.0 if term.is_zero else term.strength,
        op=native.OPS[term.effective_op],
        il_first=il_first,
        il_last=il_last,
        stream=native.STREAM_ALL if term.stream is None else term.stream,
        scope=native.SCOPES[scope] if window is None else native.SCOPE_RANGE,
        first=first,
        last=-1 if last is None else last,
        schedule=native.SCHEDULES[schedule.kind if schedule is not None else "constant"],
        over=schedule.over if schedule is not None else 0,
        floor=schedule.floor if schedule is not None else 0.0,
        level=term.level if term.level is not None else 0.0,
        name=repr(term.vector.name),
    )


def check_fits(vector: SteeringVector, model: ModelFacts) -> None:
    """Raise VectorError when a vector is not for this model: identity, width, layers or sites."""
    vector.check_fits(model.identity)
    for site in vector.sites:
        if site not in model.steer.sites:
            raise VectorError(
                f"vector {vector.name!r} acts at {site}, which {model.identity.architecture} does not offer: "
                f"it has {', '.join(model.steer.sites)}"
            )
