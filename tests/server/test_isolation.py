"""What a page in somebody's browser, or another client, can do to a server: nothing but ask for its own replies."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.store.vectorfile import write_vector
from tests.server.conftest import OCTETS, PROMPT, Server, make_vector
from tests.server.test_cache import term

JSON = {"Content-Type": "application/json"}
ROUTES = [
    ("GET", "/steering", None, {}),
    ("POST", "/steering/read", b'{"prompts": ["a b"]}', JSON),
    ("POST", "/steering/logprobs", b'{"items": [{"prompt": "a", "response": "b"}]}', JSON),
    ("POST", "/steering/requests/mine", b'{"steering": []}', JSON),
    ("POST", "/steering/vectors/mood", b"", OCTETS),
    ("DELETE", "/steering/vectors/mood", None, {}),
]


@pytest.fixture
def server(own: Callable[..., Server], tmp_path: Path) -> Iterator[Server]:
    one = own("llama", "-np", "2", "-c", "4096")
    assert one.put("mood", make_vector(one), tmp_path).status_code == 200
    yield one


def call(server: Server, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str]:
    """Exactly these headers; a ``Host`` among them replaces the true one."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def sentence(text: str) -> str:
    message: str = json.loads(text)["error"]["message"]
    return message


@pytest.mark.parametrize(("method", "path", "body", "headers"), ROUTES, ids=lambda value: value if isinstance(value, str) else "")
def test_pages_of_other_origins_are_refused(server: Server, method: str, path: str, body: Any, headers: dict[str, str]) -> None:
    for origin in (
        "https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1.evil.example", "http://127.0.0.1@evil.example",
        "http://evil.example:8080", "file://", "http://10.0.0.9", "moz-extension://localhost", "http://",
    ):  # fmt: skip
        status, text = call(server, method, path, body, {**headers, "Origin": origin})
        assert status == 403, (origin, text)
        assert "may not steer this server" in sentence(text)
    # its name may be made to lead here: a page of it then asks its "own" host
    status, _ = call(server, method, path, body, {**headers, "Origin": "http://evil.example:80", "Host": "evil.example:80"})
    assert status == 403
    assert server.get("/steering").json()["vectors"][0]["name"] == "mood"


def test_pages_of_this_machine_may(server: Server) -> None:
    own = server.url
    for origin in (
        own,
        "http://localhost:7860",
        "http://app.localhost",
        "https://127.0.0.1",
        "http://[::1]:3000",
        "http://LOCALHOST",
    ):
        assert call(server, "GET", "/steering", None, {"Origin": origin})[0] == 200
        assert call(server, "POST", "/steering/read", b'{"prompts": ["a b"]}', {**JSON, "Origin": origin})[0] == 200
    assert (
        call(server, "POST", "/completion", b'{"prompt": "a", "n_predict": 1}', {**JSON, "Origin": "https://evil.example"})[0]
        == 200
    )


def test_an_origin_that_the_command_line_names_may(own: Callable[..., Server]) -> None:
    server = own("llama", "-np", "1", "-c", "256", "--cors-origins", "https://app.example,https://b.example")
    assert call(server, "GET", "/steering", None, {"Origin": "https://b.example"})[0] == 200
    assert call(server, "GET", "/steering", None, {"Origin": "https://c.example"})[0] == 403


def test_content_types(server: Server, tmp_path: Path) -> None:
    """A page can send text and forms without asking first; the steering routes take neither."""
    path = tmp_path / "mood.safetensors"
    write_vector(make_vector(server, seed=5), path)
    bodies = [(path, body) for _, path, body, _ in ROUTES if body] + [("/steering/vectors/mood", path.read_bytes())]
    for route, body in bodies:
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "",
            "application/jsonp",
        ):
            status, text = call(server, "POST", route, body, {"Content-Type": kind} if kind else {})
            assert status == 415, (route, kind, text)
            assert "Content-Type" in sentence(text) and "send application/" in sentence(text)
    assert call(server, "POST", "/steering/vectors/x", path.read_bytes(), JSON)[0] == 415
    assert (
        call(server, "POST", "/steering/read", b'{"prompts": ["a b"]}', {"Content-Type": "Application/JSON; charset=utf-8"})[0]
        == 200
    )


def test_ids_are_told_to_those_who_know_them(own: Callable[..., Server]) -> None:
    server = own("llama", "-np", "2", "-c", "32768", "--override-kv", "llama.context_length=int:32768")
    body = {"prompt": PROMPT, "n_predict": 30000, "ignore_eos": True, "request_id": "mine"}
    answer = server.stream("/completion", body)
    lines = answer.iter_lines()
    next(lines)
    told = server.get("/steering").json()
    assert told["requests"] == [] and told["n_requests"] == 1 and "mine" not in json.dumps(told)
    for ids, known in (("mine", ["mine"]), ("other,mine", ["mine"]), ("", []), ("min", []), ("*", [])):
        listed = server.get(f"/steering?ids={ids}").json()["requests"]
        assert [r["request_id"] for r in listed] == known
    answer.close()


def test_a_name_is_replaced_only_on_request(server: Server, tmp_path: Path) -> None:
    def content() -> str:
        return str(server.get("/steering").json()["vectors"][0]["content_sha256"])

    first, other = make_vector(server), make_vector(server, seed=9)
    again = server.put("mood", first, tmp_path, replace="false")
    assert again.status_code == 200 and again.json()["replaced"] is False  # the same once more
    refused = server.put("mood", other, tmp_path, replace="false")
    assert refused.status_code == 409 and "?replace=true" in refused.json()["error"]["message"]
    rescoped = make_vector(server, scope="response")  # its scope is part of a vector
    assert server.put("mood", rescoped, tmp_path, replace="false").status_code == 409
    assert server.put("mood", other, tmp_path, replace="maybe").status_code == 400
    assert content() == first.content_hash
    assert server.put("mood", other, tmp_path, replace="true").json()["replaced"] is True
    assert content() == other.content_hash


def local_address() -> str:
    """An address of this machine that is not a loopback, or skip."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no address but its loopback")
        return str(probe.getsockname()[0])


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        ((), True),
        (("--steering-admin", "off"), False),
        (("--host", "0.0.0.0"), False),
        (("--host", "0.0.0.0", "--steering-admin", "on"), True),
        (("--host", "0.0.0.0", "--api-key", "secret"), True),
        (("--host", "localhost"), True),
    ],
)
def test_the_switch(server_binary: Path, tiny_model: Any, flags: tuple[str, ...], allowed: bool) -> None:
    from steer_plugins.client import ServerProcess

    host = flags[1] if flags[:1] == ("--host",) else "127.0.0.1"
    flags = flags[2:] if flags[:1] == ("--host",) else flags
    with ServerProcess(server_binary, host=host) as process:
        process.start(tiny_model("llama"), ["--no-warmup", "--parallel", "1", "-c", "256", "-t", "1", *flags])
        process.wait_ready(60)
        server = Server.__new__(Server)
        server.url = process.url
        known = {"Authorization": "Bearer secret"}
        status, text = call(server, "GET", "/steering", None, known)
        assert status == 200 and json.loads(text)["admin"] is allowed
        for method, path, body, headers in ROUTES[1:]:
            status, text = call(server, method, path, body, {**headers, **known})
            assert (status != 403) is allowed, (path, text)
            assert allowed or "--steering-admin on" in sentence(text)
        assert (
            call(server, "POST", "/completion", b'{"prompt": "a", "n_predict": 1, "steering": []}', {**JSON, **known})[0] == 200
        )


def test_a_switch_that_is_neither_on_nor_off(server_binary: Path, tiny_model: Any) -> None:
    from steer_plugins.errors import EngineError

    with pytest.raises(EngineError):
        Server(server_binary, tiny_model("llama"), "--steering-admin", "maybe")


def test_bodies_are_bounded_before_they_are_read(server: Server) -> None:
    for path, length in (("/steering/read", 9 << 20), ("/steering/vectors/x", 65 << 20)):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(length))
        connection.putheader("Content-Type", "application/json" if path == "/steering/read" else "application/octet-stream")
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()
    odd = {"Content-Length": "1\xb2", **JSON}
    assert call(server, "POST", "/steering/read", None, odd)[0] in (400, 411)


def test_nested_json_is_refused_unparsed(server: Server, tmp_path: Path) -> None:
    """A level of a list takes a hundred times more memory than the byte that opens it."""
    for body in (b"[" * 4_000_000, b'{"a":' * 1_000_000, b'{"x":"\\\\"' + b"[" * 1000):
        assert call(server, "POST", "/steering/read", body, JSON)[0] == 400
    text = b"[" * 900_000
    status, answer = call(server, "POST", "/steering/vectors/x", len(text).to_bytes(8, "little") + text, OCTETS)
    assert status == 400 and "nested" in sentence(answer)
    assert server.read(prompts=['[[[[ "\\"[[[['])  # in a text they are only text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/rerank", "/v1/audio/transcriptions", "/slots/0", "/props"])
def test_routes_that_cannot_steer_say_so(server: Server, path: str) -> None:
    """By default: a route that is not known to take the fields refuses them."""
    for field, value in (("steering", term()), ("steering_probe", ["v"]), ("steering_tags", {"open": "x"})):
        assert f"leave out '{field}'" in server.error(path, {"input": "a", field: value})


def test_ids_with_odd_bytes(server: Server) -> None:
    body = json.dumps({"prompt": "a", "n_predict": 1, "request_id": "a\0b"}).encode()
    status, text = call(server, "POST", "/completion", body, JSON)
    assert status == 400 and "is not a name for a request" in sentence(text)
