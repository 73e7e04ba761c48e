"""A stand-in for the steering llama-server: docs/http-protocol.md without a model, on a port of this machine.

Tokens are bytes, after four special ones. A reply repeats ``reply``; its letters are capitals where the steering then in force
has a term. The hidden state of a token at a layer is (layer, position, token, sum of strengths).
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from safetensors.numpy import save

from steer_plugins.steering.vector import ModelIdentity

N_LAYER, N_EMBD = 4, 4
IDENTITY = ModelIdentity("llama", N_LAYER, N_EMBD, "a" * 64, "b" * 64, name="fake")
SPECIAL = ["<s>", "</s>", "<think>", "</think>"]
BOS, EOS = 0, 1
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{% endif %}"
)


def encode(text: str, *, special: bool = True) -> list[int]:
    tokens: list[int] = []
    while text:
        found = next((i for i, s in enumerate(SPECIAL) if special and text.startswith(s)), None)
        if found is not None:
            tokens.append(found)
            text = text[len(SPECIAL[found]) :]
        else:
            tokens += [4 + b for b in text[0].encode()]
            text = text[1:]
    return tokens


def piece(token: int) -> bytes:
    return SPECIAL[token].encode() if token < 4 else bytes([token - 4])


class FakeServer(ThreadingHTTPServer):
    """Start with ``with FakeServer() as server``; the attributes may be changed at any time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = b"the quick brown fox jumps"  # what is generated, over and over; a byte 1 is the end of the text
        self.log: list[tuple[str, str, Any]] = []
        self.vectors: dict[str, str] = {}  # name -> content hash
        self.running: dict[str, list[Any]] = {}
        self.hung_up: list[str] = []  # requests whose client went away
        self.refuse: dict[str, tuple[int, str]] = {}  # path prefix -> (status, message)
        self.raw: dict[str, tuple[int, bytes]] = {}  # path prefix -> (status, body)
        self.slam = 0  # requests that are answered by closing the connection
        self.cut_after: int | None = None  # tokens of a stream after which the connection is cut
        self.gate: threading.Semaphore | None = None  # one release for each token
        self.keep_tokens = False  # streams lose ids, as the stock server's do
        self.max_vectors = 1024
        self.api_key: str | None = None
        self.loading = 0  # requests that are told that the model is loading
        self.at_work = threading.Semaphore(0)  # released by each reply that begins
        self.facts: dict[str, Any] = {
            "protocol": 1,
            "model": {
                "identity": IDENTITY.to_dict(),
                "path": "C:\\models\\fake.gguf",
                "sites": ["resid_post"],
                "last_layer_outputs_only": True,
                "n_ctx": 128,
                "n_vocab": 260,
                "n_slots": 3,
                "has_chat_template": True,
                "think_open": "<think>",
                "think_close": "</think>",
                "devices": [],
                "n_gpu_layers": 0,
            },
        }
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self, path: str) -> list[Any]:
        """What was posted to a path."""
        with self.lock:
            return [body for method, where, body in self.log if method == "POST" and where.startswith(path)]

    def deleted(self) -> list[str]:
        with self.lock:
            return [where.rsplit("/", 1)[1] for method, where, _ in self.log if method == "DELETE"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):
            self.close_connection = True

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        server = self.server
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(data) if self.headers.get("Content-Type") == "application/json" else data
        with server.lock:
            server.log.append((method, self.path, body))
            slam, server.slam = server.slam, max(0, server.slam - 1)
        if slam:
            self.close_connection = True
            return
        for prefix, (status, raw) in server.raw.items():
            if self.path.startswith(prefix):
                self._send(status, raw)
                return
        try:
            if server.loading:
                server.loading -= 1
                raise Refusal(503, "Loading model")
            if server.api_key is not None and self.headers.get("Authorization") != f"Bearer {server.api_key}":
                raise Refusal(401, "Invalid API Key")
            for prefix, (status, message) in server.refuse.items():
                if self.path.startswith(prefix):
                    raise Refusal(status, message)
            answer = self._route(method, self.path.split("?")[0], body)
        except Refusal as refusal:
            error = {"code": refusal.status, "type": "invalid_request_error", "message": refusal.message}
            self._send(refusal.status, json.dumps({"error": error}).encode())
            return
        if answer is not None:
            self._send(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    # ---- routes ----

    def _route(self, method: str, path: str, body: Any) -> Any:
        server = self.server
        if (method, path) == ("GET", "/steering"):
            with server.lock:
                vectors = [{"name": n, "content_sha256": h} for n, h in server.vectors.items()]
            return {**server.facts, "vectors": vectors}
        if path == "/props":
            return {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
        if path == "/tokenize":
            return self._tokenize(body)
        if path.startswith("/steering/vectors/"):
            return self._vector(method, path.rsplit("/", 1)[1], body)
        if path.startswith("/steering/requests/"):
            name = path.rsplit("/", 1)[1]
            self._check(body["steering"])
            with server.lock:
                if name not in server.running:
                    raise Refusal(404, f"there is no request '{name}'")
                server.running[name] = body["steering"]
            return {"request_id": name, "from_position": [0]}
        if path == "/steering/read":
            return self._read(body)
        if path == "/steering/logprobs":
            self._check(body["steering"])
            extra = sum(t["strength"] for t in body["steering"])
            return {"logprobs": [[-t / 10 + extra for t in item["response"]] for item in body["items"]]}
        if path == "/completion":
            return self._complete(body)
        raise Refusal(404, "File Not Found")

    def _tokenize(self, body: Any) -> Any:
        parts = body["content"] if isinstance(body["content"], list) else [body["content"]]
        tokens = [BOS] if body.get("add_special") else []
        for part in parts:
            tokens += encode(part, special=body.get("parse_special", True)) if isinstance(part, str) else [part]
        if not body.get("with_pieces"):
            return {"tokens": tokens}
        found = []
        for t in tokens:
            try:
                found.append({"id": t, "piece": piece(t).decode()})
            except UnicodeDecodeError:
                found.append({"id": t, "piece": list(piece(t))})
        return {"tokens": found}

    def _vector(self, method: str, name: str, data: bytes) -> Any:
        server = self.server
        with server.lock:
            if method == "DELETE":
                if server.vectors.pop(name, None) is None:
                    raise Refusal(404, f"there is no vector '{name}'")
                return {"name": name, "deleted": True}
            if len(server.vectors) >= server.max_vectors:
                raise Refusal(429, f"more than {server.max_vectors} vectors")
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            content = json.loads(header["__metadata__"]["steer"])["content_sha256"]
            server.vectors[name] = content
            return {"name": name, "content_sha256": content, "replaced": False}

    def _check(self, terms: list[Any]) -> None:
        for term in terms:
            if term["vector"] not in self.server.vectors:
                raise Refusal(400, f"there is no vector '{term['vector']}'")

    def _read(self, body: Any) -> bytes:
        self._check(body["steering"])
        layers = body.get("layers", list(range(N_LAYER if body["positions"] in ("last", [-1]) else N_LAYER - 1)))
        pull = sum(t["strength"] for t in body["steering"])
        tensors, n_prompts = {}, []
        for i, prompt in enumerate(body["prompts"]):
            head, tail = (prompt, []) if isinstance(prompt, list) else (prompt["prompt"], prompt["response"])
            tokens = head + tail
            n = len(tokens)
            rows = {
                "last": [n - 1],
                "all": list(range(n)),
                "mean": list(range(1, n)),
                "response": list(range(len(head), n)),
                "response_mean": list(range(len(head), n)),
            }.get(body["positions"]) if isinstance(body["positions"], str) else [p % n for p in body["positions"]]  # fmt: skip
            values = np.array([[[il, p, tokens[p], pull] for p in rows] for il in layers], np.float32)
            if "mean" in body["positions"]:
                values, rows = values.mean(axis=1, keepdims=True), rows[-1:]
            tensors[f"{i}.values"] = values
            tensors[f"{i}.positions"] = np.array(rows, np.int32)
            tensors[f"{i}.tokens"] = np.array(tokens, np.int32)
            n_prompts.append(len(head))
        facts = {"format": "steer-read-v1", "layers": layers, "site": body["site"], "stream": "mean", "n_prompt": n_prompts}
        return save(tensors, {"steer": json.dumps(facts)})

    # ---- replies ----

    def _complete(self, body: Any) -> None:
        server, name = self.server, body["request_id"]
        steering = body.get("steering", [])
        self._check(steering)
        with server.lock:
            if name in server.running:
                raise Refusal(409, "that request_id is in use")
            server.running[name] = steering
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        server.at_work.release()
        try:
            self._generate(body, name)
        except OSError:
            with server.lock:
                server.hung_up.append(name)
            self.close_connection = True
        finally:
            with server.lock:
                server.running.pop(name, None)

    def _event(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _chunk(self, content: str, tokens: list[int], **more: Any) -> None:
        self._event(b"data: " + json.dumps({"content": content, "tokens": tokens, "stop": False, **more}).encode() + b"\n\n")

    def _generate(self, body: Any, name: str) -> None:
        server = self.server
        text, sent_text, tokens, sent = b"", 0, [], 0
        reason = "limit"
        self._event(b": a comment\n\n")
        for k in range(body["n_predict"]):
            while server.gate is not None and not server.gate.acquire(timeout=0.02):
                self._event(b":\n\n")  # so that a client that went away is noticed
            if server.cut_after is not None and k == server.cut_after:
                self.close_connection = True
                self.wfile.flush()
                self.connection.close()
                return
            byte = server.reply[k % len(server.reply) : k % len(server.reply) + 1]
            if server.running[name]:
                byte = byte.upper()
            tokens.append(EOS if byte == b"\x01" else 4 + byte[0])
            if byte == b"\x01":
                reason = "eos"
                break
            text += byte
            try:
                whole = text.decode()
            except UnicodeDecodeError:
                continue
            cut = min((i for i in (whole.find(s, sent_text) for s in body["stop"]) if i >= 0), default=-1)
            if cut >= 0:
                self._chunk(whole[sent_text:cut], tokens[sent:])
                sent, reason = len(tokens), "word"
                break
            held = any(whole.endswith(s[:n]) for s in body["stop"] for n in range(1, len(s)))
            self._chunk("" if held else whole[sent_text:], tokens[-1:] if server.keep_tokens else tokens[sent:])
            sent, sent_text = len(tokens), sent_text if held else len(whole)
        final = {"stop": True, "stop_type": reason, "tokens_predicted": len(tokens)}
        self._chunk("", [] if server.keep_tokens else tokens[sent:], **final)
        self._event(b"")


def eventually(condition: Any, seconds: float = 20.0) -> None:
    """Wait for what another thread is about to do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
