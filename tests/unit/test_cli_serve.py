"""ServerProcess and `steer serve` with a stand-in for llama-server, and `--server` of the other commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import requests
from click.testing import CliRunner

from steer_plugins import testing
from steer_plugins.cli.main import cli
from steer_plugins.cli.serve import Staged, split_flags
from steer_plugins.client import ServerProcess, free_port
from steer_plugins.errors import EngineError, ModelError, RuntimeMissing, SpecError, VectorError
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.identity import identity_of_gguf
from steer_plugins.store.library import Library, MissingVector
from steer_plugins.store.vectorfile import write_vector
from tests.unit.steering_server import FakeServer, eventually

posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for llama-server is a script with a #! line")

# What FAKE_MODE says is what it does; it writes how it ended to FAKE_OUT, and its arguments.
LLAMA_SERVER = """
import http.server, json, os, signal, sys, threading, time
args, mode, out = sys.argv[1:], os.environ.get("FAKE_MODE", ""), os.environ["FAKE_OUT"]
host, port = args[args.index("--host") + 1], int(args[args.index("--port") + 1])
vectors = args[args.index("--steering-dir") + 1] if "--steering-dir" in args else None
with open(out + ".part", "w") as file:
    seen = sorted(name for name in os.environ if name.startswith(("LLAMA_", "AIP_")))
    json.dump({"args": args, "pid": os.getpid(), "vectors": sorted(os.listdir(vectors)) if vectors else None, "env": seen}, file)
os.replace(out + ".part", out)
print("load_model: using device FAKE0 (Fake GPU (TM)) - 24 GB free", flush=True)
if mode == "crash":
    print("error: no such tensor", file=sys.stderr, flush=True)
    sys.exit(3)
if mode == "left out":
    print("common_init_from_params: failed to load control vector file from x.gguf", flush=True)
if mode == "bind":
    print("couldn't bind HTTP server socket, hostname: x", flush=True)
    sys.exit(1)
def end(number, frame):
    with open(out + ".ended", "w") as file:
        file.write(str(number))
    try:
        print("cleaning up", flush=True)
    except OSError:
        pass  # nobody reads any more
    if mode != "deaf":
        os._exit(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        if mode == "never" or (mode == "slow" and Handler.asked < 4):
            self.send_error(503, "Loading model")
            return
        body = json.dumps({"status": "ok"})
        if mode.startswith("/") and not self.path.startswith(mode) or mode == "another":
            self.send_error(404)
            return
        if self.path == "/steering":
            devices = [{"name": "CPU", "description": "x", "type": "cpu"}, {"name": "CUDA0", "description": "Big", "type": "gpu"}]
            body = json.dumps({"model": {"devices": devices, "n_gpu_layers": int(os.environ["FAKE_LAYERS"])}})
            if mode == "stock":
                self.send_error(404)
                return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())
        if self.path == "/die":
            os.kill(os.getpid(), signal.SIGSEGV)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer((host, port), Handler).serve_forever()
"""


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama-server in a folder that is a runtime."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in ("libllama.so", "libllama.dylib"):
        (folder / name).write_bytes(b"")
    path = folder / "llama-server"
    path.write_text(f"#!{sys.executable}\n{LLAMA_SERVER}")
    path.chmod(0o755)
    monkeypatch.setenv("STEER_RUNTIME", str(folder))
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("FAKE_OUT", str(tmp_path / "said.json"))
    monkeypatch.setenv("FAKE_LAYERS", "0")
    monkeypatch.delenv("FAKE_MODE", raising=False)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("model") / "tiny.gguf")[0]


def said(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "said.json").read_text())


def ended(tmp_path: Path) -> bool:
    return (tmp_path / "said.json.ended").is_file()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # in a container nobody may collect orphans
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return False


def vector(model: Path, seed: int = 0, *, name: str = "mood", layers: tuple[int, ...] = (1,)) -> SteeringVector:
    identity = identity_of_gguf(model)
    rng = np.random.default_rng(seed)
    directions = {(il, "resid_post"): rng.standard_normal(identity.n_embd) for il in layers}
    return SteeringVector(name, directions, identity=identity)


# ---- the process ----


@posix
def test_a_server_from_start_to_stop(binary: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    def listen(line: str) -> None:
        lines.append(line)
        raise RuntimeError("a listener's own trouble")

    server = ServerProcess(binary, on_line=listen)
    assert not server.running and server.stop() == 0 and server.wait() == 0 and server.device == "CPU"
    with pytest.raises(EngineError, match="was not started"):
        server.wait_ready(1)
    server.start("some model.gguf", ["-c", "64"], {"FAKE_MODE": "slow"})
    waits: list[float] = []
    server.wait_ready(30, on_wait=waits.append)
    assert waits and server.running and server.wait(0.01) is None
    assert requests.get(server.url + "/health", timeout=10, proxies={"no_proxy": "*"}).json() == {"status": "ok"}
    args = said(tmp_path)["args"]
    assert args == ["--host", "127.0.0.1", "--port", str(server.port), "--model", "some model.gguf", "-c", "64"]
    with pytest.raises(EngineError, match="runs already"):
        server.start("x")
    assert server.stop() == 0 and ended(tmp_path) and server.stop() == 0 and not server.running
    assert server.log_tail[-1] == "cleaning up" == lines[-1] and lines == server.log_tail
    # once more, on the same port
    with server:
        server.start(None)
        server.wait_ready(30)
        assert "--model" not in said(tmp_path)["args"]
    assert not server.running


@posix
def test_devices(binary: Path) -> None:
    for mode, layers, device in (
        ("", "0", "CPU"),
        ("", "99", "CUDA0 (Big)"),
        ("stock", "0", "FAKE0 (Fake GPU (TM))"),
    ):
        with ServerProcess(binary) as server:
            server.start(None, env={"FAKE_MODE": mode, "FAKE_LAYERS": layers})
            server.wait_ready(30)
            assert server.device == device


@posix
def test_servers_that_fail(binary: Path, tmp_path: Path) -> None:
    loading = threading.Event()
    server = ServerProcess(binary, on_line=lambda line: loading.set() if line.startswith("load_model") else None)
    server.start(None, env={"FAKE_MODE": "crash"})
    with pytest.raises(EngineError, match="llama-server ended with exit code 3; it said last: error: no such tensor"):
        server.wait_ready(30)
    assert not server.running and server.stop() == 3
    server.start(None, env={"FAKE_MODE": "bind"})
    with pytest.raises(EngineError, match=f"port {server.port} of 127.0.0.1 is in use"):
        server.wait_ready(30)
    server.stop()
    loading.clear()
    server.start(None, env={"FAKE_MODE": "never"})
    assert loading.wait(60)
    with pytest.raises(EngineError, match=r"not loaded its model in 0.1 s: .* .it said last: load_model"):
        server.wait_ready(0.1)
    server.stop()
    server.start(None)
    server.wait_ready(30)
    with contextlib.suppress(requests.RequestException):
        requests.get(server.url + "/die", timeout=10)
    code = server.wait(30)
    assert code == 128 + signal.SIGSEGV and f"was killed by signal {int(signal.SIGSEGV)}" in server.epitaph(code)
    server.stop()
    (tmp_path / "notes.txt").write_text("not a program")
    other = ServerProcess(tmp_path / "notes.txt")
    other.start(None)
    with pytest.raises(EngineError, match="exit code 127"):
        other.wait_ready(30)
    other.stop()
    with pytest.raises(RuntimeMissing, match="no llama-server at"):
        ServerProcess(tmp_path / "nothing")


@posix
def test_a_server_that_will_not_end(binary: Path, tmp_path: Path) -> None:
    with ServerProcess(binary, grace=0.3) as server:
        server.start(None, env={"FAKE_MODE": "deaf"})
        server.wait_ready(30)
        pid = said(tmp_path)["pid"]
        assert server.stop() == 128 + 9 and ended(tmp_path)
        eventually(lambda: gone(pid))


@posix
def test_a_port_in_use(binary: Path) -> None:
    with contextlib.closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=f"^port {port} of 127.0.0.1 is in use: stop what runs there, or choose another"):
            ServerProcess(binary, port=port).start(None)
    assert free_port() != 0
    with pytest.raises(EngineError, match="cannot listen on 203.0.113.1"):
        ServerProcess(binary, host="203.0.113.1", port=80).start(None)


@posix
@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_server_with_a_prefix_and_a_key(binary: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    flags = ["--api-prefix", "/x/y", "--api-key", "one,two"] if how == "flag" else []
    for name, value in (("LLAMA_ARG_API_PREFIX", "/x/y"), ("LLAMA_API_KEY", "one,two")) if how == "variable" else ():
        monkeypatch.setenv(name, value)
    with ServerProcess(binary) as server:
        server.start(None, flags, {"FAKE_MODE": "/x/y"})
        server.wait_ready(30)
        assert server.url.endswith(f":{server.port}/x/y") and server.api_key == "one"


@posix
def test_a_file_of_keys(binary: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\nthree\nfour\n")
    with ServerProcess(binary) as server:
        server.start(None, ["--api-key-file", str(tmp_path / "keys")])
        assert server.api_key == "three"
    with pytest.raises(EngineError, match="file of API keys .* cannot be read"):
        ServerProcess(binary).start(None, ["--api-key-file", str(tmp_path / "nothing")])


@posix
def test_another_program_at_the_port_is_not_waited_for(binary: Path) -> None:
    with ServerProcess(binary) as server:
        server.start(None, env={"FAKE_MODE": "another"})
        with pytest.raises(EngineError, match="not the llama-server that was started"):
            server.wait_ready(30)


@posix
@pytest.mark.parametrize(
    ("flags", "env", "part"),
    [
        (["--port", "1"], {}, "--port"),
        (["--host", "10.9.9.9"], {}, "--host"),
        (["--ssl-key-file", "k"], {}, "--ssl-key-file: the server is asked over plain HTTP"),
        ([], {"LLAMA_ARG_SSL_CERT_FILE": "c"}, "LLAMA_ARG_SSL_CERT_FILE: the server is asked over plain HTTP"),
        (["--api-prefix", "x"], {}, "must begin with a slash"),
        ([], {"LLAMA_ARG_API_PREFIX": "/x/"}, "must begin with a slash and not end with one"),
    ],
)
def test_flags_and_variables_that_would_hide_the_server(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], env: dict[str, str], part: str
) -> None:
    """A sentence at once, and nothing is started: they all ended in a wait for a server that listens elsewhere."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=re.escape(part)):
        ServerProcess(binary).start(None, flags)
    assert not (tmp_path / "said.json").exists()


@posix
def test_variables_for_other_programs_do_not_reach_the_server(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AIP_MODE", "AIP_HTTP_PORT", "LLAMA_SERVER_ROUTER_PORT", "LLAMA_ARG_THREADS", "LLAMA_ARG_TOP_K"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)  # of a test that loaded a runtime in this process
    with ServerProcess(binary) as server:
        server.start(None, env={"LLAMA_ARG_TOP_K": None, "LLAMA_ARG_TOP_P": "0.5"})
        server.wait_ready(30)
        assert said(tmp_path)["env"] == ["LLAMA_ARG_THREADS", "LLAMA_ARG_TOP_P"]


def test_addresses(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    for host, url in (("0.0.0.0", "http://127.0.0.1:5"), ("::", "http://[::1]:5"), ("127.0.0.2", "http://127.0.0.2:5")):
        assert ServerProcess(tmp_path / "x", host=host, port=5).url == url


@posix
def test_no_server_outlives_a_killed_program(binary: Path, tmp_path: Path) -> None:
    """Not even when the program is killed in a way it cannot answer."""
    code = (
        "import sys, time\n"
        "from steer_plugins.client import ServerProcess\n"
        "server = ServerProcess(sys.argv[1])\n"
        "server.start(None)\n"
        "server.wait_ready(30)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    program = subprocess.Popen([sys.executable, "-c", code, str(binary)], stdout=subprocess.PIPE)
    try:
        assert program.stdout is not None and program.stdout.readline() == b"ready\n"
        assert not ended(tmp_path)
    finally:
        program.kill()
        program.communicate()
    eventually(lambda: ended(tmp_path) and gone(said(tmp_path)["pid"]))


# ---- steer serve ----


@contextlib.contextmanager
def serving(*args: str, mode: str = "") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "steer_plugins", "serve", *args]
    environment = {**os.environ, "FAKE_MODE": mode}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_serve_ends_with_its_child(binary: Path, model: Path, tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    with serving(str(model), "--port", "0", "-ngl", "99") as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("Serving tiny.gguf on CPU at http://127.0.0.1:")
        if name == "SIGINT":
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == {"SIGINT": 130, "SIGKILL": -9}.get(name, 128 + number)
        assert err.strip() == "loading tiny.gguf ..."
    eventually(lambda: ended(tmp_path) and gone(said(tmp_path)["pid"]))
    assert (tmp_path / "said.json.ended").read_text() == str(int(signal.SIGTERM)), "it was asked once, in order"


@posix
def test_serve_with_vectors(binary: Path, model: Path, tmp_path: Path) -> None:
    library = Library()
    library.put(vector(model), identity_of_gguf(model))
    library.put(vector(model, 1, name="calm"), identity_of_gguf(model))
    library.path("torn", identity_of_gguf(model)).write_bytes(b"xx")
    extra = tmp_path / "extra.safetensors"
    write_vector(vector(model, 2, name="other", layers=(0, 2)), extra)
    port = free_port()
    flags = ["--port", str(port), "--vector", f"extra={extra}", "--parallel", "2", "-hf", "x/y", "-mg", "0", "--temp", "-1"]
    with serving(str(model), "--steering", f'mood:0.5 + !extra@1- - "{extra}"?all', *flags) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        assert lines[0] == f"Serving tiny.gguf on CPU at http://127.0.0.1:{port}\n" and lines[1] == "Vectors: calm, mood, extra\n"
        assert lines[3].startswith(f"  curl http://127.0.0.1:{port}/v1/chat/completions") and '{"vector": "calm"' in lines[3]
        process.terminate()
        _, err = process.communicate(timeout=60)
    warning = err.splitlines()[0]
    assert warning.startswith("steer: warning: ") and "torn.safetensors" in warning
    args = said(tmp_path)["args"]
    own = f"c-{vector(model, 2, layers=(0, 2)).content_hash[:24]}"
    assert json.loads(args[args.index("--steering") + 1]) == [
        {"vector": "mood", "strength": 0.5},
        {"vector": "extra", "strength": 1.0, "layers": [1, None], "op": "project"},
        {"vector": own, "strength": -1.0, "scope": "all"},
    ]
    assert said(tmp_path)["vectors"] == sorted(f"{n}.safetensors" for n in ("calm", "mood", "extra", own))
    assert args[-8:] == ["--parallel", "2", "-hf", "x/y", "-mg", "0", "--temp", "-1"]
    assert not Path(args[args.index("--steering-dir") + 1]).exists(), "the folder is tidied up"


@posix
def test_serve_for_scripts(binary: Path, model: Path, tmp_path: Path) -> None:
    Library().put(vector(model), identity_of_gguf(model))
    with serving("--json", "--no-library", "--port", "0", "--", "-m", str(model), "--api-key", "k") as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        assert facts["model"] == str(model) and facts["vectors"] == [] and facts["device"] == "CPU"
        assert said(tmp_path)["vectors"] == [] and said(tmp_path)["args"][-2:] == ["--api-key", "k"]
        process.terminate()
        assert process.communicate(timeout=60) == ("", "")


@posix
def test_serve_and_a_crash(binary: Path, model: Path) -> None:
    with serving(str(model), "--port", "0", mode="crash") as process:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, "")
        assert err.endswith("steer: llama-server ended with exit code 3; it said last: error: no such tensor\n")
    with serving(str(model), "--port", "0", "--json", "--show-log") as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        with contextlib.suppress(requests.RequestException):
            requests.get(url + "/die", timeout=10)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGSEGV
        assert "was killed by signal 11; it said last: load_model" in err and err.startswith("load_model: using device")


def test_flags() -> None:
    here = __file__
    for given, name, rest in (
        ([here, "-c", "5"], here, ["-c", "5"]),
        (["-c", "5", "-m", here, "-ngl", "9"], here, ["-c", "5", "-ngl", "9"]),
        (["--model", here], here, []),
        (["-hf", "a/b"], None, ["-hf", "a/b"]),
        (["--models-dir", "x"], None, ["--models-dir", "x"]),
    ):
        assert split_flags(given) == (None if name is None else Path(name), rest)
    for given, sentence in (([here, "-m", here], "name one model"), (["-m"], "needs a file")):
        with pytest.raises(click.UsageError, match=sentence):
            split_flags(given)
    with pytest.raises(ModelError, match="no model file"):
        split_flags(["none.gguf"])


def test_what_cannot_be_staged(model: Path, tmp_path: Path) -> None:
    staged = Staged(tmp_path, Library(tmp_path / "library"), model)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: staged.add("calm"), SpecError, "not of the form NAME=FILE"),
        (lambda: staged.add("calm="), SpecError, "not of the form NAME=FILE"),
        (lambda: staged.add("../x=y.safetensors"), VectorError, "not a vector name"),
        (lambda: staged.add("x=./none.safetensors"), VectorError, "none.safetensors"),
        (lambda: staged.flags("mood:0.5"), MissingVector, "steer train mood"),
        (lambda: staged.flags("mood:"), SpecError, "at character 6"),
    ]
    for call, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            call()
    write_vector(vector(model), tmp_path / "v.safetensors")
    staged.add(f"v={tmp_path / 'v.safetensors'}")
    with pytest.raises(SpecError, match="layers 2-9 of 'v' hold none"):
        staged.flags("v@2-9")
    assert staged.flags(None) == ["--steering-dir", str(tmp_path)]


@posix
def test_serve_says_no(binary: Path, model: Path) -> None:
    def run(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, ["serve", *args])
        return done.exit_code, f"{done.output}{done.exception}"

    assert run("-h")[0] == 0 and " serve [MODEL] [OPTIONS] [LLAMA-SERVER FLAGS]" in run("-h")[1]
    assert run("-hf", "a/b", "--steering", "mood")[1].endswith(
        "--steering and --vector need a model file: name one, in place of the flag that fetches a model"
    )
    assert run(str(model), "-m", str(model))[0] == 2
    assert run(str(model), "--port", "70000")[0] == 2


# ---- --server ----


def run(*args: str, **environment: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, list(args), env={"STEER_SERVER": "", "STEER_API_KEY": "", **environment})
    return done.exit_code, done.output, str(done.exception or "")


def test_generate_and_read_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path))
    with FakeServer() as server:
        assert run("generate", "--server", server.url, "-n", "9", "--raw", "go")[:2] == (0, "the quick\n")
        server.api_key = "secret"
        assert "wants an API key" in run("generate", "--server", server.url, "go")[2]
        environment = {"STEER_SERVER": server.url, "STEER_API_KEY": "secret"}
        code, out, _ = run("generate", "-n", "3", "--json", "go", **environment)
        assert code == 0 and json.loads(out)["text"] == "the" and json.loads(out)["model"].endswith("fake.gguf")
        file = tmp_path / "a.safetensors"
        code, out, _ = run("read", "--positions", "all", "--raw", "-o", str(file), "abc", **environment)
        assert (code, out) == (0, f"wrote 3 layers of 4 x 4 (4 tokens) to {file}\n")
        assert "steer train mood" in run("generate", "-s", "mood", "go", **environment)[2]


def test_server_or_model(model: Path) -> None:
    for option in (["-m", str(model)], ["-c", "64"], ["-ngl", "1"], ["-t", "1"]):
        code, out, _ = run("generate", "--server", "http://127.0.0.1:1", *option, "go")
        assert code == 2 and "--server uses the model that runs there" in out
    # what is said on the command line wins over the environment
    assert "no model file" in run("generate", "-m", "none.gguf", "go", STEER_SERVER="http://127.0.0.1:1")[2]
    assert "no server answers at http://127.0.0.1:1" in run("generate", "go", STEER_SERVER="127.0.0.1:1")[2]
    for command in (["train", "mood"], ["read", "x", "-o", "nothing.safetensors"], ["demo"]):
        assert "no server answers" in run(*command, "--server", "http://127.0.0.1:1")[2]


@posix
@pytest.mark.parametrize("flag", ["--steering-dir", "--steering_dir"])
def test_flags_that_contradict_ours(binary: Path, model: Path, tmp_path: Path, flag: str) -> None:
    done = CliRunner().invoke(cli, ["serve", str(model), flag, str(tmp_path)])
    assert done.exit_code != 0 and "--vector NAME=FILE" in str(done.exception)
    assert not (tmp_path / "said.json").exists()
