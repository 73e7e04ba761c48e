"""The reply to a prompt: streamed, in a format if one is asked for, cut where it does not fit."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from . import options
from .checks import json_schema, logprob_count
from .job import Job, with_top
from .llama import End, Piece, TooLong


async def complete(
    job: Job, prompt: str, images: Sequence[str] = (), before: Sequence[int] = (), text: str | None = None
) -> AsyncGenerator[Piece, None]:
    """The pieces of a reply to a rendered prompt.

    A format binds the answer only: where the prompt leaves thinking open, the model thinks first.

    Args:
        images: base64, for the marks in the prompt.
        before: tokens in front of the prompt.
        text: what the model reads last, where that is in ``before``.
    """
    tags = (job.runner.facts.thinking or ("<think>", "</think>")) if job.think else None
    inside = tags is not None and (text or prompt).rstrip().endswith(tags[0].strip())
    schema = json_schema(job.body.get("format"))
    if schema is not None and tags is not None and inside:
        pieces = _thought_first(job, prompt, images, before, tags[1].strip(), schema)
    else:
        pieces = _once(
            job, prompt, images, before, tags=tags, thinking=inside, **({} if schema is None else {"json_schema": schema})
        )
    async for piece in pieces:
        yield piece


async def _once(
    job: Job,
    prompt: str,
    images: Sequence[str],
    before: Sequence[int],
    *,
    tags: tuple[str, str] | None = None,
    thinking: bool = False,
    **more: Any,
) -> AsyncGenerator[Piece, None]:
    """One request to the server. ``more``: further fields."""
    body: dict[str, Any] = {**options.sampling(job.options, job.runner.facts.n_ctx), "return_tokens": True, **more}
    if images:
        body["prompt"] = {"prompt_string": prompt, "multimodal_data": list(images)}
    else:
        body["prompt"] = [*before, *([prompt] if prompt else [])] if before else prompt
    top = logprob_count(job.body)
    if top is not None:
        body["n_probs"] = max(1, top)
    make = functools.partial(job.server.complete, tags=tags, thinking=thinking)
    async for piece in job.steered(lambda fields: make({**body, **fields})):
        yield with_top(piece, top)


async def _thought_first(
    job: Job, prompt: str, images: Sequence[str], before: Sequence[int], closing: str, schema: dict[str, Any]
) -> AsyncGenerator[Piece, None]:
    """Thoughts as they come, and when they end an answer in the format: two requests, as Ollama does it.

    At most half of the tokens are for the thoughts, so that there is an answer in any case.
    """
    wanted = options.sampling(job.options, job.runner.facts.n_ctx)
    limit = wanted["n_predict"]
    thought, tokens = "", []
    first = End("length")
    most = max(1, (limit if limit > 0 else job.runner.facts.n_ctx) // 2)
    async for piece in _once(job, prompt, images, before, n_predict=most, stop=[*wanted["stop"], closing]):
        begun = bool(thought.strip())
        thought += piece.content
        tokens += piece.tokens
        first = piece.end or first
        yield Piece(thinking=piece.content if begun else piece.content.lstrip(), logprobs=piece.logprobs)
    left = limit - first.n_reply if limit > 0 else -1
    if first.word not in ("", closing) or left == 0:
        yield Piece(tokens=tokens, end=first if first.word not in ("", closing) else replace(first, reason="length"))
        return
    added = f"{thought}{closing}\n\n"
    read = await job.server.ask("/tokenize", {"content": added, "add_special": False, "parse_special": True})
    yield Piece(tokens=read["tokens"])
    try:
        async for piece in _once(job, prompt + added, images, before, n_predict=left, json_schema=schema):
            if piece.end is not None:
                piece.end = replace(
                    piece.end,
                    n_prompt=first.n_prompt,
                    prompt_ms=first.prompt_ms + piece.end.prompt_ms,
                    n_reply=first.n_reply + piece.end.n_reply,
                    reply_ms=first.reply_ms + piece.end.reply_ms,
                )
            yield piece
    except TooLong:  # the thoughts have filled the context
        yield Piece(end=replace(first, reason="length"))


async def cut_to_fit(job: Job, prompt: str, before: Sequence[int] = ()) -> AsyncGenerator[Piece, None]:
    """A completion whose prompt loses its middle where it is too long, unless ``truncate`` is false."""
    started = False
    try:
        async for piece in complete(job, prompt, before=before):
            started = True
            yield piece
        return
    except TooLong as error:
        if started or job.body.get("truncate") is False or error.n_ctx < 8:
            raise
        n_ctx = error.n_ctx
    asked = {"content": prompt, "add_special": not before, "parse_special": True}
    tokens = [*before, *(await job.server.ask("/tokenize", asked))["tokens"]]
    wanted = int(job.options.get("num_keep") or 0)
    keep = n_ctx // 2 if wanted < 0 else min(wanted, n_ctx // 2)  # a negative one means all
    rest = n_ctx - keep - max(1, n_ctx // 8)  # some of the context is for the reply
    async for piece in complete(job, "", before=[*tokens[:keep], *tokens[-rest:]], text=prompt):
        yield piece
