"""HTTP to a llama-server: JSON, bytes and event streams; whatever goes wrong becomes one sentence."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, HTTPError, MaxRetryError, NewConnectionError

from ..errors import EngineError, SpecError

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a connection."""

MAX_ANSWER = 4 << 30
"""Longer answers are not read into memory (bytes)."""


class ServerRefusal(SpecError):
    """The server understood the request and refused it (4xx); the message is the server's own sentence."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerBusy(EngineError):
    """The server is still loading its model (503)."""


class Connection:
    """A server's address and the connections to it. May be used by several threads at once.

    Args:
        url: ``http://host:port``, with or without the scheme; a path in front of the routes is kept.
        api_key: what the server was started with as ``--api-key``.
        timeout: seconds of silence after which an answer is given up.
        n_parallel: connections kept open.

    Raises:
        EngineError: the address cannot be understood. All methods raise it when the server cannot be reached, ends in the
            middle, fails (5xx) or wants an API key, and :class:`ServerRefusal` when it refuses (4xx).
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0, n_parallel: int = 16) -> None:
        self.url = normal_url(url)
        self.api_key = api_key
        self.timeout = timeout
        self._session = requests.Session()
        # a proxy of the environment cannot reach this machine's own ports
        self._session.trust_env = not is_loopback(self.url)
        adapter = HTTPAdapter(pool_maxsize=max(16, 2 * n_parallel))
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise EngineError("the API key holds characters that no key has: copy it again")
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Any:
        """The JSON that a route answers."""
        return self._json(self._send("GET", path))

    def post(self, path: str, body: Any) -> Any:
        """The JSON that a route answers to JSON."""
        return self._json(self._send("POST", path, json_body=body))

    def post_bytes(self, path: str, data: bytes) -> Any:
        """The JSON that a route answers to bytes."""
        return self._json(self._send("POST", path, data=data))

    def post_for_bytes(self, path: str, body: Any) -> bytes:
        """The bytes that a route answers to JSON."""
        return self._content(self._send("POST", path, json_body=body))

    def delete(self, path: str) -> Any:
        """The JSON that a route answers to DELETE."""
        return self._json(self._send("DELETE", path))

    def events(self, path: str, body: Any) -> EventStream:
        """Post JSON and follow the stream of events that answers."""
        return EventStream(self, self._send("POST", path, json_body=body, keep=False))

    def close(self) -> None:
        """Close the idle connections."""
        self._session.close()

    # ---- inside ----

    def _send(
        self, method: str, path: str, *, json_body: Any = None, data: bytes | None = None, keep: bool = True
    ) -> requests.Response:
        headers = {} if keep else {"Connection": "close"}  # llama-server hangs up after a stream, said or not
        if json_body is not None:
            data = json.dumps(json_body, allow_nan=False).encode()
            headers["Content-Type"] = "application/json"
        elif data is not None:
            headers["Content-Type"] = "application/octet-stream"
        for attempt in (1, 2):
            try:
                response = self._session.request(
                    method,
                    self.url + path,
                    data=data,
                    headers=headers,
                    timeout=(CONNECT_TIMEOUT, self.timeout),
                    stream=True,
                    allow_redirects=False,
                )
                break
            except requests.exceptions.ConnectionError as error:
                # A kept connection may have been closed by the server the moment it was used again.
                if attempt == 2 or is_unreachable(error) or isinstance(error, requests.exceptions.Timeout):
                    raise self.broken(error) from None
            except (requests.RequestException, HTTPError) as error:
                raise self.broken(error) from None
        if response.status_code != 200:
            raise self._refused(response, path)
        return response

    def _content(self, response: requests.Response) -> bytes:
        parts, size = [], 0
        try:
            for part in response.iter_content(1 << 20):
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER:
                    raise EngineError(f"the answer of {self.url} is longer than {MAX_ANSWER} bytes: ask for less at once")
        except (requests.RequestException, HTTPError) as error:
            raise self.broken(error) from None
        finally:
            response.close()
        return b"".join(parts)

    def _json(self, response: requests.Response) -> Any:
        try:
            return json.loads(self._content(response))
        except ValueError:
            raise EngineError(f"{self.url} does not answer in JSON, so it is not a llama-server: correct the address") from None

    def _refused(self, response: requests.Response, path: str) -> Exception:
        status = response.status_code
        message = _message(self._content(response)) or response.reason or f"status {status}"
        if status == 401:
            return EngineError(f"{self.url} wants an API key ({message}): give it as api_key, or in STEER_API_KEY")
        if status == 403:
            return EngineError(f"{self.url} refuses this: {message}")
        if status == 503:
            return ServerBusy(f"{self.url} cannot answer yet ({message}): try again in a moment")
        if 400 <= status < 500:
            return ServerRefusal(message, status)
        return EngineError(f"{self.url}{path} failed with status {status}: {message}")

    def broken(self, error: Exception) -> EngineError:
        """What a failed transfer means for the user."""
        if is_unreachable(error):
            return EngineError(f"no server answers at {self.url}: start one with `steer serve`, or correct the address")
        if isinstance(error, requests.exceptions.Timeout) or "timed out" in str(error):
            return EngineError(f"{self.url} did not answer in time: see what it does, allow longer, or correct the address")
        if isinstance(error, requests.exceptions.SSLError):
            return EngineError(f"{self.url} cannot be trusted ({_one_line(str(error))}): correct the address or its certificate")
        return EngineError(
            f"the connection to {self.url} was lost in the middle of an answer: see whether the server still runs, and ask again"
        )


class EventStream:
    """Server-sent events. Iterate for the JSON of each; :meth:`close` hangs up, upon which the server stops its work."""

    def __init__(self, connection: Connection, response: requests.Response) -> None:
        self._connection = connection
        self._response = response

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for line in self._response.iter_lines():
                name, _, text = line.partition(b":")
                text = text.strip()
                if name not in (b"data", b"error") or text == b"[DONE]":
                    continue  # comments keep the connection alive
                event = self._parse(text)
                if name == b"error" or "error" in event:
                    raise self._error(event.get("error", event))
                yield event
        except (requests.RequestException, HTTPError, OSError) as error:
            raise self._connection.broken(error) from None

    def _parse(self, text: bytes) -> dict[str, Any]:
        try:
            event = json.loads(text)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise EngineError(f"{self._connection.url} sent an event that is not a JSON object: see whether it is a llama-server")
        return event

    def _error(self, error: Any) -> Exception:
        code = error.get("code") if isinstance(error, dict) else None
        message = _message(json.dumps({"error": error}).encode()) or "no reason given"
        if isinstance(code, int) and 400 <= code < 500:
            return ServerRefusal(message, code)
        return EngineError(f"{self._connection.url} failed in the middle of a reply: {message}")

    def shutdown(self) -> None:
        """Wake a thread that waits for the next event; it sees the connection as lost. For another thread to call."""
        shutdown = getattr(self._response.raw, "shutdown", None)  # urllib3 2.3 and later
        if shutdown is not None:
            try:
                shutdown()
            except (OSError, ValueError, RuntimeError):
                pass  # it has ended already

    def close(self) -> None:
        """Hang up."""
        self._response.close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def normal_url(url: str) -> str:
    """``http://host:port`` without a slash at the end, the scheme added where it is missing.

    Raises:
        EngineError: no http address.
    """
    text = url.strip()
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        ok = False
    if ok and parts.path.rstrip("/").endswith("/v1"):
        raise EngineError(f"{url!r:.100} is the address of a server's OpenAI API: leave out the /v1")
    if not ok or parts.query or parts.fragment or any(c.isspace() for c in text):
        raise EngineError(f"{url!r:.100} is not an address of a server: write it like http://127.0.0.1:8080")
    return text.rstrip("/")


def is_loopback(url: str) -> bool:
    """True for addresses of this machine itself."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_unreachable(error: Exception) -> bool:
    """True when not even a connection was made: wrong address, or nobody listens there."""
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return True
    inner = error.args[0] if error.args else None
    reason = inner.reason if isinstance(inner, MaxRetryError) else inner
    return isinstance(reason, NewConnectionError | ConnectTimeoutError)


def _message(body: bytes) -> str:
    """The sentence in an error body, on one line and of bounded length."""
    try:
        data = json.loads(body)
    except ValueError:
        return ""
    error = data.get("error", data) if isinstance(data, dict) else data
    text = error.get("message", "") if isinstance(error, dict) else error
    return _one_line(text) if isinstance(text, str) else ""


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]
