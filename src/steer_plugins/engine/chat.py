"""Chat messages to text, through the template that the model file carries."""

from __future__ import annotations

import datetime
import json
import warnings
from typing import TYPE_CHECKING, Any

from ..errors import DataError, ModelError, SteerWarning

if TYPE_CHECKING:
    import jinja2

_MARK = "marked text"


class ChatTemplate:
    """A model's Jinja chat template, rendered in a sandbox as Hugging Face's ``apply_chat_template`` does.

    The template is compiled when a chat is first rendered, so a model whose template is broken can still be given raw prompts.
    What a template cannot take is put so that it can, as llama-server does: a system message in front of the user's where there
    is no system role (a :class:`~steer_plugins.errors.SteerWarning` says so, once), parts of text where it looks for parts.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        self._source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._compiled: jinja2.Template | None = None
        self._parts = False
        self._system = True
        self._warned = False

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True, thinking: bool | None = None) -> str:
        """Text of a conversation. ``thinking`` sets the template's switches of that name; None leaves its default.

        Raises:
            ModelError: the template is not valid Jinja.
            DataError: the template refuses the messages.
        """
        if self._compiled is None:
            self._compiled = _compile(self._source)
            self._parts = not self._shows([_said("user", _MARK)]) and self._shows([_said("user", _MARK)], parts=True)
            # a template that refuses even a plain message has its own sentence to say
            if self._shows([_said("user", _MARK)], parts=self._parts):
                self._system = self._shows([_said("system", _MARK), _said("user", "Hello")], parts=self._parts)
        if not self._system and any(message["role"] == "system" for message in messages):
            messages = _folded(messages)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "the model's chat template has no system role: the system prompt goes in front of the user's message",
                    SteerWarning,
                    stacklevel=2,
                )
        extra: dict[str, Any] = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        try:
            return self._rendered(messages, parts=self._parts, add_generation_prompt=add_generation_prompt, **extra)
        except Exception as error:  # whatever a template's own code may raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise DataError(f"the model's chat template refuses these messages: {reason:.300}") from None

    def _rendered(self, messages: list[dict[str, str]], *, parts: bool, **extra: Any) -> str:
        assert self._compiled is not None
        given: list[dict[str, Any]] = list(messages)
        if parts:
            given = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return self._compiled.render(messages=given, tools=None, documents=None, **self._tokens, **extra)

    def _shows(self, messages: list[dict[str, str]], *, parts: bool = False) -> bool:
        """Whether the text that is marked comes out."""
        try:
            return _MARK in self._rendered(messages, parts=parts, add_generation_prompt=True)
        except Exception:
            return False


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Return chat messages whose shape is right.

    Raises:
        DataError: not a list of objects with string ``role`` and ``content``, or text that is not UTF-8.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError("a chat prompt is a list of messages, each with 'role' and 'content'")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"message {i + 1} of the chat needs 'role' and 'content' as text")
        utf8(message["content"])
    return messages


def utf8(text: str) -> bytes:
    """The bytes of a prompt. Raises DataError where it holds what is not text: bytes of a terminal that are not UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not UTF-8 at character {error.start + 1}: save or type it as UTF-8") from None


def _compile(source: str) -> jinja2.Template:
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes, parser

    class Generation(jinja2.ext.Extension):
        """``{% generation %}…{% endgeneration %}`` marks what an assistant says, for training; the body is rendered."""

        tags = {"generation"}

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ModelError(f"the model's chat template is not valid Jinja ({error}): give a raw prompt instead") from None


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _folded(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages without a system role: its texts stand in front of what the user says next."""
    out: list[dict[str, str]] = []
    held: list[str] = []
    for message in messages:
        if message["role"] == "system":
            held.append(message["content"])
        elif message["role"] == "user":
            out.append({**message, "content": "\n".join([*held, message["content"]])})
            held = []
        else:
            out.append(message)
    if held and out and out[-1]["role"] == "user":
        out[-1] = {**out[-1], "content": "\n".join([out[-1]["content"], *held])}
    elif held:
        out.append(_said("user", "\n".join(held)))
    return out


def _raise_exception(text: str) -> None:
    import jinja2

    raise jinja2.TemplateError(text)
