"""From the text of a template to its nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .functions import FUNCTIONS
from .nodes import Action, Branch, Call, Field, Jump, Literal, TemplateError, Text, Variable

MAX_DEPTH = 100

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


class Parser:
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
                    found.append(Text(text))
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
            return Jump(word)
        if word in ("define", "template", "block"):
            raise TemplateError(line, f"{{{{ {word} }}}} is not supported")
        if tokens[0].kind == "variable" and len(tokens) > 2 and tokens[1].text in (":=", "="):
            pipe = _Expression(tokens[2:], line).whole()
            return Action(pipe, tokens[0].text, tokens[1].text == ":=", line)
        return Action(_Expression(tokens, line).whole(), line=line)

    def branch(self, kind: str, tokens: list[_Token], line: int) -> Branch:
        names: list[str] = []
        assign = next((i for i, t in enumerate(tokens) if t.text == ":="), None)
        if assign is not None:
            names = [t.text for t in tokens[:assign] if t.kind == "variable"]
            marks = [t.text for t in tokens[:assign] if t.kind != "variable"]
            if not names or len(names) > (2 if kind == "range" else 1) or marks != [","] * (len(names) - 1):
                raise TemplateError(line, f"the variables of {kind} are not understood")
            tokens = tokens[assign + 1 :]
        node = Branch(kind, _Expression(tokens, line).whole(), names, line=line)
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
            return Call(token.text, arguments + ([] if piped is None else [piped]), token.line)
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
            return Field([token.text[1:], *self.fields()])
        if token.kind == "variable":
            return Variable(token.text, self.fields(), token.line)
        if token.text == "." and token.kind == "mark":
            return Field([])
        if token.text == "(" and token.kind == "mark":
            node = self.pipe()
            closing = self.peek()
            if closing is None or closing.text != ")":
                raise TemplateError(token.line, "( without )")
            self.at += 1
            names = self.fields()
            return Field(names, node) if names else node
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
            return Literal(json.loads(token.text))
        except ValueError:
            raise TemplateError(token.line, f"the text {token.text[:40]} has a bad escape") from None
    if token.kind == "raw":
        return Literal(token.text[1:-1])
    if token.kind == "number":
        digits = token.text.replace("_", "")
        if len(digits) > 20:
            raise TemplateError(token.line, f"the number {digits[:20]}… is too long")
        return Literal(float(digits) if "." in digits else int(digits))
    if token.kind == "word" and token.text in ("true", "false", "nil"):
        return Literal({"true": True, "false": False, "nil": None}[token.text])
    if token.kind == "word":
        return Call(_known(token), [], token.line)
    raise TemplateError(token.line, f"{token.text!r} is not expected here")


def _known(token: _Token) -> str:
    if token.text not in FUNCTIONS:
        raise TemplateError(token.line, f"the function {token.text} is not supported")
    return token.text
