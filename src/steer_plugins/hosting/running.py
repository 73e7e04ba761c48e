"""Runs an ASGI application on a port of this machine, in this thread or beside it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from ..client import port_taken
from ..errors import EngineError
from .passthrough import Change, Passthrough

HOST = "127.0.0.1"


def passing(change: Change, app: Starlette | None = None) -> Starlette:
    """An application that passes on all requests for which ``app`` has no route of its own."""
    behind, app = Passthrough(change), app or Starlette()
    app.router.routes.append(Mount("/", app=behind))
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Any]:
        async with inner(app) as state:
            yield state
        await behind.close()

    app.router.lifespan_context = lifespan
    return app


class _Server(uvicorn.Server):
    """Says where it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            self._ready(f"http://{HOST}:{port}")


def _server(app: Any, port: int, ready: Callable[[str], None]) -> _Server:
    """Raises EngineError when the port is in use."""
    if port and port_taken(HOST, port):
        raise EngineError(f"port {port} of {HOST} is in use: stop what runs there, or choose another with --port")
    config = uvicorn.Config(
        app, host=HOST, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=5, server_header=False, ws="none"
    )
    return _Server(config, ready)


def run(app: Any, port: int, ready: Callable[[str], None]) -> None:
    """Serve until a signal ends it. ``ready`` gets the address once it listens; port 0 takes a free one. Raises EngineError."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order already
        _server(app, port, ready).run()


@contextlib.contextmanager
def beside(app: Any, port: int = 0) -> Iterator[str]:
    """Serve in a thread of its own while the block runs; gives the address. Raises EngineError."""
    listening = threading.Event()
    urls: list[str] = []

    def ready(url: str) -> None:
        urls.append(url)
        listening.set()

    server = _server(app, port, ready)

    def serve() -> None:
        try:
            server.run()
        finally:
            listening.set()

    thread = threading.Thread(target=serve, daemon=True, name="steer passes requests on")
    thread.start()
    try:
        listening.wait()
        if not urls:
            raise EngineError(f"nothing can listen on {HOST} port {port}: choose another port")
        yield urls[0]
    finally:
        server.should_exit = True
        thread.join(10)
