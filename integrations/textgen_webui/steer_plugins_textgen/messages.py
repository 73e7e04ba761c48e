"""The steering of each reply, kept with it in the chat's history and said where the webui says its model: over the message."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from steer_plugins.steering.grammar import format_terms

from . import webui, wording
from .link import current_or_none
from .settings import settings


def patch() -> None:
    """Let the webui keep and show it. Does nothing where the webui has no such functions."""
    for module, name, make in (("chat", "update_message_metadata", _kept), ("html_generator", "get_message_tooltip", _shown)):
        owner = webui.module(module)
        if hasattr(owner, name):
            webui.wrap(owner, name, make)


def _kept(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update_message_metadata(metadata: Any, role: str, index: int, **fields: Any) -> Any:
        if role == "assistant" and "model_name" in fields and webui.enabled() and not webui.multi_user():
            # also "", for a reply that takes the place of a steered one
            fields["steering"] = format_terms(wording.acting(current_or_none(), settings().active)[0])
        return original(metadata, role, index, **fields)

    return update_message_metadata


def _shown(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_message_tooltip(history: Any, role: str, index: int, *rest: Any, **more: Any) -> Any:
        said = original(history, role, index, *rest, **more)
        steering = history.get("metadata", {}).get(f"{role}_{index}", {}).get("steering")
        return " | ".join(filter(None, [said, f"Steering: {steering}"])) if steering else said

    return get_message_tooltip
