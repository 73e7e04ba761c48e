"""The functions of templates, and how values are compared, tested and printed."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping
from typing import Any


def truth(value: Any) -> bool:
    return bool(value) if not isinstance(value, float) else value != 0.0


def _compare(name: str) -> Callable[..., Any]:
    def run(a: Any, *others: Any) -> Any:
        if name == "eq":
            return any(_same(a, b) for b in others)
        (b,) = others
        if name == "ne":
            return not _same(a, b)
        return {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[name]

    return run


def _same(a: Any, b: Any) -> bool:
    if a is None and isinstance(b, str | bool | int):
        return not b  # a key that is missing has the zero value
    return bool(a == b)


def _length(value: Any) -> int:
    return len(value.encode()) if isinstance(value, str) else len(value or ())


def _slice(value: Any, *bounds: int) -> Any:
    part = slice(*bounds) if len(bounds) == 2 else slice(bounds[0] if bounds else None, None)
    if any(not 0 <= b <= _length(value) for b in bounds):
        raise ValueError("the bounds lie outside")
    return value.encode()[part].decode(errors="replace") if isinstance(value, str) else (value or [])[part]


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(key, int) and 0 <= key < len(value):
            value = value[key]
        else:
            raise ValueError(f"there is no {key!r:.40}")
    return value


def _printf(form: str, *values: Any) -> str:
    """``%s``, ``%v``, ``%d``, ``%q`` and ``%%``; other verbs raise ValueError."""
    rest = list(values)

    def one(match: re.Match[str]) -> str:
        verb = match[1]
        if verb == "%":
            return "%"
        if verb not in "svdq" or not rest:
            raise ValueError(f"%{verb} is not supported, or has no value")
        text = show(rest.pop(0))
        return json.dumps(text, ensure_ascii=False) if verb == "q" else text

    return re.sub(r"%(.?)", one, form, flags=re.DOTALL)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "not": lambda value: not truth(value),
    "len": _length,
    "slice": _slice,
    "index": _index,
    "json": lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    "printf": _printf,
    "print": lambda *values: "".join(show(v) for v in values),
    "currentDate": lambda *ignored: datetime.date.today().isoformat(),
    "yesterdayDate": lambda *ignored: (datetime.date.today() - datetime.timedelta(days=1)).isoformat(),
    # `and` and `or` are evaluated in place: they stop at the first argument that decides
    "and": lambda *values: None,
    "or": lambda *values: None,
}


def show(value: Any) -> str:
    """What printing a value gives."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return str(value)
