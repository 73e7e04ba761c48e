"""Run ``server.py`` of a text-generation-webui whose Python has gradio 4.37 of the package index, not the webui's build of it.

What the webui's build adds is stood in for: ``Headless`` and ``DragDrop``, ``Blocks(dark_theme=…)``. And newer versions of two
libraries, which its requirements name, are made to look as that gradio expects. With the webui's own build nothing is changed.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any


def stand_in() -> None:
    """Make gradio what the webui expects."""
    import huggingface_hub

    if not hasattr(huggingface_hub, "HfFolder"):
        huggingface_hub.HfFolder = type("HfFolder", (), {"get_token": staticmethod(lambda: None)})  # type: ignore[attr-defined]
    import gradio as gr
    import gradio.networking
    import gradio_client.utils as schemas

    if hasattr(gr, "Headless"):
        return
    described = schemas._json_schema_to_python_type

    def describe(schema: Any, defs: Any = None) -> str:  # pydantic 2.11 writes true for "anything"
        return "Any" if isinstance(schema, bool) else str(described(schema, defs))

    schemas._json_schema_to_python_type = describe
    gradio.networking.url_ok = lambda url: True  # it waits three seconds for its own page, which a busy machine takes longer for
    make_blocks = gr.Blocks.__init__

    def blocks(self: Any, *args: Any, dark_theme: bool = True, css: str = "", js: str = "", head: str = "", **more: Any) -> None:
        hidden = "\n.headless { display: none !important }"
        dark = "<script>addEventListener('load', () => document.body.classList.add('dark'))</script>" if dark_theme else ""
        more.update({"js": js} if js else {})
        make_blocks(self, *args, css=css + hidden, head=head + dark, **more)

    gr.Blocks.__init__ = blocks

    def headless(value: Any = None) -> Any:
        """A value that reaches the page's scripts and is not shown."""
        return gr.JSON(value, elem_classes=["headless"])

    def drag_drop(value: Any = None, **more: Any) -> Any:
        """A list to put in order: here its text."""
        return gr.Textbox("\n".join(value) if isinstance(value, list) else value, **more)

    gr.Headless, gr.DragDrop = headless, drag_drop


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = ""
    stand_in()
    runpy.run_path(sys.argv[0], run_name="__main__")
