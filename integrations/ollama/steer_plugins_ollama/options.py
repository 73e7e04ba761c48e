"""Ollama's options as llama-server's fields and flags."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import BadRequest
from .model import STEERING
from .modelfile import PARAMETERS

DEFAULT_CONTEXT = 4096
DEFAULT_KEEP_ALIVE = 300.0
FOREVER = float("inf")

#: What Ollama sets where nobody says otherwise (its ``DefaultOptions``).
DEFAULTS: dict[str, Any] = {
    "num_predict": -1,
    "num_keep": 4,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": -1,
}
_RENAMED = {"num_predict": "n_predict", "num_keep": "n_keep"}
_SAMPLING = (*DEFAULTS, "mirostat", "mirostat_tau", "mirostat_eta")
_INT32 = 2**31 - 1
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")


def checked(options: Any) -> dict[str, Any]:
    """A request's ``options`` with every known key of its type; unknown keys are left out, as Ollama does.

    Raises:
        BadRequest: a known key has a wrong type.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise BadRequest("options must be an object")
    found: dict[str, Any] = {}
    for key, value in options.items():
        kind = PARAMETERS.get(key)
        if value is None or kind is None:
            continue
        if key == STEERING:
            found[key] = value
        elif kind is list:
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                raise BadRequest(f"option {key!r} must be of type array")
            found[key] = texts
        elif kind is bool:
            if not isinstance(value, bool):
                raise BadRequest(f"option {key!r} must be of type boolean")
            found[key] = value
        else:
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
                raise BadRequest(f"option {key!r} must be of type {'integer' if kind is int else 'float'}")
            found[key] = kind(value)
    return found


def merged(model: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """The options that count: those of the request over those of the model over Ollama's defaults."""
    return {**DEFAULTS, **checked(model), **{k: v for k, v in request.items() if k != STEERING}}


def sampling(options: Mapping[str, Any], n_ctx: int = DEFAULT_CONTEXT) -> dict[str, Any]:
    """The fields of a llama-server request, with what Ollama takes and llama-server refuses as what Ollama makes of it.

    ``n_ctx``: tokens of one request's context, which is what looking back at all of it (``repeat_last_n`` -1) means.
    """
    fields = {_RENAMED.get(key, key): options[key] for key in _SAMPLING if key in options}
    for key, value in fields.items():
        if isinstance(value, int):
            fields[key] = max(-_INT32, min(value, _INT32))
    fields["n_predict"] = fields["n_predict"] if fields["n_predict"] > 0 else -1  # 0 is no limit either
    fields["n_keep"] = max(-1, fields["n_keep"])
    last = fields["repeat_last_n"]
    fields["repeat_last_n"] = n_ctx if last < 0 else min(last, n_ctx)
    if not fields["repeat_penalty"] > 1e-30:
        fields["repeat_penalty"] = 1.0  # what would divide by nothing is off
    fields["seed"] = options["seed"] & _INT32 if options["seed"] >= 0 else -1
    fields["stop"] = [text for text in options.get("stop") or [] if text]
    return fields


@dataclass(frozen=True)
class LoadOptions:
    """What a process is started with. ``n_ctx``: tokens of one request; None elsewhere: llama-server decides."""

    n_ctx: int
    n_gpu: int | None = None
    n_batch: int | None = None
    n_thread: int | None = None
    main_gpu: int | None = None
    mmap: bool | None = None

    def flags(self, n_parallel: int, environ: Mapping[str, str] | None = None) -> list[str]:
        """Flags of llama-server."""
        env = os.environ if environ is None else environ
        flags = ["-c", str(self.n_ctx * n_parallel), "-np", str(n_parallel), "--no-kv-unified", "--no-context-shift"]
        for flag, value in (("-b", self.n_batch), ("-t", self.n_thread), ("-mg", self.main_gpu)):
            if value is not None and value >= (0 if flag == "-mg" else 1):
                flags += [flag, str(value)]
        if self.n_gpu is not None and self.n_gpu >= 0:
            flags += ["-ngl", str(self.n_gpu)]
        if self.mmap is False:
            flags += ["--load-mode", "none"]
        if env.get("OLLAMA_FLASH_ATTENTION"):
            flags += ["-fa", "on" if env["OLLAMA_FLASH_ATTENTION"].lower() in ("1", "true") else "off"]
        if env.get("OLLAMA_KV_CACHE_TYPE"):
            flags += ["-ctk", env["OLLAMA_KV_CACHE_TYPE"], "-ctv", env["OLLAMA_KV_CACHE_TYPE"]]
        return flags

    def served_by(self, running: LoadOptions) -> bool:
        """Whether a process started with ``running`` will do: a longer context does, another device does not."""
        same = all(
            mine in (None, theirs)
            for mine, theirs in (
                (self.n_gpu, running.n_gpu),
                (self.n_thread, running.n_thread),
                (self.main_gpu, running.main_gpu),
            )
        )
        return same and self.n_ctx <= running.n_ctx


def load_options(options: Mapping[str, Any], environ: Mapping[str, str] | None = None, n_trained: int = 0) -> LoadOptions:
    """What a request needs loaded. A context longer than the ``n_trained`` tokens of the model is cut to them, as Ollama does.

    Raises:
        BadRequest: the context is invalid.
    """
    env = os.environ if environ is None else environ
    n_ctx = options.get("num_ctx") or whole_number(env, "OLLAMA_CONTEXT_LENGTH", DEFAULT_CONTEXT)
    if not 4 <= n_ctx <= 1 << 27:
        raise BadRequest(f"num_ctx is {n_ctx}: give the tokens of a context, such as 4096")
    return LoadOptions(
        n_ctx=min(n_ctx, max(4, n_trained)) if n_trained else n_ctx,
        n_gpu=options.get("num_gpu") if (options.get("num_gpu") or 0) >= 0 else None,
        n_batch=options.get("num_batch"),
        n_thread=options.get("num_thread") or None,
        main_gpu=options.get("main_gpu"),
        mmap=options.get("use_mmap"),
    )


def whole_number(environ: Mapping[str, str], name: str, default: int) -> int:
    """A count from the environment; the default where it is missing, 0 or no number."""
    text = environ.get(name, "").strip()
    return int(text) if text.isdigit() and int(text) > 0 else default


def keep_alive(value: Any, environ: Mapping[str, str] | None = None) -> float:
    """Seconds that a model stays loaded; negative ones are :data:`FOREVER`. None: ``OLLAMA_KEEP_ALIVE``, or five minutes.

    Raises:
        BadRequest: it is not a duration.
    """
    env = os.environ if environ is None else environ
    if value is None:
        text = env.get("OLLAMA_KEEP_ALIVE", "").strip()
        if not text:
            return DEFAULT_KEEP_ALIVE
        try:
            return keep_alive(text)
        except BadRequest:
            return DEFAULT_KEEP_ALIVE  # as Ollama does
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRequest("keep_alive is a number of seconds or a duration such as 5m")
    seconds = _seconds(value.strip()) if isinstance(value, str) else float(value)
    if seconds != seconds:
        raise BadRequest("keep_alive is a number of seconds or a duration such as 5m")
    return FOREVER if seconds < 0 else seconds


def _seconds(text: str) -> float:
    sign = -1.0 if text.startswith("-") else 1.0
    body = text.lstrip("+-")
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", body):
        return sign * float(body)
    parts = _DURATION.findall(body)
    if not parts or "".join(n + u for n, u in parts) != body:
        raise BadRequest(f"keep_alive {text[:40]!r} is not a duration: write one such as 5m, 1h30m or -1")
    return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
