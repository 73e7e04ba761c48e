"""What can go wrong around the sidecar: a sentence each, nothing stored by halves, nothing left waiting."""

from __future__ import annotations

import base64
import json
import os
import plistlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import httpx
import pytest
from steer_plugins_ollama import creating, install
from steer_plugins_ollama import daemon as daemons
from steer_plugins_ollama import store as stores
from steer_plugins_ollama.daemon import Daemon
from steer_plugins_ollama.folder import FolderStore
from steer_plugins_ollama.plugin import ollama
from steer_plugins_ollama.pool import Pool
from steer_plugins_ollama.service import Service
from steer_plugins_ollama.serving import ServeOptions, make_service, serve
from steer_plugins_ollama.store import OllamaStore

from steer_plugins import Library, testing
from steer_plugins.errors import EngineError, SteerError

from .ollama_standins import StandInDaemon, running, send_chunk, send_json, start_chunks
from .test_ollama_stores import ollama_model, vector


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("m") / "tiny.gguf")[0]


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    found = StandInDaemon()
    yield found
    found.close()


def sentence(answer: httpx.Response) -> str:
    """The one sentence of an error, wherever in the answer it is."""
    last = json.loads(answer.text.splitlines()[-1])
    assert set(last) == {"error"} and "\n" not in last["error"] and "Traceback" not in last["error"]
    return str(last["error"])


# ---- a create that fails half-way ----


@pytest.mark.parametrize("existed", [False, True])
def test_a_model_is_not_stored_without_its_vectors(
    tmp_path: Path, gguf: Path, daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    """The disk is full when the vectors' manifest is written: Ollama has the model already by then."""
    root = tmp_path / "store"
    ollama_model(root, "base", gguf)
    if existed:
        ollama_model(root, "new", gguf)

    def create(handler: Any, body: bytes) -> None:
        ollama_model(root, "new", gguf)
        start_chunks(handler)
        send_chunk(handler, b'{"status":"success"}\n')
        send_chunk(handler, b"")

    daemon.answers[("POST", "/api/create")] = create
    daemon.answers[("DELETE", "/api/delete")] = lambda h, b: send_json(h, {})
    real = stores.write_atomically

    def full(path: Path, data: bytes) -> None:
        if "manifests" in Path(path).parts:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(stores, "write_atomically", full)
    library = Library(tmp_path / "library")
    carried = base64.b64encode(creating.vector_bytes(vector("own", gguf))).decode()
    body = {"model": "new", "from": "base", "parameters": {"steering": "own"}, "vectors": {"own": carried}}
    with running(lambda: Service(OllamaStore(root), Pool(), library, daemon=Daemon(daemon.url))) as (client, _):
        answer = client.post("/api/create", json=body)
        assert "No space left" in sentence(answer) and "success" not in answer.text
    deleted = [json.loads(body) for method, _, body in daemon.asked if method == "DELETE"]
    assert deleted == ([] if existed else [{"model": "new:latest", "name": "new:latest"}])


def test_a_store_that_cannot_be_written_is_found_first(
    tmp_path: Path, gguf: Path, daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    ollama_model(root, "base", gguf)

    def refused(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stores, "write_atomically", refused)
    library = Library(tmp_path / "library")
    carried = base64.b64encode(creating.vector_bytes(vector("own", gguf))).decode()
    body = {"model": "new", "from": "base", "parameters": {"steering": "own"}, "vectors": {"own": carried}}
    with running(lambda: Service(OllamaStore(root), Pool(), library, daemon=Daemon(daemon.url))) as (client, _):
        assert "run as the user that owns Ollama's store" in sentence(client.post("/api/create", json=body))
    assert "/api/create" not in daemon.paths()


def test_a_daemon_that_dies_while_it_creates(tmp_path: Path, gguf: Path, daemon: StandInDaemon) -> None:
    root = tmp_path / "store"
    ollama_model(root, "base", gguf, {"params": {"steering": ""}})

    def create(handler: Any, body: bytes) -> None:
        start_chunks(handler)
        send_chunk(handler, b'{"status":"reading model"}\n')
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    daemon.answers[("POST", "/api/create")] = create
    library = Library(tmp_path / "library")
    with running(lambda: Service(OllamaStore(root), Pool(), library, daemon=Daemon(daemon.url))) as (client, _):
        answer = client.post("/api/create", json={"model": "new", "from": "base", "parameters": {"steering": ""}})
        assert answer.text.startswith('{"status":"reading model"}\n') and "does not answer" in sentence(answer)
        whole = client.post("/api/create", json={"model": "new", "from": "base", "stream": False})
        assert whole.status_code == 502 and "does not answer" in sentence(whole)


def test_an_upload_that_is_not_finished_is_kept_until_it_is_used(tmp_path: Path, gguf: Path) -> None:
    """Somebody else deletes a model between another's upload and create."""
    store = FolderStore(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(gguf.read_bytes())
    (tmp_path / "old.modelfile").write_text("FROM tiny\n")
    upload = store.blob_path("sha256:" + "0" * 64)
    upload.parent.mkdir()
    upload.write_bytes(b"new")
    store.delete("old")
    assert upload.is_file()


# ---- the commands ----


def test_no_daemon_and_no_sidecar(tmp_path: Path, daemon: StandInDaemon) -> None:
    daemon.close()
    path = tmp_path / "Modelfile"
    path.write_text("FROM base\nPARAMETER steering mood\n")
    runner = click.testing.CliRunner()
    env = {"OLLAMA_HOST": "http://127.0.0.1:9"}
    done = runner.invoke(ollama, ["create", "x", "-f", str(path), "--url", daemon.url], env=env)
    assert isinstance(done.exception, EngineError) and "start one with `steer ollama serve`" in str(done.exception)


def test_the_address_of_the_sidecar_is_not_taken_for_ollamas(
    tmp_path: Path, daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the documentation has it, OLLAMA_HOST is the sidecar's address, which does not run now."""
    daemon.close()
    monkeypatch.setattr(daemons, "DEFAULT_URL", "http://127.0.0.1:9")  # where nobody is
    path = tmp_path / "Modelfile"
    path.write_text("FROM base\nPARAMETER steering mood\n")
    address = daemon.url.removeprefix("http://")
    done = click.testing.CliRunner().invoke(
        ollama, ["create", "x", "-f", str(path), "--url", daemon.url], env={"OLLAMA_HOST": address}
    )
    assert f"the sidecar ({daemon.url}) nor Ollama (http://127.0.0.1:9)" in str(done.exception)
    wanted = ServeOptions(port=11435, daemon="http://localhost:11435")
    with pytest.raises(EngineError, match="where the sidecar itself listens"):
        make_service(wanted)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("FROM base\n\nPARAMETER steering mood:\n", "line 3"),
        ("FROM base\nPARAMETER stearing mood\n", "line 2: unknown parameter 'stearing'"),
        ("FROM base\nNONSENSE x\n", "line 2: unknown instruction"),
        ('FROM base\nSYSTEM """never closed\n', "line 2"),
        ('FROM base\nPARAMETER steering mood\nTEMPLATE """a\n{{ nope }}"""\n', "line 4: TEMPLATE: the function nope"),
        ("FROM ./nosuch.gguf\nPARAMETER steering mood\n", "line 1: FROM: there is no file"),
        ("PARAMETER steering mood\n", "there is no FROM"),
    ],
)
def test_bad_modelfile_lines(tmp_path: Path, daemon: StandInDaemon, text: str, part: str) -> None:
    path = tmp_path / "Modelfile"
    path.write_text(text)
    done = click.testing.CliRunner().invoke(ollama, ["create", "x", "-f", str(path), "--url", daemon.url])
    assert isinstance(done.exception, SteerError) and part in str(done.exception)
    assert "/api/create" not in daemon.paths()


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} of 127.0.0.1 is in use"):
            serve(ServeOptions(port=port, folder=tmp_path), lambda said: pytest.fail("it said that it serves"))


def test_a_proxy_is_asked_for_an_ollama_elsewhere(tmp_path: Path, daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", daemon.url)
    monkeypatch.setenv("http_proxy", daemon.url)
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    daemon.answers[("GET", "http://ollama.example/api/tags")] = lambda h, b: send_json(h, {"models": []})
    library = Library(tmp_path)
    service = lambda: Service(OllamaStore(tmp_path), Pool(), library, daemon=Daemon("http://ollama.example"))  # noqa: E731
    with running(service) as (client, _):
        assert client.get("/api/tags").json() == {"models": []}


# ---- the service ----


def test_install_says_first_what_it_will_do_and_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        ran.append(list(command))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "systemd" / "user" / install.UNIT
    runner = click.testing.CliRunner()
    done = runner.invoke(ollama, ["install"], input="n\n")
    assert done.exit_code == 1 and not path.exists() and not ran
    said = done.output
    assert said.index("ExecStart=") < said.index("run:    systemctl --user enable --now") < said.index("Do this?")
    assert runner.invoke(ollama, ["install", "--dry-run"]).exit_code == 0 and not path.exists() and not ran
    assert json.loads(runner.invoke(ollama, ["install", "--json"]).output)["path"] == str(path) and not ran
    done = runner.invoke(ollama, ["install", "--", "--all"], input="y\n")
    assert done.exit_code == 0 and "ollama serve --all" in path.read_text()
    assert ran == [["systemctl", "--user", "daemon-reload"], ["systemctl", "--user", "enable", "--now", install.UNIT]]
    ran.clear()
    assert runner.invoke(ollama, ["install", "--remove", "--yes"]).exit_code == 0
    assert not path.exists() and ran[0] == ["systemctl", "--user", "disable", "--now", install.UNIT]


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    plan = install.plan(["--all", "50% $x"], platform="linux", environ={"OLLAMA_MODELS": str(tmp_path / "my models")})
    assert plan.content is not None

    def complaints(content: bytes) -> str:
        unit = tmp_path / install.UNIT
        unit.write_bytes(content)
        env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        command = ["systemd-analyze", "--user", "verify", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
        if "Failed to" in done.stderr and "manager" in done.stderr:
            pytest.skip(f"systemd-analyze cannot work here: {done.stderr.strip()[:200]}")
        return "\n".join(line for line in done.stderr.splitlines() if install.UNIT in line)

    assert complaints(plan.content) == ""
    assert complaints(plan.content.replace(b"on-failure", b"nonsense")) != "", "it would not complain of anything"


def test_the_launchd_agent_is_a_property_list(tmp_path: Path) -> None:
    content = install.launchd_agent(["python", "a b", "<&>"], {"OLLAMA_MODELS": "/m & m"})
    found = plistlib.loads(content)
    assert found["ProgramArguments"] == ["python", "a b", "<&>"] and found["EnvironmentVariables"] == {"OLLAMA_MODELS": "/m & m"}
    assert found["Label"] == install.LABEL and found["RunAtLoad"] is True


def test_a_service_finds_its_folders_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(install.sys, "platform", "darwin")
    monkeypatch.setenv("STEER_LIBRARY", "vectors")
    runner = click.testing.CliRunner()

    def agent(*options: str) -> dict[str, Any]:
        done = runner.invoke(ollama, ["install", "--json", "--", *options])
        assert done.exit_code == 0, done.output
        return dict(plistlib.loads(json.loads(done.output)["content"].encode()))

    for options in (["--folder", "ggufs"], ["--folder=ggufs"]):
        found = agent("--all", *options, "--", "--folder", "x")
        assert found["EnvironmentVariables"]["STEER_LIBRARY"] == str(tmp_path / "vectors")
        words = " ".join(found["ProgramArguments"]).replace("=", " ")
        assert words.endswith(f"serve --all --folder {tmp_path / 'ggufs'} -- --folder x")
    done = runner.invoke(ollama, ["install", "--json", "--", "--prot", "1"])
    assert done.exit_code == 2 and "--prot" in done.output


def test_a_modelfile_as_powershell_writes_it(tmp_path: Path, daemon: StandInDaemon) -> None:
    path = tmp_path / "Modelfile"
    for encoding in ("utf-16", "utf-8-sig"):
        path.write_text("FROM base\nPARAMETER steering mood:\n", encoding=encoding)
        done = click.testing.CliRunner().invoke(ollama, ["create", "x", "-f", str(path), "--url", daemon.url])
        assert "Modelfile line 2" in str(done.exception)
        (tmp_path / "x.modelfile").write_bytes(path.read_bytes())
        with pytest.raises(SteerError, match="line 2"):
            FolderStore(tmp_path).get("x")


def test_what_the_command_sends_of_several_steering_lines(tmp_path: Path, daemon: StandInDaemon) -> None:
    """A leading plus is kept: only the server knows what it is added to."""
    from steer_plugins_ollama import modelfile
    from steer_plugins_ollama.client import Api, request_of

    api = Api(daemon.url)
    try:
        for lines, wanted in (
            (["mood:0.6", "kind:0.3"], "mood:0.6 + kind:0.3"),
            (["+ mood:0.6", "kind:0.3"], "+ mood:0.6 + kind:0.3"),
            (["mood:0.6", "+ kind:0.3"], "mood:0.6 + kind:0.3"),
            ([""], ""),
        ):
            text = "FROM base\n" + "".join(f'PARAMETER steering "{line}"\n' for line in lines)
            assert request_of("x", modelfile.parse(text), tmp_path, api)["parameters"] == {"steering": wanted}
    finally:
        api.close()
