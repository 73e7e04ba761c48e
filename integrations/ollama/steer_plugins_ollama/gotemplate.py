"""The part of Go's text/template that Ollama's TEMPLATE uses, for chat prompts.

Fields (``.System``, ``.Messages`` ...), variables, ``if``/``else``, ``range`` (with ``break`` and ``continue``), ``with``, pipes,
parentheses, trim markers, comments, and the functions below. ``define``, ``template``, ``block`` and method calls are
not understood: a :class:`TemplateError` names their line. Written for this purpose, since no maintained library fits: those that
wrap Go need its compiler, and the one in Python needs a newer Python than this package.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_TEMPLATE = 1 << 20
MAX_OUTPUT = 64 << 20
MAX_DEPTH = 100
MAX_STEPS = 1_000_000
"""Nodes and values of one rendering: a request may bring a template, and must not keep the sidecar busy with it."""


class TemplateError(ValueError):
    """A template cannot be understood; ``line`` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line, self.reason = line, reason


# ---- nodes ----


@dataclass
class _Text:
    text: str


@dataclass
class _Field:
    names: list[str]
    of: Any = None  # an expression, or None for dot


@dataclass
class _Variable:
    name: str
    names: list[str]
    line: int


@dataclass
class _Literal:
    value: Any


@dataclass
class _Call:
    name: str
    arguments: list[Any]
    line: int


@dataclass
class _Action:
    pipe: Any
    assign: str | None = None
    declares: bool = False
    line: int = 0


@dataclass
class _Branch:
    kind: str  # if, with, range
    pipe: Any
    names: list[str]
    body: list[Any] = field(default_factory=list)
    otherwise: list[Any] = field(default_factory=list)
    line: int = 0


@dataclass
class _Jump:
    kind: str


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


# ---- functions ----


def _truth(value: Any) -> bool:
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
        text = _show(rest.pop(0))
        return json.dumps(text, ensure_ascii=False) if verb == "q" else text

    return re.sub(r"%(.?)", one, form, flags=re.DOTALL)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "not": lambda value: not _truth(value),
    "len": _length,
    "slice": _slice,
    "index": _index,
    "json": lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    "printf": _printf,
    "print": lambda *values: "".join(_show(v) for v in values),
    "currentDate": lambda *ignored: datetime.date.today().isoformat(),
    "yesterdayDate": lambda *ignored: (datetime.date.today() - datetime.timedelta(days=1)).isoformat(),
    # `and` and `or` are evaluated in place: they stop at the first argument that decides
    "and": lambda *values: None,
    "or": lambda *values: None,
}


def _show(value: Any) -> str:
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


# ---- parsing ----

_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<raw>`[^`]*`)|(?P<number>[+-]?[0-9][0-9_]*(?:\.[0-9]+)?)"""
    r"""|(?P<field>\.[A-Za-z_][A-Za-z0-9_]*)|(?P<variable>\$[A-Za-z0-9_]*)|(?P<word>[A-Za-z_][A-Za-z0-9_]*)"""
    r"""|(?P<mark>:=|[.|(),=])"""
)


@dataclass
class _Token:
    kind: str
    text: str
    line: int
    spaced: bool  # white space before it


class _Parser:
    def __init__(self, text: str) -> None:
        self.pieces = _split(text)
        self.at = 0
        self.depth = 0
        self.loops = 0

    def parse(self) -> list[Any]:
        nodes, stop = self.nodes(())
        if stop is not None:
            raise TemplateError(stop[1], f"{{{{ {stop[0]} }}}} has nothing to end")
        return nodes

    def deeper(self, line: int) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TemplateError(line, "the template is nested too deeply")

    def nodes(self, until: Sequence[str]) -> tuple[list[Any], tuple[str, int, list[_Token]] | None]:
        found: list[Any] = []
        self.deeper(1)
        while self.at < len(self.pieces):
            kind, text, line = self.pieces[self.at]
            self.at += 1
            if kind == "text":
                if text:
                    found.append(_Text(text))
                continue
            tokens = _tokens(text, line)
            if not tokens:
                raise TemplateError(line, "an empty {{ }}")
            word = tokens[0].text if tokens[0].kind == "word" else ""
            if word in ("end", "else"):
                self.depth -= 1
                return found, (word, tokens[0].line, tokens[1:])
            found.append(self.statement(word, tokens))
        self.depth -= 1
        if until:
            raise TemplateError(self.pieces[-1][2], f"{until[0]} has no end")
        return found, None

    def statement(self, word: str, tokens: list[_Token]) -> Any:
        line = tokens[0].line
        if word in ("if", "with", "range"):
            return self.branch(word, tokens[1:], line)
        if word in ("break", "continue") and len(tokens) == 1:
            if not self.loops:
                raise TemplateError(line, f"{word} outside of a range")
            return _Jump(word)
        if word in ("define", "template", "block"):
            raise TemplateError(line, f"{{{{ {word} }}}} is not supported")
        if tokens[0].kind == "variable" and len(tokens) > 2 and tokens[1].text in (":=", "="):
            pipe = _Expression(tokens[2:], line).whole()
            return _Action(pipe, tokens[0].text, tokens[1].text == ":=", line)
        return _Action(_Expression(tokens, line).whole(), line=line)

    def branch(self, kind: str, tokens: list[_Token], line: int) -> _Branch:
        names: list[str] = []
        assign = next((i for i, t in enumerate(tokens) if t.text == ":="), None)
        if assign is not None:
            names = [t.text for t in tokens[:assign] if t.kind == "variable"]
            marks = [t.text for t in tokens[:assign] if t.kind != "variable"]
            if not names or len(names) > (2 if kind == "range" else 1) or marks != [","] * (len(names) - 1):
                raise TemplateError(line, f"the variables of {kind} are not understood")
            tokens = tokens[assign + 1 :]
        node = _Branch(kind, _Expression(tokens, line).whole(), names, line=line)
        self.loops += kind == "range"
        node.body, stop = self.nodes((kind,))
        self.loops -= kind == "range"
        assert stop is not None
        if stop[0] == "else":
            rest = stop[2]
            if rest and rest[0].text in ("if", "with"):  # `else if`: a branch of its own that shares our end
                self.deeper(stop[1])
                node.otherwise = [self.branch(rest[0].text, rest[1:], stop[1])]
                self.depth -= 1
                return node
            if rest:
                raise TemplateError(stop[1], f"else {rest[0].text} is not supported")
            node.otherwise, stop = self.nodes((kind,))
            assert stop is not None
            if stop[0] == "else":
                raise TemplateError(stop[1], "a second else")
        if stop[2]:
            raise TemplateError(stop[1], "something follows end")
        return node


def _split(text: str) -> list[tuple[str, str, int]]:
    """Texts and actions with their lines, trimmed as the markers say."""
    pieces: list[tuple[str, str, int]] = []
    at, line, trim = 0, 1, False
    while True:
        start = text.find("{{", at)
        plain = text[at:] if start < 0 else text[at:start]
        first_line = line
        line += plain.count("\n")
        if trim:
            plain = plain.lstrip(" \t\r\n")
        left = start >= 0 and re.match(r"\{\{-[ \t\r\n]", text[start : start + 4])
        if left:
            plain = plain.rstrip(" \t\r\n")
        pieces.append(("text", plain, first_line))
        if start < 0:
            return pieces
        body_at = start + (3 if left else 2)
        comment = re.compile(r"\s*/\*(.*?)\*/(\s-)?\}\}", re.DOTALL).match(text, body_at)
        if comment:
            trim, end = bool(comment[2]), comment.end()
        else:
            end = _end_of(text, body_at, line)
            body = text[body_at : end - 2]
            trim = bool(re.search(r"[ \t\r\n]-$", body))
            pieces.append(("action", body[:-1] if trim else body, line))
        line += text.count("\n", start, end)
        at = end


def _end_of(text: str, at: int, line: int) -> int:
    """Past the ``}}`` of an action; those in strings do not count."""
    pattern = re.compile(r'"(?:[^"\\\n]|\\.)*"|`[^`]*`|\}\}')
    while match := pattern.search(text, at):
        if match[0] == "}}":
            return match.end()
        at = match.end()
    raise TemplateError(line, "{{ without }}")


def _tokens(text: str, line: int) -> list[_Token]:
    found: list[_Token] = []
    at, spaced = 0, True
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise TemplateError(line, f"{text[at]!r} is not understood")
        kind = str(match.lastgroup)
        if kind != "space":
            found.append(_Token(kind, match[0], line, spaced))
        spaced = kind == "space"
        line += match[0].count("\n")
        at = match.end()
    return found


class _Expression:
    """Parses a pipeline from tokens."""

    def __init__(self, tokens: list[_Token], line: int) -> None:
        self.tokens, self.at, self.line = tokens, 0, line
        self.depth = 0

    def whole(self) -> Any:
        node = self.pipe()
        if self.at < len(self.tokens):
            raise TemplateError(self.tokens[self.at].line, f"{self.tokens[self.at].text!r} is not expected here")
        return node

    def peek(self) -> _Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def pipe(self) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TemplateError(self.line, "too many parentheses")
        node = self.command(None)
        while (token := self.peek()) and token.text == "|" and token.kind == "mark":
            self.at += 1
            node = self.command(node)
        self.depth -= 1
        return node

    def command(self, piped: Any) -> Any:
        token = self.peek()
        if token is None:
            raise TemplateError(self.line, "a value is missing")
        if token.kind == "word" and token.text not in ("true", "false", "nil"):
            self.at += 1
            if token.text not in FUNCTIONS:
                raise TemplateError(token.line, f"the function {token.text} is not supported")
            arguments = []
            while (following := self.peek()) and following.text not in ("|", ")"):
                arguments.append(self.operand())
            return _Call(token.text, arguments + ([] if piped is None else [piped]), token.line)
        if piped is not None:
            raise TemplateError(token.line, "a value cannot be piped into a value")
        node = self.operand()
        following = self.peek()
        if following is not None and following.text not in ("|", ")"):
            raise TemplateError(following.line, f"{following.text!r} is not expected here: methods are not supported")
        return node

    def operand(self) -> Any:
        token = self.tokens[self.at]
        self.at += 1
        if token.kind == "field":
            return _Field([token.text[1:], *self.fields()])
        if token.kind == "variable":
            return _Variable(token.text, self.fields(), token.line)
        if token.text == "." and token.kind == "mark":
            return _Field([])
        if token.text == "(" and token.kind == "mark":
            node = self.pipe()
            closing = self.peek()
            if closing is None or closing.text != ")":
                raise TemplateError(token.line, "( without )")
            self.at += 1
            names = self.fields()
            return _Field(names, node) if names else node
        return _literal(token)

    def fields(self) -> list[str]:
        names = []
        while (token := self.peek()) and token.kind == "field" and not token.spaced:
            names.append(token.text[1:])
            self.at += 1
        return names


def _literal(token: _Token) -> Any:
    if token.kind == "string":
        try:
            return _Literal(json.loads(token.text))
        except ValueError:
            raise TemplateError(token.line, f"the text {token.text[:40]} has a bad escape") from None
    if token.kind == "raw":
        return _Literal(token.text[1:-1])
    if token.kind == "number":
        digits = token.text.replace("_", "")
        if len(digits) > 20:
            raise TemplateError(token.line, f"the number {digits[:20]}… is too long")
        return _Literal(float(digits) if "." in digits else int(digits))
    if token.kind == "word" and token.text in ("true", "false", "nil"):
        return _Literal({"true": True, "false": False, "nil": None}[token.text])
    if token.kind == "word":
        return _Call(_known(token), [], token.line)
    raise TemplateError(token.line, f"{token.text!r} is not expected here")


def _known(token: _Token) -> str:
    if token.text not in FUNCTIONS:
        raise TemplateError(token.line, f"the function {token.text} is not supported")
    return token.text


# ---- running ----


class _Run:
    """One rendering: the output so far and the variables."""

    def __init__(self, data: Any) -> None:
        self.scopes: list[dict[str, Any]] = [{"$": data}]
        self.out: list[str] = []
        self.size = 0
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateError(1, "the template takes too many steps")

    def write(self, text: str) -> None:
        self.size += len(text)
        if self.size > MAX_OUTPUT:
            raise TemplateError(1, "the prompt becomes too long")
        self.out.append(text)

    def nodes(self, nodes: list[Any], dot: Any) -> None:
        for node in nodes:
            self.step()
            if isinstance(node, _Text):
                self.write(node.text)
            elif isinstance(node, _Action):
                self.action(node, dot)
            elif isinstance(node, _Jump):
                raise _Break if node.kind == "break" else _Continue
            else:
                self.branch(node, dot)

    def action(self, node: _Action, dot: Any) -> None:
        value = self.value(node.pipe, dot)
        if node.assign is None:
            self.write(_show(value))
        elif node.declares:
            self.scopes[-1][node.assign] = value
        else:
            self.scope_of(node.assign, node.line)[node.assign] = value

    def scope_of(self, name: str, line: int) -> dict[str, Any]:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope
        raise TemplateError(line, f"the variable {name} does not exist here")

    def branch(self, node: _Branch, dot: Any) -> None:
        self.scopes.append({})
        try:
            value = self.value(node.pipe, dot)
            if node.kind == "range":
                self.loop(node, value, dot)
                return
            if node.names:
                self.scopes[-1][node.names[0]] = value
            if _truth(value):
                self.nodes(node.body, value if node.kind == "with" else dot)
            else:
                self.nodes(node.otherwise, dot)
        finally:
            self.scopes.pop()

    def loop(self, node: _Branch, value: Any, dot: Any) -> None:
        pairs: Sequence[tuple[Any, Any]]
        if isinstance(value, Mapping):
            pairs = sorted(value.items())
        elif isinstance(value, int) and not isinstance(value, bool):
            pairs = [(i, i) for i in range(min(value, MAX_STEPS + 1))]
        elif isinstance(value, list | tuple) or value is None:
            pairs = list(enumerate(value or ()))
        else:
            raise TemplateError(node.line, "range needs a list")
        if not pairs:
            self.nodes(node.otherwise, dot)
        for key, item in pairs:
            self.step()
            self.scopes.append(dict(zip(node.names, (key, item) if len(node.names) == 2 else (item,), strict=False)))
            try:
                self.nodes(node.body, item)
            except _Break:
                break
            except _Continue:
                continue
            finally:
                self.scopes.pop()

    def value(self, node: Any, dot: Any) -> Any:
        self.step()
        if isinstance(node, _Literal):
            return node.value
        if isinstance(node, _Field):
            return _get(dot if node.of is None else self.value(node.of, dot), node.names)
        if isinstance(node, _Variable):
            return _get(self.scope_of(node.name, node.line)[node.name], node.names)
        if node.name in ("and", "or"):
            result: Any = None
            for argument in node.arguments:
                result = self.value(argument, dot)
                if _truth(result) == (node.name == "or"):
                    break
            return result
        arguments = [self.value(argument, dot) for argument in node.arguments]
        try:
            return FUNCTIONS[node.name](*arguments)
        except (TypeError, ValueError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else "its arguments are not of the kind it takes"
            raise TemplateError(node.line, f"{node.name}: {reason}") from None


def _get(value: Any, names: list[str]) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


class Template:
    """A TEMPLATE, parsed. Raises TemplateError.

    ``uses``: the first names of all fields, in lower case (``messages``, ``prompt``, ``tools`` ...).
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_TEMPLATE:
            raise TemplateError(1, f"{len(text)} characters are too long")
        self.text = text
        self._nodes = _Parser(text).parse()
        self.uses = {name.lower() for name in _names(self._nodes)}
        if not self.uses & {"messages", "response"}:
            self._nodes.append(_Action(_Field(["Response"])))
        # what follows the response belongs to a finished turn, and the last one is not finished
        self._open, _ = _cut(self._nodes)

    def execute(self, data: Mapping[str, Any], *, last: bool = False) -> str:
        """The text for some values; ``last``: only up to the response."""
        run = _Run(data)
        run.nodes(self._open if last else self._nodes, data)
        return "".join(run.out)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Any = None,
        think: bool | str | None = None,
    ) -> str:
        """The prompt of a conversation, as Ollama builds it. ``messages`` have ``role`` and ``content``, and perhaps more."""
        extra = {
            "Think": bool(think),
            "ThinkLevel": think if isinstance(think, str) else "",
            "IsThinkSet": think is not None,
        }
        system, joined = _collate(messages)
        if "messages" in self.uses:
            return self.execute({"System": system, "Messages": joined, "Tools": tools, "Response": "", **extra})
        return self._turns(joined, extra)

    def insert(self, prompt: str, suffix: str) -> str:
        """The prompt that fills the gap between two texts."""
        return self.execute({"Prompt": prompt, "Suffix": suffix, "Response": ""})

    def _turns(self, messages: list[dict[str, Any]], extra: dict[str, Any]) -> str:
        """Templates without ``.Messages`` are run once for each turn."""
        out: list[str] = []
        turn = {"System": "", "Prompt": "", "Response": ""}

        def close() -> None:
            out.append(self.execute({**turn, **extra}))
            turn.update(System="", Prompt="", Response="")

        for message in messages:
            role, content = message["Role"], message["Content"]
            if role == "system":
                if turn["Prompt"] or turn["Response"]:
                    close()
                turn["System"] = content
            elif role == "user":
                if turn["Response"]:
                    close()
                turn["Prompt"] = content
            elif role == "assistant":
                turn["Response"] = content
        out.append(self.execute({**turn, **extra}, last=True))
        return "".join(out)


def _collate(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """All system texts, and the messages under Go's names; neighbours of one role become one."""
    system: list[str] = []
    joined: list[dict[str, Any]] = []
    for message in messages:
        role, content = str(message.get("role")), str(message.get("content") or "")
        if role == "system":
            system.append(content)
        if joined and joined[-1]["Role"] == role and role != "tool":
            joined[-1]["Content"] += "\n\n" + content
            continue
        calls = [
            {"ID": call.get("id", ""), "Function": _titled(call.get("function") or {})}
            for call in message.get("tool_calls") or ()
        ]
        names = {"Thinking": "thinking", "ToolName": "tool_name", "ToolCallID": "tool_call_id"}
        entry = {"Role": role, "Content": content, "ToolCalls": calls}
        joined.append({**entry, **{go: str(message.get(key) or "") for go, key in names.items()}})
    return "\n\n".join(system), joined


def _titled(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"Name": function.get("name", ""), "Arguments": function.get("arguments") or {}}


def _names(node: Any) -> list[str]:
    """First names of the fields in a tree."""
    if isinstance(node, list):
        return [name for one in node for name in _names(one)]
    if isinstance(node, _Field):
        return node.names[:1] + (_names(node.of) if node.of is not None else [])
    if isinstance(node, _Variable):
        return node.names[:1]
    if isinstance(node, _Call):
        return _names(node.arguments)
    if isinstance(node, _Action):
        return _names(node.pipe)
    if isinstance(node, _Branch):
        return _names(node.pipe) + _names(node.body) + _names(node.otherwise)
    return []


def _cut(nodes: list[Any]) -> tuple[list[Any], bool]:
    """The tree up to the first node that uses ``.Response``."""
    kept: list[Any] = []
    for node in nodes:
        if isinstance(node, _Branch):
            found = "Response" in _names(node.pipe)
            body, in_body = ([], True) if found else _cut(node.body)
            otherwise, in_other = ([], True) if found or in_body else _cut(node.otherwise)
            kept.append(_Branch(node.kind, node.pipe, node.names, body, otherwise, node.line))
            if found or in_body or in_other:
                return kept, True
        else:
            kept.append(node)
            if "Response" in _names(node):
                return kept, True
    return kept, False
