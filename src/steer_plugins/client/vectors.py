"""Vectors on a server: uploaded when a steering first needs them, under names that follow from their content."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections import OrderedDict
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

MAX_OWN = 128
"""Vectors that one engine keeps on the server; those not used for longest make room. The server takes 1024 in all."""


def content_name(vector: SteeringVector) -> str:
    """The name a vector is uploaded under: it says what is applied, so nobody can put another vector in its place."""
    return f"c-{vector.content_hash[:24]}"


def gate_name(gate: Gate) -> str:
    """The name a gate is uploaded under, from all that it does."""
    return f"g-{gate.digest[:24]}"


class ServerVectors:
    """Which vectors the server holds, and the terms of requests that use them. May be used by several threads at once.

    Args:
        connection: to the server.
        info: its model.
        tags: whether the model has thinking tags.
    """

    def __init__(self, connection: Connection, info: ModelInfo, *, tags: bool) -> None:
        self._connection = connection
        self._info = info
        self._tags = tags
        self._there: OrderedDict[str, bool] = OrderedDict()  # name -> uploaded by us; least recently used first
        self._lock = threading.Lock()

    def learn(self, listed: Any) -> None:
        """Take note of what ``GET /steering`` lists; content that others put there need not be sent again."""
        for entry in listed:
            name, content = str(entry.get("name")), str(entry.get("content_sha256"))
            if name == f"c-{content[:24]}":
                with self._lock:
                    self._there.setdefault(name, False)

    def check(self, steering: Steering) -> None:
        """Raise VectorError or SpecError for what can be seen to be wrong without the server."""
        check_gates(steering, self._info)
        for term in steering.terms:
            check_fits(term.vector, self._info)
            if term.gate is not None:
                check_fits(term.gate.vector, self._info)
            if term.effective_scope == "thinking" and not self._tags:
                raise SpecError(f"scope 'thinking' of '{term.vector.name}' needs a model with <think> tags: use response or all")

    def terms(self, steering: Steering) -> list[dict[str, Any]]:
        """The JSON terms of a steering, its vectors uploaded where they are missing.

        Raises:
            VectorError: a vector does not fit the model, or the server has no room for it.
            SpecError: a scope that this model cannot have.
        """
        self.check(steering)
        return [self._term(term) for term in steering.terms]

    def _term(self, term: Term) -> dict[str, Any]:
        scope = term.effective_scope
        if scope == "answer" and not self._tags:
            scope = "response"  # nothing but answer there
        # op and scope are always said: they are no part of the content that the name stands for
        data: dict[str, Any] = {
            "vector": self.name_of(term.vector),
            "strength": term.strength,
            "op": term.effective_op,
            "scope": scope,
        }
        if term.layers is not None:
            data["layers"] = list(term.layers)
        if term.stream is not None:
            data["stream"] = term.stream
        if term.schedule is not None:
            data["schedule"] = term.schedule.to_json()
        if term.gate is not None:
            data["gate"] = self._name(gate_name(term.gate), term.gate.to_vector())
        return data

    def name_of(self, vector: SteeringVector) -> str:
        """The name of a vector over there; it is uploaded when it is missing. Raises VectorError."""
        return self._name(content_name(vector), vector)

    def _name(self, name: str, vector: SteeringVector) -> str:
        with self._lock:
            if name in self._there:
                self._there.move_to_end(name)
                return name
            self._make_room(MAX_OWN)
            try:
                self._upload(name, vector)
            except ServerRefusal as refusal:
                if refusal.status != 429 or not self._make_room(MAX_OWN // 4):
                    raise VectorError(f"vector {vector.name!r}: {refusal}") from None
                try:
                    self._upload(name, vector)
                except ServerRefusal as again:
                    raise VectorError(f"vector {vector.name!r}: {again}") from None
            self._there[name] = True
        return name

    def _upload(self, name: str, vector: SteeringVector) -> None:
        gate = (vector.provenance or {}).get("gate") if name.startswith("g-") else None
        bare = vector.replace(name=name, provenance=None if gate is None else {"gate": gate}, calibration=None)
        with tempfile.TemporaryDirectory(prefix="steer-") as folder:
            path = Path(folder) / "vector.safetensors"
            write_vector(bare, path)
            data = path.read_bytes()
        self._connection.post_bytes(f"/steering/vectors/{name}", data)

    def _make_room(self, most: int) -> bool:
        """Delete our least recently used vectors until fewer than ``most`` are left; True if there were any to delete."""
        own = [name for name, ours in self._there.items() if ours]
        surplus = own[: max(0, len(own) - most + 1)]
        for name in surplus:
            del self._there[name]
            with contextlib.suppress(ServerRefusal):  # gone already
                self._connection.delete(f"/steering/vectors/{name}")
        return bool(surplus)

    def forget_lost(self, terms: list[dict[str, Any]]) -> bool:
        """True if the server has lost a vector of these terms, or another that was there, such as one that is probed (it was
        restarted, or somebody deleted it)."""
        listed = {str(entry.get("name")) for entry in self._connection.get("/steering").get("vectors", [])}
        lost = {term[key] for term in terms for key in ("vector", "gate") if key in term} - listed
        with self._lock:
            gone = [name for name in self._there if name not in listed]
            for name in gone:
                del self._there[name]
        return bool(lost or gone)

    def close(self) -> None:
        """Delete what was uploaded from here."""
        with self._lock:
            with contextlib.suppress(EngineError):  # the server has gone, and the vectors with it
                self._make_room(0)
            self._there.clear()


def check_fits(vector: SteeringVector, info: ModelInfo) -> None:
    """Raise VectorError when a vector is not for this model: identity, width, layers or sites."""
    vector.check_fits(info.identity)
    for site in vector.sites:
        if site not in info.sites:
            raise VectorError(
                f"vector {vector.name!r} acts at {site}, which {info.architecture} does not offer: it has {', '.join(info.sites)}"
            )
