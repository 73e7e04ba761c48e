"""A reply in the making: the steering of its tokens, its sampler and its text."""

from __future__ import annotations

import codecs
from functools import cached_property
from typing import Any

from ..errors import SpecError
from .base import GenerateRequest, Generation, as_steering
from .batching import MIN_SHARED
from .sampler import Sampler
from .session import COPY_COST, BatchToken, SequenceSteering, Session, held_prefix


class GrowingReply:
    """One reply in the making, on one sequence of a session."""

    def __init__(self, session: Session, sequence: int, request: GenerateRequest, prompt: list[int], n_ctx: int) -> None:
        if request.max_tokens < 1:
            raise SpecError(f"max_tokens is {request.max_tokens}: ask for at least 1")
        self.session = session
        self.sequence = sequence
        self.request = request
        self.prompt = prompt
        self.tokens: list[int] = []
        self.finished: str | None = None
        self.text = ""
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n_max = min(request.max_tokens, n_ctx - len(prompt))
        self.steering = SequenceSteering(session, as_steering(request.steering), prompt)
        self._changed = False  # since ranges were set
        self._sampler = Sampler(session.c, request, session.model.n_vocab)

    @cached_property
    def wanted(self) -> list[tuple[int, int]]:
        """The prompt as what the KV cache has to hold: tokens and edit ids."""
        return list(zip(self.prompt, self.steering.edits(), strict=True))

    def start(self) -> list[BatchToken]:
        """Set the ranges of the prompt and return what has to be computed of it."""
        session, n = self.session, len(self.prompt)
        source, _ = session.source_of(self.sequence, self.wanted)
        if source != self.sequence:
            session.copy(source, self.sequence)
        first = session.reuse(self.sequence, self.wanted)
        session.clear_ranges(self.sequence)
        self.steering.apply(self.sequence)
        return [BatchToken(self.prompt[p], p, self.sequence, output=p == n - 1) for p in range(first, n)]

    def next_entry(self) -> BatchToken:
        """The token sampled last, with its steering set."""
        token = self.tokens[-1]
        position = len(self.prompt) + len(self.tokens) - 1
        if self.steering.feed(token) or self._changed:
            self.steering.apply(self.sequence, position)
            self._changed = False
        return BatchToken(token, position, self.sequence, output=True)

    def change(self, steering: Any) -> None:
        """Another steering from the next token on."""
        self.steering = SequenceSteering(self.session, as_steering(steering), self.prompt)
        for token in self.tokens[:-1]:
            self.steering.feed(token)
        self._changed = True

    def sample(self, index: int) -> str:
        """Draw a token from batch entry ``index``; returns the text it completes."""
        token = self._sampler.sample(self.session.pointer, index)
        if self.session.model.is_end(token):
            self.finished = "stop"
            return self._flush()
        self.tokens.append(token)
        before = len(self.text)
        self.text += self._bytes.decode(self.session.model.piece(token))
        cut = min((i for i in (self.text.find(s, max(0, before - len(s))) for s in self.request.stop if s) if i >= 0), default=-1)
        if cut >= 0:
            self.text = self.text[:cut]
            self.finished = "stop"
        elif len(self.tokens) >= self._n_max:
            self.finished = "length"
            self._flush()
        return self.text[before:]

    def _flush(self) -> str:
        rest = self._bytes.decode(b"", final=True)
        self.text += rest
        return rest

    def result(self) -> Generation:
        return Generation(self.text, list(self.tokens), list(self.prompt), self.finished or "cancelled")

    def close(self) -> None:
        self._sampler.close()


def prefill(session: Session, replies: list[GrowingReply]) -> None:
    """Compute the prompts of new replies and draw their first tokens. Those that begin as another does wait for it."""
    while replies:
        now: list[GrowingReply] = []
        later: list[GrowingReply] = []
        for reply in replies:
            there = session.source_of(reply.sequence, reply.wanted)[1]
            coming = max((held_prefix(other.wanted, reply.wanted) for other in now), default=0)
            worth = session.model.shares_tokens and coming >= max(there + MIN_SHARED, session.limits.n_ctx // COPY_COST)
            (later if worth else now).append(reply)
        _prefill_together(session, now)
        replies = later


def _prefill_together(session: Session, replies: list[GrowingReply]) -> None:
    entries = [(e, reply) for reply in replies for e in reply.start()]
    n_batch = session.limits.n_batch
    for start in range(0, len(entries), n_batch):
        part = entries[start : start + n_batch]
        session.decode([e for e, _ in part])
        for k, (e, reply) in enumerate(part):
            if e.output:
                reply.sample(k)
