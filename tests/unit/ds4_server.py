"""A stand-in for ds4-server: its public flags, and a reply that tells how it was started.

    python ds4_server.py --host H --port P --model FILE [--dir-steering-file F --dir-steering-ffn S ...]

Steering does what ds4 does, to a state of ones at layer 0: y - S v (v.y).
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

N_EMBD = int(os.environ.get("DS4_N_EMBD", "4"))


def start(argv: list[str]) -> dict[str, Any]:
    flags = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--host", "--model", "--kv-disk-dir", "--dir-steering-file"):
        flags.add_argument(name)
    flags.add_argument("--port", type=int)
    flags.add_argument("--ctx", type=int, default=32768)
    flags.add_argument("--dir-steering-ffn", type=float)
    flags.add_argument("--dir-steering-attn", type=float, default=0.0)
    given = vars(flags.parse_args(argv))
    state = [1.0] * N_EMBD
    if given["dir_steering_file"]:
        with open(given["dir_steering_file"], "rb") as file:
            data = file.read()
        row = struct.unpack(f"<{N_EMBD}f", data[: 4 * N_EMBD])
        scale = 1.0 if given["dir_steering_ffn"] is None else given["dir_steering_ffn"]
        along = sum(a * b for a, b in zip(row, state, strict=True))
        state = [y - scale * v * along for y, v in zip(state, row, strict=True)]
        given["bytes"] = len(data)
    return {**given, "state": state, "pid": os.getpid()}


class Handler(BaseHTTPRequestHandler):
    facts: dict[str, Any]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(
            {"object": "list", "data": [{"id": "deepseek-v4-flash"}]} if self.path == "/v1/models" else {"path": self.path}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not body.get("stream"):
            self._send({**self.facts, "body": body})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in ("one", "two", "three"):
            self.wfile.write(f"data: {json.dumps({'text': word})}\n\n".encode())
            self.wfile.flush()
            time.sleep(body.get("pause", 0.0))
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    Handler.facts = start(sys.argv[1:])
    if "broken" in Handler.facts["model"]:
        sys.exit("error: the model cannot be read")
    with ThreadingHTTPServer((Handler.facts["host"], Handler.facts["port"]), Handler) as server:
        server.serve_forever()
