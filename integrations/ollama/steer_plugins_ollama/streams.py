"""Answers that notice when the client has gone, and that never end in silence."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from steer_plugins.errors import SteerError

from .errors import Ending, status_of

log = logging.getLogger("steer.ollama")


def line(value: Mapping[str, Any]) -> bytes:
    """A line of NDJSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def sentence(error: BaseException) -> str:
    """What the client is told."""
    if isinstance(error, SteerError):
        return str(error)
    log.error("a bug: %s: %s", type(error).__name__, error, exc_info=error)
    return f"this is a bug of the sidecar: {type(error).__name__}"


def error_answer(error: BaseException, style: str = "ollama") -> JSONResponse:
    """An error in the shape of Ollama or of OpenAI."""
    status = status_of(error)
    return JSONResponse(error_body(sentence(error), status, style), status_code=status)


def error_body(text: str, status: int, style: str) -> dict[str, Any]:
    """The JSON of an error."""
    if style != "openai":
        return {"error": text}
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
    return {"error": {"message": text, "type": kind, "param": None, "code": None}}


def guarded(handler: Callable[[Request], Awaitable[Response]], style: str = "ollama") -> Callable[[Request], Awaitable[Response]]:
    """A route whose every error is an answer in the shape of its API."""

    @functools.wraps(handler)
    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is left to read it
        except asyncio.CancelledError:
            return error_answer(Ending(), style)
        except Exception as error:
            return error_answer(error, style)

    return run


async def watch(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(Response):
    """A streamed answer. Errors before the first part are an answer with a status, later ones a line (or a hang-up).

    Args:
        parts: the parts; closed when the client goes.
        broken: how an error is said in the middle: ``ndjson``, ``sse``, ``abort``.
        style: of the errors, ``ollama`` or ``openai``.
    """

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        *,
        status: int = 200,
        headers: Sequence[tuple[bytes, bytes]] | None = None,
        media_type: str = "application/x-ndjson",
        broken: str = "ndjson",
        style: str = "ollama",
    ) -> None:
        self.parts, self.broken, self.style = parts, broken, style
        self.status_code = status
        self.background = None
        self.raw_headers = list(headers) if headers is not None else [(b"content-type", media_type.encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._started = False
        pump = asyncio.create_task(self._pump(scope, receive, send))
        gone = asyncio.create_task(self.watch(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pump.cancel()
            await asyncio.wait({pump})
            with contextlib.suppress(OSError):
                await self._fail(Ending(), scope, receive, send)
        finally:
            gone.cancel()
            if not pump.done():
                pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pump

    async def watch(self, receive: Receive) -> None:
        """Returns when the client has gone."""
        await watch(receive)

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for part in self.parts:
                if not self._started:
                    await self._start(send)
                await send({"type": "http.response.body", "body": part, "more_body": True})
            if not self._started:
                await self._start(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            return  # the client hung up
        except Exception as error:
            await self._fail(error, scope, receive, send)
        finally:
            close = getattr(self.parts, "aclose", None)
            if close is not None:
                await close()

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        """Say what went wrong: an answer with a status, or in the middle a line of the answer."""
        if not self._started:
            await error_answer(error, self.style)(scope, receive, send)
            return
        text = sentence(error)
        log.warning("an answer broke off: %s", text)
        if self.broken == "abort":
            return  # an answer of a promised length: only a hang-up tells, which an answer without an end is
        line = json.dumps(error_body(text, 500, self.style)).encode()
        line = b"data: " + line + b"\n\n" if self.broken == "sse" else line + b"\n"
        await send({"type": "http.response.body", "body": line, "more_body": False})

    async def _start(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})


class Whole(Response):
    """An answer in one piece, whose making is cancelled when the client goes."""

    def __init__(self, made: Awaitable[Any], *, style: str = "ollama") -> None:
        self.made, self.style = made, style
        self.status_code, self.background, self.raw_headers = 200, None, []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        making = asyncio.ensure_future(self.made)
        gone = asyncio.create_task(watch(receive))
        try:
            ending = False
            try:
                await asyncio.wait({making, gone}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                ending = True
            if ending:
                making.cancel()
                await asyncio.wait({making})
                await error_answer(Ending(), self.style)(scope, receive, send)
                return
            if not making.done():
                making.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await making
                return
            try:
                answer: Response = JSONResponse(making.result())
            except Exception as error:
                answer = error_answer(error, self.style)
            await answer(scope, receive, send)
        finally:
            gone.cancel()
            if not making.done():
                making.cancel()
