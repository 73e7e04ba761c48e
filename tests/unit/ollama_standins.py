"""Stand-ins for the Ollama daemon and for llama-server, and the sidecar in a thread, for tests without any of these programs."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import uvicorn
from steer_plugins_ollama.app import make_app
from steer_plugins_ollama.service import Service


class StandIn:
    """A server that answers what it is told to, and remembers what it was asked.

    ``answers``: (method, path) -> what to do with the handler.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        self.answers: dict[tuple[str, str], Callable[[BaseHTTPRequestHandler, bytes], None]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def handle_any(self) -> None:
                body = _body(self)
                path = self.path.split("?")[0]
                outer.asked.append((self.command, self.path, body))
                answer = outer.answers.get((self.command, path))
                if answer is not None:
                    answer(self, body)
                else:
                    send_json(self, {"error": f"404 {path}"}, 404)

            do_GET = do_POST = do_HEAD = do_DELETE = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]

    def bodies(self, path: str) -> list[Any]:
        """The JSON bodies that were sent to a path."""
        return [json.loads(body) for _, asked, body in self.asked if asked == path and body]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


class StandInDaemon(StandIn):
    """An Ollama that says it has ``loaded`` these models, and unloads them when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.answers[("GET", "/api/version")] = lambda h, b: send_json(h, {"version": "0.9.3"})
        self.answers[("GET", "/api/ps")] = lambda h, b: send_json(h, {"models": [{"name": n} for n in self.loaded]})
        self.answers[("POST", "/api/generate")] = self._unload

    def _unload(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked = json.loads(body)
        if asked.get("keep_alive") == 0 and asked["model"] in self.loaded:
            self.loaded.remove(asked["model"])
        send_json(handler, {"model": asked["model"], "done": True})


class StandInLlama(StandIn):
    """What a steering llama-server answers, for the routes that the sidecar asks; replies are scripted.

    ``events``: those of ``/v1/chat/completions`` and ``/completion``. ``left``: set when a client has gone that was being
    answered; ``began``: when such a request has come in.
    """

    def __init__(self, *, vision: bool = False, think: bool = False, tools: bool = True) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []
        self.began, self.left = threading.Event(), threading.Event()
        self.wait_at: int | None = None  # this many events are sent, then the client is waited for
        self.die_at: int | None = None  # this many events are sent, then the connection breaks
        # without an identity: whoever wants to steer it has to be told why not
        model = {"n_ctx": 4096, "has_chat_template": True, "n_gpu_layers": 0, "devices": [], "error": "a stand-in has no layers"}
        if think:
            model |= {"think_open": "<think>", "think_close": "</think>"}
        self.answers[("GET", "/health")] = lambda h, b: send_json(h, {"status": "ok"})
        self.answers[("GET", "/steering")] = lambda h, b: send_json(h, {"protocol": 1, "model": model, "vectors": []})
        props = {"modalities": {"vision": vision}, "media_marker": "<m>", "chat_template_caps": {"supports_tools": tools}}
        self.answers[("GET", "/props")] = lambda h, b: send_json(h, props)
        self.answers[("POST", "/apply-template")] = lambda h, b: send_json(h, {"prompt": "hi"})
        self.answers[("POST", "/tokenize")] = lambda h, b: send_json(h, {"tokens": [1, 2]})
        for path in ("/v1/chat/completions", "/completion"):
            self.answers[("POST", path)] = self._reply

    def _reply(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.began.set()
        if self.wait_at == 0:
            return self._wait(handler)
        start_chunks(handler, "text/event-stream")
        for number, event in enumerate(self.events):
            send_chunk(handler, b"data: " + json.dumps(event).encode() + b"\n\n")
            if number + 1 == self.wait_at:
                return self._wait(handler)
            if number + 1 == self.die_at:
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
                return None
        send_chunk(handler, b"data: [DONE]\n\n")
        send_chunk(handler, b"")
        return None

    def _wait(self, handler: BaseHTTPRequestHandler) -> None:
        handler.connection.settimeout(30)
        handler.close_connection = True
        with contextlib.suppress(TimeoutError):
            with contextlib.suppress(ConnectionError):
                assert handler.connection.recv(1) == b""
            self.left.set()


class StandInProcess:
    """In the place of ``ServerProcess``: "starts" a stand-in. ``started`` and ``stopped`` count."""

    def __init__(self, llama: StandInLlama, *, load_seconds: float = 0.0, stop_seconds: float = 0.0) -> None:
        self.llama, self.load_seconds, self.stop_seconds = llama, load_seconds, stop_seconds
        self.log: list[str] = []
        self.alive: set[object] = set()
        self.most = 0

    def __call__(self, binary: Any, on_line: Any = None) -> Any:
        outer = self

        class Process:
            running = False
            url, log_tail, api_key = outer.llama.url, ["a line"], None

            def start(self, model: Any, args: Any = (), env: Any = None) -> None:
                outer.log.append("start")
                time.sleep(outer.load_seconds / 2)
                self.running = True
                outer.alive.add(self)
                outer.most = max(outer.most, len(outer.alive))

            def wait_ready(self, timeout: float) -> None:
                time.sleep(outer.load_seconds / 2)

            def stop(self) -> int:
                if self.running:
                    outer.log.append("stop")
                    time.sleep(outer.stop_seconds)
                    self.running = False
                    outer.alive.discard(self)
                return 0

        return Process()


def said(
    *, content: str | None = None, thinking: str | None = None, calls: Any = None, finish: str | None = None
) -> dict[str, Any]:
    """An event of ``/v1/chat/completions``."""
    delta = {"content": content, "reasoning_content": thinking, "tool_calls": calls}
    choice = {"index": 0, "delta": {k: v for k, v in delta.items() if v is not None}, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def last_said() -> dict[str, Any]:
    """The last event, with the counts."""
    timings = {"prompt_n": 5, "cache_n": 2, "prompt_ms": 1.5, "predicted_n": 3, "predicted_ms": 2.5}
    return {"object": "chat.completion.chunk", "choices": [], "usage": {}, "timings": timings}


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding") == "chunked":
        parts = []
        while size := int(handler.rfile.readline(), 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(parts)
    return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))


def send_json(handler: BaseHTTPRequestHandler, value: Any, status: int = 200) -> None:
    data = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json; charset=utf-8")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data)


def start_chunks(handler: BaseHTTPRequestHandler, kind: str = "application/x-ndjson") -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()


def send_chunk(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    handler.wfile.flush()


@contextlib.contextmanager
def running(make: Callable[[], Service]) -> Iterator[tuple[httpx.Client, Service]]:
    """The sidecar on a free port, in a thread, and a client of it."""
    service = make()
    app = make_app(service)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as client:
            yield client, service
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
