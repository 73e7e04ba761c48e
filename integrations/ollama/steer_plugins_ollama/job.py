"""One request for text on the process that has its model, and the prompt that its template makes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from . import gotemplate, llama
from .errors import BadRequest
from .expression import Terms
from .llama import LlamaServer, Piece
from .log import tell_once
from .model import Model
from .pool import Pool, Runner

T = TypeVar("T")


@dataclass
class Job:
    """A request, checked, on a process that has the model. ``terms``: its steering, or None."""

    pool: Pool
    runner: Runner
    model: Model
    body: Mapping[str, Any]
    options: Mapping[str, Any]
    terms: Terms | None
    think: bool | str | None = None

    @property
    def server(self) -> LlamaServer:
        return self.runner.server

    async def fields(self) -> dict[str, Any]:
        """The fields that steer the request, its vectors uploaded. ``steering`` is always said, also when empty."""
        attempts = await self.pool.attempts(self.runner, self.model, self.terms)
        return await asyncio.to_thread(next, attempts)

    async def steered(self, make: Callable[[dict[str, Any]], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """The parts of an answer to a request with steering fields; once more if the server has lost the vectors meanwhile."""
        attempts = await self.pool.attempts(self.runner, self.model, self.terms)
        refused: BadRequest | None = None
        while (fields := await asyncio.to_thread(next, attempts, None)) is not None:
            started = False
            pieces = make(fields)
            try:
                async for piece in pieces:
                    started = True
                    yield piece
                return
            except BadRequest as error:
                if started:
                    raise
                refused = error
            finally:
                await pieces.aclose()
        assert refused is not None
        raise refused

    def check_images(self, messages: list[dict[str, Any]]) -> None:
        """Raise BadRequest for pictures that the model cannot see."""
        if any(m.get("images") for m in messages) and not self.runner.vision:
            raise BadRequest(f'"{self.model.name}" does not support images: it has no projector')

    def template(self) -> gotemplate.Template | None:
        """The model's own TEMPLATE; None: the GGUF's chat template is used, which the log says once where there is a TEMPLATE."""
        if not self.model.template:
            return None if self.runner.facts.has_chat_template else parsed_template("{{ .Prompt }}")
        try:
            return parsed_template(self.model.template)
        except gotemplate.TemplateError as error:
            tell_once(f"the TEMPLATE of {self.model.name} is not understood ({error}): the chat template of its GGUF is used")
            return None

    async def prompt(self, messages: list[dict[str, Any]], template: gotemplate.Template | None) -> tuple[str, list[str]]:
        """The text of a conversation, and its images. Raises BadRequest where the template fails."""
        if template is None:
            asked = {"messages": llama.chat_messages(messages), "chat_template_kwargs": thinking_kwargs(self.think)}
            return str((await self.server.ask("/apply-template", asked))["prompt"]), []
        marker = self.runner.media_marker
        images: list[str] = []
        marked = []
        for message in messages:
            found = [llama.plain_base64(one) for one in message.get("images") or []]
            images += found
            marked.append({**message, "content": marker * len(found) + (message.get("content") or "")} if found else message)
        try:
            return template.prompt(marked, think=self.think), images
        except gotemplate.TemplateError as error:
            raise BadRequest(f"the TEMPLATE of {self.model.name} fails at {error}") from None


@functools.lru_cache(maxsize=64)
def parsed_template(text: str) -> gotemplate.Template:
    """Raises TemplateError."""
    return gotemplate.Template(text)


def thinking_kwargs(think: bool | str | None) -> dict[str, Any]:
    """The switches of chat templates: Qwen's and those like it, Granite's and DeepSeek's, gpt-oss's."""
    if think is None:
        return {}
    level = {"reasoning_effort": "high" if think == "max" else think} if isinstance(think, str) else {}
    return {"enable_thinking": bool(think), "thinking": bool(think), **level}


def with_top(piece: Piece, top: int | None) -> Piece:
    """A piece without the alternatives that nobody asked for."""
    if top == 0:
        for entry in piece.logprobs:
            entry.pop("top_logprobs", None)
    return piece
