"""Requests for text: Ollama's bodies to llama-server's, with the model's own template, system prompt and parameters."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from . import gotemplate, llama, options
from .errors import ApiError, BadRequest
from .llama import Piece, TooLong
from .log import tell_once
from .model import Model
from .pool import Pool, Runner

ROLES = ("system", "user", "assistant", "tool")
THINK_LEVELS = ("low", "medium", "high", "max")
T = TypeVar("T")
_IMAGE_MARK = re.compile(r"\[img-([0-9]{1,4})\]")


@dataclass
class Job:
    """One request for text, checked, on a process that has the model. ``steering``: its text, or None."""

    pool: Pool
    client: httpx.AsyncClient
    runner: Runner
    model: Model
    body: Mapping[str, Any]
    options: Mapping[str, Any]
    steering: str | None
    think: bool | str | None = None

    @property
    def url(self) -> str:
        return self.runner.url

    async def steered(self, make: Callable[[dict[str, Any]], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """The parts of an answer to a request with steering fields; once more if the server has lost the vectors meanwhile."""
        for attempt in (1, 2):
            fields = await self.pool.fields(self.runner, self.model, self.steering)
            started = False
            pieces = make(fields)
            try:
                async for piece in pieces:
                    started = True
                    yield piece
                return
            except BadRequest:
                resolver = self.runner.resolver
                if started or attempt == 2 or not fields["steering"] or resolver is None:
                    raise
                if not await asyncio.to_thread(resolver.lost, fields):
                    raise
            finally:
                await pieces.aclose()


# ---- checks ----


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """Raises BadRequest for what are not chat messages."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRequest("messages must be a list")
    found = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"message {number} has no role")
        if message["role"] not in ROLES:
            raise BadRequest(f"message {number} has the invalid role {message['role'][:40]!r}: use {', '.join(ROLES)}")
        if not isinstance(message.get("content") or "", str):
            raise BadRequest(f"the content of message {number} must be a text")
        for key in ("images", "tool_calls"):
            if not isinstance(message.get(key) or [], list):
                raise BadRequest(f"{key} of message {number} must be a list")
        if not all(isinstance(c, dict) and isinstance(c.get("function"), dict) for c in message.get("tool_calls") or []):
            raise BadRequest(f"tool_calls of message {number} need a function each")
        found.append(message)
    return found


def checked_messages_openai(value: Any) -> list[dict[str, Any]]:
    """OpenAI's messages, whose content llama-server checks. Raises BadRequest."""
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        raise BadRequest("messages must be a list of objects with a role")
    return value


def checked_think(value: Any, model: Model, runner: Runner) -> bool | str | None:
    """What ``think`` means for a model: its default is on where the model can think.

    Raises:
        BadRequest: it is not a switch, or the model does not think.
    """
    can = runner.facts.think is not None or "thinking" in model.capabilities()
    if value is None:
        return True if can else None
    if not isinstance(value, bool) and value not in THINK_LEVELS:
        raise BadRequest(f'think must be a boolean or one of "{", ".join(THINK_LEVELS)}"')
    if value and not can:
        raise BadRequest(f'"{model.name}" does not support thinking')
    return value if can else None


def json_schema(value: Any) -> dict[str, Any] | None:
    """The JSON schema of ``format``; None where any text will do. Raises BadRequest."""
    if value in (None, "", "null"):
        return None
    if value == "json":
        return {"type": "object"}
    if isinstance(value, dict):
        return value
    raise BadRequest(f'invalid format: {str(value)[:60]!r}; expected "json" or a valid JSON Schema object')


def logprob_count(body: Mapping[str, Any]) -> int | None:
    """``top_logprobs`` where logprobs are wanted, else None. Raises BadRequest."""
    top = body.get("top_logprobs") or 0
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= 20:
        raise BadRequest("top_logprobs must be between 0 and 20")
    return top if body.get("logprobs") or top else None


@functools.lru_cache(maxsize=64)
def parsed_template(text: str) -> gotemplate.Template:
    """Raises TemplateError."""
    return gotemplate.Template(text)


def template_of(model: Model, runner: Runner) -> gotemplate.Template | None:
    """The model's own TEMPLATE; None: the GGUF's chat template is used, which the log says once where there is a TEMPLATE."""
    if not model.template:
        return None if runner.facts.has_chat_template else parsed_template("{{ .Prompt }}")
    try:
        return parsed_template(model.template)
    except gotemplate.TemplateError as error:
        tell_once(f"the TEMPLATE of {model.name} is not understood ({error}): the chat template of its GGUF is used")
        return None


# ---- chat ----


def conversation(model: Model, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the model's own history and system prompt before them."""
    system = [{"role": "system", "content": model.system}] if model.system and messages[0].get("role") != "system" else []
    return [*system, *model.messages, *messages]


async def chat(job: Job) -> AsyncGenerator[Piece, None]:
    """The reply to ``/api/chat``. Old messages are left out where the context is too short, unless ``truncate`` is false."""
    messages = conversation(job.model, checked_messages(job.body.get("messages")))
    tools = job.body.get("tools") or None
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools)):
        raise BadRequest("tools must be a list of objects")
    _check_images(job, messages)
    template = template_of(job.model, job.runner)
    if tools is not None and template is not None:
        if "tools" not in job.model.facts.chat_template:
            raise BadRequest(f'"{job.model.name}" does not support tools')
        tell_once(f"{job.model.name}: requests with tools use the chat template of its GGUF, not its TEMPLATE")
        template = None
    while True:
        started = False
        pieces = _chat_once(job, messages, tools, template)
        try:
            async for piece in pieces:
                started = True
                yield piece
            return
        except TooLong as error:
            shorter = without_oldest(messages, error.n_prompt, error.n_ctx)
            if started or shorter is None or job.body.get("truncate") is False:
                raise
            messages = shorter
        finally:
            await pieces.aclose()


def _chat_once(
    job: Job, messages: list[dict[str, Any]], tools: Any, template: gotemplate.Template | None
) -> AsyncGenerator[Piece, None]:
    if template is not None:
        prompt, images = _rendered(job, template, messages)
        return _complete(job, prompt, images)
    return _server_chat(job, messages, tools)


def _rendered(job: Job, template: gotemplate.Template, messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    marker = job.runner.facts.media_marker
    images: list[str] = []
    marked = []
    for message in messages:
        found = [llama.plain_base64(one) for one in message.get("images") or []]
        images += found
        marked.append({**message, "content": marker * len(found) + (message.get("content") or "")} if found else message)
    try:
        return template.prompt(marked, think=job.think), images
    except gotemplate.TemplateError as error:
        raise BadRequest(f"the TEMPLATE of {job.model.name} fails at {error}") from None


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


def _check_images(job: Job, messages: list[dict[str, Any]]) -> None:
    if any(m.get("images") for m in messages) and not job.runner.facts.vision:
        raise BadRequest(f'"{job.model.name}" does not support images: it has no projector')


async def _server_chat(job: Job, messages: list[dict[str, Any]], tools: Any = None) -> AsyncGenerator[Piece, None]:
    body: dict[str, Any] = {**options.sampling(job.options), "messages": llama.chat_messages(messages)}
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
    async for piece in job.steered(lambda fields: llama.chat(job.url, {**body, **fields})):
        yield _with_top(piece, top)


def thinking_kwargs(think: bool | str | None) -> dict[str, Any]:
    """The switches of chat templates."""
    if think is None:
        return {}
    level = {"reasoning_effort": "high" if think == "max" else think} if isinstance(think, str) else {}
    return {"enable_thinking": bool(think), **level}


def _with_top(piece: Piece, top: int | None) -> Piece:
    if top == 0:
        for entry in piece.logprobs:
            entry.pop("top_logprobs", None)
    return piece


# ---- completion ----


async def _complete(
    job: Job, prompt: str, images: list[str] | None = None, before: list[int] | None = None, **more: Any
) -> AsyncGenerator[Piece, None]:
    """A rendered prompt's completion; ``before``: tokens in front of it."""
    body: dict[str, Any] = {**options.sampling(job.options), "return_tokens": True, **more}
    if images:
        body["prompt"] = {"prompt_string": prompt, "multimodal_data": images}
    else:
        body["prompt"] = [*before, *([prompt] if prompt else [])] if before else prompt
    schema = json_schema(job.body.get("format"))
    if schema is not None:
        body["json_schema"] = schema
    top = logprob_count(job.body)
    if top is not None:
        body["n_probs"] = max(1, top)
    tags = (job.runner.facts.think or ("<think>", "</think>")) if job.think else None
    inside = tags is not None and prompt.rstrip().endswith(tags[0].strip())
    make = functools.partial(llama.complete, job.url, tags=tags, thinking=inside)
    async for piece in job.steered(lambda fields: make({**body, **fields})):
        yield _with_top(piece, top)


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
            _check_images(job, [{"images": images}])
            async for piece in _complete(job, *_raw_images(job, prompt, images)):
                yield piece
            return
        async for piece in _cut_to_fit(job, prompt, []):
            yield piece
        return
    template = _given_template(body) or template_of(job.model, job.runner)
    if suffix:
        async for piece in _insert(job, template, prompt, suffix):
            yield piece
        return
    message: dict[str, Any] = {"role": "user", "content": prompt, "images": images}
    system = _text(body, "system") or job.model.system
    messages = [{"role": "system", "content": system}] if system else []
    messages += [] if context else list(job.model.messages)
    messages.append(message)
    _check_images(job, messages)
    if images and template is None:
        async for piece in _server_chat(job, messages):
            yield piece
        return
    if template is not None:
        text, found = _rendered(job, template, messages)
        if found:
            async for piece in _complete(job, text, found):
                yield piece
            return
    else:
        asked = {"messages": llama.chat_messages(messages), "chat_template_kwargs": thinking_kwargs(job.think)}
        text = str((await llama.ask(job.client, job.url, "/apply-template", asked))["prompt"])
    told.prompt, told.before, told.known = text, tuple(context), True
    async for piece in _cut_to_fit(job, text, context):
        yield piece


def _raw_images(job: Job, prompt: str, images: list[Any]) -> tuple[str, list[str]]:
    """A raw prompt with llama-server's mark where it says ``[img-0]``, and the pictures in that order. Raises BadRequest."""
    order = [int(number) for number in _IMAGE_MARK.findall(prompt)]
    if sorted(order) != list(range(len(images))):
        raise BadRequest("a raw prompt says where each image belongs: [img-0] for the first, [img-1] for the second")
    return _IMAGE_MARK.sub(job.runner.facts.media_marker, prompt), [llama.plain_base64(images[number]) for number in order]


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
        async for piece in _complete(job, template.insert(prompt, suffix)):
            yield piece
        return
    body = {**options.sampling(job.options), "input_prefix": prompt, "input_suffix": suffix, "prompt": "", "return_tokens": True}
    infill = functools.partial(llama.complete, job.url, tags=None, path="/infill")
    try:
        async for piece in job.steered(lambda fields: infill({**body, **fields})):
            yield piece
    except ApiError as error:
        if "infill" not in str(error).lower():
            raise
        raise BadRequest(f'"{job.model.name}" does not support insert') from None


async def _cut_to_fit(job: Job, prompt: str, before: list[int]) -> AsyncGenerator[Piece, None]:
    """A completion whose prompt loses its middle where it is too long, unless ``truncate`` is false."""
    try:
        async for piece in _complete(job, prompt, before=before):
            yield piece
        return
    except TooLong as error:
        if job.body.get("truncate") is False or error.n_ctx < 8:
            raise
        n_ctx = error.n_ctx
    asked = {"content": prompt, "add_special": not before, "parse_special": True}
    tokens = [*before, *(await llama.ask(job.client, job.url, "/tokenize", asked))["tokens"]]
    keep = min(max(0, int(job.options.get("num_keep") or 0)), n_ctx // 2)
    rest = n_ctx - keep - max(1, n_ctx // 8)  # some of the context is for the reply
    cut = [*tokens[:keep], *tokens[-rest:]]
    async for piece in _complete(job, "", before=cut):
        yield piece


async def context_of(job: Job, told: Generated, reply: list[int]) -> list[int]:
    """The tokens of the conversation so far, for the next request's ``context``."""
    asked = {"content": told.prompt, "add_special": not told.before, "parse_special": True}
    tokens = (await llama.ask(job.client, job.url, "/tokenize", asked))["tokens"]
    return [*told.before, *tokens, *reply]
