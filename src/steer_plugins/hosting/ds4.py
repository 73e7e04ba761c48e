"""DwarfStar 4's own server with a steering: what it can express, and a small pool of its processes, one for each steering.

ds4 takes one file of directions and two strengths when it starts: y - S v (v.y) at the output of the feed-forward part and of
attention, for every token.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..client import ServerProcess
from ..errors import EngineError, SpecError
from ..steering.grammar import TermSpec, steering_of, terms_of
from ..steering.terms import Steering
from ..steering.vector import ModelIdentity
from ..store.library import Library

SITES = ("ffn_out", "attn_out")
SCOPE = "0-"
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses")
"""Routes of ds4-server whose requests may carry ``steering``."""


@dataclass(frozen=True)
class Ds4Steering:
    """What ds4-server is told.

    Attributes:
        rows: float32 [n_layer, n_embd], unit rows, zero where nothing is steered.
        ffn, attn: S at both places; 0 is off.
    """

    rows: npt.NDArray[np.float32] = field(repr=False)
    ffn: float
    attn: float

    def __bool__(self) -> bool:
        return bool((self.ffn or self.attn) and self.rows.any())

    @property
    def key(self) -> str:
        """A name for it, from all that it does; ``plain`` for nothing."""
        if not self:
            return "plain"
        digest = hashlib.sha256(np.ascontiguousarray(self.rows, "<f4").tobytes())
        digest.update(f"{self.ffn!r} {self.attn!r}".encode())
        return digest.hexdigest()[:24]

    def flags(self, file: Path) -> list[str]:
        """The flags that make ds4 apply it, when ``file`` holds its rows; none where it does nothing."""
        if not self:
            return []
        return ["--dir-steering-file", str(file), "--dir-steering-ffn", f"{self.ffn:g}", "--dir-steering-attn", f"{self.attn:g}"]

    def write(self, file: Path) -> None:
        """Write the rows as ds4 reads them: float32, little-endian, no header."""
        file.write_bytes(np.ascontiguousarray(self.rows, "<f4").tobytes())


def express(steering: Steering, identity: ModelIdentity) -> Ds4Steering:
    """A steering as ds4 has it. Raises SpecError for what it cannot do exactly."""
    rows = np.zeros((identity.n_layer, identity.n_embd), np.float32)
    strengths: dict[str, float] = {}
    places: dict[str, dict[int, npt.NDArray[np.float32]]] = {site: {} for site in SITES}
    for term in steering:
        name = term.vector.name
        if term.is_zero:
            continue
        sites = {site for _, site in term.keys()}
        if term.effective_op != "project" or not sites <= set(SITES):
            what = f"{name!r} would {term.effective_op} at {' and '.join(sorted(sites))}"
            raise SpecError(f"{what}, and ds4 only projects at ffn_out or attn_out: fit one for it with steer train --for ds4")
        if term.effective_scope != SCOPE:
            raise SpecError(f"{name!r} has scope {term.effective_scope}, and ds4 steers every token: write {name}?{SCOPE}")
        for given, what in ((term.stream, "stream"), (term.schedule, "schedule"), (term.gate, "gate")):
            if given is not None:
                raise SpecError(f"{name!r} has a {what}, which ds4 has not: leave it out")
        for site in sites:
            if strengths.setdefault(site, term.strength) != term.strength:
                raise SpecError(f"ds4 has one strength at {site}, not {strengths[site]:g} and {term.strength:g}: make them equal")
        for layer, site in term.keys():
            if layer in places[site]:
                raise SpecError(f"ds4 has one direction at layer {layer}, and several terms steer {site} there: leave one out")
            places[site][layer] = term.vector.directions[layer, site]
    active = [site for site in SITES if places[site]]
    if len(active) == 2 and set(places["ffn_out"]) != set(places["attn_out"]):
        raise SpecError("ds4 steers the same layers at ffn_out and at attn_out: give both the same layers")
    for site in active:
        for layer, row in places[site].items():
            other = rows[layer]
            # v and -v are the same edit
            if other.any() and not (np.array_equal(row, other) or np.array_equal(-row, other)):
                raise SpecError(f"ds4 has one direction at layer {layer}, the same at ffn_out and at attn_out: steer one of them")
            rows[layer] = row
    return Ds4Steering(rows, strengths.get("ffn_out", 0.0), strengths.get("attn_out", 0.0))


class Ds4Process(ServerProcess):
    """A ds4-server, watched like a llama-server."""

    program = "ds4-server"
    health = "/v1/models"


@dataclass
class _Running:
    process: Ds4Process
    users: int = 0


class Ds4Pool:
    """Passes requests on to a ds4-server that was started with their steering; starts one where there is none.

    Args:
        binary: ds4-server.
        model: its GGUF file.
        identity: of that.
        library: where vectors are looked up.
        folder: for the files of directions; it has to last as long as this.
        default: the terms for requests that say nothing.
        flags: for every ds4-server.
        kv: where disk caches go, one folder for each steering: ds4 does not ask whether a cached state was steered.
        most: how many run at once. With another steering the one that was not used for longest has to go, when it is idle.
        on_line: gets each line of their logs.

    Raises:
        SpecError, VectorError: the default cannot be applied.
    """

    def __init__(
        self,
        binary: Path,
        model: Path,
        identity: ModelIdentity,
        library: Library,
        folder: Path,
        *,
        default: Sequence[TermSpec] = (),
        flags: Sequence[str] = (),
        kv: Path,
        most: int = 1,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self._binary, self._model, self._identity, self._library = binary, model, identity, library
        self._folder, self._flags, self._kv, self._most, self._on_line = folder, list(flags), kv, most, on_line
        self._default = self.wanted(list(default), names_only=False)
        self._running: OrderedDict[str, _Running] = OrderedDict()
        self._leases: dict[int, _Running] = {}
        self._changed = threading.Condition()

    def wanted(self, wish: Any, *, names_only: bool = True) -> Ds4Steering:
        """What a text, or terms as JSON, mean. Raises SpecError or VectorError."""
        terms = terms_of(wish)
        if terms is None:
            raise SpecError(f"steering is {wish!r:.60}: give a text or a list of terms")

        def find(name: str) -> Any:
            return self._library.resolve(name, self._identity, names_only=names_only)

        return express(steering_of(terms, find), self._identity)

    def start(self) -> None:
        """Start the server of the default. Raises EngineError."""
        self._leave(self._lease(self._default))

    def stop(self) -> None:
        """End all of them."""
        with self._changed:
            for one in self._running.values():
                one.process.stop()
            self._running.clear()

    def bodies(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The body without its steering, once a server with that steering runs. Raises SteerError."""
        wanted = self._default
        if path in PATHS and body.get("steering") is not None:
            wanted = self.wanted(body["steering"])
        sent = {key: value for key, value in body.items() if key != "steering"} if path in PATHS else dict(body)
        self._leases[id(sent)] = self._lease(wanted)
        yield sent

    def address(self, body: dict[str, Any] | None) -> str:
        """The server of a body; one that runs for all else."""
        if body is not None:
            return self._leases[id(body)].process.url
        with self._changed:
            if not self._running:
                raise EngineError("no ds4-server runs: see its log")
            return next(reversed(self._running.values())).process.url

    def ended(self, body: dict[str, Any]) -> None:
        """Its server may be stopped again."""
        lease = self._leases.pop(id(body), None)
        if lease is not None:
            self._leave(lease)

    def _leave(self, lease: _Running) -> None:
        with self._changed:
            lease.users -= 1
            self._changed.notify_all()

    def _lease(self, wanted: Ds4Steering) -> _Running:
        """A running server with this steering, for one more user."""
        key = wanted.key
        with self._changed:
            while True:
                one = self._running.get(key)
                if one is not None and not one.process.running:
                    del self._running[key]
                    continue
                if one is not None:
                    break
                if len(self._running) < self._most:
                    one = self._running[key] = _Running(self._start(key, wanted))
                    break
                idle = next((name for name, other in self._running.items() if not other.users), None)
                if idle is not None:
                    self._running.pop(idle).process.stop()
                else:
                    self._changed.wait()
            self._running.move_to_end(key)
            one.users += 1
            return one

    def _start(self, key: str, wanted: Ds4Steering) -> Ds4Process:
        file = self._folder / f"{key}.f32"
        if wanted:
            wanted.write(file)
        cache = self._kv / key
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(f"the folder {cache} for ds4's disk cache cannot be made: {error.strerror or error}") from None
        process = Ds4Process(self._binary, on_line=self._on_line)
        try:
            process.start(self._model, [*self._flags, "--kv-disk-dir", str(cache), *wanted.flags(file)])
            process.wait_ready(timeout=3600)
        except BaseException:
            process.stop()
            raise
        return process
