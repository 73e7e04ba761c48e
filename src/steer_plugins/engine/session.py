"""One llama_context: batches, logits, and the tokens that its KV cache holds with the edits they were computed under."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from .model import LoadedModel, shared_log
from .steered import UNKNOWN_EDIT, SequenceSteering, SteeredContext

__all__ = [
    "COPY_COST",
    "BatchToken",
    "SessionLimits",
    "SequenceSteering",
    "Session",
    "chunks",
    "cleaned",
    "held_prefix",
    "shared_prefix",
]

COPY_COST = 64
"""Copying the buffer of so many tokens costs no more than computing one. (It is far less in models of any size.)"""


@dataclass(frozen=True)
class BatchToken:
    """One token of a batch. ``also``: further sequences that it belongs to, in a context where they share their buffer."""

    token: int
    position: int
    sequence: int = 0
    output: bool = False
    also: tuple[int, ...] = ()


@dataclass(frozen=True)
class SessionLimits:
    """Sizes of a context. ``n_ctx`` is for one sequence; ``unified``: sequences share one KV buffer and may share prefixes."""

    n_ctx: int
    n_seq: int = 1
    unified: bool = False
    n_batch: int = 512
    n_threads: int = 4
    n_threads_batch: int = 4


class Session(SteeredContext):
    """A context of a model, with its KV cache. Not thread safe.

    ``bare``: an unmodified library computes as if we were not there; such a context cannot be steered.

    Raises:
        EngineError: the context cannot be made (usually: not enough memory).
    """

    def __init__(self, model: LoadedModel, limits: SessionLimits, *, bare: bool = False) -> None:
        self.model = model
        self.limits = limits
        c = self.c = model.c
        params = c.llama_context_default_params()
        params.n_ctx = limits.n_ctx * limits.n_seq
        params.n_batch = limits.n_batch
        params.n_ubatch = min(limits.n_batch, 512)
        params.n_seq_max = limits.n_seq
        params.n_threads = limits.n_threads
        params.n_threads_batch = limits.n_threads_batch
        params.kv_unified = limits.unified
        log = shared_log(c)
        log.errors = []
        prepared = model.steering.prepare(params)
        if bare:
            params.cb_eval = type(params.cb_eval)()
        self.pointer = c.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            reason = log.errors[-1] if log.errors else "no reason given"
            raise EngineError(f"a context of {params.n_ctx} tokens could not be made ({reason}): use a smaller --n-ctx")
        self.memory = c.llama_get_memory(self.pointer)
        super().__init__(model, model.steering.attach(prepared, self.pointer))
        self._batch = c.llama_batch_init(limits.n_batch, 0, limits.n_seq)
        self.kv: dict[int, list[tuple[int, int]]] = {s: [] for s in range(limits.n_seq)}

    # ---- decoding ----

    def decode(self, entries: Sequence[BatchToken]) -> None:
        """Compute one batch of at most ``n_batch`` tokens, and make sure that all was applied and read that should be.

        Raises:
            EngineError: the native call failed, or a layer that should be steered was not.
        """
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, e in enumerate(entries):
            batch.token[i] = e.token
            batch.pos[i] = e.position
            batch.n_seq_id[i] = 1 + len(e.also)
            batch.seq_id[i][0] = e.sequence
            for k, other in enumerate(e.also, start=1):
                batch.seq_id[i][k] = other
            batch.logits[i] = e.output
        with self.steer.interrupts_held():
            code = self.steer.decode(self.c, batch)
        if code != 0:
            self.steer.raise_callback_error()
            if code == 1:
                raise EngineError("the context is full: use a larger --n-ctx or a shorter prompt")
            raise EngineError(f"llama.cpp failed to compute a batch (code {code}): {self.steer.error()}")
        for e in entries:
            for sequence in (e.sequence, *e.also):
                kv = self.kv[sequence]
                del kv[e.position :]
                kv.append((e.token, self.edit_of(sequence, e.position)))
        self.check_decoded()
        # Some models bring large states into their float16 cache, where they become infinite and then everybody's NaN.
        for k in {e.sequence: k for k, e in enumerate(entries) if e.output}.values():
            if not math.isfinite(self.c.llama_get_logits_ith(self.pointer, k)[0]):
                raise EngineError("this model does not stay finite under such a steering: use a smaller strength")

    def logits(self, index: int) -> npt.NDArray[np.float32]:
        """Logits of batch entry ``index`` of the last decode: float32 [n_vocab], a view that the next decode overwrites."""
        pointer = self.c.llama_get_logits_ith(self.pointer, index)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab,))

    # ---- KV cache ----

    def reuse(self, sequence: int, wanted: Sequence[tuple[int, int]]) -> int:
        """Keep the longest cached prefix that matches ``wanted`` (token, edit id) pairs; returns its length.

        At least the last wanted token is left to compute. Caches that cannot be cut give up their whole content.
        """
        return self.cut(sequence, held_prefix(self.kv[sequence], wanted))

    def cut(self, sequence: int, length: int) -> int:
        """Keep the first ``length`` tokens of a sequence, or nothing where its cache cannot be cut; returns how many are left."""
        kv = self.kv[sequence]
        if length < len(kv):
            if length == 0 or not self.is_whole(sequence) or not self.c.llama_memory_seq_rm(self.memory, sequence, length, -1):
                self.c.llama_memory_seq_rm(self.memory, sequence, -1, -1)
                length = 0
            del kv[length:]
        return len(kv)

    def is_whole(self, sequence: int) -> bool:
        """Whether nothing has been dropped at the beginning. A sliding window drops what lies before it: a cut or a copy of the
        rest would leave holes."""
        return bool(self.c.llama_memory_seq_pos_min(self.memory, sequence) <= 0)

    def forget(self, sequence: int) -> None:
        """Drop a sequence from the KV cache, with its ranges."""
        self.c.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        self.kv[sequence].clear()
        self.clear_ranges(sequence)

    def copy(self, source: int, target: int, length: int = -1) -> None:
        """Let ``target`` start with all that ``source`` holds, or with the first ``length`` tokens of it.

        Sequences that do not share a buffer (``unified``) can be copied whole only.
        """
        self.c.llama_memory_seq_rm(self.memory, target, -1, -1)
        self.c.llama_memory_seq_cp(self.memory, source, target, -1, length)
        self.kv[target] = self.kv[source][: None if length < 0 else length]

    def source_of(self, sequence: int, wanted: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Where most of ``wanted`` (token, edit id) pairs is held already: a sequence, and how much of it.

        Another than ``sequence`` itself is worth the copy, which takes the whole buffer, only for a part of it.
        """
        best, most = sequence, held_prefix(self.kv[sequence], wanted)
        if self.limits.unified or not self.model.shares_tokens:
            return best, most
        for other, kv in self.kv.items():
            n = held_prefix(kv, wanted)
            if n > max(most, self.limits.n_ctx // COPY_COST) and self.is_whole(other):
                best, most = other, n
        return best, most

    def reset(self) -> None:
        """Drop everything but the vectors: used when a call was interrupted half-way."""
        self.c.llama_memory_clear(self.memory, True)
        for s in self.kv:
            self.kv[s].clear()
            self.clear_ranges(s)

    def close(self) -> None:
        """Free the context."""
        if self.pointer:
            self.c.llama_batch_free(self._batch)
            self.c.llama_free(self.pointer)
            self.steer.close()
            self.pointer = None


class cleaned:
    """After an exception (Ctrl-C included) a session holds half a batch: start it afresh."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and kind is not GeneratorExit:
            self._session.reset()


def held_prefix(held: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]]) -> int:
    """How many (token, edit id) pairs agree, but for the last wanted one, which is left to compute."""
    n = shared_prefix(held, wanted[:-1])
    return next((i for i, (_, edit) in enumerate(wanted[:n]) if edit == UNKNOWN_EDIT), n)


def shared_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the prefix that two sequences share."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n


def chunks(entries: Iterable[BatchToken], n_batch: int, n_outputs: int) -> Iterable[list[BatchToken]]:
    """Cut a run of tokens into batches with bounded tokens and outputs (each output holds a row of logits)."""
    part: list[BatchToken] = []
    outputs = 0
    for e in entries:
        if len(part) == n_batch or (e.output and outputs == n_outputs):
            yield part
            part, outputs = [], 0
        part.append(e)
        outputs += e.output
    if part:
        yield part
