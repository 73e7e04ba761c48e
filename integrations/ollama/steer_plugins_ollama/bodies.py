"""The JSON bodies of requests, read as Ollama reads them: keys in any case, texts that are always text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import BadRequest
from .modelfile import PARAMETERS

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_BODY = 256 << 20
"""Bytes of a request that is read here."""

_HALF = re.compile("[\ud800-\udfff]")
_FUNCTION = ("name", "description", "parameters", "arguments")
#: Objects inside a body whose keys are known, by the key they are under. Below them everything is the user's own.
_INSIDE: Mapping[str, Iterable[str]] = {
    "options": PARAMETERS,
    "parameters": PARAMETERS,
    "messages": ("role", "content", "thinking", "images", "tool_calls", "tool_name", "tool_call_id"),
    "tools": ("type", "function", "name", "description", "parameters", "input_schema"),
    "response_format": ("type", "json_schema", "schema"),
    "stream_options": ("include_usage",),
}


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Go's decoder, and so Ollama, takes keys in any case (the last one of a name counts), and texts that are not Unicode with a
    U+FFFD in the place of what is wrong. Whatever is passed on is written anew from what is returned here, so that nobody
    behind the sidecar can understand a request in another way.

    Raises:
        BadRequest: it is too long, or not a JSON object.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise BadRequest(f"the request is longer than {MAX_BODY >> 20} MiB")
        parts.append(part)
    raw = b"".join(parts)
    if not raw.strip():
        raise BadRequest("missing request body")
    try:
        body = loads(raw)
    except ValueError as error:
        raise BadRequest(f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("the request must be a JSON object")
    return folded(body)


def loads(raw: bytes) -> Any:
    """The value of a JSON text, its texts valid Unicode and its numbers finite. Raises ValueError."""
    text = raw.decode("utf-8", "replace")
    try:
        value = json.loads(text, object_pairs_hook=_last_counts, parse_float=_finite, parse_constant=_no_number)
        return whole(value) if re.search(r"\\u[dD][89a-fA-F]", text) else value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dumps(body: Mapping[str, Any]) -> bytes:
    """The JSON text of a body. Raises BadRequest for one that is nested too deeply."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except RecursionError:
        raise BadRequest("the request is not JSON: it is nested too deeply") from None


def folded(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body with the keys that are known in lower case."""
    found = _lower(body, None)
    for key, names in _INSIDE.items():
        value = found.get(key)
        if isinstance(value, dict):
            found[key] = _lower(value, names)
        elif isinstance(value, list):
            found[key] = [_with_functions(_lower(one, names)) if isinstance(one, dict) else one for one in value]
    return found


def _with_functions(entry: dict[str, Any]) -> dict[str, Any]:
    """A message or a tool with the keys of its functions folded too."""
    if isinstance(entry.get("function"), dict):
        entry["function"] = _lower(entry["function"], _FUNCTION)
    if isinstance(entry.get("tool_calls"), list):
        calls = [_lower(one, ("id", "type", "function")) if isinstance(one, dict) else one for one in entry["tool_calls"]]
        entry["tool_calls"] = [_with_functions(one) if isinstance(one, dict) else one for one in calls]
    return entry


def _lower(value: Mapping[str, Any], names: Iterable[str] | None) -> dict[str, Any]:
    """An object with these keys (None: all) in lower case; of those that become one, the last counts."""
    found: dict[str, Any] = {}
    for key, one in value.items():
        lower = key.replace("\u017f", "s").lower()  # Go folds the long s too, and the Kelvin sign, which lower() knows
        if names is None or lower in names:
            key = lower
        found[key] = one
    return found


def _last_counts(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are in the order in which they were said last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        found.pop(key, None)
        found[key] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def whole(value: Any) -> Any:
    """A value with U+FFFD in the place of each half of a surrogate pair."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [whole(one) for one in value]
    if isinstance(value, dict):
        return {_HALF.sub("\ufffd", key): whole(one) for key, one in value.items()}
    return value
