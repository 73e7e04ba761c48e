"""What a server says of itself and of its model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..engine.base import ModelInfo
from ..errors import EngineError, VectorError
from ..steering.vector import ModelIdentity
from .connection import Connection, ServerBusy, ServerRefusal

PROTOCOL = 1
"""The version of docs/http-protocol.md that is spoken here."""


@dataclass(frozen=True)
class ServerFacts:
    """A llama-server with steering and its model, as they were when they were asked.

    Attributes:
        url: address of the server.
        info: the model; None when it cannot be steered.
        problem: why it cannot, one sentence; "" when it can.
        n_ctx: tokens of one request.
        n_slots: requests that are computed side by side.
        device: where the model runs, for people: ``CPU``, or the devices that hold layers (``CUDA0 (NVIDIA RTX 4090)``).
        thinking: the tags that open and close thinking, None when the model has none.
        has_chat_template: whether the model brings a template for chats.
        vectors: name -> content sha256 of the vectors that are loaded there.
        props: what ``GET /props`` of llama-server says: its chat template, what kinds of input it takes.
        thinks_untold: the template speaks of thinking without a tag that ends it, so neither scope of it can be followed.
    """

    url: str
    info: ModelInfo | None
    problem: str
    n_ctx: int
    n_slots: int
    device: str
    thinking: tuple[str, str] | None
    has_chat_template: bool
    vectors: Mapping[str, str]
    props: Mapping[str, Any] = field(repr=False)
    thinks_untold: bool = False

    @classmethod
    def ask(cls, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> ServerFacts:
        """The facts of a server, whose model need not be one that can be steered.

        Args:
            url: ``http://host:port``; the scheme may be left out.
            api_key: the server's ``--api-key``, if it has one.
            timeout: seconds without a sign of life after which it is given up; also how long it may take to load its model.

        Raises:
            EngineError: nobody answers there, it is a server without steering, or it speaks another protocol version.
        """
        connection = Connection(url, api_key=api_key, timeout=timeout)
        try:
            return ask(connection)
        finally:
            connection.close()

    @property
    def on_gpu(self) -> bool:
        """Whether layers of the model are on a GPU."""
        return self.device != "CPU"

    @property
    def tags(self) -> dict[str, str] | None:
        """``steering_tags`` of a request; None when the model has no thinking."""
        return None if self.thinking is None else {"open": self.thinking[0], "close": self.thinking[1]}


def ask(connection: Connection) -> ServerFacts:
    """The facts of a server that speaks our protocol; waits for one that is loading its model. Raises EngineError."""
    said = _hello(connection)
    model = said["model"]
    problem = str(model.get("error") or "")
    opening, closing = model.get("think_open"), model.get("think_close")
    try:
        return ServerFacts(
            url=connection.url,
            info=None if problem else _model_info(model),
            problem=problem,
            n_ctx=int(model.get("n_ctx") or 0),
            n_slots=max(1, int(model.get("n_slots") or 1)),
            device=device_of(model) or "CPU",
            thinking=(str(opening), str(closing)) if opening and closing else None,
            has_chat_template=bool(model.get("has_chat_template")),
            vectors={str(v["name"]): str(v["content_sha256"]) for v in said.get("vectors", [])},
            props=dict(connection.get("/props")),
            thinks_untold=bool(model.get("thinks_untold")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, VectorError) as error:
        raise EngineError(f"{connection.url} does not say what its model is ({error}); it may be a different version") from None


def _hello(connection: Connection) -> dict[str, Any]:
    """What ``GET /steering`` answers."""
    deadline = time.monotonic() + connection.timeout
    while True:
        try:
            facts = connection.get("/steering")
            break
        except ServerBusy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.25)
        except ServerRefusal as refusal:
            if refusal.status != 404:
                raise
            raise EngineError(f"the server at {connection.url} cannot steer: start one that can with `steer serve`") from None
    protocol = facts.get("protocol") if isinstance(facts, dict) else None
    if protocol is None or not isinstance(facts.get("model"), dict):
        raise EngineError(f"the server at {connection.url} cannot steer: start one that can with `steer serve`")
    if protocol != PROTOCOL:
        older = isinstance(protocol, int) and protocol < PROTOCOL
        way_out = "restart it with `steer serve`" if older else "upgrade steer-plugins"
        raise EngineError(f"{connection.url} speaks protocol version {protocol!r:.20}, and this package {PROTOCOL}: {way_out}")
    return dict(facts)


def _model_info(model: Mapping[str, Any]) -> ModelInfo:
    identity = ModelIdentity.from_dict(model["identity"])
    path = str(model.get("path", ""))
    stem = (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).stem
    return ModelInfo(
        path=path,
        identity=identity,
        architecture=identity.architecture,
        n_layer=identity.n_layer,
        n_embd=identity.n_embd,
        n_streams=identity.n_streams,
        n_ctx=int(model["n_ctx"]),
        n_vocab=int(model["n_vocab"]),
        sites=tuple(str(site) for site in model["sites"]),
        last_layer_outputs_only=bool(model["last_layer_outputs_only"]),
        has_chat_template=bool(model["has_chat_template"]),
        name=identity.name or stem,
    )


def device_of(model: Mapping[str, Any]) -> str:
    """Where the model of ``GET /steering`` runs; "" when it does not say."""
    if not int(model.get("n_gpu_layers") or 0):
        return "CPU"
    return ", ".join(f"{d['name']} ({d['description']})" for d in model.get("devices", []) if d.get("type") == "gpu")
