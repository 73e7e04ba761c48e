"""Requests that Ollama takes, on a scripted llama-server: what that is asked, and what it must never be asked."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from steer_plugins_ollama import options
from steer_plugins_ollama import pool as pools
from steer_plugins_ollama.folder import FolderStore
from steer_plugins_ollama.model import knows_tools, thinks
from steer_plugins_ollama.pool import Pool
from steer_plugins_ollama.service import Service

from steer_plugins import Library, testing

from .ollama_standins import StandInLlama, StandInProcess, last_said, running, said, send_chunk, send_json, start_chunks

CHAT = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}}
TEMPLATE = "{{ range .Messages }}[{{ .Role }}]{{ .Content }}{{ end }}<think>\n"
TIMINGS = {"prompt_n": 5, "cache_n": 2, "prompt_ms": 1.5, "predicted_n": 3, "predicted_ms": 2.5}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write("llama", tmp_path_factory.mktemp("m") / "tiny.gguf")[0]


class World:
    """A sidecar on a folder with ``one`` (the GGUF's own template) and ``own`` (a TEMPLATE), and the llama-server behind it."""

    def __init__(self, client: httpx.Client, llama: StandInLlama, root: Path) -> None:
        self.client, self.llama, self.root = client, llama, root
        llama.events = [said(content="Yes."), said(finish="stop"), last_said()]

    def complete(self, *replies: list[dict[str, Any]]) -> None:
        """Script ``/completion``: the events of one request after the other."""
        left = list(replies)

        def answer(handler: Any, body: bytes) -> None:
            start_chunks(handler, "text/event-stream")
            for event in left.pop(0):
                send_chunk(handler, b"data: " + json.dumps(event).encode() + b"\n\n")
            send_chunk(handler, b"")

        self.llama.answers[("POST", "/completion")] = answer

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.client.post(path, json={"model": "one", "stream": False, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def refused(self, path: str, **body: Any) -> str:
        for stream in (True, False):
            answer = self.client.post(path, json={"model": "one", **body, "stream": stream})
            assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        return str(error if isinstance(error, str) else error["message"])


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    llama = StandInLlama(**getattr(request, "param", {}))
    monkeypatch.setattr(pools, "ServerProcess", StandInProcess(llama))
    root = tmp_path / "folder"
    root.mkdir()
    (root / "one.gguf").write_bytes(gguf.read_bytes())
    (root / "own.modelfile").write_text(
        'FROM one\nTEMPLATE """{{ range .Messages }}[{{ .Role }}]{{ .Content }}{{ end }}<think>\n"""'
    )
    library = Library(tmp_path / "library")
    with running(
        lambda: Service(FolderStore(root), Pool(binary=gguf, library=library, environ={}), library, environ={})
    ) as found:
        yield World(found[0], llama, root)
    llama.close()


thinks_too = pytest.mark.parametrize("world", [{"think": True}], indirect=True)


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"content": text, "tokens": [len(text)], "stop": False, **more}


def last(text: str = "", kind: str = "eos", word: str = "", **timings: Any) -> dict[str, Any]:
    return part(text, stop=True, stop_type=kind, stopping_word=word, timings={**TIMINGS, **timings})


# ---- a format, and a prompt that leaves thinking open ----


@thinks_too
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_format_binds_the_answer_and_not_the_thoughts(world: World, path: str, stream: bool) -> None:
    """A grammar from the first token on would have the JSON be the thoughts, and the answer empty."""
    world.complete([part("\nLet "), part("me."), last(word="</think>", kind="word")], [part('{"a": '), part("true}"), last()])
    body = {"model": "own", "messages": CHAT, "prompt": "hi", "stream": stream, "options": {"num_predict": 20, "stop": ["END"]}}
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    wanted = {"response_format": form, "max_tokens": 20, "stop": ["END"]} if path.startswith("/v1") else {"format": SCHEMA}
    answer = world.client.post(path, json={**body, **wanted})
    assert answer.status_code == 200
    thinking, content = "", ""
    for line in answer.text.replace("data: ", "").splitlines():
        if not line or line == "[DONE]":
            continue
        found = json.loads(line)
        found = (found["choices"][0].get("delta") or found["choices"][0].get("message") or {}) if "choices" in found else found
        message = found.get("message", found)
        thinking += message.get("thinking") or message.get("reasoning_content") or ""
        content += message.get("content") or message.get("response") or ""
    assert (thinking, content) == ("Let me.", '{"a": true}')
    first, second = world.llama.bodies("/completion")
    assert "json_schema" not in first and first["stop"] == ["END", "</think>"] and first["n_predict"] == 10
    assert second["json_schema"] == SCHEMA and second["stop"] == ["END"] and second["n_predict"] == 17
    assert first["prompt"].endswith("<think>\n") and second["prompt"] == first["prompt"] + "\nLet me.</think>\n\n"


@thinks_too
def test_counts_and_context_of_thoughts_and_answer(world: World) -> None:
    world.complete([part("Hm"), last(word="</think>", kind="word")], [part("{}"), last(prompt_n=1, predicted_n=4)])
    found = world.post("/api/generate", model="own", prompt="hi", format="json")
    assert (found["thinking"], found["response"], found["done_reason"]) == ("Hm", "{}", "stop")
    assert (found["prompt_eval_count"], found["eval_count"]) == (7, 7)
    asked = [body["content"] for body in world.llama.bodies("/tokenize")]
    assert asked[0] == "Hm</think>\n\n" and found["context"] == [1, 2, 1, 2, 2, 0]  # prompt, thoughts, answer


@thinks_too
@pytest.mark.parametrize("kind", ["limit", "eos"])
def test_thoughts_that_do_not_end(world: World, kind: str) -> None:
    """The answer follows all the same: whoever asks for JSON has no use for none."""
    world.complete([part("Hm"), last(kind=kind)], [part("{}"), last()])
    found = world.post("/api/chat", model="own", messages=CHAT, format="json")
    assert found["message"] == {"role": "assistant", "content": "{}", "thinking": "Hm"} and found["done_reason"] == "stop"
    first, second = world.llama.bodies("/completion")
    assert first["n_predict"] == 2048 and second["n_predict"] == -1 and second["prompt"].endswith("Hm</think>\n\n")


@thinks_too
def test_a_stop_text_among_the_thoughts_is_the_end(world: World) -> None:
    world.complete([part("Hm"), last(kind="word", word="END")])
    found = world.post("/api/chat", model="own", messages=CHAT, format="json", options={"stop": ["END"]})
    assert found["message"] == {"role": "assistant", "content": "", "thinking": "Hm"} and found["done_reason"] == "stop"


@thinks_too
def test_thoughts_that_take_all_the_tokens(world: World) -> None:
    world.complete([part("Hm"), last(word="</think>", kind="word")])
    found = world.post("/api/chat", model="own", messages=CHAT, format="json", options={"num_predict": 3})
    assert found["message"]["thinking"] == "Hm" and found["done_reason"] == "length"


@thinks_too
def test_thoughts_that_fill_the_context(world: World) -> None:
    full = {"code": 400, "type": "exceed_context_size_error", "message": "too long", "n_prompt_tokens": 100, "n_ctx": 40}
    world.complete([part("Hm"), last(kind="limit")], [{"error": full}])
    found = world.post("/api/chat", model="own", messages=CHAT, format="json")
    assert found["message"]["thinking"] == "Hm" and found["done_reason"] == "length"


@thinks_too
def test_without_thinking_a_format_binds_from_the_first_token(world: World) -> None:
    for body in ({"think": False}, {"think": True, "template": "{{ .Prompt }}"}, {"raw": True}):
        world.complete([part("{}"), last()])
        assert world.post("/api/generate", model="own", prompt="hi", format="json", **body)["response"] == "{}"
        assert world.llama.bodies("/completion")[-1]["json_schema"] == {"type": "object"}


# ---- options ----


def float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


@pytest.mark.parametrize("name", ["num_predict", "num_keep", "repeat_last_n", "top_k", "seed"])
@pytest.mark.parametrize("value", [0, -1, -2, -5, 1, 2**31, 2**40, -(2**40), 10**200])
def test_every_whole_number_is_one_that_llama_server_takes(name: str, value: int) -> None:
    fields = options.sampling(options.merged({}, options.checked({name: value})), n_ctx=512)
    low, high = {
        **{"num_predict": (-1, 2**31 - 1), "num_keep": (-1, 2**31 - 1), "repeat_last_n": (0, 512)},
        **{"top_k": (-(2**31), 2**31 - 1), "seed": (-1, 2**31 - 1)},
    }[name]
    assert low <= fields[{"num_predict": "n_predict", "num_keep": "n_keep"}.get(name, name)] <= high


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"num_predict": 0}, "n_predict", -1),
        ({"num_predict": -2}, "n_predict", -1),
        ({"num_predict": 1}, "n_predict", 1),
        ({"num_keep": -5}, "n_keep", -1),
        ({"repeat_last_n": -1}, "repeat_last_n", 512),
        ({"repeat_last_n": -7}, "repeat_last_n", 512),
        ({"repeat_last_n": 0}, "repeat_last_n", 0),
        ({"repeat_last_n": 2_000_000_000}, "repeat_last_n", 512),
        ({"repeat_penalty": 0}, "repeat_penalty", 1.0),
        ({"repeat_penalty": -1.5}, "repeat_penalty", 1.0),
        ({"repeat_penalty": 1e-300}, "repeat_penalty", 1.0),
        ({"repeat_penalty": 1.3}, "repeat_penalty", 1.3),
        ({"seed": 7}, "seed", 7),
        ({"seed": 0}, "seed", 0),
    ],
)
def test_options_mean_what_they_mean_in_ollama(given: dict[str, Any], field: str, value: float) -> None:
    found = options.sampling(options.merged({}, options.checked(given)), n_ctx=512)[field]
    assert found == value and float32(found) == float32(value)
    modelfile = options.sampling(options.merged(given, {}), n_ctx=512)
    assert modelfile[field] == value


def test_no_tokens_means_no_limit_on_every_route(world: World) -> None:
    (world.root / "zero.modelfile").write_text("FROM one\nPARAMETER num_predict 0\nPARAMETER repeat_last_n -1\n")
    for path, body in (
        ("/api/chat", {"options": {"num_predict": 0}}),
        ("/api/chat", {"model": "zero"}),
        ("/v1/chat/completions", {"max_tokens": 0, "stream": True}),
        ("/v1/chat/completions", {"max_completion_tokens": 0, "stream": True}),
    ):
        world.client.post(path, json={"model": "one", "messages": CHAT, "stream": False, **body}).raise_for_status()
        asked = world.llama.bodies("/v1/chat/completions")[-1]
        assert asked["n_predict"] == -1 and "max_tokens" not in asked
    assert world.llama.bodies("/v1/chat/completions")[1]["repeat_last_n"] == 4096


# ---- roles ----


def test_any_role_reaches_the_template(world: World) -> None:
    messages = [{"role": role, "content": "thinking"} for role in ("System", "control", "developer", "document", "USER")]
    world.post("/api/chat", messages=messages)
    roles = ["system", "control", "developer", "document", "user"]
    assert [m["role"] for m in world.llama.bodies("/v1/chat/completions")[-1]["messages"]] == roles
    world.complete([part("Yes."), last()])
    world.post("/api/chat", model="own", messages=messages)
    assert world.llama.bodies("/completion")[-1]["prompt"] == "".join(f"[{role}]thinking" for role in roles) + "<think>\n"
    world.client.post(
        "/v1/chat/completions", json={"model": "one", "messages": [{"role": "User", "content": "x"}], "stream": True}
    )
    assert world.llama.bodies("/v1/chat/completions")[-1]["messages"][0]["role"] == "user"


def test_a_system_message_in_any_case_takes_the_models_place(world: World) -> None:
    (world.root / "calm.modelfile").write_text("FROM one\nSYSTEM Hush.\n")
    world.post("/api/chat", model="calm", messages=[{"role": "SYSTEM", "content": "Sing."}, *CHAT])
    assert [m["content"] for m in world.llama.bodies("/v1/chat/completions")[-1]["messages"]] == ["Sing.", "hi"]


@pytest.mark.parametrize("message", [{"content": "hi"}, {"role": "", "content": "hi"}, {"role": 3}, {"role": None}, "hi", None])
def test_messages_without_a_role(world: World, message: Any) -> None:
    assert world.refused("/api/chat", messages=[message]) == "message 1 has no role"
    assert world.refused("/v1/chat/completions", messages=[message]) == "message 1 has no role"


# ---- thinking ----


@thinks_too
def test_the_switches_of_all_templates(world: World) -> None:
    """``thinking`` is that of Granite 3 and DeepSeek V3.1, ``enable_thinking`` that of Qwen 3."""
    for think, level in ((True, {}), (False, {}), ("high", {"reasoning_effort": "high"})):
        wanted = {"thinking": bool(think), "enable_thinking": bool(think), **level}
        world.post("/api/chat", messages=CHAT, think=think)
        assert world.llama.bodies("/v1/chat/completions")[-1]["chat_template_kwargs"] == wanted
        world.complete([part("Yes."), last()])
        world.post("/api/generate", prompt="hi", think=think)
        assert world.llama.bodies("/apply-template")[-1]["chat_template_kwargs"] == wanted
    for effort, think in (("none", False), ("low", True)):
        body = {"model": "one", "messages": CHAT, "reasoning_effort": effort, "stream": True}
        world.client.post("/v1/chat/completions", json=body).raise_for_status()
        assert world.llama.bodies("/v1/chat/completions")[-1]["chat_template_kwargs"]["thinking"] is think


@pytest.mark.parametrize(
    ("jinja", "found"),
    [
        ("{% if thinking %}Think.{% endif %}", True),
        ("{%- elif thinking and x %}", True),
        ("{%- if not thinking %}", True),
        ("{% if enable_thinking is defined %}", True),
        ("{{ messages }}", False),
        ("{# if thinking: <think> #}{{ messages }}", False),
        ("I was thinking.", False),
    ],
)
def test_templates_that_know_of_thinking(jinja: str, found: bool) -> None:
    assert thinks(jinja) is found


# ---- tools ----


@pytest.mark.parametrize("world", [{"tools": False}], indirect=True)
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_tools_that_the_template_does_not_know(world: World, path: str) -> None:
    """They were left out of the prompt without a word."""
    for model in ("one", "own"):
        said = world.refused(path, model=model, messages=CHAT, input="hi", tools=[TOOL])
        assert said == f'"{model}:latest" does not support tools'
    assert not world.llama.bodies(path)
    assert world.client.post("/api/chat", json={"model": "one", "messages": CHAT, "tools": []}).status_code == 200


@pytest.mark.parametrize(
    ("tools", "part"),
    [
        ([{"function": {"name": "f"}}], 'tool 1 has no type: write "type": "function"'),
        ([TOOL, {"type": 3, "function": {"name": "f"}}], "tool 2 has no type"),
        ([{"type": "function"}], "tool 1 needs a function with a name"),
        ([{"type": "function", "function": {}}], "tool 1 needs a function with a name"),
        ([{"type": "function", "function": "f"}], "tool 1 needs a function with a name"),
        ([{"type": "function", "function": {"name": "f", "parameters": [1]}}], "the parameters of tool 1"),
        (["f"], "tools must be a list of objects"),
        ({"f": 1}, "tools must be a list of objects"),
    ],
)
def test_tools_that_are_none(world: World, tools: Any, part: str) -> None:
    assert part in world.refused("/api/chat", messages=CHAT, tools=tools)
    assert part in world.refused("/v1/chat/completions", messages=CHAT, tools=tools)


@pytest.mark.parametrize("arguments", ["no json", "[1]", "3", [1], 3, '{"a": ', "[" * 100_000])
def test_arguments_that_are_no_object(world: World, arguments: Any) -> None:
    messages = [*CHAT, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    for path in ("/api/chat", "/v1/chat/completions"):
        assert world.refused(path, messages=messages) == "the arguments of 'f' in message 2 must be a JSON object"


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_arguments_as_an_object_or_its_text(world: World, arguments: Any) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    world.post("/api/chat", messages=messages)
    world.client.post("/v1/chat/completions", json={"model": "one", "messages": messages, "stream": True}).raise_for_status()
    for body in world.llama.bodies("/v1/chat/completions"):
        assert body["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}


def test_templates_that_know_tools() -> None:
    assert knows_tools("{% if tools %}") and knows_tools("{{ tools | tojson }}")
    assert not knows_tools("{{ is_tool }}") and not knows_tools("{# tools #}{{ messages }}") and not knows_tools("toolset")


# ---- a conversation that is too long ----


def too_long(handler: Any, body: bytes) -> None:
    error = {"code": 400, "type": "exceed_context_size_error", "message": "too long", "n_prompt_tokens": 100, "n_ctx": 40}
    send_json(handler, {"error": error}, 400)


@pytest.mark.parametrize("model", ["one", "own"])
def test_one_message_that_is_longer_than_the_context(world: World, model: str) -> None:
    """It loses its middle, as a prompt of ``/api/generate`` does."""
    asked = []

    def complete(handler: Any, body: bytes) -> None:
        prompt = json.loads(body)["prompt"]
        asked.append(prompt)
        if isinstance(prompt, str):
            return too_long(handler, body)
        start_chunks(handler, "text/event-stream")
        send_chunk(handler, b"data: " + json.dumps(last("Yes.")).encode() + b"\n\n")
        return send_chunk(handler, b"")

    world.llama.answers[("POST", "/completion")] = complete
    world.llama.answers[("POST", "/v1/chat/completions")] = too_long
    world.llama.answers[("POST", "/tokenize")] = lambda h, b: send_json(h, {"tokens": list(range(100))})
    body = {"model": model, "messages": [{"role": "system", "content": "x"}, *CHAT], "think": False} if model == "own" else {}
    found = world.post("/api/chat", **{"messages": CHAT, "options": {"num_keep": 4}, **body})
    assert found["message"]["content"] == "Yes."
    assert asked[-1] == [*range(4), *range(69, 100)]
    world.post("/api/chat", messages=CHAT, options={"num_keep": -1})
    assert asked[-1] == [*range(20), *range(85, 100)]
    assert "too long" in world.refused("/api/chat", messages=CHAT, truncate=False)
    assert "too long" in world.refused("/api/chat", messages=CHAT, tools=[TOOL])
