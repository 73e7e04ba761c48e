"""All that is known of the webui's own modules. They are looked up when they are needed, never at import."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any


def module(name: str) -> Any:
    """``modules.NAME`` of the webui."""
    return import_module(f"modules.{name}")


def shared() -> Any:
    """The webui's global state: ``args``, ``model``, ``model_name``, ``settings``, ``gradio``."""
    return module("shared")


def log(sentence: str, *, error: bool = False) -> None:
    """Say something in the webui's console."""
    logger = module("logging_colors").logger
    (logger.error if error else logger.info)(f"Steering: {sentence}")


def enabled() -> bool:
    """Whether the extension is among those that are switched on now. Patches stay in place, and do nothing without it."""
    state = module("extensions").state
    return _starting or any(on and getattr(extension, "STEER_PLUGINS", False) for on, _, extension in list(state.values()))


_starting = False


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Count as switched on while ``setup()`` runs: the webui lists an extension only after that."""
    global _starting
    _starting = True
    try:
        yield
    finally:
        _starting = False


def data_dir() -> Path:
    """Where our settings are kept: ``user_data/steering``."""
    return Path(shared().user_data_dir) / "steering"


def loader_name() -> str:
    """The loader of the model that is loaded, ``""`` without one."""
    return str(shared().args.loader or "") if shared().model is not None else ""


def llama_server() -> Any | None:
    """The running ``LlamaServer`` object, None without a model or with another loader."""
    model = shared().model
    return model if model is not None and type(model).__name__ == "LlamaServer" else None


def multi_user() -> bool:
    """Whether strangers share this page: its widgets are one set for all of them, so none may be moved."""
    return bool(getattr(shared().args, "multi_user", False))


def open_to_others() -> bool:
    """Whether the page can be reached from other machines: then it names vectors of the library, and no files."""
    return any(getattr(shared().args, flag, False) for flag in ("listen", "share"))


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Count as a generation, so that the webui's idle timer does not unload the model meanwhile."""
    models = module("models")
    lock = getattr(models, "_generation_count_lock", contextlib.nullcontext())
    counts = hasattr(models, "active_generation_count")

    def count(step: int) -> None:
        if counts:
            with lock:
                models.active_generation_count += step

    count(1)
    try:
        yield
    finally:
        count(-1)


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``make(original)``, once, however often the extension is set up."""
    original = getattr(owner, name)
    if getattr(original, "steer_plugins", False):
        return
    wrapper = make(original)
    wrapper.steer_plugins = True
    setattr(owner, name, wrapper)


def loaded(name: str) -> bool:
    """Whether ``modules.NAME`` has been imported already."""
    return f"modules.{name}" in sys.modules
