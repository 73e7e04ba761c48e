"""A stand-in for the Ollama daemon, and the sidecar in a thread, for tests without either program."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import uvicorn
from steer_plugins_ollama.app import Service, make_app


class StandInDaemon:
    """Answers what it is told to, and remembers what it was asked. ``answers``: (method, path) -> what to do with the handler."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        self.answers: dict[tuple[str, str], Callable[[BaseHTTPRequestHandler, bytes], None]] = {}
        self.loaded: list[str] = []
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
        self.answers[("GET", "/api/version")] = lambda h, b: send_json(h, {"version": "0.9.3"})
        self.answers[("GET", "/api/ps")] = lambda h, b: send_json(h, {"models": [{"name": n} for n in self.loaded]})
        self.answers[("POST", "/api/generate")] = self._unload

    def _unload(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked = json.loads(body)
        if asked.get("keep_alive") == 0 and asked["model"] in self.loaded:
            self.loaded.remove(asked["model"])
        send_json(handler, {"model": asked["model"], "done": True})

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


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
