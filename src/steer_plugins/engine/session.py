"""One llama_context with its steering: columns and configs by content, and the tokens that its KV cache holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_plugins import native
from steer_plugins.engine.model import LoadedModel, shared_log
from steer_plugins.engine.scopes import Phases, ScopeMap
from steer_plugins.errors import EngineError, SpecError, VectorError
from steer_plugins.steering import Steering, Term
from steer_plugins.vector import SteeringVector

MAX_COLUMNS = 256
MAX_CONFIGS = 1024

UNKNOWN_EDIT = -1
"""Edit id of tokens computed under an add callback: what was applied is not known, so they are never shared."""


@dataclass(frozen=True)
class Entry:
    """One token of a batch."""

    token: int
    position: int
    sequence: int = 0
    output: bool = False


@dataclass(frozen=True)
class Limits:
    """Sizes of a context. ``n_ctx`` is for one sequence; ``unified``: sequences share one KV buffer and may share prefixes."""

    n_ctx: int
    n_seq: int = 1
    unified: bool = False
    n_batch: int = 512
    n_threads: int = 4
    n_threads_batch: int = 4


class Session:
    """A context of a model. Not thread safe.

    Raises:
        EngineError: the context cannot be made (usually: not enough memory).
    """

    def __init__(self, model: LoadedModel, limits: Limits) -> None:
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
        self.pointer = c.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            reason = log.errors[-1] if log.errors else "no reason given"
            raise EngineError(
                f"A context of {params.n_ctx} tokens could not be made ({reason}): use a smaller --n-ctx."
            )
        self.memory = c.llama_get_memory(self.pointer)
        self.steer = native.SteerContext(model.library, self.pointer, model.steer.n_embd)
        self._batch = c.llama_batch_init(limits.n_batch, 0, limits.n_seq)
        self._columns: OrderedDict[str, int] = OrderedDict()
        self._configs: OrderedDict[tuple[native.NativeTerm, ...], int] = OrderedDict()
        self._next_config = 1
        self._pinned: dict[int, int] = {}  # column -> users outside configs (callbacks)
        self._unproved: dict[int, set[tuple[int, int]]] = {}  # config -> places that have not been seen to fire yet
        self._ranges: dict[int, set[int]] = {}  # sequence -> configs that its ranges name
        self.kv: dict[int, list[tuple[int, int]]] = {s: [] for s in range(limits.n_seq)}
        self.edits_unknown = False

    # ---- vectors and configs ----

    def column(self, vector: SteeringVector) -> int:
        """Native column that holds a vector; the same content always has the same one.

        Raises:
            VectorError: the vector does not fit the model.
        """
        key = vector.content_hash
        if key in self._columns:
            self._columns.move_to_end(key)
            return self._columns[key]
        check_fits(vector, self.model)
        if len(self._columns) >= MAX_COLUMNS:
            self._evict()
        used = set(self._columns.values())
        column = next(i for i in range(MAX_COLUMNS) if i not in used)
        places = list(vector.directions)
        self.steer.set_column(
            column,
            [layer for layer, _ in places],
            [native.SITES[site] for _, site in places],
            np.stack([vector.directions[p] for p in places]),
            [vector.scales[p] for p in places],
        )
        self._columns[key] = column
        return column

    def _evict(self) -> None:
        """Forget configs that no range uses, then the columns that nothing uses any more."""
        live = {config for s in self._ranges.values() for config in s}
        for terms, config in list(self._configs.items()):
            if config not in live:
                self.steer.clear_config(config)
                del self._configs[terms]
                self._unproved.pop(config, None)
        needed = {t.column for terms in self._configs for t in terms} | set(self._pinned)
        free = [key for key, column in self._columns.items() if column not in needed]
        if not free and len(self._columns) >= MAX_COLUMNS:
            raise SpecError(f"More than {MAX_COLUMNS} different vectors are in use at once.")
        for key in free[: max(1, len(free) // 2)]:
            self.steer.clear_column(self._columns.pop(key))

    def config(self, terms: Sequence[Term]) -> int:
        """Config that applies terms; 0 when they apply nothing."""
        natives = tuple(self._native(t) for t in terms if not t.is_zero)
        if not natives:
            return 0
        if natives in self._configs:
            self._configs.move_to_end(natives)
            return self._configs[natives]
        if len(self._configs) >= MAX_CONFIGS:
            self._evict()
            natives = tuple(self._native(t) for t in terms if not t.is_zero)
        config, self._next_config = self._next_config, self._next_config + 1
        self.steer.set_config(config, natives)
        self._configs[natives] = config
        self._unproved[config] = {
            (layer, native.SITES[site])
            for t in terms
            if not t.is_zero
            for layer, site in t.keys()
            if t.effective_op != "add" or t.vector.scales[layer, site] != 0.0
        }
        if self.steer.config_id(config) == 0:
            self._unproved[config] = set()  # the terms cancel out exactly
        return config

    def pin(self, vectors: Sequence[SteeringVector]) -> list[int]:
        """Columns of vectors that a callback uses: they stay until :meth:`unpin`, ready for their op."""
        columns = [self.column(v) for v in vectors]
        for column, vector in zip(columns, vectors, strict=True):
            self._pinned[column] = 1
            if vector.op != "add":  # a config that projects makes the column ready for g
                self.config([Term(vector)])
        return columns

    def unpin(self) -> None:
        """Let the columns of callbacks go."""
        self._pinned.clear()

    def _native(self, term: Term) -> native.NativeTerm:
        first, last = term.layers if term.layers is not None else (-1, -1)
        return native.NativeTerm(
            column=self.column(term.vector),
            op=native.OPS[term.effective_op],
            strength=term.strength,
            il_first=first,
            il_last=last,
            stream=native.STREAM_ALL if term.stream is None else term.stream,
        )

    def edit_id(self, config: int) -> int:
        """What a token under a config is remembered by."""
        return UNKNOWN_EDIT if self.edits_unknown else (self.steer.config_id(config) if config else 0)

    # ---- ranges ----

    def set_ranges(self, sequence: int, first: int, configs: Sequence[int], *, open_end: bool = False) -> None:
        """Positions ``first``, ``first + 1``, … of a sequence get ``configs``; ``open_end`` lets the last go on."""
        use = self._ranges.setdefault(sequence, set())
        start = 0
        for i in range(1, len(configs) + 1):
            if i == len(configs) or configs[i] != configs[start]:
                end = -1 if open_end and i == len(configs) else first + i
                self.steer.set_range(sequence, first + start, end, configs[start])
                use.add(configs[start])
                start = i

    def clear_ranges(self, sequence: int) -> None:
        """Forget the steering and the reading wishes of a sequence."""
        self.steer.clear_sequence(sequence)
        self._ranges.pop(sequence, None)

    # ---- decoding ----

    def decode(self, entries: Sequence[Entry]) -> None:
        """Compute one batch of at most ``n_batch`` tokens, then prove that new configs fired.

        Raises:
            EngineError: the native call failed, or a layer that should be steered was not.
        """
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, e in enumerate(entries):
            batch.token[i] = e.token
            batch.pos[i] = e.position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = e.sequence
            batch.logits[i] = e.output
        code = self.c.llama_decode(self.pointer, batch)
        if code != 0:
            self.steer.raise_callback_error()
            if code == 1:
                raise EngineError("The context is full: use a larger --n-ctx or a shorter prompt.")
            raise EngineError(f"llama.cpp failed to compute a batch (code {code}): {self.steer.error()}")
        for e in entries:
            kv = self.kv[e.sequence]
            del kv[e.position :]
            kv.append((e.token, self.edit_of(e.sequence, e.position)))
        if self._unproved:
            self._prove(entries)

    def edit_of(self, sequence: int, position: int) -> int:
        """Edit id of a token that was or would be computed now."""
        return UNKNOWN_EDIT if self.edits_unknown else self.steer.edit_id(sequence, position)

    def _prove(self, entries: Sequence[Entry]) -> None:
        """A silent no-op is the worst failure of steering: each place of a config must fire the first time it is used."""
        for config in list(self._unproved):
            places = self._unproved[config]
            if not places:
                del self._unproved[config]
                continue
            identity = self.steer.config_id(config)
            hit = [e for e in entries if self.steer.edit_id(e.sequence, e.position) == identity]
            if not hit:
                continue
            last = self.model.steer.n_layer - 1 if self.model.steer.last_layer_outputs_only else -1
            if last >= 0 and not any(e.output for e in hit):
                places = {p for p in places if p[0] != last}
            dead = sorted(p for p in places if self.steer.fired(*p) == 0)
            if dead:
                names = {i: name for name, i in native.SITES.items()}
                layer, site = dead[0]
                raise EngineError(
                    f"Steering was asked for at layer {layer} ({names[site]}) but this model never passed through that hook: "
                    "leave the layer out, and please report the architecture."
                )
            self._unproved[config] -= places
            if not self._unproved[config]:
                del self._unproved[config]

    def logits(self, index: int) -> npt.NDArray[np.float32]:
        """Logits of batch entry ``index`` of the last decode: float32 [n_vocab], a view that the next decode overwrites."""
        pointer = self.c.llama_get_logits_ith(self.pointer, index)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab,))

    # ---- KV cache ----

    def reuse(self, sequence: int, wanted: Sequence[tuple[int, int]]) -> int:
        """Keep the longest cached prefix that matches ``wanted`` (token, edit id) pairs; returns its length.

        At least the last wanted token is left to compute. Caches that cannot be cut give up their whole content.
        """
        kv = self.kv[sequence]
        n = 0
        for have, want in zip(kv, wanted, strict=False):
            if have != want or want[1] == UNKNOWN_EDIT:
                break
            n += 1
        n = min(n, len(wanted) - 1)
        if n < len(kv):
            # a sliding window has dropped what lies before it, so a cut there would leave holes
            holes = self.c.llama_memory_seq_pos_min(self.memory, sequence) > 0
            if holes or n == 0 or not self.c.llama_memory_seq_rm(self.memory, sequence, n, -1):
                self.c.llama_memory_seq_rm(self.memory, sequence, -1, -1)
                n = 0
            del kv[n:]
        return n

    def forget(self, sequence: int) -> None:
        """Drop a sequence from the KV cache, with its ranges."""
        self.c.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        self.kv[sequence].clear()
        self.clear_ranges(sequence)

    def copy(self, source: int, target: int) -> None:
        """Let ``target`` start with all that ``source`` holds."""
        self.c.llama_memory_seq_rm(self.memory, target, -1, -1)
        self.c.llama_memory_seq_cp(self.memory, source, target, -1, -1)
        self.kv[target] = list(self.kv[source])

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
            self.pointer = None


class SequenceSteering:
    """The steering of one sequence, position by position, as configs of a session."""

    def __init__(self, session: Session, steering: Steering, prompt: Sequence[int]) -> None:
        self._session = session
        self.steering = steering
        model = session.model
        self._map = ScopeMap(steering, len(prompt), has_thinking=model.think_open is not None)
        self._phases = Phases(prompt, model.think_open, model.think_close)
        self._cache: dict[tuple[int, ...], int] = {}
        for term in steering.terms:
            check_fits(term.vector, model)

    def config_at(self, position: int) -> int:
        """Config for a position in the current phase."""
        active = self._map.active(position, self._phases.thinking)
        if active not in self._cache:
            self._cache[active] = self._session.config([self.steering.terms[i] for i in active])
        return self._cache[active]

    def configs(self, n: int) -> list[int]:
        """Configs of positions 0 … n - 1."""
        return [self.config_at(p) for p in range(n)]

    def feed(self, token: int) -> None:
        """Take note of a sampled token."""
        self._phases.feed(token)


def check_fits(vector: SteeringVector, model: LoadedModel) -> None:
    """Raise VectorError when a vector is not for this model: identity, width, layers or sites."""
    if vector.identity is not None and vector.identity.mismatch(model.identity) is not None:
        raise VectorError(
            f"Vector '{vector.name}' was made for another model ({vector.identity.mismatch(model.identity)}): "
            f"fit it for this one with `steer train {vector.name}`."
        )
    info = model.steer
    if vector.n_embd != info.n_embd:
        raise VectorError(f"Vector '{vector.name}' has n_embd {vector.n_embd}, this model has {info.n_embd}.")
    if vector.layers[-1] >= info.n_layer:
        raise VectorError(
            f"Vector '{vector.name}' names layer {vector.layers[-1]}, this model has layers 0 to {info.n_layer - 1}."
        )
    for site in vector.sites:
        if site not in info.sites:
            raise VectorError(
                f"Vector '{vector.name}' acts at {site}, which {model.identity.architecture} does not offer: "
                f"it has {', '.join(info.sites)}."
            )


def chunks(entries: Iterable[Entry], n_batch: int, n_outputs: int) -> Iterable[list[Entry]]:
    """Cut a run of tokens into batches with bounded tokens and outputs (each output holds a row of logits)."""
    part: list[Entry] = []
    outputs = 0
    for e in entries:
        if len(part) == n_batch or (e.output and outputs == n_outputs):
            yield part
            part, outputs = [], 0
        part.append(e)
        outputs += e.output
    if part:
        yield part
