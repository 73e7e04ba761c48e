"""Who may ask: what Ollama's own server checks before it answers a browser.

A page of any web site can send requests to this machine, and with a domain name that it points here also read the answers.
So a sidecar that listens on this machine only answers to names of this machine, and foreign origins are refused. Origins that are
allowed get the CORS headers that let their pages read the answers. The lists are those of Ollama (``server/routes.go``,
``envconfig``), ``OLLAMA_ORIGINS`` adds to them.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOCAL_NAMES = ("localhost", "127.0.0.1", "0.0.0.0")
_APPS = ("app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*")
_LOCAL_ENDS = (".localhost", ".local", ".internal")
_WRITING = ("POST", "PUT", "PATCH", "DELETE")
_FORMS = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")
"""What a page can send without asking first whether it may."""
_METHODS = "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS"


def origins(environ: Mapping[str, str]) -> list[str]:
    """The patterns of origins that may read answers."""
    given = [one.strip() for one in environ.get("OLLAMA_ORIGINS", "").split(",")]
    local = [f"{scheme}://{name}{port}" for name in _LOCAL_NAMES for scheme in ("http", "https") for port in ("", ":*")]
    return [one for one in given if one] + local + list(_APPS)


def host_allowed(host: str) -> bool:
    """Whether a ``Host`` header names this machine or an address, not a domain that somebody has pointed here."""
    name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name in ("", "localhost", socket.gethostname().lower()) or name.endswith(_LOCAL_ENDS)


class Access:
    """The ASGI middleware. ``local``: the sidecar listens on a loopback address, so only this machine's names are its own."""

    def __init__(self, app: ASGIApp, environ: Mapping[str, str], local: bool = True) -> None:
        self.app, self.local = app, local
        self.origins = origins(environ)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        origin = headers.get(b"origin")
        try:
            refused = self._refused(scope, headers)
        except ValueError:
            refused = (400, "the Host or Origin header is not an address")
        if refused is not None:
            await JSONResponse({"error": refused[1]}, refused[0])(scope, receive, send)
        elif origin:
            await self._with_cors(origin, headers, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refused(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """Status and sentence for a request that is not answered. Raises ValueError for a Host or Origin that is no address."""
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.local and not host_allowed(host):
            return 403, f"the host {host[:100]!r} is not allowed: ask for 127.0.0.1"
        if origin is None:
            # browsers say nothing of their page where they only fetch, as for a picture; what they do say is enough
            foreign = headers.get(b"sec-fetch-site") == "cross-site" and headers.get(b"sec-fetch-mode") != "navigate"
            return (403, "another web site is not allowed to ask: add it to OLLAMA_ORIGINS") if foreign else None
        if not self._allowed(origin, host):
            return 403, f"the origin {origin[:100]!r} is not allowed: add it to OLLAMA_ORIGINS"
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if scope["method"] in _WRITING and kind in _FORMS:
            return 415, f"a web page sends {kind or 'a body'} as application/json"
        return None

    def _allowed(self, origin: str, host: str) -> bool:
        """Whether a page may ask: our own, under a name that nobody else can have pointed here, or one that is listed."""
        if urlsplit(origin).netloc == host and host_allowed(host):
            return True
        return any(pattern == "*" or fnmatch.fnmatchcase(origin.lower(), pattern.lower()) for pattern in self.origins)

    async def _with_cors(self, origin: str, headers: dict[bytes, str], scope: Scope, receive: Receive, send: Send) -> None:
        ours = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            wanted = headers.get(b"access-control-request-headers", "content-type, authorization")
            allowed = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Allow-Headers": wanted}
            answer = Response(status_code=204, headers={**allowed, "Access-Control-Max-Age": "43200"})
            answer.raw_headers += ours
            await answer(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(k, v) for k, v in message.get("headers", ()) if not k.lower().startswith(b"access-control-")]
                message = {**message, "headers": kept + ours}
            await send(message)

        await self.app(scope, receive, marked)
