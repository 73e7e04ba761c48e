"""Our llama-server under the llama.cpp loader: put there, checked before a loaded model is touched, taken back if it fails."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer_plugins.errors import SteerError
from steer_plugins.steering.grammar import TermSpec

from . import replies, webui, wishes
from .link import Link, current_or_none, link_of
from .settings import settings

TIMEOUT = 60
"""Seconds a llama-server gets to say what it takes; loading a GPU's libraries may be slow."""

LOST = "The webui's own build also returns log-probabilities of prompts (`prompt_logprobs`); this server does not."

_DEVICE = re.compile(r"^\s+(\w+):\s+(.+?)(?:\s+\(\d+ MiB.*\))?$")


@dataclass
class State:
    """What became of the swap. ``problem``: why our server is not in use, one sentence; "" when it is."""

    server: str = ""
    problem: str = ""
    notes: list[str] = field(default_factory=list)


state = State()


def patch() -> None:
    """Wrap the methods of ``LlamaServer`` that matter; what runs already is not touched."""
    cls = webui.module("llama_cpp_server").LlamaServer
    webui.wrap(cls, "__init__", _init)
    webui.wrap(cls, "prepare_payload", _prepare_payload)
    webui.wrap(cls, "generate_with_streaming", _generate_with_streaming)


def _init(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, model_path: Any, server_path: Any = None) -> None:
        ours = None
        if server_path is None and webui.enabled():
            ours = candidate()
        if ours is not None:
            try:
                original(self, model_path, ours)
                state.server, state.problem = ours, ""
                return
            except Exception as error:  # whatever it is, the webui's own server may do better
                state.server = ""
                state.problem = f"the steering server did not start ({_line(error)}), so the webui's own is in use"
                webui.log(state.problem, error=True)
                with contextlib.suppress(Exception):
                    self.stop()
        original(self, model_path, server_path)

    return __init__


def _prepare_payload(original: Any) -> Any:
    @functools.wraps(original)
    def prepare_payload(self: Any, state: dict[str, Any]) -> Any:
        payload = original(self, state)
        if webui.enabled():
            payload.update(_fields(self, state))
        return payload

    return prepare_payload


def _generate_with_streaming(original: Any) -> Any:
    @functools.wraps(original)
    def generate_with_streaming(self: Any, prompt: Any, state: dict[str, Any]) -> Any:
        text = ""
        for attempt in (1, 2):
            state["steering_following"] = following = Following()
            try:
                for text in original(self, prompt, state):
                    yield text
                return
            except Exception:
                if text or attempt == 2 or not following.lost():
                    raise
            finally:
                state.pop("steering_following", None)
                if following.link is not None and following.name:
                    replies.remember(prompt, state, text, following.link.end(following.name))

    return generate_with_streaming


@dataclass
class Following:
    """A reply under way. Those of the page have a name and are told of moved sliders. Asking for logits is none."""

    link: Link | None = None
    name: str = ""
    fields: dict[str, Any] = field(default_factory=dict)

    def lost(self) -> bool:
        """Whether the server has lost a vector that the reply needs: then it is asked for once more."""
        with contextlib.suppress(SteerError):
            return bool(self.fields.get("steering")) and self.link is not None and self.link.engine.lost(self.fields)
        return False


def _fields(server: Any, generation: dict[str, Any]) -> dict[str, Any]:
    """What is added to a request to llama-server. A fault in a request of the API was refused before this; in the page,
    terms that the model has no vectors for are left out, which the tab shows, and the console."""
    wish = wishes.wish_of(generation, settings())
    page = wishes.from_page(generation)
    if wish is None:
        return {}
    try:
        link = link_of(server)
    except SteerError as error:
        if wish:
            if not page:
                raise
            webui.log(f"the reply is not steered: {error}", error=True)
        return {}
    following = generation.get("steering_following")
    fields = _page_fields(link, wish, following) if page else link.fields(wish)
    if following is not None:
        following.link, following.fields = link, fields
    return fields


def _page_fields(link: Link, wish: list[TermSpec], following: Following | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    good: list[TermSpec] = []
    if wish:
        good, wrong = link.usable(wish)
        for sentence in wrong:
            webui.log(f"left out: {sentence}", error=True)
        fields = link.fields(good)
    if following is not None:
        following.name = fields["request_id"] = link.begin(good)
    return fields


# ---- which server ----


def candidate() -> str | None:
    """Our server, when it may take the place of the webui's; None with ``state.problem`` saying why not."""
    state.server = ""
    ours, state.problem = find_server()
    if ours is None:
        return None
    if getattr(webui.shared().args, "ik", False):
        state.problem = "the webui runs with --ik, whose flags and quantisations are not llama.cpp's: leave it out to steer"
        return None
    state.problem = cpu_problem(ours)
    return None if state.problem else ours


def cpu_problem(ours: str) -> str:
    """Why our server would be a step back from a GPU to the CPU; "" when it is none, or the user wants it so."""
    stock = stock_server()
    if stock is None or settings().cpu_too or devices(ours):
        return ""
    gpus = devices(stock)
    if gpus is None:
        where = "what the webui's own runs on could not be found out"
    elif gpus:
        where = f"the webui's own on {', '.join(gpus)}"
    else:
        return ""
    return (
        f"the steering server here runs on the CPU only, and {where}: "
        f"build it on those libraries with: steer build --on {Path(stock).parent}"
    )


def find_server() -> tuple[str | None, str]:
    """Our llama-server, or None and how to get it."""
    from steer_plugins.runtime import find_runtime

    try:
        runtime = find_runtime(need_server=True)
    except SteerError as error:
        return None, str(error)
    if runtime is None or runtime.server is None:
        stock = stock_server()
        how = f"steer build --on {Path(stock).parent}" if stock else "steer build"
        return None, f"there is no steering llama-server yet: make one, once, with: {how}"
    return str(runtime.server), ""


def stock_server() -> str | None:
    """The webui's own llama-server, where it has one."""
    server = webui.llama_server()
    path = getattr(server, "server_path", None)
    if path and str(path) != state.server and Path(path).is_file():
        return str(path)
    try:
        from llama_cpp_binaries import get_binary_path

        path = str(get_binary_path())
    except Exception:  # not installed, or a platform it does not know
        return None
    return path if Path(path).is_file() else None


@functools.lru_cache(maxsize=16)
def devices(server: str) -> tuple[str, ...] | None:
    """The GPUs that a llama-server would use, None when it does not say."""
    code, out, _ = _run([server, "--list-devices"])
    if code != 0:
        return None
    listed = out.partition("Available devices:")[2].splitlines()
    return tuple(match[2] for line in listed if (match := _DEVICE.match(line)) and match[1] != "CPU")


def flags_problem(server: str, command: list[str]) -> str:
    """Why a llama-server would not take the flags of a command line; "" when it takes them.

    With ``--help`` last, llama-server checks all flags and their values, and ends before it loads anything.
    """
    code, _, errors = _run([server, *command, "--help"])
    if code == 0:
        return ""
    said = [line for line in errors.splitlines() if line.startswith("error")] or errors.splitlines()[-1:]
    return _line(" ".join(said) or f"exit code {code}")


def adopt() -> None:
    """Put our server under a model that is loaded already, if all is well with it. The webui never stays without a model."""
    shared = webui.shared()
    server = webui.llama_server()
    name = shared.model_name
    if server is None:
        # The first load has failed where the webui brought no server of its own.
        if shared.model is None and name not in (None, "None") and str(shared.args.loader) == "llama.cpp" and candidate():
            webui.log(f"loading {name} with the steering server")
            shared.model, shared.tokenizer = webui.module("models").load_model(name)
        else:
            _, state.problem = find_server()
        return
    if current_or_none() is not None:
        state.server, state.problem = str(server.server_path), ""
        return
    ours = candidate()
    if ours is None:
        webui.log(state.problem, error=True)
        return
    problem = flags_problem(ours, [str(part) for part in server.process.args[1:]])
    if problem:
        state.problem = f"the steering server does not take the webui's flags ({problem}), so the webui's own stays in use"
        webui.log(state.problem, error=True)
        return
    models = webui.module("models")
    if getattr(models, "active_generation_count", 0) > 0:
        state.problem = "a reply is being written: look for the steering server again when it has ended"
        return
    webui.log(f"reloading {name} with the steering server")
    models.unload_model(keep_model_name=True)
    shared.model, shared.tokenizer = models.load_model(name)


def _run(command: list[str]) -> tuple[int, str, str]:
    environment = dict(os.environ)
    if os.name == "posix":  # as the webui does for its own
        paths = [environment.get("LD_LIBRARY_PATH", ""), os.path.dirname(command[0])]
        environment["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    flags = getattr(subprocess, "CREATE_NO_WINDOW", 0) if sys.platform == "win32" else 0
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, env=environment, creationflags=flags
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", f"error: {_line(error)}"
    return done.returncode, done.stdout, done.stderr


def _line(what: object) -> str:
    return " ".join(str(what).split())[:300]
