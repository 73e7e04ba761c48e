"""Vectors on a server: uploaded when a steering first needs them, under names that follow from their content."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.base import ModelInfo
from ..engine.gates import check_gates
from ..errors import EngineError, SpecError, VectorError
from ..steering.gate import Gate
from ..steering.terms import Steering, Term
from ..steering.vector import SteeringVector
from ..store.vectorfile import write_vector
from .connection import Connection, ServerRefusal
from .facts import ServerFacts

MAX_OWN = 128
"""Vectors that one program keeps on the server; those not used for longest make room. The server takes 1024 in all."""


def content_name(vector: SteeringVector) -> str:
    """The name a vector is uploaded under: it says what is applied, so nobody can put another vector in its place."""
    return f"c-{vector.content_hash[:24]}"


def gate_name(gate: Gate) -> str:
    """The name a gate is uploaded under, from all that it does."""
    return f"g-{gate.digest[:24]}"


class Uploads:
    """The vectors that this program knows to be on one server. May be used by several threads at once.

    Engines on one server share one, so none can delete what another is about to name: see :meth:`of`.
    """

    _all: dict[tuple[str, str | None], Uploads] = {}
    _all_lock = threading.Lock()

    def __init__(self) -> None:
        self._there: OrderedDict[str, bool] = OrderedDict()  # name -> uploaded by us; least recently used first
        self._users = 0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, connection: Connection) -> Uploads:
        """Those of a server, for one more user, who ends with :meth:`leave`."""
        with cls._all_lock:
            uploads = cls._all.setdefault((connection.url, connection.api_key), cls())
            uploads._users += 1
            return uploads

    def leave(self, connection: Connection) -> None:
        """One user fewer. The last one deletes what was uploaded from here."""
        with self._all_lock:
            self._users -= 1
            if self._users > 0:
                return
            self._all.pop((connection.url, connection.api_key), None)
        with self._lock:
            with contextlib.suppress(EngineError):  # the server has gone, and the vectors with it
                self._make_room(connection, 0)
            self._there.clear()

    def learn(self, listed: Mapping[str, str]) -> set[str]:
        """Take note of what the server lists, name -> content sha256; returns the names that are gone.

        Content that others put there need not be sent again.
        """
        with self._lock:
            gone = {name for name in self._there if name not in listed}
            for name in gone:
                del self._there[name]
            for name, content in listed.items():
                if name == f"c-{content[:24]}":
                    self._there.setdefault(name, False)
        return gone

    def put(self, connection: Connection, name: str, vector: SteeringVector) -> str:
        """Make sure that the vector is there under this name; returns the name. Raises VectorError."""
        with self._lock:
            if name in self._there:
                self._there.move_to_end(name)
                return name
            self._make_room(connection, MAX_OWN)
            try:
                _upload(connection, name, vector)
            except ServerRefusal as refusal:
                if refusal.status != 429 or not self._make_room(connection, MAX_OWN // 4):
                    raise VectorError(f"vector {vector.name!r}: {refusal}") from None
                try:
                    _upload(connection, name, vector)
                except ServerRefusal as again:
                    raise VectorError(f"vector {vector.name!r}: {again}") from None
            self._there[name] = True
        return name

    def _make_room(self, connection: Connection, most: int) -> bool:
        """Delete our least recently used vectors until fewer than ``most`` are left; True if there were any to delete."""
        own = [name for name, ours in self._there.items() if ours]
        surplus = own[: max(0, len(own) - most + 1)]
        for name in surplus:
            del self._there[name]
            with contextlib.suppress(ServerRefusal):  # gone already
                connection.delete(f"/steering/vectors/{name}")
        return bool(surplus)


def _upload(connection: Connection, name: str, vector: SteeringVector) -> None:
    gate = (vector.provenance or {}).get("gate") if name.startswith("g-") else None
    # what the name does not stand for is the same in every upload: the server replaces no vector by another unasked
    provenance = None if gate is None else {"gate": gate}
    bare = vector.replace(name=name, default_scope="response", provenance=provenance, calibration=None)
    with tempfile.TemporaryDirectory(prefix="steer-") as folder:
        path = Path(folder) / "vector.safetensors"
        write_vector(bare, path)
        data = path.read_bytes()
    connection.post_bytes(f"/steering/vectors/{name}", data)


class ServerVectors:
    """The terms of requests to one server, their vectors uploaded. May be used by several threads at once.

    Args:
        connection: to the server.
        facts: what it says of itself; its model can be steered.
    """

    def __init__(self, connection: Connection, facts: ServerFacts) -> None:
        assert facts.info is not None
        self._connection = connection
        self._info = facts.info
        self._tags = facts.tags
        self._untold = facts.thinks_untold
        self._uploads = Uploads.of(connection)
        self._uploads.learn(facts.vectors)

    def check(self, steering: Steering) -> None:
        """Raise VectorError or SpecError for what can be seen to be wrong without the server."""
        check_gates(steering, self._info)
        for term in steering.terms:
            check_fits(term.vector, self._info)
            if term.gate is not None:
                check_fits(term.gate.vector, self._info)
            if term.effective_scope in ("thinking", "answer") and self._untold:
                raise SpecError(
                    f"scope '{term.effective_scope}' of {term.vector.name!r} cannot be followed, "
                    "as this model's template does not say where thinking ends: use response"
                )
            if term.effective_scope == "thinking" and self._tags is None:
                raise SpecError(f"scope 'thinking' of {term.vector.name!r} needs a model with <think> tags: use response or all")

    def fields(self, steering: Steering) -> dict[str, Any]:
        """``steering`` and ``steering_tags`` of a request, its vectors uploaded where they are missing.

        Raises:
            VectorError: a vector does not fit the model, or the server has no room for it.
            SpecError: a scope that this model cannot have.
        """
        self.check(steering)
        # always said, also when empty: the server's default is for those who say nothing
        fields: dict[str, Any] = {"steering": [self._term(term) for term in steering.terms]}
        if any(term["scope"] in ("thinking", "answer") for term in fields["steering"]):
            fields["steering_tags"] = self._tags
        return fields

    def _term(self, term: Term) -> dict[str, Any]:
        scope = term.effective_scope
        if scope == "answer" and self._tags is None:
            scope = "response"  # nothing but answer there
        # op and scope are always given: they are not part of the content that the name stands for
        data: dict[str, Any] = {
            "vector": self.name_of(term.vector),
            "strength": term.strength,
            "op": term.effective_op,
            "scope": scope,
        }
        if term.level is not None:
            data["level"] = term.level
        if term.layers is not None:
            data["layers"] = list(term.layers)
        if term.stream is not None:
            data["stream"] = term.stream
        if term.schedule is not None:
            data["schedule"] = term.schedule.to_json()
        if term.gate is not None:
            data["gate"] = self._uploads.put(self._connection, gate_name(term.gate), term.gate.to_vector())
        return data

    def name_of(self, vector: SteeringVector) -> str:
        """The name of a vector over there; it is uploaded when it is missing. Raises VectorError."""
        return self._uploads.put(self._connection, content_name(vector), vector)

    def lost(self, fields: Mapping[str, Any]) -> bool:
        """True if the server has lost a vector of these fields, or another that was there, such as one that is probed (it was
        restarted, or somebody deleted it). It is uploaded again when it is next needed."""
        listed = {str(v["name"]): str(v["content_sha256"]) for v in self._connection.get("/steering").get("vectors", [])}
        named = {term[key] for term in fields["steering"] for key in ("vector", "gate") if key in term}
        return bool(self._uploads.learn(listed) or named - listed.keys())

    def close(self) -> None:
        """Delete what was uploaded from here, unless another engine of this program still uses the server."""
        self._uploads.leave(self._connection)


def check_fits(vector: SteeringVector, info: ModelInfo) -> None:
    """Raise VectorError when a vector is not for this model: identity, width, layers or sites."""
    vector.check_fits(info.identity)
    for site in vector.sites:
        if site not in info.sites:
            raise VectorError(
                f"vector {vector.name!r} acts at {site}, which {info.architecture} does not offer: it has {', '.join(info.sites)}"
            )
