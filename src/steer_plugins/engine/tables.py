"""Steerings as the native vectors and configs of one context, shared by content."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .. import native
from ..errors import EngineError, SpecError, VectorError
from ..steering.terms import Steering, Term
from ..steering.vector import ModelIdentity, SteeringVector
from .scopes import Phases, ScopeMap

MAX_VECTORS = 256
MAX_CONFIGS = 1024

UNKNOWN_EDIT = -1
"""Edit id of tokens computed under an add callback: what was applied is not known, so they are never shared."""


class ModelFacts(Protocol):
    """What has to be known of a model to steer it. ``think_open`` and ``think_close`` are token ids, None without tags."""

    identity: ModelIdentity
    steer: native.SteerInfo
    think_open: int | None
    think_close: int | None


class SteeringTables:
    """Vectors, configs and ranges of one ``llama_context``.

    Args:
        facts: the model's.
        steer: the native steering of the context.
    """

    def __init__(self, facts: ModelFacts, steer: native.SteerContext) -> None:
        self.facts = facts
        self.steer = steer
        self._vectors: OrderedDict[str, int] = OrderedDict()
        self._configs: OrderedDict[tuple[native.NativeTerm, ...], int] = OrderedDict()
        self._next_config = 1
        self._pinned: set[int] = set()  # vectors that a callback uses
        self._unproved: dict[int, set[tuple[int, int]]] = {}  # config -> places that have not been seen to fire yet
        self._ranges: dict[int, set[int]] = {}  # sequence -> configs that its ranges name
        self._plans: weakref.WeakSet[SequenceSteering] = weakref.WeakSet()  # whose vectors and configs are in use
        self.edits_unknown = False

    # ---- vectors and configs ----

    def vector(self, vector: SteeringVector) -> int:
        """Native id of a vector; the same content always has the same one.

        Raises:
            VectorError: the vector does not fit the model.
        """
        key = vector.content_hash
        if key in self._vectors:
            self._vectors.move_to_end(key)
            return self._vectors[key]
        check_fits(vector, self.facts)
        if len(self._vectors) >= MAX_VECTORS:
            self._evict()
        if len(self._vectors) >= MAX_VECTORS:
            raise SpecError(f"More than {MAX_VECTORS} different vectors are in use at once.")
        used = set(self._vectors.values())
        id_ = next(i for i in range(MAX_VECTORS) if i not in used)
        places = list(vector.directions)
        self.steer.set_vector(
            id_,
            [layer for layer, _ in places],
            [native.SITES[site] for _, site in places],
            np.stack([vector.directions[p] for p in places]),
            [vector.scales[p] for p in places],
        )
        self._vectors[key] = id_
        return id_

    def _evict(self) -> None:
        """Forget configs that neither a range nor a live plan uses, then the vectors that nothing uses any more."""
        live = {config for s in self._ranges.values() for config in s}
        live |= {config for plan in self._plans for config in plan.held.values()}
        for terms, config in list(self._configs.items()):
            if config not in live:
                self.steer.clear_config(config)
                del self._configs[terms]
                self._unproved.pop(config, None)
        needed = {t.vector for terms in self._configs for t in terms} | self._pinned
        held = {term.vector.content_hash for plan in self._plans for term in plan.steering}
        free = [key for key, vector in self._vectors.items() if vector not in needed and key not in held]
        for key in free[: max(1, len(free) // 2)]:
            self.steer.clear_vector(self._vectors.pop(key))

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
        config, self._next_config = self._next_config, self._next_config + 1
        self.steer.set_config(config, natives)
        self._configs[natives] = config
        places = {(layer, native.SITES[site]) for t in terms if not t.is_zero for layer, site in t.keys()}
        self._unproved[config] = {p for p in places if self.steer.config_acts(config, *p)}
        return config

    def pin(self, vectors: Sequence[SteeringVector]) -> list[int]:
        """Native ids of vectors that a callback uses: they stay until :meth:`unpin`, ready for their op."""
        ids = [self.vector(v) for v in vectors]
        for id_, vector in zip(ids, vectors, strict=True):
            self._pinned.add(id_)
            if vector.op != "add":  # a config that projects makes it ready for g
                self.config([Term(vector)])
        return ids

    def unpin(self) -> None:
        """Let the vectors of callbacks go."""
        self._pinned.clear()

    def _native(self, term: Term) -> native.NativeTerm:
        first, last = term.layers if term.layers is not None else (-1, -1)
        return native.NativeTerm(
            vector=self.vector(term.vector),
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

    def edit_of(self, sequence: int, position: int) -> int:
        """Edit id of a token that was or would be computed now."""
        return UNKNOWN_EDIT if self.edits_unknown else self.steer.edit_id(sequence, position)

    def prove(self, tokens: Sequence[tuple[int, int, bool]]) -> None:
        """Make sure that each place of a config fires the first time it is used. ``tokens``: (sequence, position, output).

        A silent no-op is the worst failure of steering.

        Raises:
            EngineError: a layer that was to be steered was never passed through.
        """
        for config in list(self._unproved):
            places = self._unproved[config]
            if not places:
                del self._unproved[config]
                continue
            identity = self.steer.config_id(config)
            hit = [output for seq, pos, output in tokens if self.steer.edit_id(seq, pos) == identity]
            if not hit:
                continue
            last = self.facts.steer.n_layer - 1 if self.facts.steer.last_layer_outputs_only else -1
            if last >= 0 and not any(hit):
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


class SequenceSteering:
    """The steering of one sequence, position by position, as configs of a context. What it names is kept while it lives."""

    def __init__(self, tables: SteeringTables, steering: Steering, prompt: Sequence[int]) -> None:
        if steering.gates:
            name = next(term.vector.name for term in steering if term.gate is not None)
            raise SpecError(f"the gate of {name!r} is not decided: use an Engine, or decide it on the prompt (Steering.decided)")
        self.steering = steering
        self.held: dict[tuple[tuple[int, float], ...], int] = {}  # active terms, and what is left of them -> config
        self._tables = tables
        facts = tables.facts
        self._n_prompt = len(prompt)
        self._map = ScopeMap(steering, len(prompt), has_thinking=facts.think_open is not None)
        self._phases = Phases(prompt, facts.think_open, facts.think_close)
        for term in steering.terms:
            check_fits(term.vector, facts)
        tables._plans.add(self)

    def config_at(self, position: int) -> int:
        """Config for a position in the current phase."""
        n = self._map.decides(position)
        terms = self.steering.terms
        active = tuple((i, terms[i].factor(n)) for i in self._map.active(position, self._phases.thinking))
        if active not in self.held:
            self.held[active] = self._tables.config([terms[i].at(n) for i, _ in active])
        return self.held[active]

    def configs(self, tokens: Sequence[int]) -> list[int]:
        """Configs of all tokens: the prompt, and what follows it, which is taken note of on the way."""
        result = []
        for position, token in enumerate(tokens):
            if position >= self._n_prompt:
                self.feed(token)
            result.append(self.config_at(position))
        return result

    def feed(self, token: int) -> None:
        """Take note of a sampled or given response token."""
        self._phases.feed(token)

    def release(self) -> None:
        """Let go of what the plan holds, without waiting for its last reference to go."""
        self._tables._plans.discard(self)


def check_fits(vector: SteeringVector, model: ModelFacts) -> None:
    """Raise VectorError when a vector is not for this model: identity, width, layers or sites."""
    vector.check_fits(model.identity)
    for site in vector.sites:
        if site not in model.steer.sites:
            raise VectorError(
                f"vector {vector.name!r} acts at {site}, which {model.identity.architecture} does not offer: "
                f"it has {', '.join(model.steer.sites)}"
            )
