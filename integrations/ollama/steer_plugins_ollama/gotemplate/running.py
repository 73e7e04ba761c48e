"""From nodes and values to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .functions import FUNCTIONS, show, truth
from .nodes import Action, Branch, Field, Jump, Literal, TemplateError, Text, Variable

MAX_OUTPUT = 64 << 20
MAX_STEPS = 1_000_000
"""Nodes and values of one rendering: a request may bring a template, and must not keep the sidecar busy with it."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class Run:
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
            if isinstance(node, Text):
                self.write(node.text)
            elif isinstance(node, Action):
                self.action(node, dot)
            elif isinstance(node, Jump):
                raise _Break if node.kind == "break" else _Continue
            else:
                self.branch(node, dot)

    def action(self, node: Action, dot: Any) -> None:
        value = self.value(node.pipe, dot)
        if node.assign is None:
            self.write(show(value))
        elif node.declares:
            self.scopes[-1][node.assign] = value
        else:
            self.scope_of(node.assign, node.line)[node.assign] = value

    def scope_of(self, name: str, line: int) -> dict[str, Any]:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope
        raise TemplateError(line, f"the variable {name} does not exist here")

    def branch(self, node: Branch, dot: Any) -> None:
        self.scopes.append({})
        try:
            value = self.value(node.pipe, dot)
            if node.kind == "range":
                self.loop(node, value, dot)
                return
            if node.names:
                self.scopes[-1][node.names[0]] = value
            if truth(value):
                self.nodes(node.body, value if node.kind == "with" else dot)
            else:
                self.nodes(node.otherwise, dot)
        finally:
            self.scopes.pop()

    def loop(self, node: Branch, value: Any, dot: Any) -> None:
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
        if isinstance(node, Literal):
            return node.value
        if isinstance(node, Field):
            return _get(dot if node.of is None else self.value(node.of, dot), node.names)
        if isinstance(node, Variable):
            return _get(self.scope_of(node.name, node.line)[node.name], node.names)
        if node.name in ("and", "or"):
            result: Any = None
            for argument in node.arguments:
                result = self.value(argument, dot)
                if truth(result) == (node.name == "or"):
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
