"""The reply to ``/api/generate``."""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from . import gotemplate, llama, options
from .chat import server_chat
from .complete import complete, cut_to_fit
from .errors import ApiError, BadRequest
from .job import Job, parsed_template
from .llama import Piece

_IMAGE_MARK = re.compile(r"\[img-([0-9]{1,4})\]")


@dataclass
class Generated:
    """What ``/api/generate`` needs at its end to tell its ``context``."""

    prompt: str = ""
    before: tuple[int, ...] = ()
    known: bool = False


async def generate(job: Job, told: Generated) -> AsyncGenerator[Piece, None]:
    """The reply to ``/api/generate``."""
    body = job.body
    prompt, suffix = _text(body, "prompt"), _text(body, "suffix")
    images = body.get("images") or []
    if not isinstance(images, list):
        raise BadRequest("images must be a list")
    context = body.get("context") or []
    if not isinstance(context, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in context):
        raise BadRequest("context must be a list of token ids")
    if body.get("raw"):
        if body.get("template") or body.get("system") or context:
            raise BadRequest("raw mode does not support template, system, or context")
        job.think = None
        if images:
            job.check_images([{"images": images}])
            async for piece in complete(job, *_raw_images(job, prompt, images)):
                yield piece
            return
        async for piece in cut_to_fit(job, prompt):
            yield piece
        return
    template = _given_template(body) or job.template()
    if suffix:
        async for piece in _insert(job, template, prompt, suffix):
            yield piece
        return
    message: dict[str, Any] = {"role": "user", "content": prompt, "images": images}
    system = _text(body, "system") or job.model.system
    messages = [{"role": "system", "content": system}] if system else []
    messages += [] if context else list(job.model.messages)
    messages.append(message)
    job.check_images(messages)
    if images and template is None:
        async for piece in server_chat(job, messages):
            yield piece
        return
    text, found = await job.prompt(messages, template)
    if found:
        async for piece in complete(job, text, found):
            yield piece
        return
    told.prompt, told.before, told.known = text, tuple(context), True
    async for piece in cut_to_fit(job, text, context):
        yield piece


def _raw_images(job: Job, prompt: str, images: list[Any]) -> tuple[str, list[str]]:
    """A raw prompt with llama-server's mark where it says ``[img-0]``, and the pictures in that order. Raises BadRequest."""
    order = [int(number) for number in _IMAGE_MARK.findall(prompt)]
    if sorted(order) != list(range(len(images))):
        raise BadRequest("a raw prompt says where each image belongs: [img-0] for the first, [img-1] for the second")
    return _IMAGE_MARK.sub(job.runner.media_marker, prompt), [llama.plain_base64(images[number]) for number in order]


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key) or ""
    if not isinstance(value, str):
        raise BadRequest(f"{key} must be a text")
    return value


def _given_template(body: Mapping[str, Any]) -> gotemplate.Template | None:
    text = _text(body, "template")
    if not text:
        return None
    try:
        return parsed_template(text)
    except gotemplate.TemplateError as error:
        raise BadRequest(f"template {error}") from None


async def _insert(job: Job, template: gotemplate.Template | None, prompt: str, suffix: str) -> AsyncGenerator[Piece, None]:
    """Fill the gap between two texts: by the TEMPLATE where it knows how, else by the model's own marks."""
    job.think = None
    if template is not None and "suffix" in template.uses:
        async for piece in complete(job, template.insert(prompt, suffix)):
            yield piece
        return
    body = {
        **options.sampling(job.options, job.runner.facts.n_ctx),
        "input_prefix": prompt,
        "input_suffix": suffix,
        "prompt": "",
        "return_tokens": True,
    }
    infill = functools.partial(job.server.complete, tags=None, path="/infill")
    try:
        async for piece in job.steered(lambda fields: infill({**body, **fields})):
            yield piece
    except ApiError as error:
        if "infill" not in str(error).lower():
            raise
        raise BadRequest(f'"{job.model.name}" does not support insert') from None


async def context_of(job: Job, told: Generated, reply: list[int]) -> list[int]:
    """The tokens of the conversation so far, for the next request's ``context``."""
    asked = {"content": told.prompt, "add_special": not told.before, "parse_special": True}
    tokens = (await job.server.ask("/tokenize", asked))["tokens"]
    return [*told.before, *tokens, *reply]
