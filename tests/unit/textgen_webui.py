"""A stand-in for text-generation-webui: the names of its modules that the extension uses, doing as little as possible."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class StandIn:
    """The modules are attributes: ``shared``, ``models``, ``extensions``, ``llama_cpp_server``, ``text_generation``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, user_data: Path) -> None:
        self._monkeypatch = monkeypatch
        self._module("modules")
        self.shared = self._module("modules.shared")
        args = SimpleNamespace(
            loader="llama.cpp", ik=False, multi_user=False, api=False, public_api=False, extensions=["steering"]
        )
        vars(self.shared).update(model=None, tokenizer=None, model_name="None", args=args, user_data_dir=user_data, gradio={})
        self.lines: list[str] = []
        logger = SimpleNamespace(info=self.lines.append, error=self.lines.append)
        vars(self._module("modules.logging_colors")).update(logger=logger)
        self.extensions = self._module("modules.extensions")
        self.switch(True)
        self.logits = self._module("modules.logits")
        self.logits._get_next_logits = lambda prompt, state, use_samplers, previous: "logits"  # type: ignore[attr-defined]
        self.models = self._module("modules.models")
        vars(self.models).update(
            active_generation_count=0, _generation_count_lock=threading.Lock(), load_model=self.load, unload_model=self.unload
        )
        self.llama_cpp_server = self._module("modules.llama_cpp_server")
        self.llama_cpp_server.LlamaServer = self._server_class()  # type: ignore[attr-defined]
        self.text_generation = self._module("modules.text_generation")
        self.text_generation.generate_reply_HF = self._generate_hf  # type: ignore[attr-defined]
        self._module("modules.api")
        self.chat, self.html_generator = self._module("modules.chat"), self._module("modules.html_generator")
        self.chat.update_message_metadata = lambda kept, role, i, **more: kept.setdefault(f"{role}_{i}", {}).update(more)
        self.html_generator.get_message_tooltip = lambda history, role, i: "Model: m"
        self.started: list[str] = []  # server paths, in the order of starting
        self.breaks: set[str] = set()  # server paths that do not start
        self.port = 0
        self.posted: list[dict[str, Any]] = []

    def _module(self, name: str) -> Any:
        module = ModuleType(name)
        self._monkeypatch.setitem(sys.modules, name, module)
        return module

    on_post: Any = None
    """Called with what is posted for a reply; may raise."""

    def switch(self, on: bool) -> None:
        """Switch the extension on or off, as the Session tab does."""
        extension = SimpleNamespace(STEER_PLUGINS=True)
        self.extensions.state = {"steering": [True, 0, extension]} if on else {}

    def _server_class(self) -> Any:
        webui = self

        class LlamaServer:
            def __init__(self, model_path: Any, server_path: Any = None) -> None:
                self.model_path, self.server_path = model_path, server_path or "stock"
                self.stopped = False
                webui.started.append(str(self.server_path))
                self.port = webui.port
                self.process = SimpleNamespace(args=[self.server_path, "--model", model_path, "--flash-attn", "on"])
                if str(self.server_path) in webui.breaks:
                    raise RuntimeError("Server process terminated unexpectedly with exit code: 1")

            def prepare_payload(self, state: dict[str, Any]) -> dict[str, Any]:
                return {"temperature": state["temperature"]}

            def generate_with_streaming(self, prompt: Any, state: dict[str, Any]) -> Any:
                webui.posted.append(self.prepare_payload(state))
                if webui.on_post is not None:
                    webui.on_post(webui.posted[-1])
                yield "one"
                yield "one two"

            def stop(self) -> None:
                self.stopped = True

        return LlamaServer

    def load(self, name: str, loader: Any = None) -> Any:
        self.shared.model_name = name
        server = self.llama_cpp_server.LlamaServer(name)
        return server, server

    def unload(self, keep_model_name: bool = False) -> None:
        self.shared.model.stop()
        self.shared.model = self.shared.tokenizer = None

    def _generate_hf(self, question: Any, original: Any, state: Any, *rest: Any, **more: Any) -> Any:
        yield "hf"
