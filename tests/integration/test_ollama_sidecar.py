"""The sidecar on the demo model, asked by real clients. Without Ollama: a folder is served."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from steer_plugins_ollama.key import server_key

from steer_plugins import Library, testing
from steer_plugins.metrics import builtin_metrics
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.identity import identity_of_gguf

from .ollama_sidecar import ROOT, demo_model, need_server, sidecar

CHAT = [{"role": "user", "content": "Describe a walk in the forest"}]


FINAL = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}


def key() -> dict[str, str]:
    """What the sidecar's llama-servers want to be asked with."""
    return {"Authorization": f"Bearer {server_key()}"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with `mood` fitted to the demo model."""
    from steer_plugins.client import ServerProcess
    from steer_plugins.client.engine import ServerEngine
    from steer_plugins.training.train import TrainOptions, train
    from steer_plugins.training.traits import load_trait

    model = demo_model()
    need_server()
    root = tmp_path_factory.mktemp("library")
    with ServerProcess() as process:
        process.start(model, ["-c", "4096", "-np", "4", "-t", "1", "-tb", "1"])  # two threads crawl on a busy machine
        process.wait_ready()
        engine = ServerEngine(process.url)
        # not calibrated: that takes minutes, and here it only matters that the two poles differ
        vector = train(engine, "mood", load_trait("mood"), TrainOptions(calibrate="none", layers=(15,)))
        engine.close()
    Library(root).put(vector, identity_of_gguf(model))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    """Two Modelfiles on the demo model, some variants, and tiny models that may think."""
    root = tmp_path_factory.mktemp("folder")
    try:
        (root / "demo.gguf").symlink_to(demo_model())
    except OSError:
        shutil.copyfile(demo_model(), root / "demo.gguf")
    common = "\nPARAMETER temperature 0\nPARAMETER num_predict 60\n"
    (root / "cheerful.modelfile").write_text('FROM demo\nPARAMETER steering "mood:0.8"' + common)
    (root / "sombre.modelfile").write_text('FROM demo\nPARAMETER steering "mood:-0.8"' + common)
    (root / "plain.modelfile").write_text("FROM demo" + common)
    (root / "templated.modelfile").write_text(
        'FROM demo\nPARAMETER steering "mood:0.5"\nSYSTEM Be brief.\nMESSAGE user Hi.\nMESSAGE assistant Hello.\n'
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"""'
        + common
    )
    testing.write("llama", root / "tiny.gguf")
    testing.write("deepseek4", root / "thinker.gguf")
    return root


@pytest.fixture(scope="module")
def url(folder: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sidecar(tmp_path_factory.mktemp("log"), "--folder", str(folder), env={"STEER_LIBRARY": str(library)}) as found:
        yield found


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=300) as client:
        yield client


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    ollama = pytest.importorskip("ollama")
    found = ollama.Client(url, trust_env=False)
    yield found
    found._client.close()  # it has no way to close itself


def lines_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert answer.text.endswith("\n") and "\n\n" not in answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


# ---- what steering does ----


def test_two_modelfiles_and_no_steering(client: Any, http: httpx.Client) -> None:
    mood = builtin_metrics()["mood"]
    prompts = ["Describe a walk in the forest", "Tell me about your morning", "Describe a small town"]

    def score(model: str) -> float:
        return sum(mood(client.chat(model, [{"role": "user", "content": p}]).message.content) for p in prompts)

    cheerful, sombre = score("cheerful"), score("sombre")
    assert cheerful > sombre, (cheerful, sombre)
    plain = client.chat("plain", CHAT).message.content
    (runner,) = {m["steer_server"] for m in http.get("/api/ps").json()["models"]}
    assert plain not in (client.chat("cheerful", CHAT).message.content, client.chat("sombre", CHAT).message.content)
    # the very process, asked without the sidecar and without steering
    body = {"messages": CHAT, "temperature": 0, "top_p": 0.9, "min_p": 0.0, "max_tokens": 60, "steering": []}
    direct = httpx.post(f"{runner}/v1/chat/completions", json=body, headers=key(), trust_env=False, timeout=300).json()
    assert plain == direct["choices"][0]["message"]["content"]


def test_requests_override_and_add(client: Any) -> None:
    def text(model: str, steering: Any = None) -> str:
        options = {} if steering is None else {"steering": steering}
        return str(client.chat(model, CHAT, options={"num_predict": 20, **options}).message.content)

    assert text("plain", "mood:0.8") == text("cheerful") == text("sombre", "mood:0.8")
    assert text("cheerful", "+ mood:-1.6") == text("sombre")
    assert text("cheerful", "") == text("plain")
    assert text("plain", [{"vector": "mood", "strength": -0.8}]) == text("sombre")


# ---- the shape of answers ----


def test_streamed_chat(http: httpx.Client) -> None:
    body = {"model": "cheerful", "messages": CHAT, "options": {"num_predict": 5}}
    *parts, last = lines_of(http.post("/api/chat", json=body))
    assert len(parts) == 5
    for part in parts:
        assert set(part) == {"model", "created_at", "message", "done"} and part["done"] is False
        assert part["message"]["role"] == "assistant" and part["message"]["content"] and part["model"] == "cheerful"
    assert last["done"] is True and last["done_reason"] == "length" and last["message"]["content"] == ""
    assert set(last) >= FINAL and all(isinstance(last[key], int) for key in FINAL)
    assert last["eval_count"] == 5 and last["prompt_eval_count"] > 20 and last["total_duration"] >= last["eval_duration"] > 1000
    whole = http.post("/api/chat", json={**body, "stream": False}).json()
    assert whole["message"]["content"] == "".join(p["message"]["content"] for p in parts)
    assert set(whole) == {"model", "created_at", "message", "done", "done_reason", *FINAL}


def test_streamed_generate_and_its_context(http: httpx.Client) -> None:
    body = {"model": "plain", "prompt": "My name is Bob.", "options": {"num_predict": 8}}
    *parts, last = lines_of(http.post("/api/generate", json=body))
    assert all(set(p) == {"model", "created_at", "response", "done"} for p in parts)
    assert last["response"] == "" and set(last) >= {"context", "done_reason", *FINAL}
    assert len(last["context"]) == last["prompt_eval_count"] + last["eval_count"]
    again = http.post("/api/generate", json={**body, "prompt": "And?", "context": last["context"], "stream": False}).json()
    assert again["prompt_eval_count"] > len(last["context"]) and again["context"][: len(last["context"])] == last["context"]


def test_load_unload_and_ps(http: httpx.Client) -> None:
    for path, empty in (("/api/chat", {"message": {"role": "assistant", "content": ""}}), ("/api/generate", {"response": ""})):
        loaded = http.post(path, json={"model": "cheerful", "keep_alive": "10m"}).json()
        assert loaded["done_reason"] == "load" and loaded["done"] is True and loaded.items() >= empty.items()
        (entry,) = [m for m in http.get("/api/ps").json()["models"] if m["name"] == "cheerful:latest"]
        assert entry["steering"] == "mood:0.8" and entry["context_length"] == 4096 and entry["device"]
        gone = http.post(path, json={"model": "cheerful", "keep_alive": 0}).json()
        assert gone["done_reason"] == "unload"
        assert not [m for m in http.get("/api/ps").json()["models"] if m["name"] == "cheerful:latest"]


def test_keep_alive_runs_out(http: httpx.Client) -> None:
    http.post("/api/generate", json={"model": "tiny", "prompt": "a", "options": {"num_predict": 1}, "keep_alive": "100ms"})
    until = time.monotonic() + 60
    while any(m["name"] == "tiny:latest" for m in http.get("/api/ps").json()["models"]):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_variants_share_a_process_and_it_grows(http: httpx.Client) -> None:
    for model in ("cheerful", "sombre", "plain"):
        http.post("/api/generate", json={"model": model, "prompt": "a", "options": {"num_predict": 1}, "stream": False})
    entries = [
        m for m in http.get("/api/ps").json()["models"] if m["name"] in ("cheerful:latest", "sombre:latest", "plain:latest")
    ]
    assert len(entries) == 3 and len({m["steer_server"] for m in entries}) == 1
    body = {"model": "cheerful", "prompt": "a", "options": {"num_predict": 1, "num_ctx": 5000}, "stream": False}
    assert http.post("/api/generate", json=body).status_code == 200
    (entry,) = [m for m in http.get("/api/ps").json()["models"] if m["name"] == "cheerful:latest"]
    assert entry["context_length"] >= 5000


# ---- the rest of the surface ----


def test_json_and_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    options = {"num_predict": 60}
    for model in ("plain", "templated"):
        found = json.loads(client.chat(model, CHAT, format=schema, options=options).message.content)
        assert found["colour"] in ("red", "blue")
    found = json.loads(client.generate("plain", "A colour", format=schema, options=options).response)
    assert found["colour"] in ("red", "blue")


def test_tools(client: Any, http: httpx.Client) -> None:
    """The demo model's template knows none, which is said; earlier calls and their answers are messages like any other."""
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    asked = [{"role": "user", "content": "Call the tool get_weather for Oslo."}]
    for path in ("/api/chat", "/v1/chat/completions"):
        refused = http.post(path, json={"model": "plain", "messages": asked, "tools": [tool]})
        assert refused.status_code == 400 and "does not support tools" in refused.text
    assert "tools" not in client.show("plain").capabilities
    history = [
        *asked,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "content": "rain", "tool_name": "get_weather"},
    ]
    assert client.chat("plain", history, options={"num_predict": 5}).done


def test_thinking(client: Any, http: httpx.Client) -> None:
    body = {"model": "thinker", "messages": CHAT, "options": {"num_predict": 6, "seed": 1}, "stream": False}
    thought = http.post("/api/chat", json={**body, "think": True}).json()["message"]
    assert thought["thinking"] and thought["content"] == ""
    answered = http.post("/api/chat", json={**body, "think": False}).json()["message"]
    assert answered["content"] and "thinking" not in answered
    *parts, last = lines_of(http.post("/api/generate", json={**body, "prompt": "x", "think": True, "stream": True}))
    assert all(p.get("thinking") and p["response"] == "" for p in parts) and parts
    refused = http.post("/api/chat", json={**body, "model": "plain", "think": True})
    assert refused.status_code == 400 and "does not support thinking" in refused.json()["error"]
    assert "thinking" in client.show("thinker").capabilities


def test_logprobs(http: httpx.Client) -> None:
    for path, more in (("/api/chat", {"messages": CHAT}), ("/api/generate", {"prompt": "a"})):
        body = {"model": "plain", **more, "options": {"num_predict": 3}, "stream": False}
        entries = http.post(path, json={**body, "logprobs": True, "top_logprobs": 2}).json()["logprobs"]
        assert len(entries) == 3
        for entry in entries:
            assert entry["logprob"] <= 0 and isinstance(entry["token"], str) and len(entry["top_logprobs"]) == 2
        assert "top_logprobs" not in http.post(path, json={**body, "logprobs": True}).json()["logprobs"][0]
        assert http.post(path, json={**body, "top_logprobs": 21}).status_code == 400


def test_raw_stop_system_template(client: Any, http: httpx.Client) -> None:
    options = {"num_predict": 12}
    raw = client.generate("plain", "One two three", raw=True, options=options)
    assert raw.response and raw.context is None
    assert http.post("/api/generate", json={"model": "plain", "prompt": "a", "raw": True, "system": "x"}).status_code == 400
    assert " " not in client.generate("plain", "a b c", raw=True, options={**options, "stop": [" "]}).response
    by_hand = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    wanted = client.generate("plain", by_hand, raw=True, options=options).response
    assert client.generate("plain", "hi", system="S", options=options).response == wanted
    template = "<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
    assert client.generate("plain", "hi", system="S", template=template, options=options).response == wanted
    bad = http.post("/api/generate", json={"model": "plain", "prompt": "a", "template": "a\n{{ nope }}"})
    assert bad.status_code == 400 and "line 2" in bad.json()["error"]


def test_template_system_and_history_of_the_model(client: Any) -> None:
    history = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    )
    by_hand = history + "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    options = {"num_predict": 16}
    wanted = client.generate("templated", by_hand, raw=True, options=options).response
    assert client.chat("templated", [{"role": "user", "content": "Who?"}], options=options).message.content == wanted
    assert client.generate("templated", "Who?", options=options).response == wanted


def test_suffix_and_images_say_what_is_missing(http: httpx.Client) -> None:
    answer = http.post("/api/generate", json={"model": "plain", "prompt": "def f(", "suffix": "return 1"})
    assert answer.status_code == 400 and "does not support insert" in answer.json()["error"]
    answer = http.post("/api/generate", json={"model": "plain", "prompt": "look", "images": ["QUJD"]})
    assert answer.status_code == 400 and "images" in answer.json()["error"]


def test_images(client: Any, http: httpx.Client, folder: Path) -> None:
    """A tiny random projector: what matters is that the picture is looked at."""
    from .tiny_projector import png, write_projector

    write_projector(folder / "eyes.gguf", identity_of_gguf(folder / "tiny.gguf").n_embd)
    common = "FROM ./tiny.gguf\nFROM ./eyes.gguf\nPARAMETER temperature 0\nPARAMETER num_ctx 256\nPARAMETER num_predict 8\n"
    (folder / "seeing.modelfile").write_text(common)
    (folder / "seeing-templated.modelfile").write_text(common + 'TEMPLATE """<u>{{ .Prompt }}<a>"""\n')
    assert "vision" in client.show("seeing").capabilities and "vision" not in client.show("tiny").capabilities
    for model in ("seeing", "seeing-templated"):
        texts = []
        for shade in (0, 255, 255):
            message = {"role": "user", "content": "What is this?", "images": [png(shade)]}
            answer = client.chat(model, [message])
            texts.append(answer.message.content)
            assert answer.prompt_eval_count > client.chat(model, [{**message, "images": []}]).prompt_eval_count
        assert texts[0] != texts[1] == texts[2], model
        asked = client.generate(model, "What is this?", images=[png(0)])
        assert asked.response == texts[0]
        broken = http.post("/api/generate", json={"model": model, "prompt": "x", "images": ["QUJD"]})
        assert broken.status_code == 400 and broken.json()["error"]
        client.generate(model, keep_alive=0)


def test_a_long_conversation_loses_its_oldest_messages(http: httpx.Client) -> None:
    long = [{"role": "user", "content": "old " * 700}, {"role": "assistant", "content": "ok"}] * 2
    body = {"model": "tiny", "messages": [*long, *CHAT], "options": {"num_ctx": 512, "num_predict": 2}, "stream": False}
    assert http.post("/api/chat", json=body).status_code == 200
    refused = http.post("/api/chat", json={**body, "truncate": False})
    assert refused.status_code == 400 and "context" in refused.json()["error"]
    generated = {"model": "tiny", "prompt": "old " * 700, "options": {"num_ctx": 512, "num_predict": 2}, "stream": False}
    assert http.post("/api/generate", json=generated).json()["prompt_eval_count"] < 512


# ---- errors ----


def test_missing_and_deleted_vectors(http: httpx.Client, library: Path) -> None:
    answer = http.post("/api/chat", json={"model": "plain", "messages": CHAT, "options": {"steering": "nosuch"}})
    assert answer.status_code == 400 and "steer ollama train plain:latest nosuch" in answer.json()["error"]
    answer = http.post("/api/chat", json={"model": "tiny", "messages": CHAT, "options": {"steering": "mood"}})
    assert answer.status_code == 400 and "no vector 'mood'" in answer.json()["error"]
    (path,) = library.rglob("mood.safetensors")
    away = path.with_suffix(".away")
    body = {"model": "cheerful", "messages": CHAT, "options": {"num_predict": 2}, "stream": False}
    assert http.post("/api/chat", json=body).status_code == 200
    path.rename(away)
    try:
        answer = http.post("/api/chat", json=body)
        assert answer.status_code == 400 and "no vector 'mood'" in answer.json()["error"]
    finally:
        away.rename(path)
    assert http.post("/api/chat", json=body).status_code == 200


def test_vectors_that_the_server_has_dropped_are_uploaded_again(http: httpx.Client) -> None:
    """It keeps a bounded number of them, and any client of it may delete one."""
    limits = {"max_tokens": 2, "max_output_tokens": 2, "options": {"num_predict": 2}, "messages": CHAT, "input": "hi"}
    for path in ("/api/chat", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
        for stream in (False, True):
            assert http.post("/api/chat", json={"model": "cheerful", **limits}).status_code == 200
            (server,) = {m["steer_server"] for m in http.get("/api/ps").json()["models"] if m["name"] == "cheerful:latest"}
            for vector in httpx.get(f"{server}/steering", headers=key(), trust_env=False, timeout=60).json()["vectors"]:
                at = f"{server}/steering/vectors/{vector['name']}"
                httpx.delete(at, headers=key(), trust_env=False, timeout=60).raise_for_status()
            answer = http.post(path, json={"model": "cheerful", "stream": stream, **limits})
            assert answer.status_code == 200 and not re.search(r'"error": ?["{]', answer.text), answer.text


def test_a_file_that_llama_cpp_cannot_open(http: httpx.Client, folder: Path) -> None:
    (folder / "cut.gguf").write_bytes((folder / "tiny.gguf").read_bytes()[:-1000])
    data = (folder / "tiny.gguf").read_bytes()
    (folder / "old.gguf").write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_old.wght"))
    for name, status, part in (("cut", 400, "cut.gguf is truncated"), ("old", 500, "old.gguf: check_tensor_dims: tensor")):
        answer = http.post("/api/chat", json={"model": name, "messages": CHAT})
        assert answer.status_code == status and part in answer.json()["error"], answer.text
        assert "Ollama published" not in answer.text, "the layouts of a folder are the user's own"
    assert http.post("/api/generate", json={"model": "tiny", "prompt": "a", "options": {"num_predict": 1}}).status_code == 200


def test_a_server_that_is_killed(http: httpx.Client) -> None:
    if not hasattr(os, "kill") or not Path("/proc").is_dir():
        pytest.skip("finds the process in /proc")
    body = {"model": "tiny", "prompt": "a", "options": {"num_predict": 1500, "num_ctx": 2048}, "keep_alive": "5m"}
    with http.stream("POST", "/api/generate", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        (entry,) = [m for m in http.get("/api/ps").json()["models"] if m["name"] == "tiny:latest"]
        port = entry["steer_server"].rsplit(":", 1)[1]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"llama-server") and port.encode() in words:
                os.kill(int(path.parent.name), signal.SIGKILL)
        last = json.loads(list(lines)[-1])
    assert "stopped unexpectedly" in last["error"]
    assert http.post("/api/generate", json={**body, "options": {"num_predict": 1}, "stream": False}).status_code == 200


# ---- many clients, and clients that leave ----


def busy(http: httpx.Client, model: str) -> int:
    (server,) = {m["steer_server"] for m in http.get("/api/ps").json()["models"] if m["name"] == f"{model}:latest"}
    return sum(slot["is_processing"] for slot in httpx.get(f"{server}/slots", headers=key(), trust_env=False, timeout=60).json())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels(http: httpx.Client, url: str, stream: bool) -> None:
    endless = {"type": "array", "items": {"type": "integer"}, "minItems": 2000}
    body = {"model": "plain", "prompt": "Tell", "format": endless, "options": {"num_predict": 3000}, "stream": stream}
    http.post("/api/generate", json={"model": "plain"})
    if stream:
        with http.stream("POST", "/api/generate", json=body) as answer:
            lines = answer.iter_lines()
            assert not json.loads(next(lines))["done"]
            assert busy(http, "plain") == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/api/generate", json=body, trust_env=False, timeout=httpx.Timeout(60, read=1.0))
    until = time.monotonic() + 60
    while busy(http, "plain"):
        assert time.monotonic() < until, "the reply goes on without its reader"
        time.sleep(0.05)


def test_many_clients_and_switches(url: str) -> None:
    """A short soak: concurrent chats on several models, some of which are left, and model switches."""
    errors: list[str] = []

    def one(number: int) -> None:
        model = ("cheerful", "sombre", "tiny", "plain", "thinker")[number % 5]
        body = {
            "model": model,
            "messages": CHAT,
            "options": {"num_predict": 6, "seed": number},
            "keep_alive": (0, "5s")[number % 7 > 0],
        }
        with httpx.Client(base_url=url, trust_env=False, timeout=300) as mine:
            with mine.stream("POST", "/api/chat", json=body) as answer:
                if answer.status_code != 200:
                    errors.append(answer.read().decode())
                    return
                lines = answer.iter_lines()
                first = json.loads(next(lines))
                if number % 3 == 0:
                    return  # leaves
                found = [first, *map(json.loads, lines)]
            if not found[-1].get("done") or any("error" in line for line in found):
                errors.append(str(found[-1]))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(30)))
    assert not errors
    with httpx.Client(base_url=url, trust_env=False, timeout=300) as mine:
        for model in ("cheerful", "tiny", "thinker"):
            assert mine.post("/api/generate", json={"model": model, "keep_alive": 0}).json()["done_reason"] == "unload"
        until = time.monotonic() + 60
        while mine.get("/api/ps").json()["models"]:
            assert time.monotonic() < until
            time.sleep(0.1)


# ---- other clients ----


def test_openai_client(url: str, client: Any) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as asked:
        check_openai(asked, client, openai)


def check_openai(asked: Any, client: Any, openai: Any) -> None:
    for model in ("cheerful", "templated"):
        wanted = client.chat(model, CHAT, options={"num_predict": 10}).message.content
        whole = asked.chat.completions.create(model=model, messages=CHAT, max_tokens=10)
        assert whole.choices[0].message.content == wanted and whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 10 and whole.model == model
        chunks = list(asked.chat.completions.create(model=model, messages=CHAT, max_tokens=10, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    steered = asked.chat.completions.create(model="plain", messages=CHAT, max_tokens=10, extra_body={"steering": "mood:0.8"})
    assert steered.choices[0].message.content == client.chat("cheerful", CHAT, options={"num_predict": 10}).message.content
    whole = asked.completions.create(model="plain", prompt="Hi", max_tokens=5)
    assert whole.choices[0].text == client.generate("plain", "Hi", options={"num_predict": 5}).response
    chunks = list(asked.completions.create(model="plain", prompt="Hi", max_tokens=5, stream=True))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError, match="character"):
        asked.chat.completions.create(model="plain", messages=CHAT, extra_body={"steering": "mood:"})
    with pytest.raises(openai.NotFoundError):
        asked.chat.completions.create(model="nosuch", messages=CHAT)
    assert asked.responses.create(model="cheerful", input="Hi", max_output_tokens=5).output_text
    assert "cheerful:latest" in [m.id for m in asked.models.list()]


def test_npm_client(url: str, client: Any, tmp_path: Path) -> None:
    modules = os.environ.get("STEER_TEST_NODE_MODULES")
    if not modules or shutil.which("node") is None:
        pytest.skip("STEER_TEST_NODE_MODULES names no node_modules with the npm package ollama")
    script = tmp_path / "ask.mjs"
    script.write_text(
        f"import {{ Ollama }} from {json.dumps(str(Path(modules) / 'ollama' / 'dist' / 'index.mjs'))}\n"
        f"const o = new Ollama({{ host: {json.dumps(url)} }})\n"
        f"const messages = {json.dumps(CHAT)}\n"
        "const whole = await o.chat({ model: 'cheerful', messages, options: { num_predict: 10 } })\n"
        "let text = ''\n"
        "for await (const p of await o.chat({ model: 'plain', messages, stream: true, "
        "options: { num_predict: 10, steering: 'mood:0.8' } })) text += p.message.content\n"
        "let error = ''\n"
        "try { await o.generate({ model: 'plain', prompt: 'x', options: { steering: 'mood:' } }) }\n"
        "catch (e) { error = e.message }\n"
        "const ps = (await o.ps()).models.map(m => m.name)\n"
        "const show = (await o.show({ model: 'cheerful' })).parameters\n"
        "console.log(JSON.stringify({ whole: whole.message.content, text, error, ps, show }))\n"
    )
    done = subprocess.run(["node", str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wanted = client.chat("cheerful", CHAT, options={"num_predict": 10}).message.content
    assert found["whole"] == found["text"] == wanted
    assert "character 6" in found["error"] and "cheerful:latest" in found["ps"] and "mood:0.8" in found["show"]


def test_the_python_client_manages_models(client: Any, library: Path) -> None:
    client.create("made", from_="cheerful", parameters={"steering": "+ mood:-1.6"}, system="S")
    assert 'steering                       "mood:0.8 + mood:-1.6"' in client.show("made").parameters
    client.copy("made", "made-too")
    assert {"made:latest", "made-too:latest"} <= {m.model for m in client.list().models}
    assert client.chat("made-too", CHAT, options={"num_predict": 2}).done
    client.delete("made")
    client.delete("made-too")
    with pytest.raises(Exception, match="no vector 'nosuch'"):
        client.create("made", from_="cheerful", parameters={"steering": "nosuch"})
    assert "made:latest" not in {m.model for m in client.list().models}


def test_a_carried_vector(client: Any, http: httpx.Client, folder: Path) -> None:
    from base64 import b64encode

    from steer_plugins_ollama.creating import vector_bytes

    identity = identity_of_gguf(folder / "tiny.gguf")
    direction = np.ones(identity.n_embd, np.float32) / np.sqrt(identity.n_embd)
    vector = SteeringVector(
        "own", {(1, "resid_post"): direction}, {(1, "resid_post"): 50.0}, identity=identity, default_scope="all"
    )
    body = {"model": "carrier", "from": "tiny", "parameters": {"steering": "own"}, "stream": False}
    body["vectors"] = {"own": b64encode(vector_bytes(vector)).decode()}
    assert http.post("/api/create", json=body).json() == {"status": "success"}
    options = {"num_predict": 8, "temperature": 0}
    assert (
        client.chat("carrier", CHAT, options=options).message.content
        != client.chat("tiny", CHAT, options=options).message.content
    )
    assert http.post("/api/chat", json={"model": "tiny", "messages": CHAT, "options": {"steering": "own"}}).status_code == 400


def test_port_in_use(url: str, folder: Path) -> None:
    port = url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "steer_plugins_ollama", "serve", "--port", port, "--folder", str(folder)]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "integrations" / "ollama")])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.returncode == 1 and f"port {port}" in done.stderr and done.stderr.count("\n") == 1
