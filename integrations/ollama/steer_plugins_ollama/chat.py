"""The reply to ``/api/chat``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from . import gotemplate, llama, options
from .checks import checked_messages, checked_tools, json_schema, logprob_count
from .complete import complete, cut_to_fit
from .job import Job, thinking_kwargs, with_top
from .llama import Piece, TooLong
from .log import tell_once
from .model import Model


def conversation(model: Model, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the model's own history and system prompt before them."""
    system = [{"role": "system", "content": model.system}] if model.system and messages[0].get("role") != "system" else []
    return [*system, *model.messages, *messages]


async def chat(job: Job) -> AsyncGenerator[Piece, None]:
    """The pieces of a reply. Where the context is too short, old messages are left out, and last the middle of what remains,
    unless ``truncate`` is false."""
    messages = conversation(job.model, checked_messages(job.body.get("messages")))
    tools = checked_tools(job.body.get("tools"), job.model, job.runner)
    job.check_images(messages)
    template = job.template()
    if tools is not None and template is not None:
        tell_once(f"{job.model.name}: requests with tools use the chat template of its GGUF, not its TEMPLATE")
        template = None
    while True:
        started = False
        pieces = _once(job, messages, tools, template)
        try:
            async for piece in pieces:
                started = True
                yield piece
            return
        except TooLong as error:
            if started or job.body.get("truncate") is False:
                raise
            shorter = without_oldest(messages, error.n_prompt, error.n_ctx)
            if shorter is None and (tools or any(m.get("images") for m in messages)):
                raise
        finally:
            await pieces.aclose()
        if shorter is None:
            text, _ = await job.prompt(messages, template)
            async for piece in cut_to_fit(job, text):
                yield piece
            return
        messages = shorter


async def _once(
    job: Job, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, template: gotemplate.Template | None
) -> AsyncGenerator[Piece, None]:
    if template is None:
        pieces = server_chat(job, messages, tools)
    else:
        pieces = complete(job, *await job.prompt(messages, template))
    async for piece in pieces:
        yield piece


def without_oldest(messages: list[dict[str, Any]], n_prompt: int = 0, n_ctx: int = 0) -> list[dict[str, Any]] | None:
    """The messages without the oldest that are neither system prompts nor the last; None if there are none.

    Fewer than need be, and at least one: those that make up two thirds of what is too long, as their lengths say. So a long
    conversation takes a few rounds, not one for each of its messages, and the last rounds still go one by one.
    """
    old = [at for at, message in enumerate(messages[:-1]) if message.get("role") != "system"]
    if not old:
        return None
    sizes = [len(message.get("content") or "") + 16 for message in messages]
    left = sum(sizes) * (1 - n_ctx / n_prompt) * 2 / 3 if n_prompt > n_ctx else 0.0
    dropped = {old[0]}
    left -= sizes[old[0]]
    for at in old[1:]:
        left -= sizes[at]
        if left < 0:
            break
        dropped.add(at)
    return [message for at, message in enumerate(messages) if at not in dropped]


async def server_chat(
    job: Job, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> AsyncGenerator[Piece, None]:
    """A chat that llama-server renders and parses."""
    body = {**options.sampling(job.options, job.runner.facts.n_ctx), "messages": llama.chat_messages(messages)}
    if tools:
        body["tools"] = tools
    schema = json_schema(job.body.get("format"))
    if schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    kwargs = thinking_kwargs(job.think)
    if kwargs:
        body["chat_template_kwargs"] = kwargs
    top = logprob_count(job.body)
    if top is not None:
        body.update(logprobs=True, top_logprobs=max(1, top))
    async for piece in job.steered(lambda fields: job.server.chat({**body, **fields})):
        yield with_top(piece, top)
