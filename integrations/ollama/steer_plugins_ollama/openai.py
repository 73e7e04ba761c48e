"""The routes under ``/v1``: OpenAI's chat and completions, and llama-server's own ``/v1/responses`` and ``/v1/messages``.

A model whose chat template is its GGUF's is answered by llama-server as it is; a TEMPLATE of its own is rendered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from steer_plugins.errors import SteerError

from . import llama, options
from .bodies import read_body
from .calls import RequestCall, make_call, steering_in
from .checks import checked_roles, checked_tools
from .daemon import Forwarded
from .errors import BadRequest
from .job import Job, thinking_kwargs
from .log import tell_once
from .model import STEERING, Model
from .service import Service
from .streams import Streamed, Whole

#: OpenAI's names of sampling options, as Ollama's.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
    "max_output_tokens": "num_predict",
}


#: The routes that steered models are asked through.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


async def handle(request: Request) -> Response:
    """One of :data:`PATHS`."""
    service: Service = request.app.state.service
    path = request.url.path
    body = await read_body(request)
    model = await service.mine(body, steering_in(body))
    if model is None:
        assert service.daemon is not None
        return Forwarded(service.daemon, request, body)
    for key in ("options", "stream_options", "response_format"):
        if not isinstance(body.get(key) or {}, dict):
            raise BadRequest(f"{key} must be an object")
    given = {ours: body[theirs] for theirs, ours in _OPTIONS.items() if body.get(theirs) is not None}
    if path == "/v1/messages" and body.get("stop_sequences"):
        given["stop"] = body["stop_sequences"]
    call = make_call(service, model, {**body, "options": {**(body.get("options") or {}), **given}}, chat=True)
    streams = bool(body.get("stream"))
    if path == "/v1/completions":
        found = completion_body(call.body)
        call.body, call.chat = found, False
        return _own(call, body, streams, "text_completion")
    if path == "/v1/chat/completions":
        call.body["messages"] = checked_roles(body.get("messages"))
        if not call.body["messages"]:
            raise BadRequest("[] is too short - 'messages'")
        effort = call.body.get("reasoning_effort")
        if effort is not None and call.body.get("think") is None:
            call.body["think"] = False if effort == "none" else effort
        if model.template and not body.get("tools"):
            call.body = chat_body(call.body)
            return _own(call, body, streams, "chat.completion")
    needed = "input" if path == "/v1/responses" else "messages"
    if not body.get(needed):
        raise BadRequest(f"{needed} is required")
    if not isinstance(body[needed], list | str if needed == "input" else list):
        raise BadRequest(f"{needed} must be a list")
    refuse_links(body[needed])
    return _passed(call, path, streams)


_MEDIA = ("image", "image_url", "input_image", "input_audio", "input_video", "video_url")


def refuse_links(value: Any, *, media: bool = False) -> None:
    """Raise BadRequest for pictures and sounds at an address: llama-server would fetch them, from wherever a request says."""
    if isinstance(value, str) and media and value.startswith(("http", "file:")):
        raise BadRequest("images are data: URLs: nothing is fetched from elsewhere")
    if isinstance(value, list):
        for one in value:
            refuse_links(one, media=media)
    elif isinstance(value, dict):
        inside = media or value.get("type") in _MEDIA
        for one in value.values() if inside else (value.get("content"), value.get("output")):
            refuse_links(one, media=inside)


# ---- answered by llama-server ----


def _passed(call: RequestCall, path: str, streams: bool) -> Response:
    """The process's own answer, its bytes untouched."""
    if streams:
        return Streamed(_passed_bytes(call, path), media_type="text/event-stream", broken="sse", style="openai")
    return Whole(_passed_whole(call, path), style="openai")


async def _passed_whole(call: RequestCall, path: str) -> Any:
    async with call.job() as job:
        body = _server_body(call, job, path)

        async def once(fields: dict[str, Any]) -> AsyncGenerator[Any, None]:
            yield await job.server.ask(path, {**body, **fields})

        async with contextlib.aclosing(job.steered(once)) as answers:
            answer = await anext(answers)
        return {**answer, "model": call.name} if isinstance(answer, dict) else answer


async def _passed_bytes(call: RequestCall, path: str) -> AsyncGenerator[bytes, None]:
    async with call.job() as job:
        body = _server_body(call, job, path)
        async with contextlib.aclosing(job.steered(lambda fields: job.server.stream(path, {**body, **fields}))) as parts:
            async for part in parts:
                yield part


def _server_body(call: RequestCall, job: Job, path: str) -> dict[str, Any]:
    """The request with the model's options, system prompt and history in it."""
    drop = {STEERING, "options", "keep_alive", *_OPTIONS}
    body = {**options.sampling(job.options, job.runner.facts.n_ctx), **{k: v for k, v in call.body.items() if k not in drop}}
    model = job.model
    checked_tools(call.body.get("tools"), model, job.runner, functions=path == "/v1/chat/completions")
    if path == "/v1/chat/completions":
        body["messages"] = _with_model(model.system, model.messages, call.body["messages"])
        if call.body.get("think") is not None:
            body["chat_template_kwargs"] = thinking_kwargs(job.think)
    elif path == "/v1/messages":
        if model.system and not call.body.get("system"):
            body["system"] = model.system
        body["messages"] = [*_history(model), *call.body["messages"]]
        body["max_tokens"] = call.body.get("max_tokens") or 4096
    else:
        if model.system and not call.body.get("instructions"):
            body["instructions"] = model.system
        asked = call.body["input"]
        if history := _history(model):
            body["input"] = [*history, *(asked if isinstance(asked, list) else [{"role": "user", "content": asked}])]
    if model.template and path != "/v1/chat/completions":
        tell_once(f"{model.name}: {path} uses the chat template of its GGUF, not its TEMPLATE")
    return body


def _history(model: Model) -> list[dict[str, Any]]:
    """The model's MESSAGE lines, as routes take them that know no system message."""
    return [{"role": m["role"], "content": m.get("content") or ""} for m in model.messages if m.get("role") != "system"]


def _with_model(system: str, history: Any, messages: list[Any]) -> list[Any]:
    first = [{"role": "system", "content": system}] if system and messages[0].get("role") not in ("system", "developer") else []
    asked = [{**m, "tool_calls": llama.openai_calls(m["tool_calls"])} if m.get("tool_calls") else m for m in messages]
    return [*first, *llama.chat_messages(list(history)), *asked]


# ---- rendered here ----


def completion_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """``/api/generate``'s body from that of ``/v1/completions``. Raises BadRequest."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest("prompt must be a text: ask for one completion at a time")
    top = body.get("logprobs")
    wanted = isinstance(top, int) and not isinstance(top, bool)
    return {
        **{key: body.get(key) for key in ("model", "suffix", "options", STEERING) if body.get(key) is not None},
        "prompt": prompt,
        "logprobs": wanted,
        "top_logprobs": top if wanted else 0,
    }


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """``/api/chat``'s body from that of ``/v1/chat/completions``. Raises BadRequest."""
    messages = []
    for message in body["messages"]:
        content, images = _content(message.get("content"))
        role = {"developer": "system"}.get(message.get("role"), message.get("role"))
        messages.append({**message, "role": role, "content": content, "images": images})
    found: dict[str, Any] = {**body, "messages": messages}
    form = body.get("response_format") or {}
    if form.get("type") == "json_object":
        found["format"] = form.get("schema") or "json"
    elif form.get("type") == "json_schema":
        schema = form.get("json_schema") or {}
        if not isinstance(schema, dict):
            raise BadRequest("json_schema must be an object")
        found["format"] = schema.get("schema") or "json"
    return found


def _content(content: Any) -> tuple[str, list[str]]:
    if content is None or isinstance(content, str):
        return content or "", []
    texts, images = [], []
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and part.get("type") == "text":
            texts.append(str(part.get("text") or ""))
        elif isinstance(part, dict) and part.get("type") == "image_url":
            url = part.get("image_url")
            images.append(str(url.get("url") if isinstance(url, dict) else url))
        else:
            raise BadRequest("a part of a message is neither text nor image_url")
    if any(not image.startswith("data:") for image in images):
        raise BadRequest("images are data: URLs")
    return "".join(texts), images


def _own(call: RequestCall, asked: Mapping[str, Any], streams: bool, kind: str) -> Response:
    if streams:
        lines = _chunks(call, asked, kind)
        return Streamed(lines, media_type="text/event-stream", broken="sse", style="openai")
    return Whole(_one(call, kind), style="openai")


def _id(kind: str) -> str:
    return ("cmpl-" if kind == "text_completion" else "chatcmpl-") + secrets.token_hex(8)


def _usage(end: llama.End) -> dict[str, int]:
    total = end.n_prompt + end.n_reply
    return {"prompt_tokens": end.n_prompt, "completion_tokens": end.n_reply, "total_tokens": total}


async def _one(call: RequestCall, kind: str) -> dict[str, Any]:
    texts, thoughts, logprobs, end = [], [], [], llama.End("stop")
    async with contextlib.aclosing(call.pieces()) as pieces:
        async for piece, _ in pieces:
            texts.append(piece.content)
            thoughts.append(piece.thinking)
            logprobs += piece.logprobs
            end = piece.end or end
    choice: dict[str, Any] = {"index": 0, "finish_reason": end.reason, "logprobs": None}
    if kind == "text_completion":
        choice["text"] = "".join(texts)
        choice["logprobs"] = _old_logprobs(logprobs)
    else:
        choice["message"] = {"role": "assistant", "content": "".join(texts)}
        if any(thoughts):
            choice["message"]["reasoning_content"] = "".join(thoughts)
        if logprobs:
            choice["logprobs"] = {"content": logprobs}
    head = {"id": _id(kind), "object": kind, "created": int(time.time()), "model": call.name}
    return {**head, "choices": [choice], "usage": _usage(end)}


def _old_logprobs(entries: list[dict[str, Any]], offset: int = 0) -> dict[str, list[Any]] | None:
    """Log probabilities as ``/v1/completions`` has them: a list for each kind. ``offset``: characters before the first token."""
    if not entries:
        return None
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        found["tokens"].append(entry["token"])
        found["token_logprobs"].append(entry["logprob"])
        found["top_logprobs"].append({top["token"]: top["logprob"] for top in entry.get("top_logprobs") or ()})
        found["text_offset"].append(offset)
        offset += len(entry["token"])
    return found


async def _chunks(call: RequestCall, asked: Mapping[str, Any], kind: str) -> AsyncGenerator[bytes, None]:
    name = kind if kind == "text_completion" else "chat.completion.chunk"
    head = {"id": _id(kind), "object": name, "created": int(time.time()), "model": call.name}

    def chunk(choice: dict[str, Any] | None, **more: Any) -> bytes:
        choices = [] if choice is None else [{"index": 0, "finish_reason": None, **choice}]
        return b"data: " + json.dumps({**head, "choices": choices, **more}, ensure_ascii=False).encode() + b"\n\n"

    first: dict[str, Any] = {"role": "assistant"}
    offset = 0
    async with contextlib.aclosing(call.pieces()) as pieces:
        async for piece, _ in pieces:
            if piece.content or piece.thinking:
                if kind == "text_completion":
                    yield chunk({"text": piece.content, "logprobs": _old_logprobs(piece.logprobs, offset)})
                    offset += len(piece.content)
                else:
                    delta = {**first, "content": piece.content}
                    first = {}
                    if piece.thinking:
                        delta["reasoning_content"] = piece.thinking
                    extra = {"logprobs": {"content": piece.logprobs}} if piece.logprobs else {}
                    yield chunk({"delta": delta, **extra})
            if piece.end is not None:
                empty: dict[str, Any] = {"text": ""} if kind == "text_completion" else {"delta": first}
                yield chunk({**empty, "finish_reason": piece.end.reason})
                if (asked.get("stream_options") or {}).get("include_usage"):
                    yield chunk(None, usage=_usage(piece.end))
                yield b"data: [DONE]\n\n"


async def models(request: Request) -> Response:
    """``GET /v1/models`` of a folder."""
    service: Service = request.app.state.service
    wanted = request.path_params.get("model")

    def entry(name: str, modified: float) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(modified), "owned_by": "library"}

    def collect() -> Any:
        if wanted:
            model = service.store.get(wanted)
            return entry(wanted, model.modified)
        found = []
        for name in service.store.names():
            with contextlib.suppress(SteerError):
                found.append(entry(str(name), service.store.get(str(name)).modified))
        return {"object": "list", "data": found}

    return JSONResponse(await asyncio.to_thread(collect))
