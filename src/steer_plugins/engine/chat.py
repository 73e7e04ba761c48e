"""Chat messages to text, through the template that the model file carries."""

from __future__ import annotations

import datetime
import json
from typing import Any

from ..errors import DataError, ModelError


class ChatTemplate:
    """A model's Jinja chat template, rendered in a sandbox as Hugging Face's ``apply_chat_template`` does.

    Raises:
        ModelError: the template is not valid Jinja.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        import jinja2
        import jinja2.sandbox

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._error = jinja2.TemplateError
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template is not valid Jinja ({error}): give a raw prompt instead") from None

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True, thinking: bool | None = None) -> str:
        """Text of a conversation. ``thinking`` sets the template's switches of that name; None leaves its default.

        Raises:
            DataError: the template refuses the messages.
        """
        extra: dict[str, Any] = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens, **extra)
        except self._error as error:
            raise DataError(f"the model's chat template refuses these messages: {error}") from None


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Return chat messages whose shape is right.

    Raises:
        DataError: not a list of objects with string ``role`` and ``content``.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError("a chat prompt is a list of messages, each with 'role' and 'content'")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"message {i + 1} of the chat needs 'role' and 'content' as text")
    return messages


def _raise_exception(text: str) -> None:
    import jinja2

    raise jinja2.TemplateError(text)
