"""A TEMPLATE as Ollama uses it: the prompt of a conversation, and of a gap between two texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .nodes import Action, Branch, Call, Field, TemplateError, Variable
from .parsing import Parser
from .running import Run

MAX_TEMPLATE = 1 << 20


class Template:
    """A TEMPLATE, parsed. Raises TemplateError.

    ``uses``: the first names of all fields, in lower case (``messages``, ``prompt``, ``tools`` ...).
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_TEMPLATE:
            raise TemplateError(1, f"{len(text)} characters are too long")
        self.text = text
        self._nodes = Parser(text).parse()
        self.uses = {name.lower() for name in _names(self._nodes)}
        if not self.uses & {"messages", "response"}:
            self._nodes.append(Action(Field(["Response"])))
        # what follows the response belongs to a finished turn, and the last one is not finished
        self._open, _ = _cut(self._nodes)

    def execute(self, data: Mapping[str, Any], *, last: bool = False) -> str:
        """The text for some values; ``last``: only up to the response."""
        run = Run(data)
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
    if isinstance(node, Field):
        return node.names[:1] + (_names(node.of) if node.of is not None else [])
    if isinstance(node, Variable):
        return node.names[:1]
    if isinstance(node, Call):
        return _names(node.arguments)
    if isinstance(node, Action):
        return _names(node.pipe)
    if isinstance(node, Branch):
        return _names(node.pipe) + _names(node.body) + _names(node.otherwise)
    return []


def _cut(nodes: list[Any]) -> tuple[list[Any], bool]:
    """The tree up to the first node that uses ``.Response``."""
    kept: list[Any] = []
    for node in nodes:
        if isinstance(node, Branch):
            found = "Response" in _names(node.pipe)
            body, in_body = ([], True) if found else _cut(node.body)
            otherwise, in_other = ([], True) if found or in_body else _cut(node.otherwise)
            kept.append(Branch(node.kind, node.pipe, node.names, body, otherwise, node.line))
            if found or in_body or in_other:
                return kept, True
        else:
            kept.append(node)
            if "Response" in _names(node):
                return kept, True
    return kept, False
