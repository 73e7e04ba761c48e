"""The running steering server as the extension sees it: its model, vectors on it, replies under way."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

from steer_plugins.client.engine import ServerEngine
from steer_plugins.errors import EngineError, SteerError
from steer_plugins.steering.grammar import TermSpec, is_file_name, names_of
from steer_plugins.steering.terms import Steering
from steer_plugins.store.library import Library

from . import webui, wishes

RETRY = 0.2
"""Seconds until a reply that has not begun yet is asked again to change."""


class Link:
    """One running server. ``engine``: for training, reading and comparing; requests of the webui get :meth:`fields`.

    Raises:
        EngineError: a server without steering, or it does not answer. ModelError: a model that cannot be steered.
    """

    def __init__(self, url: str, library: Library | None = None) -> None:
        self.library = library or Library()
        self.engine = ServerEngine(url, library=self.library)
        self.info = self.engine.info
        self.device = self.engine.facts.device
        self._running: dict[str, list[TermSpec]] = {}
        self._wanted: tuple[int, list[TermSpec]] = (0, [])
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    def steering(self, terms: list[TermSpec]) -> Steering:
        """The terms with their vectors from the library. Raises SteerError that names what is missing or does not fit."""
        files = any(map(is_file_name, names_of(terms))) and not webui.open_to_others()
        # without a file, none is looked for: a name that the library lacks could be a file in the webui's folder
        steering = self.engine.steering(terms, names_only=not files)
        self.engine.check(steering)
        return steering

    def fields(self, terms: list[TermSpec]) -> dict[str, Any]:
        """What goes into a request's body. Vectors are uploaded when they are first used. Raises SteerError."""
        return self.engine.request_fields(self.steering(terms))

    def usable(self, terms: list[TermSpec]) -> tuple[list[TermSpec], list[str]]:
        """The terms that fit this model and each other, and a sentence for each of the others."""
        return wishes.fitting(terms, self.steering)

    # ---- replies of the page that are being generated ----

    def begin(self, terms: list[TermSpec]) -> str:
        """A name for a reply that the page asks for with these terms."""
        name = f"textgen-{uuid.uuid4().hex}"
        with self._lock:
            self._running[name] = terms
        return name

    def end(self, name: str) -> list[TermSpec]:
        """The reply has ended; returns the terms that it began with."""
        with self._lock:
            return self._running.pop(name, [])

    def change_running(self, terms: list[TermSpec]) -> None:
        """Let the replies of the page that are being generated follow, from their next token on. Returns at once."""
        with self._lock:
            if not self._running:
                return
            self._wanted = (self._wanted[0] + 1, list(terms))
            if self._worker is None:
                self._worker = threading.Thread(target=self._follow, daemon=True, name="steering follows the sliders")
                self._worker.start()

    def _follow(self) -> None:
        """Until each running reply has been told the latest wish; a newer one replaces it on the way."""
        told: dict[str, int] = {}
        while True:
            with self._lock:
                version, wanted = self._wanted
                left = [name for name in self._running if told.get(name) != version]
                if not left:
                    self._worker = None
                    return
            try:
                steering = self.steering(self.usable(wanted)[0])
                # a reply that has not begun is between the webui and the server, or waits for a slot
                told.update({name: version for name in left if self.engine.change(name, steering) is not None})
            except SteerError as error:
                webui.log(f"the running reply does not follow: {error}", error=True)
                with self._lock:
                    self._worker = None
                return
            if any(told.get(name) != version for name in left):
                time.sleep(RETRY)


_links: dict[int, tuple[Any, Link | SteerError]] = {}
_lock = threading.Lock()


def link_of(server: Any | None) -> Link:
    """The link to a ``LlamaServer`` object, made once for each: an unsteered reply costs a look into a dictionary.

    Raises:
        EngineError, ModelError: there is no server, or it cannot steer; the sentence is remembered with the server.
    """
    if server is None:
        raise EngineError(why_not())
    with _lock:
        known = _links.get(server.port)
        if known is None or known[0] is not server.process:
            found: Link | SteerError
            try:
                found = Link(f"http://127.0.0.1:{server.port}")
            except SteerError as error:
                found = error
            known = _links[server.port] = (server.process, found)
    if isinstance(known[1], SteerError):
        raise known[1]
    return known[1]


def current() -> Link:
    """The link to the model that is loaded now. Raises SteerError that says why there is none."""
    return link_of(webui.llama_server())


def current_or_none() -> Link | None:
    """As :func:`current`, None in place of an error."""
    try:
        return current()
    except SteerError:
        return None


def why_not() -> str:
    """Why the loaded model has no server that could steer."""
    name = webui.loader_name()
    if not name:
        return "no model is loaded: load one in the Model tab"
    if name == "Transformers":
        return "models of the Transformers loader are steered by hooks, not by a server: this needs the llama.cpp loader"
    return f"models of the {name} loader cannot be steered: load a GGUF with llama.cpp, or use the Transformers loader"
