"""What a template is made of, once parsed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class TemplateError(ValueError):
    """A template cannot be understood; ``line`` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line, self.reason = line, reason


@dataclass
class Text:
    text: str


@dataclass
class Field:
    names: list[str]
    of: Any = None  # an expression, or None for dot


@dataclass
class Variable:
    name: str
    names: list[str]
    line: int


@dataclass
class Literal:
    value: Any


@dataclass
class Call:
    name: str
    arguments: list[Any]
    line: int


@dataclass
class Action:
    pipe: Any
    assign: str | None = None
    declares: bool = False
    line: int = 0


@dataclass
class Branch:
    kind: str  # if, with, range
    pipe: Any
    names: list[str]
    body: list[Any] = field(default_factory=list)
    otherwise: list[Any] = field(default_factory=list)
    line: int = 0


@dataclass
class Jump:
    kind: str
