"""Vectors of a running server: uploads without trust, limits, memory, sleep, and what happens to a vector that is in use."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.identity import identity_of_gguf
from steer_plugins.store.vectorfile import write_vector
from tests.server.conftest import EXACT, OCTETS, PROMPT, Server, make_responsive, make_vector
from tests.server.test_cache import LONG, term


def upload(server: Server, name: str, data: bytes, **query: str) -> requests.Response:
    return server.http.post(
        f"{server.url}/steering/vectors/{name}", data=data, headers=OCTETS, params={"replace": "true", **query}, timeout=60
    )


def file_of(vector: SteeringVector, folder: Path) -> bytes:
    write_vector(vector, folder / "file.safetensors")
    return (folder / "file.safetensors").read_bytes()


@pytest.mark.parametrize(("arch", "options"), [("llama", {}), ("deepseek4", {}), ("deepseek4", {"split": 3}), ("gemma3", {})])
def test_identity_is_the_one_of_the_package(exact: Any, tiny_model: Any, arch: str, options: dict[str, Any]) -> None:
    server = exact(arch, **options)
    assert server.model["identity"] == identity_of_gguf(tiny_model(arch, **options)).to_dict()


def test_upload_list_replace_delete(own: Any, tmp_path: Path) -> None:
    server = own("llama", *EXACT)
    vector = make_vector(server, 1, 2, scope="response")
    assert server.put("a", vector, tmp_path).json() == {"name": "a", "content_sha256": vector.content_hash, "replaced": False}
    assert server.put("a", make_vector(server, 1, seed=3), tmp_path).json()["replaced"] is True
    assert server.put("a", vector, tmp_path).json()["replaced"] is True
    listed = server.get("/steering").json()["vectors"]
    assert listed == [{
        "name": "a", "content_sha256": vector.content_hash, "op": "add", "default_scope": "response",
        "layers": [1, 2], "sites": ["resid_post"], "bytes": 2 * 4 * server.n_embd, "gate": False,
    }]  # fmt: skip
    assert server.http.delete(f"{server.url}/steering/vectors/a").json() == {"name": "a", "deleted": True}
    gone = server.http.delete(f"{server.url}/steering/vectors/a")
    assert gone.status_code == 404 and "no vector 'a'" in gone.json()["error"]["message"]


@pytest.mark.parametrize("name", ["A", ".a", "..", "a b", "a%2Fb", "..%2Fa", "x" * 65, "%00", "a%0Ab", "ä"])
def test_bad_names(exact: Any, tmp_path: Path, name: str) -> None:
    server = exact()
    answer = upload(server, name, file_of(make_vector(server), tmp_path))
    assert answer.status_code in (400, 404)
    assert server.http.delete(f"{server.url}/steering/vectors/{name}").status_code in (400, 404)
    assert all(v["name"] in ("one", "two", "v", "w", "p") for v in server.get("/steering").json()["vectors"])


def refused(server: Server, data: bytes, **query: str) -> str:
    answer = upload(server, "bad", data, **query)
    assert answer.status_code == 400, (answer.status_code, answer.text)
    assert "bad" not in [v["name"] for v in server.get("/steering").json()["vectors"]]
    return str(answer.json()["error"]["message"])


def test_vectors_of_other_models(exact: Any, tiny_model: Any, tmp_path: Path) -> None:
    server = exact()
    good = make_vector(server)
    mine = identity_of_gguf(tiny_model("llama"))
    from dataclasses import replace

    def with_identity(**changes: Any) -> bytes:
        v = SteeringVector("v", good.directions, good.scales, identity=replace(mine, **changes))
        return file_of(v, tmp_path)

    assert upload(server, "v", with_identity()).status_code == 200
    assert "it was made for qwen2" in refused(server, with_identity(architecture="qwen2"))
    assert "another vocabulary" in refused(server, with_identity(tokens_sha256="0" * 64))
    assert "norm weights" in refused(server, with_identity(norms_sha256="0" * 64))
    assert upload(server, "v", with_identity(norms_sha256="0" * 64), force="true").status_code == 200
    wide = SteeringVector("v", {(1, "resid_post"): np.ones(64, np.float32)})
    assert "64 numbers" in refused(server, file_of(wide, tmp_path))
    deep = SteeringVector("v", {(99, "resid_post"): np.ones(server.n_embd, np.float32)})
    assert "layer 99" in refused(server, file_of(deep, tmp_path))
    site = SteeringVector("v", {(1, "ffn_out"): np.ones(server.n_embd, np.float32)})
    assert "does not offer" in refused(server, file_of(site, tmp_path))


def test_damaged_files(exact: Any, tmp_path: Path) -> None:
    server = exact()
    good = file_of(make_vector(server), tmp_path)
    length = int.from_bytes(good[:8], "little")
    assert refused(server, b"") and refused(server, b"x" * 100)
    for cut in (4, 9, 8 + length - 1, 8 + length, len(good) - 1):
        assert refused(server, good[:cut])
    assert "bytes follow" in refused(server, good + b"\0\0\0\0")
    assert refused(server, (1 << 60).to_bytes(8, "little") + good[8:])
    flipped = bytearray(good)
    flipped[-1] ^= 0x80  # a sign: the length stays 1
    assert "do not match their content_sha256" in refused(server, bytes(flipped))
    nan = bytearray(good)
    nan[-4:] = np.float32(np.nan).tobytes()
    assert "NaN" in refused(server, bytes(nan))
    for old, new, sentence in (
        (b'\\"op\\":\\"add\\"', b'\\"op\\":\\"ADD\\"', "unknown op"),
        (b'"F32"', b'"F16"', "is not F32"),
        (b"steer-vector-v1", b"steer-vector-v9", "unknown format version"),
        (b"direction.1.", b"direction.x.", "unknown tensor"),
    ):
        assert old in good
        assert sentence in refused(server, good.replace(old, new))


def test_damaged_columns(exact: Any, tmp_path: Path) -> None:
    server = exact()
    good = file_of(make_responsive(server), tmp_path)
    assert upload(server, "fine", good).status_code == 200
    server.http.delete(f"{server.url}/steering/vectors/fine")
    for old, new, sentence in (
        (b"steer-vector-v2", b"steer-vector-v1", "unknown field"),
        (b'\\"bias\\":0.3', b'\\"bias\\":0.4', "do not match their content_sha256"),
        (b'\\"bias\\":0.3', b'\\"blas\\":0.3', "bias is no finite number"),
        (b'\\"knee\\":0.5', b'\\"knee\\":-.5', "not valid JSON"),
        (b'\\"knee\\":0.5', b'\\"knee\\":-50', "a knee that is not from 0"),
        (b'"read.1.', b'"reap.1.', "unknown tensor"),
        (b'"read.1.', b'"read.0.', "belongs to no column"),
        (b'"write.1.', b'"write.0.', "belongs to no column"),
        (b'\\"1.resid_post', b'\\"0.resid_post', "belongs to no column"),
    ):
        assert old in good
        assert sentence in refused(server, good.replace(old, new, 1)), (old, new)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), columns=st.booleans())
def test_fuzzed_files(exact: Any, tmp_path: Path, data: st.DataObject, columns: bool) -> None:
    """Flipped, cut and spliced files: 400 with a sentence, or the very same vector; never a crash."""
    server = exact()
    good = file_of(make_responsive(server) if columns else make_vector(server), tmp_path)
    raw = bytearray(good)
    length = int.from_bytes(good[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "header"]))
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        if kind == "flip" and raw:
            raw[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 64))]
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=32))
        elif len(raw) > 8 + length:
            spot = data.draw(st.integers(8, 8 + length - 1))
            raw[spot] = data.draw(st.sampled_from(b'0123456789-"{}[]:,.eE \\'))
    answer = upload(server, "fuzzed", bytes(raw))
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["message"].startswith("vector 'fuzzed'")
    else:
        server.http.delete(f"{server.url}/steering/vectors/fuzzed")
    assert server.process.running


def test_bounds_on_bodies(exact: Any) -> None:
    server = exact()
    for path in ("/steering/vectors/big", "/steering/read", "/steering/requests/x"):
        connection = requests.Session()
        connection.trust_env = False
        with connection:
            prepared = requests.Request("POST", server.url + path, headers=OCTETS).prepare()
            prepared.headers["Content-Length"] = str(1 << 40)
            prepared.body = b"x"
            answer = connection.send(prepared, timeout=20)
        assert answer.status_code == 413, answer.text

        def chunks() -> Any:
            yield b"abc"

        answer = requests.post(server.url + path, data=chunks(), headers=OCTETS, timeout=20)
        assert answer.status_code == 411, answer.text
    assert server.get("/health").status_code == 200


def test_limit_of_vectors(own: Any, tmp_path: Path) -> None:
    """Past 1024 names the answer is 429; a replacement is none too many; deleting makes room."""
    server = own("llama", "--parallel", "1", "-c", "256")
    data = file_of(make_vector(server, 1), tmp_path)
    for i in range(1024):
        assert upload(server, f"v{i}", data).status_code == 200
    full = upload(server, "more", data)
    assert full.status_code == 429 and "1024" in full.json()["error"]["message"]
    assert upload(server, "v3", data).status_code == 200
    server.http.delete(f"{server.url}/steering/vectors/v4")
    assert upload(server, "more", data).status_code == 200
    # equal content is held once
    assert server.get("/steering").json()["memory"]["vector_bytes"] == 4 * server.n_embd


def resident(server: Server) -> int:
    """Resident memory of the llama-server, bytes."""
    guard = server.process._child.pid  # type: ignore[union-attr]
    child = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()[0]
    statm = Path(f"/proc/{child}/statm").read_text().split()
    return int(statm[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_thousand_distinct_uploads_do_not_leak(own: Any, tmp_path: Path) -> None:
    server = own(
        "llama", "--parallel", "2", "-c", "512", "--cache-ram", "0"
    )  # the host cache keeps a copy of each, up to its limit

    def round_of(first: int, n: int) -> None:
        for i in range(first, first + n):
            server.put("v", make_vector(server, 0, 1, 2, seed=i), tmp_path)
            server.complete(PROMPT, term(1.0), 2)

    round_of(0, 200)
    before = resident(server)
    round_of(200, 800)
    grown = resident(server) - before
    one = 3 * 4 * server.n_embd
    assert grown < 200 * one, (grown, one)  # 800 vectors went through
    memory = server.get("/steering").json()["memory"]
    assert memory["vector_bytes"] == one


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_hundred_vectors(own: Any, tmp_path: Path) -> None:
    """Loaded, and each used once: what their floats weigh and a fifth more, beside what one of them costs to use."""
    server = own("llama", "--parallel", "1", "-c", "512", "--cache-ram", "0", n_layer=64)
    vectors = [file_of(make_vector(server, *range(64), seed=i), tmp_path) for i in range(180)]
    for i in range(100, 180):  # what is kept for whoever wants the same next is full then
        upload(server, f"w{i}", vectors[i])
        server.complete(PROMPT, [{"vector": f"w{i}", "strength": 0.1}], 1)
    before = resident(server)
    for i in range(100):
        assert upload(server, f"v{i}", vectors[i]).status_code == 200
        server.complete(PROMPT, [{"vector": f"v{i}", "strength": 0.1}], 1)
    floats = 100 * 64 * 4 * server.n_embd
    grown = resident(server) - before
    assert grown < 1.2 * floats + (1 << 20), (grown, floats)


def test_a_vector_in_use_may_be_replaced_or_deleted(own: Any, tmp_path: Path) -> None:
    server = own("llama", "--parallel", "2", "-c", "2048", "--no-kv-unified", "--cache-ram", "0", weights="q8_0")
    server.put("v", make_vector(server), tmp_path)
    alone = server.complete(LONG, term(), 300, cache_prompt=False)["tokens"]
    for act in ("delete", "replace"):
        server.put("v", make_vector(server), tmp_path)
        answers: list[Any] = []
        call = threading.Thread(target=lambda to=answers: to.append(server.complete(LONG, term(), 300, cache_prompt=False)))
        call.start()
        time.sleep(0.02)
        if act == "delete":
            server.http.delete(f"{server.url}/steering/vectors/v")
        else:
            server.put("v", make_vector(server, seed=5), tmp_path)
        call.join()
        assert answers[0]["tokens"] == alone


def test_folder_and_default_of_the_command_line(own: Any, server_binary: Path, tiny_model: Any, tmp_path: Path) -> None:
    first = own("llama", *EXACT)
    first.put("mood", make_vector(first), tmp_path)
    steered = first.complete(PROMPT, [{"vector": "mood", "strength": 0.5}])["tokens"]
    plain = first.complete(PROMPT, [])["tokens"]
    folder = tmp_path / "vectors"
    folder.mkdir()
    write_vector(make_vector(first), folder / "mood.safetensors")
    default = json.dumps([{"vector": "mood", "strength": 0.5}])
    for args, env in (
        (("--steering-dir", str(folder), "--steering", default), {}),
        ((), {"STEER_SERVER_DIR": str(folder), "STEER_SERVER_DEFAULT": default}),
    ):
        server = own("llama", *EXACT, *args, env=env)
        assert server.get("/steering").json()["default"] == json.loads(default)
        assert server.complete(PROMPT)["tokens"] == steered
        assert server.complete(PROMPT, [])["tokens"] == plain
        server.process.stop()
    from steer_plugins.errors import EngineError

    (folder / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(EngineError, match="not a safetensors file|exit code 1"):
        Server(server_binary, tiny_model("llama"), "--steering-dir", str(folder))
    with pytest.raises(EngineError, match="no vector 'mood'|exit code 1"):
        Server(server_binary, tiny_model("llama"), "--steering", default)


def test_vectors_survive_sleep(own: Any, tmp_path: Path) -> None:
    server = own("llama", *EXACT, "--sleep-idle-seconds", "1")
    server.put("v", make_vector(server), tmp_path)
    before = server.complete(PROMPT, term())["tokens"]
    deadline = time.monotonic() + 20
    while 'is_sleeping":true' not in server.get("/props").text.replace(" ", ""):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    listed = server.get("/steering").json()  # answered in its sleep
    assert [v["name"] for v in listed["vectors"]] == ["v"] and listed["model"]["sites"] == ["resid_post"]
    assert server.complete(PROMPT, term())["tokens"] == before
    assert server.complete(PROMPT, [])["tokens"] != before
    server.read(prompts=[PROMPT], steering=term(), positions="mean")


def test_untested_architecture(own: Any, server_binary: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from steer_plugins.testing import architectures, writer

    path = tmp_path / "llama-embed.gguf"
    plan = replace(architectures.blueprint("llama", n_layer=2, n_ctx=256), architecture="llama-embed")
    writer._write_files(plan, path, seed=0, weights="f32", split=1)
    server = Server(server_binary, path, "--parallel", "1", "-c", "256")
    try:
        assert "llama-embed" in server.model["error"] and "sites" not in server.model
        assert server.ok("/completion", {"prompt": "a b", "n_predict": 2})["tokens_predicted"] == 2
        assert "cannot be steered" in server.error("/completion", {"prompt": "a b", "steering": [{"vector": "v"}]})
        assert "cannot be steered" in server.error("/steering/read", {"prompts": ["a"]})
    finally:
        server.process.stop()


def test_router_mode(server_binary: Path) -> None:
    """A server that spawns servers does not steer itself, and says so."""
    from steer_plugins.client import ServerProcess

    with ServerProcess(server_binary) as process:
        process.start(None, ["--no-models-autoload"])
        process.wait_ready(60)
        for method, path in (("GET", "/steering"), ("POST", "/steering/read"), ("DELETE", "/steering/vectors/a")):
            answer = requests.request(method, process.url + path, json={}, timeout=20)
            assert answer.status_code == 501 and "router" in answer.json()["error"]["message"], answer.text


def test_a_router_hands_its_flags_on(own: Any, server_binary: Path, tiny_model: Any, tmp_path: Path) -> None:
    """The servers of its models steer as a plain server does."""
    from steer_plugins.client import ServerProcess

    alone = own("llama", *EXACT)
    vector = make_vector(alone)
    alone.put("mood", vector, tmp_path)
    terms = [{"vector": "mood", "strength": 0.5}]
    steered, plain = (alone.complete(PROMPT, t)["tokens"] for t in (terms, []))
    assert steered != plain
    (tmp_path / "vectors").mkdir()
    (tmp_path / "models").mkdir()
    write_vector(vector, tmp_path / "vectors" / "mood.safetensors")
    shutil.copy(tiny_model("llama"), tmp_path / "models" / "tiny.gguf")
    flags = ("--steering-dir", str(tmp_path / "vectors"), "--steering", json.dumps(terms), "--no-warmup", "-t", "1")
    body = {"model": "tiny", "prompt": PROMPT, "n_predict": 16, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    with ServerProcess(server_binary) as process:
        process.start(None, ["--models-dir", str(tmp_path / "models"), *flags, *EXACT])
        process.wait_ready(60)
        for fields, want in (({}, steered), ({"steering": []}, plain)):
            answer = requests.post(process.url + "/completion", json={**body, **fields}, timeout=120)
            assert answer.status_code == 200, answer.text
            assert answer.json()["tokens"] == want


def test_api_key_guards_the_steering_routes(server_binary: Path, tiny_model: Any) -> None:
    from steer_plugins.client import ServerProcess

    with ServerProcess(server_binary) as process:
        process.start(tiny_model("llama"), ["--no-warmup", "--parallel", "1", "-c", "256", "--api-key", "secret"])
        process.wait_ready(60)
        for method, path in (("GET", "/steering"), ("POST", "/steering/read"), ("POST", "/steering/vectors/a")):
            assert requests.request(method, process.url + path, json={}, timeout=20).status_code == 401
        known = {"Authorization": "Bearer secret"}
        assert requests.get(process.url + "/steering", headers=known, timeout=20).json()["protocol"] == 1
