"""What a steering llama-server is asked, and what it answers: its event streams as pieces of text."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from .bodies import dumps
from .errors import ApiError, BadRequest

MAX_PART = 64 << 20
"""Bytes of one event of an answer."""

_JSON = {"Content-Type": "application/json"}


class TooLong(BadRequest):
    """The prompt does not fit the context (both in tokens)."""

    def __init__(self, message: str, n_prompt: int, n_ctx: int) -> None:
        super().__init__(message)
        self.n_prompt, self.n_ctx = n_prompt, n_ctx


class ServerGone(ApiError):
    """The llama-server ended or hung up."""


@dataclass
class Piece:
    """A part of a reply; the last one has ``end``."""

    content: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: End | None = None


@dataclass
class End:
    """How a reply ended: ``reason`` is stop or length; times in ms; ``word``: the stop text that ended it, if one did."""

    reason: str
    n_prompt: int = 0
    prompt_ms: float = 0.0
    n_reply: int = 0
    reply_ms: float = 0.0
    word: str = ""


class LlamaServer:
    """A steering llama-server of this machine. Closing what its methods iterate over cancels the request.

    Args:
        url: where it is.
        key: what it was started with as its API key.

    Raises:
        BadRequest, TooLong, ServerGone: by all methods, also in the middle of a stream.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,
            timeout=httpx.Timeout(None, connect=10.0),  # a model takes its time
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a route answers."""
        try:
            response = await self._http.post(self.url + path, content=dumps(body), headers=_JSON)
            if response.status_code != 200:
                raise refusal(response.status_code, response.content)
            return response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise gone(error) from None

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """The parts of a streamed answer as they come."""
        headers = {**_JSON, "Connection": "close"}  # llama-server hangs up after a stream anyway
        try:
            async with self._http.stream(
                "POST", self.url + path, content=dumps({**body, "stream": True}), headers=headers
            ) as answer:
                if answer.status_code != 200:
                    raise refusal(answer.status_code, await answer.aread())
                async for part in answer.aiter_raw():
                    yield part
        except httpx.HTTPError as error:
            raise gone(error) from None

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed answer."""
        buffer = b""
        async with contextlib.aclosing(self.stream(path, body)) as parts:
            async for part in parts:
                *whole, buffer = (buffer + part).split(b"\n\n")
                if len(buffer) > MAX_PART:
                    raise gone(ValueError("an event is too long"))
                for block in whole:
                    try:
                        event = _event(block)
                    except ValueError as error:
                        raise gone(error) from None
                    if event is not None:
                        yield event

    async def complete(
        self, body: Mapping[str, Any], *, tags: tuple[str, str] | None, thinking: bool = False, path: str = "/completion"
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of a completion; text between ``tags`` is thinking. ``thinking``: the prompt has opened it."""
        splitter = Splitter(*tags, inside=thinking) if tags else None
        async for event in self.events(path, body):
            piece = Piece(tokens=list(event.get("tokens") or ()))
            text = str(event.get("content") or "")
            stop = bool(event.get("stop"))
            if splitter is None:
                piece.content = text
            else:
                piece.content, piece.thinking = splitter.feed(text, last=stop)
            piece.logprobs = [_logprob(one) for one in event.get("completion_probabilities") or ()]
            if stop:
                reason = "length" if event.get("stop_type") == "limit" else "stop"
                piece.end = _end(reason, event.get("timings"), str(event.get("stopping_word") or ""))
            yield piece

    async def chat(self, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """The pieces of a chat that llama-server renders and parses itself; tool calls come whole, with the last piece."""
        calls: dict[int, dict[str, str]] = {}
        reason = "stop"
        async for event in self.events("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}):
            piece = Piece()
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                piece.content += delta.get("content") or ""
                piece.thinking += delta.get("reasoning_content") or ""
                for call in delta.get("tool_calls") or ():
                    _collect(calls, call)
                found = (choice.get("logprobs") or {}).get("content") or ()
                piece.logprobs += [_logprob(one) for one in found]
                if choice.get("finish_reason"):
                    reason = "length" if choice["finish_reason"] == "length" else "stop"
            if "timings" in event and not event.get("choices"):
                piece.tool_calls = [_tool_call(index, call) for index, call in sorted(calls.items())]
                piece.end = _end(reason, event["timings"])
            if piece.content or piece.thinking or piece.logprobs or piece.end:
                yield piece


def _event(block: bytes) -> dict[str, Any] | None:
    if block.startswith(b"error:"):
        raise refusal(500, block[6:].strip())
    if not block.startswith(b"data: ") or block == b"data: [DONE]":
        return None
    event = json.loads(block[6:])
    if isinstance(event, dict) and "error" in event:
        raise refusal(500, block[6:])
    return event if isinstance(event, dict) else None


def gone(error: Exception) -> ServerGone:
    """The sentence for a broken connection."""
    return ServerGone(f"the model runner has stopped unexpectedly ({type(error).__name__}): see the sidecar's log")


def refusal(status: int, raw: bytes) -> ApiError:
    """The error that an answer means."""
    try:
        error = json.loads(raw)
        error = error.get("error", error)
        message = str(error["message"]) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        error, message = {}, raw.decode(errors="replace")[:300] or f"status {status}"
    message = " ".join(message.split())
    if isinstance(error, dict) and error.get("type") == "exceed_context_size_error":
        return TooLong(message, int(error.get("n_prompt_tokens") or 0), int(error.get("n_ctx") or 0))
    code = error.get("code") if isinstance(error, dict) else None
    if status < 500 or (isinstance(code, int) and 400 <= code < 500):
        return BadRequest(message)
    return ApiError(message)


class Splitter:
    """Parts a reply into answer and thinking by its tags, which may arrive in pieces. Thinking comes first or not at all."""

    def __init__(self, opening: str, closing: str, *, inside: bool = False) -> None:
        self._opening, self._closing = opening.strip(), closing.strip()
        self._state = "thinking" if inside else "before"
        self._held = ""
        self._fresh = inside  # white space after a tag belongs to it

    def feed(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Answer and thinking of the next text; what may be the beginning of a tag waits for more."""
        held, thought = self._held + text, ""
        self._held = ""
        if self._state == "before":
            start = held.lstrip()
            if start.startswith(self._opening):
                self._state, self._fresh, held = "thinking", True, start[len(self._opening) :]
            elif self._opening.startswith(start) and not last:
                self._held = held
                return "", ""
            else:
                self._state = "answer"
        if self._state == "thinking":
            thought, tag, held = held.partition(self._closing)
            if tag:
                thought = self._trim(thought)
                self._state, self._fresh = "answer", True
            else:
                keep = 0 if last else _overlap(thought, self._closing)
                self._held = thought[len(thought) - keep :]
                return "", self._trim(thought[: len(thought) - keep])
        return self._trim(held), thought

    def _trim(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return text


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may begin ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)


def _logprob(one: Mapping[str, Any]) -> dict[str, Any]:
    """Ollama's entry from llama-server's."""
    entry = {key: one[key] for key in ("token", "logprob", "bytes") if key in one}
    top = [{key: t[key] for key in ("token", "logprob", "bytes") if key in t} for t in one.get("top_logprobs") or ()]
    return {**entry, "top_logprobs": top} if top else entry


def _end(reason: str, timings: Any, word: str = "") -> End:
    t = timings if isinstance(timings, Mapping) else {}
    return End(
        reason,
        n_prompt=int(t.get("prompt_n") or 0) + int(t.get("cache_n") or 0),
        prompt_ms=float(t.get("prompt_ms") or 0.0),
        n_reply=int(t.get("predicted_n") or 0),
        reply_ms=float(t.get("predicted_ms") or 0.0),
        word=word,
    )


def _collect(calls: dict[int, dict[str, str]], delta: Mapping[str, Any]) -> None:
    call = calls.setdefault(int(delta.get("index") or 0), {"id": "", "name": "", "arguments": ""})
    call["id"] = delta.get("id") or call["id"]
    function = delta.get("function") or {}
    call["name"] += function.get("name") or ""
    call["arguments"] += function.get("arguments") or ""


def _tool_call(index: int, call: Mapping[str, str]) -> dict[str, Any]:
    try:
        arguments = json.loads(call["arguments"] or "{}")
    except ValueError:
        arguments = {"arguments": call["arguments"]}
    if not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    return {"id": call["id"] or f"call_{index}", "function": {"index": index, "name": call["name"], "arguments": arguments}}


_DATA_URL = re.compile(r"data:[^,]{0,100},")


def chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ollama's messages as llama-server takes them."""
    out: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for message in messages:
        role, content = message.get("role"), message.get("content") or ""
        entry: dict[str, Any] = {"role": role, "content": content}
        images = message.get("images") or []
        if images:  # whatever the picture is: llama-server looks at its bytes, but wants a kind to be named
            parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{plain_base64(i)}"}} for i in images]
            entry["content"] = [{"type": "text", "text": content}, *parts]
        if message.get("thinking"):
            entry["reasoning_content"] = message["thinking"]
        if message.get("tool_calls"):
            entry["tool_calls"] = openai_calls(message["tool_calls"])
            open_calls = [call["id"] for call in entry["tool_calls"]]
        if role == "tool":
            entry["tool_call_id"] = message.get("tool_call_id") or (open_calls.pop(0) if open_calls else "call_0")
            if message.get("tool_name"):
                entry["name"] = message["tool_name"]
        out.append(entry)
    return out


def plain_base64(image: Any) -> str:
    """The base64 text of an image without a data URL's head. Raises BadRequest."""
    if not isinstance(image, str):
        raise BadRequest("images are base64 texts")
    return _DATA_URL.sub("", image, count=1) if image.startswith("data:") else image


def openai_calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of tools as llama-server takes them: with an id, their arguments as a text of JSON."""
    return [
        {
            "id": call.get("id") or f"call_{number}",
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"].get("arguments") or {}, ensure_ascii=False),
            },
        }
        for number, call in enumerate(calls)
    ]
