"""What text-generation-webui looks for in a script: ``params``, ``setup``, ``ui``, ``custom_css``, ``custom_js``."""

from __future__ import annotations

from typing import Any

__all__ = ["STEER_PLUGINS", "custom_css", "custom_js", "params", "setup", "ui"]

STEER_PLUGINS = True
"""How our patches know that the extension is on, under whatever name the folder has."""

params: dict[str, Any] = {"display_name": "Steering", "is_tab": True}


def setup() -> None:
    """Called after the first model load, again at each "Apply flags/extensions and restart", and with ``--nowebui``."""
    from . import api, hooks, loader, messages, webui

    with webui.starting():
        loader.patch()
        hooks.patch()
        loader.adopt()
        api.patch()
        messages.patch()


def ui() -> None:
    """Build the tab. Called inside the page's ``gr.Blocks``."""
    from .tab import build

    build()


def custom_css() -> str:
    """Styles of the tab, for both themes."""
    from .looks import CSS

    return CSS


def custom_js() -> str:
    """What draws the sliders."""
    from pathlib import Path

    return Path(__file__).with_name("page.js").read_text("utf-8")
