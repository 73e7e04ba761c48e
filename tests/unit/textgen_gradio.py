"""A stand-in for gradio: components remember what they were made with and what happens on which event."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

KINDS = "Accordion Button Checkbox CheckboxGroup Column Dropdown HTML Markdown Radio Row Slider Textbox".split()
EVENTS = "blur change click input load select submit then".split()


class Component:
    """Any component. ``events``: event -> (handler, inputs, outputs)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options
        self.events: dict[str, tuple[Callable[..., Any], list[Any], list[Any]]] = {}

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name not in EVENTS:
            raise AttributeError(name)

        def listen(fn: Any, inputs: Any = None, outputs: Any = None, **_: Any) -> Component:
            self.events[name] = (fn, list(inputs or []), list(outputs or []))
            return self

        return listen


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it what ``import gradio`` finds, and let the tab be imported anew on it."""
    module: Any = ModuleType("gradio")
    for kind in KINDS:
        setattr(module, kind, type(kind, (Component,), {}))
    module.update = lambda **changes: changes
    module.context = type("context", (), {"Context": type("Context", (), {"block": None})})
    monkeypatch.setitem(sys.modules, "gradio", module)
    import steer_plugins_textgen

    for name in ("tab", "shared", "wording"):
        monkeypatch.delitem(sys.modules, f"steer_plugins_textgen.{name}", raising=False)
        monkeypatch.delattr(steer_plugins_textgen, name, raising=False)


class Page:
    """What a user does and sees: events on the tab's components, and the values that they lead to."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.shown: dict[int, Any] = {}

    def do(self, component: Any, event: str, *values: Any) -> None:
        """Let an event happen. A handler has to give a value for each of its outputs."""
        handler, inputs, outputs = component.events[event]
        assert len(values) == len(inputs)
        found = handler(*values)
        results = list(found) if hasattr(found, "__next__") else [found]
        assert results  # gradio sets every output to null when a generator yields nothing
        for result in results:
            answers = result if len(outputs) > 1 else [result][: len(outputs)]
            assert len(answers) == len(outputs)
            for output, answer in zip(outputs, answers, strict=True):
                if isinstance(answer, dict):
                    self.shown.setdefault(id(output), {}).update(answer)
                else:
                    self.shown[id(output)] = {"value": answer}

    def value(self, component: Any, what: str = "value") -> Any:
        return self.shown.get(id(component), {}).get(what)
