"""The steering of models and requests: what overrides, what adds, and the carrier line of the stock CLI."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from steer_plugins.steering.grammar import TermSpec, from_json, names_of, parse, refuse_file

from .errors import BadRequest

#: ``LICENSE "steering: mood:0.6"``: a line that the stock CLI accepts and Ollama keeps, shows and inherits.
_CARRIER = re.compile(r"\s*steering:\s*(.*?)\s*", re.DOTALL | re.IGNORECASE)


Terms = tuple[TermSpec, ...]
"""A steering as it was read, once; empty: none."""


def combine(base: Terms | None, text: str) -> Terms:
    """What ``text`` makes of ``base``: it takes its place, or is added to it where it begins with ``+``.

    Raises:
        SpecError: a text is not in the grammar.
    """
    stripped = text.strip()
    if not stripped.startswith("+"):
        return tuple(parse(stripped))
    return (*(base or ()), *parse(stripped[1:]))


def combine_lines(base: Terms | None, lines: Iterable[str]) -> Terms | None:
    """Several ``PARAMETER steering`` lines are one text; only the first decides whether it adds to what it is based on."""
    result = base
    for number, line in enumerate(lines):
        result = combine(result, line if number == 0 or line.strip().startswith("+") else f"+{line}")
    return result


def of_parameters(value: Any) -> list[str]:
    """The texts of a stored ``steering`` parameter: a text, or a list of them.

    Raises:
        BadRequest: it is something else.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return list(value)
    raise BadRequest("the steering of a model is a text such as mood:0.6")


def of_license(text: str) -> str | None:
    """The steering that a licence text carries, or None where it is a licence."""
    match = _CARRIER.fullmatch(text)
    return match[1].strip("\"'") if match else None


def as_license(text: str) -> str:
    """The licence text that carries a steering."""
    return f"steering: {text}"


def of_request(value: Any, base: Terms | None) -> Terms | None:
    """The steering of a request: ``value`` is its ``steering``, ``base`` its model's own.

    Raises:
        SpecError: the expression is wrong.
        BadRequest: it is no text, or names a file.
    """
    if value is None:
        return base
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        result = combine_lines(base, value)
    elif isinstance(value, str):
        result = combine(base, value)
    elif isinstance(value, list):
        result = tuple(from_json(value))
    else:
        raise BadRequest('steering is a text such as "mood:0.6 + !hedging", or a list of terms')
    refuse_files(result or ())
    return result


def refuse_files(terms: Terms) -> None:
    """Raise SpecError for a term that names a file: whoever can send a request must not open files here."""
    for name in names_of(terms):
        refuse_file(name)
