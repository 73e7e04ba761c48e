"""Requests with ``steering`` in our terms, on their way to a server of EasySteer or to vLLM with hotwire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..client.connection import normal_url
from ..errors import SpecError
from ..requests import easysteer, export, hotwire
from ..requests.files import EASYSTEER
from ..steering.grammar import steering_of, terms_of
from ..steering.terms import Steering
from ..steering.vector import ModelIdentity
from ..store.library import Library

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")


class Translating:
    """What a proxy does to bodies, see :class:`~.passthrough.Change`. Vectors are looked up by name and written when needed.

    Args:
        target: ``easysteer`` or ``hotwire``.
        url: its server.
        library: where vectors are looked up.
        identity: the model of the vectors; None takes vectors that the library has for one model only.
        folder: where files are written.
        server_folder: what the server calls that folder.
        default: a text of the grammar for requests that say nothing.

    Raises:
        EngineError: the address cannot be understood. SpecError, VectorError: the default cannot be applied.
    """

    def __init__(
        self,
        target: str,
        url: str,
        library: Library,
        folder: Path,
        *,
        identity: ModelIdentity | None = None,
        server_folder: str | None = None,
        default: str = "",
    ) -> None:
        self.target, self.url = target, normal_url(url)
        self._library, self._identity, self._folder = library, identity, folder
        self._server_folder = str(folder.absolute()) if server_folder is None else server_folder
        self._default = self.fields(default, names_only=False) if default else {}

    def fields(self, wish: Any, *, names_only: bool = True) -> dict[str, Any]:
        """The target's fields for a text or terms as JSON, their files written. Raises SpecError or VectorError."""
        terms = terms_of(wish)
        if terms is None:
            raise SpecError(f"steering is {wish!r:.60}: give a text or a list of terms")
        found = steering_of(terms, lambda name: self._library.resolve(name, self._identity, names_only=names_only))
        fields = self._translate(found)
        for term in found:
            if not term.is_zero:
                export(term.vector, self.target, self._folder, term.effective_op)
        return fields

    def _translate(self, steering: Steering) -> dict[str, Any]:
        if self.target == EASYSTEER:
            return easysteer(steering, folder=self._server_folder)
        return hotwire(steering)

    def bodies(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The body with the target's fields in place of ours. Raises SteerError."""
        if path not in PATHS:
            yield body
            return
        wish = body.get("steering")
        fields = self._default if wish is None else self.fields(wish)
        rest = {key: value for key, value in body.items() if key != "steering"}
        more = rest.get("vllm_xargs")
        if "vllm_xargs" in fields and more is not None:
            if not isinstance(more, dict) or "hotwire" in more:
                raise SpecError("vllm_xargs says how to steer already: leave out hotwire there, or steering")
            fields = {"vllm_xargs": {**more, **fields["vllm_xargs"]}}
        yield body if wish is None and not fields else {**rest, **fields}

    def address(self, body: dict[str, Any] | None) -> str:
        """The server."""
        return self.url

    def ended(self, body: dict[str, Any]) -> None:
        """Nothing is kept."""
