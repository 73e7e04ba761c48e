"""``/api/chat`` and ``/api/generate``: a request for text that the sidecar answers, streamed or whole."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from . import checks, expression, generate, llama, options
from .bodies import read_body
from .chat import chat as chat_reply
from .daemon import Forwarded
from .job import Job
from .llama import Piece
from .model import STEERING, Model, rfc3339
from .service import Service
from .streams import Streamed, Whole, line


def now() -> str:
    """The time as Ollama writes it."""
    return rfc3339(time.time())


def durations(started: float, loaded: float, end: llama.End) -> dict[str, int]:
    """Ollama's counts and times, nanoseconds."""
    return {
        "total_duration": int((time.monotonic() - started) * 1e9),
        "load_duration": int((loaded - started) * 1e9),
        "prompt_eval_count": end.n_prompt,
        "prompt_eval_duration": int(end.prompt_ms * 1e6),
        "eval_count": end.n_reply,
        "eval_duration": int(end.reply_ms * 1e6),
    }


@dataclass
class RequestCall:
    """A request for text that the sidecar answers."""

    service: Service
    model: Model
    body: dict[str, Any]
    options: dict[str, Any]
    terms: expression.Terms | None
    keep: float
    chat: bool

    @property
    def name(self) -> str:
        return str(self.body.get("model") or self.body.get("name"))

    @contextlib.asynccontextmanager
    async def job(self) -> AsyncGenerator[Job, None]:
        """The process, loaded, and what is asked of it."""
        load = options.load_options(self.options, self.service.environ, self.model.facts.number("context_length"))
        async with self.service.pool.use(self.model, load, self.keep) as runner:
            think = checks.checked_think(self.body.get("think"), self.model, runner)
            yield Job(self.service.pool, runner, self.model, self.body, self.options, self.terms, think)

    def head(self) -> dict[str, Any]:
        return {"model": self.name, "created_at": now()}

    def part(self, piece: Piece) -> dict[str, Any]:
        """A reply's line that is not the last."""
        if not self.chat:
            found = {**self.head(), "response": piece.content}
            if piece.thinking:
                found["thinking"] = piece.thinking
        else:
            message: dict[str, Any] = {"role": "assistant", "content": piece.content}
            if piece.thinking:
                message["thinking"] = piece.thinking
            if piece.tool_calls:
                message["tool_calls"] = piece.tool_calls
            found = {**self.head(), "message": message}
        found["done"] = False
        if piece.logprobs:
            found["logprobs"] = piece.logprobs
        return found

    def ended(self, reason: str) -> dict[str, Any]:
        """The last line, without its counts."""
        empty: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if self.chat else {"response": ""}
        return {**self.head(), **empty, "done": True, "done_reason": reason}

    async def pieces(self) -> AsyncGenerator[tuple[Piece, dict[str, Any] | None], None]:
        """Pieces of the reply; with the last one come the counts of the last line."""
        started = time.monotonic()
        told, tokens, ended = generate.Generated(), [], False
        async with self.job() as job:
            loaded = time.monotonic()
            stream = chat_reply(job) if self.chat else generate.generate(job, told)
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    tokens += piece.tokens
                    counts = None
                    if piece.end is not None:
                        ended = True
                        counts = durations(started, loaded, piece.end)
                        if told.known:
                            counts["context"] = await generate.context_of(job, told, tokens)  # type: ignore[assignment]
                    yield piece, counts
        if not ended:
            raise llama.ServerGone("the model runner ended its answer too early: see the sidecar's log")

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """The streamed answer."""
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece, counts in pieces:
                if piece.content or piece.thinking or piece.tool_calls or piece.logprobs:
                    yield line(self.part(piece))
                if piece.end is not None:
                    yield line({**self.ended(piece.end.reason), **(counts or {})})

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        total = Piece()
        counts: dict[str, Any] = {}
        reason = "stop"
        texts, thoughts = [], []
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece, found in pieces:
                texts.append(piece.content)
                thoughts.append(piece.thinking)
                total.tool_calls += piece.tool_calls
                total.logprobs += piece.logprobs
                if piece.end is not None:
                    reason, counts = piece.end.reason, found or {}
        total.content, total.thinking = "".join(texts), "".join(thoughts)
        return {**self.part(total), "done": True, "done_reason": reason, **counts}

    async def load(self) -> dict[str, Any]:
        """An empty request: only load the model, and check that its steering can be had."""
        async with self.job() as job:
            await job.fields()
        return self.ended("load")

    async def unload(self) -> dict[str, Any]:
        """An empty request with ``keep_alive`` 0."""
        await self.service.pool.unload(self.model)
        return self.ended("unload")


def make_call(service: Service, model: Model, body: dict[str, Any], *, chat: bool) -> RequestCall:
    """Raises SteerError for a request that cannot be understood."""
    given = options.checked(body.get("options"))
    return RequestCall(
        service=service,
        model=model,
        body=body,
        options=options.merged(model.parameters, given),
        terms=expression.of_request(steering_in(body), model.terms),
        keep=options.keep_alive(body.get("keep_alive"), service.environ),
        chat=chat,
    )


def steering_in(body: Mapping[str, Any]) -> Any:
    """The steering that a request brings, wherever it is; None if it brings none."""
    given = body.get("options")
    return body[STEERING] if body.get(STEERING) is not None else given.get(STEERING) if isinstance(given, dict) else None


async def reply(request: Request) -> Response:
    """``POST /api/chat`` and ``/api/generate``."""
    service: Service = request.app.state.service
    chat = request.url.path.endswith("chat")
    body = await read_body(request)
    model = await service.mine(body, steering_in(body))
    if model is None:
        assert service.daemon is not None
        return Forwarded(service.daemon, request, body)
    call = make_call(service, model, body, chat=chat)
    if not body.get("messages" if chat else "prompt"):
        if call.keep == 0 and body.get("keep_alive") is not None:
            return Whole(call.unload())
        return Whole(call.load())
    if body.get("stream", True) is False:
        return Whole(call.whole())
    return Streamed(call.lines())
