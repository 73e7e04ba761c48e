"""The Ollama daemon behind the sidecar: management calls pass through to it untouched."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from .bodies import dumps
from .errors import BadRequest, Unavailable
from .streams import Streamed, watch

log = logging.getLogger("steer.ollama")

DEFAULT_URL = "http://127.0.0.1:11434"

# a connection's own headers (RFC 9110, 7.6.1), and what each side works out for itself
_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
_HOP |= {"host", "expect", "date"}


def daemon_url(environ: Mapping[str, str] | None = None, listen: tuple[str, int] | None = None) -> str:
    """Where the daemon is: ``OLLAMA_HOST``, unless that is where the sidecar itself listens.

    Raises:
        BadRequest: OLLAMA_HOST is not an address.
    """
    env = os.environ if environ is None else environ
    text = env.get("OLLAMA_HOST", "").strip().strip("\"'")
    if not text:
        return DEFAULT_URL
    url = host_url(text)
    parts = urlsplit(url)
    if listen is not None and parts.port == listen[1] and is_local(str(parts.hostname)):
        return DEFAULT_URL
    return url


def host_url(text: str, what: str = "OLLAMA_HOST") -> str:
    """The URL that a text such as ``OLLAMA_HOST`` means: scheme and port may be left out. Raises BadRequest."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        scheme, rest = "http", text
    try:
        if rest.count(":") > 1 and not rest.startswith("["):
            rest = f"[{rest}]"  # a bare IPv6 address
        parts = urlsplit(f"{scheme}://{rest}")
        port = parts.port or {"http": 11434 if not mark else 80, "https": 443}[scheme]
        host = parts.hostname or "127.0.0.1"
    except (ValueError, KeyError):
        raise BadRequest(f"{what}={text[:100]!r} is not an address: write one such as 127.0.0.1:11434") from None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path.rstrip('/')}"


def is_local(host: str) -> bool:
    """Whether a host is this machine, which no proxy is asked for."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Daemon:
    """Ollama's HTTP API. Calls raise Unavailable when it does not answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._local = is_local(str(urlsplit(url).hostname))
        self._client: httpx.AsyncClient | None = None

    @property
    def client(self) -> httpx.AsyncClient:
        if self._client is None:
            timeout = httpx.Timeout(None, connect=10.0)
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
            self._client = httpx.AsyncClient(trust_env=not self._local, timeout=timeout, limits=limits)
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def unavailable(self, error: Exception) -> Unavailable:
        """The sentence for a daemon that does not answer."""
        return Unavailable(
            f"Ollama does not answer at {self.url} ({type(error).__name__}): start it with `ollama serve`, or serve a folder of "
            "GGUFs without it: steer ollama serve --folder DIR"
        )

    async def alive(self) -> bool:
        """Whether it answers now."""
        try:
            return (await self.client.get(self.url + "/api/version", timeout=5.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def call(self, method: str, path: str, body: Any = None, timeout: float = 30.0) -> tuple[int, Any]:
        """Status and JSON of a short call (the text if it is not JSON), for which it may take ``timeout`` seconds."""
        try:
            response = await self.client.request(method, self.url + path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise self.unavailable(error) from None
        try:
            return response.status_code, response.json()
        except ValueError:
            return response.status_code, response.text

    async def lines(self, path: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        """The objects of a streamed answer; an error status is one with ``error`` and ``status``."""
        try:
            async with self.client.stream("POST", self.url + path, json=body) as response:
                if response.status_code != 200:
                    raw = await response.aread()
                    yield {"error": error_text(raw), "status": response.status_code}
                    return
                async for line in response.aiter_lines():
                    if line.strip():
                        try:
                            found = json.loads(line)
                        except ValueError:
                            found = {"error": line[:300]}
                        yield found
        except httpx.HTTPError as error:
            raise self.unavailable(error) from None

    # ---- one copy of the weights ----

    async def loaded(self) -> list[str]:
        """Names of the models it has loaded; none when it does not answer."""
        try:
            status, found = await self.call("GET", "/api/ps", timeout=10.0)
        except Unavailable:
            return []
        models = found.get("models") if status == 200 and isinstance(found, dict) else None
        return [str(m.get("name") or m.get("model")) for m in models or () if isinstance(m, dict)]

    async def unload(self, name: str, timeout: float = 30.0) -> None:
        """Have it unload a model (a request that runs nothing), and wait until it has."""
        await self.call("POST", "/api/generate", {"model": name, "keep_alive": 0, "stream": False}, timeout)
        until = asyncio.get_running_loop().time() + timeout
        while name in await self.loaded():
            if asyncio.get_running_loop().time() > until:
                log.warning("Ollama still has %s after %g s: its weights are held twice for now", name, timeout)
                return
            await asyncio.sleep(0.1)


class Forwarded(Streamed):
    """A request passed on to Ollama and its answer back, both streamed. When the client goes, Ollama's side is hung up at once,
    also while it has not answered yet.

    Args:
        body: what was read of the request, which is all that is passed on then; None: it is streamed.

    Raises:
        BadRequest: the path has dots for folders, so that it would be another one behind the sidecar.
    """

    def __init__(self, daemon: Daemon, request: Request, body: Mapping[str, Any] | None = None) -> None:
        style = "openai" if request.url.path.startswith("/v1/") else "ollama"
        super().__init__(self._parts(), style=style)
        if not {".", ".."}.isdisjoint(request.url.path.split("/")):
            raise BadRequest(f"invalid path: {request.url.path[:200]!r}")
        self._daemon, self._request = daemon, request
        self._body = None if body is None else dumps(body)
        given = int(request.headers.get("content-length") or 0) > 0 or "transfer-encoding" in request.headers
        self._has_stream = body is None and given
        self._sent = asyncio.Event()
        if not self._has_stream:
            self._sent.set()

    async def watch(self, receive: Receive) -> None:
        await self._sent.wait()  # until then the body is read, and reading it tells
        await watch(receive)

    async def _parts(self) -> AsyncGenerator[bytes, None]:
        response = await self._send()
        self.status_code = response.status_code
        self.raw_headers = [(k, v) for k, v in response.headers.raw if k.decode().lower() not in _HOP]
        self.broken = _mid_stream(response)
        try:
            yield b""  # the headers go out now
            async for part in response.aiter_raw():
                yield part
        except httpx.HTTPError as error:
            raise self._daemon.unavailable(error) from None
        finally:
            await response.aclose()

    async def _send(self) -> httpx.Response:
        request, client = self._request, self._daemon.client
        headers = [(k, v) for k, v in request.headers.raw if k.decode().lower() not in _HOP]
        if self._body is not None:
            headers = [(k, v) for k, v in headers if k.lower() != b"content-length"]
        path = request.scope.get("raw_path") or request.url.path.encode()
        query = request.scope.get("query_string") or b""
        url = self._daemon.url + "".join(chr(c) if c < 128 else f"%{c:02X}" for c in (path + b"?" + query if query else path))
        # Go reuses connections; one that it closed meanwhile fails at once, and what has no stream can be sent again
        for attempt in (1, 2):
            content = self._stream() if self._has_stream else self._body
            try:
                sent = client.build_request(request.method, url, headers=headers, content=content)
                return await client.send(sent, stream=True)
            except httpx.HTTPError as error:
                if attempt == 2 or self._has_stream or not isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
                    raise self._daemon.unavailable(error) from None
        raise AssertionError("unreachable")

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        try:
            async for part in self._request.stream():
                yield part
        except ClientDisconnect:
            raise ConnectionAbortedError("the client hung up") from None  # an OSError: nobody is left to be told
        finally:
            self._sent.set()


def error_text(raw: bytes) -> str:
    """The sentence of an error answer."""
    try:
        return str(json.loads(raw)["error"])
    except (ValueError, KeyError, TypeError):
        return raw.decode(errors="replace")[:300]


def _mid_stream(response: httpx.Response) -> str:
    """How an error is said in the middle: as a line of NDJSON, else by hanging up."""
    kind = response.headers.get("content-type", "")
    return "ndjson" if "ndjson" in kind and "content-length" not in response.headers else "abort"
