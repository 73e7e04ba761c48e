"""What must not happen without a word: a steered model answered unsteered, a file or address opened that a request names."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from steer_plugins_ollama import openai
from steer_plugins_ollama import pool as pools
from steer_plugins_ollama.daemon import Daemon
from steer_plugins_ollama.errors import BadRequest
from steer_plugins_ollama.folder import FolderStore
from steer_plugins_ollama.pool import Pool
from steer_plugins_ollama.service import Service
from steer_plugins_ollama.store import VECTOR_MEDIA, OllamaStore, check_readable, has_models

from steer_plugins import Library, testing
from steer_plugins.errors import ModelError

from .ollama_standins import StandInDaemon, StandInLlama, StandInProcess, last_said, running, said, send_json
from .test_ollama_stores import ollama_model

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("m") / "tiny.gguf")[0]


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    found = StandInDaemon()
    found.answers[("POST", "/api/chat")] = lambda h, b: send_json(h, {"from": "ollama"})
    yield found
    found.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def sidecar(tmp_path: Path, store: Path, daemon: StandInDaemon) -> Iterator[httpx.Client]:
    library = Library(tmp_path / "library")
    pool = Pool(binary=tmp_path / "no-llama-server", library=library)
    with running(lambda: Service(OllamaStore(store), pool, library, daemon=Daemon(daemon.url))) as (client, _):
        yield client


# ---- steered models that cannot be read ----


def without_vector(store: Path, path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["layers"].append({"mediaType": f"{VECTOR_MEDIA}mood", "digest": "sha256:" + "0" * 64, "size": 1})
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (without_vector, "is missing"),
        (lambda store, path: path.write_text("{"), "damaged"),
        (lambda store, path: path.write_text(path.read_text().replace("image.model", "image.tensor")), "has no GGUF"),
    ],
)
def test_a_steered_model_that_cannot_be_read_is_not_ollamas(
    sidecar: httpx.Client, daemon: StandInDaemon, store: Path, gguf: Path, damage: Callable[[Path, Path], None], part: str
) -> None:
    """Ollama would answer it without its steering."""
    damage(store, ollama_model(store, "steered", gguf, {"params": {"steering": "mood"}}))
    answer = sidecar.post("/api/chat", json={"model": "steered", "messages": CHAT})
    assert answer.status_code == 400 and part in answer.json()["error"]
    assert "/api/chat" not in daemon.paths()


@pytest.mark.parametrize("value", [5, {"mood": 1}, "mood:"])
def test_a_steering_that_is_none(sidecar: httpx.Client, daemon: StandInDaemon, store: Path, gguf: Path, value: Any) -> None:
    ollama_model(store, "steered", gguf, {"params": {"steering": value}})
    answer = sidecar.post("/api/chat", json={"model": "steered", "messages": CHAT})
    assert answer.status_code == 400 and "steering" in answer.json()["error"]
    assert "/api/chat" not in daemon.paths()


def test_cloud_models_are_ollamas(sidecar: httpx.Client, store: Path, gguf: Path) -> None:
    path = ollama_model(store, "big:cloud", gguf)
    path.write_text(json.dumps({"schemaVersion": 2, "config": {"digest": "sha256:" + "0" * 64}, "layers": None}))
    assert sidecar.post("/api/chat", json={"model": "big:cloud", "messages": CHAT}).json() == {"from": "ollama"}
    answer = sidecar.post("/api/chat", json={"model": "big:cloud", "messages": CHAT, "options": {"steering": "mood"}})
    assert answer.status_code == 400 and "has no GGUF" in answer.json()["error"]


@pytest.mark.parametrize(
    ("shown", "refused"),
    [
        ({"parameters": 'stop    "x"\nsteering                       "mood:0.6"'}, True),
        ({"parameters": "", "license": "MIT\nsteering: mood:0.6"}, True),
        ({"parameters": "temperature    0.5", "license": "MIT"}, False),
    ],
)
def test_a_steered_model_of_another_store(
    sidecar: httpx.Client, daemon: StandInDaemon, shown: dict[str, Any], refused: bool
) -> None:
    """Ollama runs in a container, say: the sidecar sees none of its models."""
    daemon.answers[("POST", "/api/show")] = lambda h, b: send_json(h, shown)
    answer = sidecar.post("/api/chat", json={"model": "elsewhere", "messages": CHAT})
    assert (answer.status_code == 400 and "set OLLAMA_MODELS" in answer.json()["error"]) is refused
    assert ("/api/chat" in daemon.paths()) is not refused


def test_nothing_steered_is_made_in_another_store(sidecar: httpx.Client, daemon: StandInDaemon) -> None:
    daemon.answers[("GET", "/api/tags")] = lambda h, b: send_json(h, {"models": [{"name": "base:latest"}]})
    daemon.answers[("POST", "/api/pull")] = lambda h, b: send_json(h, {"status": "success"})
    body = {"model": "new", "from": "base", "parameters": {"steering": "mood"}, "stream": False}
    answer = sidecar.post("/api/create", json=body)
    assert answer.status_code == 400 and "set OLLAMA_MODELS" in answer.json()["error"]
    assert "/api/create" not in daemon.paths()


@pytest.mark.skipif(sys.platform == "win32", reason="folders that may not be entered")
def test_a_store_that_may_not_be_read(tmp_path: Path, gguf: Path) -> None:
    """As that of Ollama's Linux service, where homes are closed to others."""
    root = tmp_path / "closed" / "models"
    ollama_model(root, "x", gguf)
    tmp_path.joinpath("closed").chmod(0)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        assert has_models(root)
        for use in (lambda: check_readable(root), lambda: OllamaStore(root).get("x")):
            with pytest.raises(ModelError, match="usermod -aG ollama"):
                use()
        assert OllamaStore(root).names() == [] and OllamaStore(root).blob("sha256:" + "0" * 64) is None
    finally:
        os.seteuid(was)
        tmp_path.joinpath("closed").chmod(0o700)
    assert not has_models(tmp_path / "none")
    check_readable(tmp_path / "none")


def test_a_steering_of_null_is_none(sidecar: httpx.Client, store: Path, gguf: Path) -> None:
    """The other place that a request may name one counts then."""
    ollama_model(store, "plain", gguf)
    body = {"model": "plain", "messages": CHAT, "steering": None, "options": {"steering": "mood:"}}
    answer = sidecar.post("/api/chat", json=body)
    assert answer.status_code == 400 and "character 6" in answer.json()["error"]


# ---- texts that would be instructions ----


@pytest.mark.parametrize(
    "body",
    [
        {"license": 'MIT\n"""\nADAPTER /etc/hostname\nLICENSE """x'},
        {"license": 'MIT\n"""\nFROM /etc/hostname\nLICENSE """x'},
        {"parameters": {"stop": ['a\n"""\nADAPTER /etc/hostname\nLICENSE """x']}},
        {"system": 'a\n"""\nADAPTER /etc/hostname\nLICENSE """x'},
        {"messages": [{"role": "user", "content": 'a\n"""\nFROM /etc/hostname\nLICENSE """x'}]},
        {"template": 'a\n"""\nPARAMETER num_ctx 9\nLICENSE """x'},
        {"license": ['a\n"""\nPARAMETER steering mood\nLICENSE """x']},
    ],
)
def test_a_text_cannot_end_its_quotes(tmp_path: Path, gguf: Path, body: dict[str, Any]) -> None:
    (tmp_path / "base.gguf").write_bytes(gguf.read_bytes())
    library = Library(tmp_path / "library")
    with running(lambda: Service(FolderStore(tmp_path), Pool(), library)) as (client, _):
        answer = client.post("/api/create", json={"model": "new", "from": "base", "stream": False, **body})
        assert answer.status_code == 400 and "cannot be written into a Modelfile" in answer.json()["error"]
    assert not list(tmp_path.glob("*.modelfile"))


def test_a_vector_line_in_a_text_is_text(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(gguf.read_bytes())
    line = "# steer-vector mood sha256:" + "0" * 64
    FolderStore(tmp_path).create(named("new"), {"from": "base", "system": f"a\n{line}\nb"})
    model = FolderStore(tmp_path).get("new")
    assert line in model.system and model.vectors == {}


def named(text: str) -> Any:
    from steer_plugins_ollama.names import parse_name

    return parse_name(text)


# ---- /v1: what goes to llama-server as it is ----


@pytest.fixture
def talks(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[httpx.Client, StandInLlama]]:
    llama = StandInLlama(vision=True)
    llama.events = [said(content="yes"), said(finish="stop"), last_said()]
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
        llama.answers[("POST", path)] = lambda h, b: send_json(h, {"model": "file.gguf", "id": "1"})
    monkeypatch.setattr(pools, "ServerProcess", StandInProcess(llama))
    (tmp_path / "base.gguf").write_bytes(gguf.read_bytes())
    (tmp_path / "told.modelfile").write_text("FROM base\nSYSTEM S\nMESSAGE user a\nMESSAGE assistant b\n")
    library = Library(tmp_path / "library")
    with running(lambda: Service(FolderStore(tmp_path), Pool(binary=gguf, library=library, environ={}), library)) as (client, _):
        yield client, llama
    llama.close()


IMAGE = "data:image/png;base64,AAAA"


@pytest.mark.parametrize("link", ["http://127.0.0.1:1/x", "https://example.org/x.png", "file:///etc/hostname"])
@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/v1/chat/completions", lambda link: {"type": "image_url", "image_url": {"url": link}}),
        ("/v1/chat/completions", lambda link: {"type": "input_audio", "input_audio": {"data": link}}),
        ("/v1/chat/completions", lambda link: {"type": "video_url", "video_url": {"url": link}}),
        ("/v1/messages", lambda link: {"type": "image", "source": {"type": "url", "url": link}}),
        (
            "/v1/messages",
            lambda link: {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": link}}]},
        ),
        ("/v1/responses", lambda link: {"type": "input_image", "image_url": link}),
    ],
)
def test_llama_server_fetches_nothing(
    talks: tuple[httpx.Client, StandInLlama], path: str, part: Callable[[str], dict[str, Any]], link: str
) -> None:
    client, llama = talks
    for url, status in ((link, 400), (IMAGE, 200)):
        messages = [{"role": "user", "content": [part(url)]}]
        answer = client.post(path, json={"model": "base", "messages": messages, "input": messages})
        assert answer.status_code == status, answer.text
        if status == 400:
            assert "nothing is fetched" in answer.json()["error"]["message"] and path not in llama.paths()


def test_addresses_that_are_no_media_are_free() -> None:
    openai.refuse_links([{"role": "user", "content": "http://example.org"}])
    openai.refuse_links([{"role": "assistant", "content": [{"type": "tool_use", "input": {"url": "http://example.org"}}]}])
    openai.refuse_links([{"type": "text", "text": "http://example.org"}])
    with pytest.raises(BadRequest):
        openai.refuse_links([{"role": "tool", "output": [{"type": "input_image", "image_url": "http://example.org"}]}])


def test_system_and_history_on_every_route(talks: tuple[httpx.Client, StandInLlama]) -> None:
    client, llama = talks
    past = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for path, asked in (("/v1/chat/completions", "messages"), ("/v1/messages", "messages"), ("/v1/responses", "input")):
        answer = client.post(path, json={"model": "told", asked: CHAT})
        assert answer.status_code == 200 and answer.json()["model"] == "told"
        sent = llama.bodies(path)[-1]
        assert sent[asked][-3:] == [*past, *CHAT]
        assert "S" in (sent.get("system"), sent.get("instructions"), sent[asked][0]["content"])
    client.post("/v1/responses", json={"model": "told", "input": "hi"})
    assert llama.bodies("/v1/responses")[-1]["input"] == [*past, *CHAT]
    for path, body in (("/v1/messages", {"messages": "hi"}), ("/v1/responses", {"input": 3}), ("/v1/responses", {})):
        assert client.post(path, json={"model": "told", **body}).status_code == 400


def test_raw_prompts_place_their_images(talks: tuple[httpx.Client, StandInLlama]) -> None:
    client, llama = talks
    llama.events = [{"content": "x", "stop": True, "timings": last_said()["timings"]}]
    one, two = base64.b64encode(b"1").decode(), base64.b64encode(b"2").decode()
    body = {"model": "base", "raw": True, "images": [one, two], "stream": False}
    assert client.post("/api/generate", json={**body, "prompt": "a [img-1] b [img-0]"}).status_code == 200
    assert llama.bodies("/completion")[-1]["prompt"] == {"prompt_string": "a <m> b <m>", "multimodal_data": [two, one]}
    for prompt in ("a", "[img-0]", "[img-0] [img-2]", "[img-0][img-0]"):
        answer = client.post("/api/generate", json={**body, "prompt": prompt})
        assert answer.status_code == 400 and "[img-0]" in answer.json()["error"]


# ---- what an OpenAI client asks for is done ----


def test_every_name_of_the_limit(talks: tuple[httpx.Client, StandInLlama]) -> None:
    client, llama = talks
    for path, asked, name in (
        ("/v1/chat/completions", "messages", "max_tokens"),
        ("/v1/chat/completions", "messages", "max_completion_tokens"),
        ("/v1/messages", "messages", "max_tokens"),
        ("/v1/responses", "input", "max_output_tokens"),
    ):
        assert client.post(path, json={"model": "base", asked: CHAT, name: 3}).status_code == 200
        assert llama.bodies(path)[-1]["n_predict"] == 3, name


def test_logprobs_of_completions(talks: tuple[httpx.Client, StandInLlama]) -> None:
    client, llama = talks
    top = [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}, {"token": "Ho", "logprob": -1.5, "bytes": [72, 111]}]
    one = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": top}
    two = {"token": " x", "logprob": -0.25, "bytes": [32, 120], "top_logprobs": []}
    llama.events = [
        {"content": "Hi", "completion_probabilities": [one]},
        {"content": " x", "completion_probabilities": [two]},
        {"content": "", "stop": True, "timings": last_said()["timings"]},
    ]
    wanted = {
        "tokens": ["Hi", " x"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"Hi": -0.5, "Ho": -1.5}, {}],
        "text_offset": [0, 2],
    }
    body = {"model": "base", "prompt": "a", "logprobs": 2}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"] == wanted
    assert llama.bodies("/completion")[-1]["n_probs"] == 2
    texts = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    choices = [json.loads(text.removeprefix("data: "))["choices"][0] for text in texts[:2]]
    assert [c["logprobs"]["text_offset"] for c in choices] == [[0], [2]]
    assert client.post("/v1/completions", json={"model": "base", "prompt": "a"}).status_code == 200
    assert "n_probs" not in llama.bodies("/completion")[-1]
