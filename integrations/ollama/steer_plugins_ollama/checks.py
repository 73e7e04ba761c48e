"""What a request for text may say: each part checked before a model is loaded for it. All raise BadRequest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import BadRequest

if TYPE_CHECKING:
    from .model import Model
    from .pool import Runner

THINK_LEVELS = ("low", "medium", "high", "max")


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """The messages of ``/api/chat``. Roles are in lower case then, and any role is left to the template, as in Ollama."""
    found = checked_roles(value)
    for number, message in enumerate(found, start=1):
        if not isinstance(message.get("content") or "", str):
            raise BadRequest(f"the content of message {number} must be a text")
        if not isinstance(message.get("images") or [], list):
            raise BadRequest(f"images of message {number} must be a list")
    return found


def checked_roles(value: Any) -> list[dict[str, Any]]:
    """Messages whose content somebody else checks."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRequest("messages must be a list")
    found = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
            raise BadRequest(f"message {number} has no role")
        message = {**message, "role": message["role"].lower()}
        calls = message.get("tool_calls")
        if calls:
            if not isinstance(calls, list):
                raise BadRequest(f"tool_calls of message {number} must be a list")
            message["tool_calls"] = [_checked_call(call, number) for call in calls]
        found.append(message)
    return found


def _checked_call(call: Any, number: int) -> dict[str, Any]:
    """A call of a tool with its arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest(f"tool_calls of message {number} need a function with a name each")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise BadRequest(f"the arguments of {function['name'][:60]!r} in message {number} must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def checked_tools(value: Any, model: Model, runner: Runner, *, functions: bool = True) -> list[dict[str, Any]] | None:
    """The tools of a request, None without any. ``functions``: they are described as OpenAI's chat and Ollama do."""
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRequest("tools must be a list of objects")
    for number, tool in enumerate(value if functions else (), start=1):
        function = tool.get("function")
        if not isinstance(tool.get("type"), str):
            raise BadRequest(f'tool {number} has no type: write "type": "function"')
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"tool {number} needs a function with a name")
        if not isinstance(function.get("parameters") or {}, dict):
            raise BadRequest(f"the parameters of tool {number} must be a JSON schema")
    if not (runner.tools or "tools" in model.capabilities()):
        raise BadRequest(f'"{model.name}" does not support tools')
    return value


def checked_think(value: Any, model: Model, runner: Runner) -> bool | str | None:
    """What ``think`` means for a model: its default is on where the model can think."""
    can = runner.facts.thinking is not None or "thinking" in model.capabilities()
    if value is None:
        return True if can else None
    if not isinstance(value, bool) and value not in THINK_LEVELS:
        raise BadRequest(f'think must be a boolean or one of "{", ".join(THINK_LEVELS)}"')
    if value and not can:
        raise BadRequest(f'"{model.name}" does not support thinking')
    return value if can else None


def json_schema(value: Any) -> dict[str, Any] | None:
    """The JSON schema of ``format``; None where any text will do."""
    if value in (None, "", "null"):
        return None
    if value == "json":
        return {"type": "object"}
    if isinstance(value, dict):
        return value
    raise BadRequest(f'invalid format: {str(value)[:60]!r}; expected "json" or a valid JSON Schema object')


def logprob_count(body: Mapping[str, Any]) -> int | None:
    """``top_logprobs`` where logprobs are wanted, else None."""
    top = body.get("top_logprobs") or 0
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= 20:
        raise BadRequest("top_logprobs must be between 0 and 20")
    return top if body.get("logprobs") or top else None
