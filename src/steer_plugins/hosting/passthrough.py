"""A server in front of a server: bodies may be changed on their way in, answers and streams go through as they are."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

import anyio
import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..client import is_loopback
from ..errors import EngineError, SteerError

MAX_BODY = 64 << 20
"""Bytes of a request."""
CONNECT_TIMEOUT = 10.0

# they belong to one connection, and httpx sets its own
_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade",
}  # fmt: skip
_OWN = _HOP | {"host", "content-length", "expect"}


class Change(Protocol):
    """What happens to the bodies of requests."""

    def bodies(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What to send in place of a JSON body that was posted; the next one where the server refuses it (400).

        Raises SteerError: the request is refused with its sentence.
        """
        ...

    def address(self, body: dict[str, Any] | None) -> str:
        """The server that gets one of :meth:`bodies`, or a request without JSON (None): ``http://host:port``.

        Raises EngineError: there is none.
        """
        ...

    def ended(self, body: dict[str, Any]) -> None:
        """The answer to one of :meth:`bodies` has ended, in whatever way."""
        ...


class Passthrough:
    """The ASGI application. It listens on this machine only, so it takes names and pages of this machine only.

    Args:
        change: what happens to bodies, and where they go.
    """

    def __init__(self, change: Change) -> None:
        self._change = change
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT)
        timeout, limits = httpx.Timeout(None, connect=CONNECT_TIMEOUT), httpx.Limits(max_connections=None)
        # a proxy of the environment cannot reach this machine's own ports
        self._near, self._far = (httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=trust) for trust in (False, True))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not passed on")
        request = Request(scope, receive)
        try:
            why = foreign(request.headers.get("host"), request.headers.get("origin"))
            answer = refusal(403, why) if why is not None else await self._unless_left(request, await _read(request), receive)
        except _TooLong:
            answer = refusal(413, f"the body is longer than {MAX_BODY} bytes")
        except ClientDisconnect:
            return
        if answer is not None:
            await answer(scope, receive, send)

    async def close(self) -> None:
        """Close the connections."""
        await self._near.aclose()
        await self._far.aclose()

    async def _unless_left(self, request: Request, data: bytes, receive: Receive) -> Response | None:
        """The answer, or None for a client that hangs up before it comes: then the server behind is told so as well."""
        answer = None
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            try:
                answer = await self._answer(request, data)
            except SteerError as error:
                answer = refusal(502 if isinstance(error, EngineError) else 400, str(error))
            group.cancel_scope.cancel()
        return answer

    async def _answer(self, request: Request, data: bytes) -> Response:
        body = _json(request, data)
        if body is None:
            return await self._pass_on(request, data, None)
        bodies = self._change.bodies(request.url.path, body)
        answer: Response | None = None
        changed = await run_in_threadpool(next, bodies, None)
        while changed is not None:
            content = data if changed is body else json.dumps(changed).encode()
            answer = await self._pass_on(request, content, changed)
            if answer.status_code != 400:
                break
            changed = await run_in_threadpool(next, bodies, None)
        assert answer is not None
        return answer

    async def _pass_on(self, request: Request, content: bytes, body: dict[str, Any] | None) -> Response:
        headers = [(key, value) for key, value in request.headers.raw if key.decode("latin-1").lower() not in _OWN]
        path = request.scope.get("raw_path") or request.url.path.encode()
        server = ""
        try:
            server = self._change.address(body)
            url = server + path.decode("latin-1") + (f"?{request.url.query}" if request.url.query else "")
            client = self._near if is_loopback(server) else self._far
            sent = client.build_request(request.method, url, headers=headers, content=content or None)
            found = await client.send(sent, stream=True)
            kept = [(key, value) for key, value in found.headers.raw if key.decode("latin-1").lower() not in _HOP]
            if found.status_code == 400:  # it may be sent again
                answer = Response(b"".join([part async for part in found.aiter_raw()]), 400)
                await found.aclose()
                self._ended(body)
                return _raw(answer, kept)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._ended(body)
            raise EngineError(f"no server answers at {server} ({type(error).__name__}): see whether it runs") from None
        except BaseException:
            self._ended(body)
            raise
        return _raw(StreamingResponse(self._parts(found, body), found.status_code), kept)

    async def _parts(self, found: httpx.Response, body: dict[str, Any] | None) -> AsyncIterator[bytes]:
        """The bytes of an answer as they come. A client that leaves ends this, and with it the request behind."""
        try:
            async for part in found.aiter_raw():
                yield part
        finally:
            self._ended(body)
            with anyio.CancelScope(shield=True):
                await found.aclose()

    def _ended(self, body: dict[str, Any] | None) -> None:
        if body is not None:
            self._change.ended(body)


class _TooLong(Exception):
    """A body that is not read to its end."""


async def _read(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY:
            raise _TooLong
    return b"".join(parts)


def _raw(answer: Response, headers: list[tuple[bytes, bytes]]) -> Response:
    answer.raw_headers = [(key.lower(), value) for key, value in headers]
    return answer


def _json(request: Request, data: bytes) -> dict[str, Any] | None:
    """The object that was posted; None for all else, which is passed on unread."""
    if request.method != "POST" or not data:
        return None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def foreign(host: str | None, origin: str | None) -> str | None:
    """Why a request is not answered: a page of elsewhere sent it, or a name that somebody has pointed at this machine."""
    try:
        name = urlsplit(f"//{host or ''}").hostname or ""
        if not _of_this_machine(name):
            return f"the host {name[:100]!r} is not this machine: ask for 127.0.0.1"
        if origin is not None and not _of_this_machine(urlsplit(origin).hostname or ""):
            return f"pages of {origin[:100]!r} may not use this server"
    except ValueError:
        return "the Host or Origin header is not an address"
    return None


def _of_this_machine(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def refusal(status: int, sentence: str) -> Response:
    """An error in the form that OpenAI's clients and llama-server have."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"code": status, "type": kind, "message": sentence}}, status)
