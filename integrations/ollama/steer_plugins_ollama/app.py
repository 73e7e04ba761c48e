"""The sidecar's HTTP surface: Ollama's API, of which it answers what steered models need and passes on the rest."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import calls, manage, openai
from .access import Access
from .service import Service
from .streams import guarded


def make_app(service: Service, *, local: bool = True) -> Starlette:
    """The ASGI application. ``local``: it listens on a loopback address only."""
    everything = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

    def route(path: str, handler: Callable[[Request], Awaitable[Response]], *methods: str) -> Route:
        style = "openai" if path.startswith("/v1/") else "ollama"
        return Route(path, guarded(handler, style), methods=list(methods))

    routes = [
        route("/", manage.root, "GET", "HEAD"),
        route("/api/version", manage.version, "GET", "HEAD"),
        route("/api/chat", calls.reply, "POST"),
        route("/api/generate", calls.reply, "POST"),
        route("/api/ps", manage.running, "GET"),
        route("/api/show", manage.show, "POST"),
        route("/api/create", manage.create, "POST"),
        route("/api/delete", manage.delete, "DELETE"),
        *(route(path, manage.embed, "POST") for path in ("/api/embed", "/api/embeddings", "/v1/embeddings")),
        *(route(path, openai.handle, "POST") for path in openai.PATHS),
    ]
    if service.daemon is None:
        routes += [
            route("/api/tags", manage.tags, "GET", "HEAD"),
            route("/api/copy", manage.copy, "POST"),
            route("/api/blobs/{digest}", manage.blobs, "HEAD", "POST"),
            route("/v1/models", openai.models, "GET"),
            route("/v1/models/{model:path}", openai.models, "GET"),
        ]
    routes.append(route("/{path:path}", manage.anything, *everything))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
        yield
        await service.close()

    guard = Middleware(Access, environ=service.environ, local=local)
    app = Starlette(routes=routes, lifespan=lifespan, middleware=[guard])
    app.state.service = service
    return app
