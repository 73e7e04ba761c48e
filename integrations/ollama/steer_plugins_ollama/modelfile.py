"""Ollama's Modelfile language, and ``PARAMETER steering`` on top of it.

Instructions: FROM LICENSE TEMPLATE SYSTEM ADAPTER DRAFT RENDERER PARSER PARAMETER MESSAGE REQUIRES. A value ends with its line,
or, when it begins with a quote (``"`` or three of them), at the first line that ends with the same quote. ``#`` begins a
comment at the start of a line only. Every error names its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from steer_plugins.errors import SpecError
from steer_plugins.steering.grammar import parse as parse_steering

from .errors import BadRequest

MAX_TEXT = 16 << 20
ROLES = ("system", "user", "assistant")

#: What a parameter's value is. Those of ``llama.cpp`` that Ollama has dropped are still taken.
PARAMETERS: dict[str, type] = {
    **dict.fromkeys(("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"), int),
    **dict.fromkeys(("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict", "mirostat"), int),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "temperature", "repeat_penalty"), float),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "mirostat_tau", "mirostat_eta", "tfs_z"), float),
    "use_mmap": bool,
    "stop": list,
    "steering": str,
}
#: Ollama warns of these and leaves them out.
DEPRECATED = ("penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "numa")

_WORD = re.compile(r"[A-Za-z]+")
_KEY = re.compile(r"[A-Za-z0-9_]+")
_COMMANDS: tuple[str, ...] = ("from", "license", "template", "system", "adapter", "draft")
_COMMANDS += ("renderer", "parser", "parameter", "message", "requires")
_SEMVER = re.compile(r"v?(0|[1-9]\d*)(\.(0|[1-9]\d*)){0,2}(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_TRUE, _FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")


class ModelfileError(BadRequest):
    """A line of a Modelfile is wrong; the message begins with its number."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"Modelfile line {line}: {message}" if line else f"Modelfile: {message}")
        self.line = line


@dataclass(frozen=True)
class Command:
    """One instruction: ``name`` in lower case, ``key`` of a PARAMETER or the role of a MESSAGE, its value and its line."""

    name: str
    key: str
    value: str
    line: int


@dataclass
class Modelfile:
    """A Modelfile's instructions, checked. ``parameters`` are typed; ``steering`` holds the texts of its lines, in order;
    ``more_sources`` are further FROM lines (a projector's)."""

    source: str = ""
    source_line: int = 0
    more_sources: list[tuple[str, int]] = field(default_factory=list)
    adapters: list[tuple[str, int]] = field(default_factory=list)
    drafts: list[tuple[str, int]] = field(default_factory=list)
    template: str | None = None
    template_line: int = 0
    system: str | None = None
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None
    licenses: list[str] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    steering: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def decode(raw: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 with its mark, as PowerShell's ``>`` writes it. Raises UnicodeDecodeError."""
    return raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")


def parse(text: str) -> Modelfile:
    """The Modelfile that a text is.

    Raises:
        ModelfileError: with the number of the line.
    """
    from . import gotemplate

    found = Modelfile()
    for one in commands(text):
        if one.name == "from" and found.source:
            found.more_sources.append((one.value, one.line))
        elif one.name == "from":
            found.source, found.source_line = one.value, one.line
        elif one.name == "parameter":
            _add_parameter(found, one)
        elif one.name == "message":
            found.messages.append({"role": one.key, "content": one.value})
        elif one.name == "license":
            found.licenses.append(one.value)
        elif one.name == "adapter":
            found.adapters.append((one.value, one.line))
        elif one.name == "draft":
            found.drafts.append((one.value, one.line))
        elif one.name == "requires":
            if not _SEMVER.fullmatch(one.value):
                raise ModelfileError(one.line, f"REQUIRES {one.value[:80]!r} is not a version: write one such as 0.14.0")
            found.requires = one.value.removeprefix("v")
        else:
            setattr(found, one.name, one.value)
            if one.name == "template":
                found.template_line = one.line
    if not found.source:
        raise ModelfileError(0, "there is no FROM line")
    if found.template is not None and found.steering:
        try:
            gotemplate.Template(found.template)
        except gotemplate.TemplateError as error:
            raise ModelfileError(found.template_line + error.line - 1, f"TEMPLATE: {error.reason}") from None
    return found


def commands(text: str) -> list[Command]:
    """The instructions of a text, in order. Raises ModelfileError."""
    if len(text) > MAX_TEXT:
        raise ModelfileError(0, f"{len(text)} characters are too long: {MAX_TEXT} are the limit")
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found: list[Command] = []
    at = 0
    while at < len(lines):
        stripped = lines[at].strip(" \t")
        if not stripped or stripped.startswith("#"):
            at += 1
            continue
        name, key, rest = _head(stripped, at + 1)
        value, n_lines = _value(rest, lines[at + 1 :], at + 1, name)
        found.append(Command(name, key, value, at + 1))
        at += n_lines
    return found


def _head(line: str, number: int) -> tuple[str, str, str]:
    """Instruction, key or role, and what follows them."""
    word = _WORD.match(line)
    name = word[0].lower() if word else ""
    if name not in _COMMANDS:
        shown = line.split()[0][:40]
        raise ModelfileError(number, f"unknown instruction {shown!r}: use one of {', '.join(c.upper() for c in _COMMANDS)}")
    rest = line[len(name) :]
    if not rest:
        raise ModelfileError(number, f"{name.upper()} has no value")
    if rest[0] not in " \t":
        raise ModelfileError(number, f"unknown instruction {line.split()[0][:40]!r}")
    rest = rest.lstrip(" \t")
    if name not in ("parameter", "message"):
        return name, "", rest
    match = _KEY.match(rest)
    if match is None or rest[match.end() : match.end() + 1] not in ("", " ", "\t"):
        raise ModelfileError(number, f"{name.upper()} needs a name and a value")
    key = match[0]
    if name == "message" and key not in ROLES:
        raise ModelfileError(number, f"the role of a message is one of {', '.join(ROLES)}, not {key[:40]!r}")
    return name, key, rest[match.end() :].lstrip(" \t")


def _value(rest: str, following: list[str], number: int, name: str) -> tuple[str, int]:
    """The value that begins with ``rest``, and how many lines it takes."""
    if not rest:
        raise ModelfileError(number, f"{name.upper()} has no value")
    quote = '"""' if rest.startswith('"""') else '"' if rest.startswith('"') else ""
    if not quote:
        return rest.rstrip(" \t"), 1
    text = rest
    for extra in range(len(following) + 1):
        if extra:
            text += "\n" + following[extra - 1]
        ended = text.rstrip(" \t\n")
        if len(ended) >= 2 * len(quote) and ended.endswith(quote):
            return ended[len(quote) : -len(quote)], extra + 1
    raise ModelfileError(number, f"the quote that opens the value of {name.upper()} is never closed")


def _add_parameter(found: Modelfile, one: Command) -> None:
    if one.key in DEPRECATED:
        found.ignored.append(one.key)
    elif one.key == "steering":
        text = one.value.replace('\\"', '"')
        check_expression(text, one.line)
        found.steering.append(text)
    elif one.key == "stop":
        found.parameters.setdefault("stop", []).append(one.value)
    else:
        found.parameters[one.key] = typed(one.key, one.value, one.line)


def check_expression(text: str, line: int) -> None:
    """Raise ModelfileError where a steering, with or without a leading ``+``, is not in the grammar."""
    try:
        parse_steering(text.strip().removeprefix("+"))
    except SpecError as error:
        raise ModelfileError(line, f"PARAMETER steering: {error}") from None


def typed(key: str, text: str, line: int) -> Any:
    """A parameter's value from its text. Raises ModelfileError."""
    kind = PARAMETERS.get(key)
    if kind is None:
        raise ModelfileError(line, f"unknown parameter {key[:60]!r}")
    try:
        if kind is bool:
            if text not in _TRUE + _FALSE:
                raise ValueError
            return text in _TRUE
        value = kind(text)
        if isinstance(value, float) and not abs(value) < 1e300:
            raise ValueError
        return value
    except ValueError:
        what = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ModelfileError(line, f"PARAMETER {key} is {what}, not {text[:60]!r}") from None


def quote(text: str) -> str:
    """A value as a Modelfile writes it."""
    if '"' in text and (text.startswith('"') or "\n" in text):
        return f'"""{text}"""'
    return f'"{text}"' if "\n" in text or text != text.strip() or not text else text


def render(
    source: str,
    *,
    template: str | None = None,
    system: str | None = None,
    adapters: Iterable[str] = (),
    parameters: Mapping[str, Any] | None = None,
    messages: Iterable[Mapping[str, Any]] = (),
    licenses: Iterable[str] = (),
    projectors: Iterable[str] = (),
) -> str:
    """A Modelfile that :func:`parse` reads back to the same."""
    lines = [f"FROM {one}" for one in (source, *projectors)]
    if template:
        lines.append(f"TEMPLATE {quote(template)}")
    if system:
        lines.append(f"SYSTEM {quote(system)}")
    lines += [f"ADAPTER {one}" for one in adapters]
    for key, value in sorted((parameters or {}).items()):
        for one in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {key} {quote(str(one).lower() if isinstance(one, bool) else str(one))}")
    lines += [f"MESSAGE {m['role']} {quote(str(m.get('content') or ''))}" for m in messages]
    lines += [f"LICENSE {quote(one)}" for one in licenses]
    return "\n".join(lines) + "\n"
