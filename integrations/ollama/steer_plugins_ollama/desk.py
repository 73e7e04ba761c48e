"""What a model's or a request's steering means on its llama-server."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer_plugins.client.engine import ServerEngine
from steer_plugins.errors import VectorError
from steer_plugins.steering.grammar import names_of
from steer_plugins.steering.vector import check_name
from steer_plugins.store.library import MissingVector
from steer_plugins.store.vectorfile import read_vector

from .expression import Terms
from .model import Model

if TYPE_CHECKING:
    from steer_plugins.client import ServerProcess
    from steer_plugins.steering.terms import Steering
    from steer_plugins.steering.vector import ModelIdentity, SteeringVector
    from steer_plugins.store.library import Library

MAX_KNOWN = 256
"""Steerings of one process whose vectors stay in memory."""

_Stamps = tuple[tuple[Path, int, int], ...]


class Desk:
    """The steerings of requests to one process. A vector's file is not read again while it is the same.

    Raises:
        SteerError: the model cannot be steered.
    """

    def __init__(self, process: ServerProcess, library: Library) -> None:
        self._engine = ServerEngine(process.url, api_key=process.api_key, library=library)
        self._library = library
        self._known: OrderedDict[Any, tuple[_Stamps, Steering]] = OrderedDict()
        self._lock = threading.Lock()

    def attempts(self, model: Model, terms: Terms) -> Iterator[dict[str, Any]]:
        """llama-server's fields for a request, and made anew if it has lost a vector meanwhile: see ServerEngine.attempts.

        Raises:
            SteerError: a vector is missing, or does not fit.
        """
        return self._engine.attempts(self._steering(model, terms))

    def _steering(self, model: Model, terms: Terms) -> Steering:
        key = terms, tuple(sorted((name, str(path)) for name, path in model.vectors.items()))
        stamps = self._stamps(model, terms)
        with self._lock:
            known = self._known.get(key)
        if known is not None and known[0] == stamps:
            return known[1]
        carried = {name: read_vector(model.vectors[name]) for name in names_of(terms) if name in model.vectors}
        try:
            steering = self._engine.steering(list(terms), vectors=carried, names_only=True)
        except MissingVector as error:
            raise hinted(error, model) from None
        if stamps is not None:
            with self._lock:
                self._known[key] = stamps, steering
                while len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        return steering

    def _stamps(self, model: Model, terms: Terms) -> _Stamps | None:
        """What the files of all vectors are now; None where one is not a file of the model's or a plain name's."""
        found = []
        for name in names_of(terms):
            try:
                path = model.vectors.get(name) or self._library.path(check_name(name), self._engine.info.identity)
                stat = os.stat(path)
            except (VectorError, OSError):
                return None
            found.append((path, stat.st_mtime_ns, stat.st_size))
        return tuple(found)


def find(model: Model, name: str, identity: ModelIdentity, library: Library) -> SteeringVector:
    """The vector of a name, as requests find it: one that the model carries, else the library's. Raises SteerError."""
    carried = model.vectors.get(name)
    if carried is not None:
        vector = read_vector(carried)
        vector.check_fits(identity)
        return vector
    try:
        return library.resolve(name, identity, names_only=True)
    except MissingVector as error:
        raise hinted(error, model) from None


def hinted(error: MissingVector, model: Model) -> MissingVector:
    """The error with the way out that there is here."""
    sentence = str(error)
    for command in ("train", "hub pull"):
        sentence = sentence.replace(f"steer {command} ", f"steer ollama {command.split()[-1]} {model.name} ")
    return MissingVector(sentence)
