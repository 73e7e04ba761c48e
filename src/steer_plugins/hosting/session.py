"""A steering that a model sets for its own replies, within bounds, while requests pass through; all of it is logged."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..client.connection import normal_url
from ..client.engine import ServerEngine
from ..errors import DataError, SpecError, SteerError
from ..report.inspection import inspect_prompt
from ..steering.grammar import TermSpec, format_terms, parse
from ..store.library import Library
from ..training.extract import ContrastData, pairs_of
from ..training.train import Training, TrainOptions
from ..training.traits import Trait, load_trait
from .bounds import Bounds

MAX_TEXT = 20_000
"""Characters of a text that a tool takes."""
MAX_PAIRS = 64
MAX_FITS = 8
"""Vectors that one session may fit: each costs minutes and a place in the library."""
PROMPTS_OF = "succinctness"
"""The bundled trait whose everyday questions a vector is fitted on, where only a system prompt is given."""

LLAMA_PATHS = (
    "/completion", "/completions", "/v1/completions", "/v1/chat/completions", "/chat/completions", "/v1/responses",
    "/v1/messages", "/infill",
)  # fmt: skip
"""Routes of llama-server whose requests take steering."""
HOST_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/api/generate")
"""Those of the adapters' hosts; below ``/api`` the field is one of ``options``."""

Log = Callable[[dict[str, Any]], None]
"""Gets each change as JSON values."""


class Session:
    """What one model, or one agent, has set. May be used by several threads at once.

    Args:
        engine: the llama-server that has the model; it reads and fits.
        bounds: what may be set.
        library: where vectors are looked up and fitted ones are put.
        to: a host that requests go to (the sidecar, the webui) and that looks names up itself; None is ``engine``'s server.
        may_fit: whether vectors may be fitted.
        calibrate: ``none``, ``quick`` or ``full``, as for ``steer train``.
        log: gets each call of a tool: time, tool, what was asked, and what became of it.
    """

    def __init__(
        self,
        engine: ServerEngine,
        bounds: Bounds | None = None,
        library: Library | None = None,
        *,
        to: str | None = None,
        may_fit: bool = False,
        calibrate: str = "none",
        log: Log | None = None,
    ) -> None:
        self.engine, self.bounds = engine, bounds or Bounds()
        self.library = library or Library()
        engine.library = self.library
        self.may_fit, self._calibrate = may_fit, calibrate
        self._to = None if to is None else normal_url(to)
        self._log = log or (lambda entry: None)
        self._terms: list[TermSpec] | None = None
        self._running: set[str] = set()
        self._fits = 0
        self._lock = threading.Lock()
        self._fitting = threading.Lock()

    # ---- tools ----

    def vectors(self) -> list[dict[str, Any]]:
        """The vectors that may be set: name, poles, largest strength, layers, scope, whether strength 1 was measured."""
        found = []
        for entry in self.library.list(self.engine.info.identity):
            limit = self.bounds.limit(entry.name)
            if limit is None:
                continue
            try:
                vector = entry.read()
            except SteerError:
                continue
            source = (vector.provenance or {}).get("source")
            poles = source.get("poles") if isinstance(source, dict) else None
            found.append(
                {
                    "name": entry.name,
                    "poles": poles if isinstance(poles, dict) else None,
                    "max_strength": limit,
                    "layers": vector.layers,
                    "scope": vector.default_scope,
                    "calibrated": vector.calibration is not None,
                }
            )
        return found

    def current(self) -> str:
        """The steering of the session as a text of the grammar; "" for none."""
        with self._lock:
            return format_terms(self._terms or [])

    def set(self, text: str) -> dict[str, Any]:
        """Replace the steering; replies that are being written follow with their next token.

        Returns:
            ``steering``: what acts now; ``running``: how many replies were changed while they are written.

        Raises:
            SpecError: the text is wrong, or not within the bounds. VectorError: a vector is missing, or does not fit.
        """
        with self._logged("set_steering", {"steering": _short(text, "the steering")}) as told:
            terms = parse(text)
            self.bounds.check(terms)
            steering = self.engine.steering(terms, names_only=True)
            self.engine.check(steering)
            with self._lock:
                self._terms = terms
                running = list(self._running)
            changed = sum(self.engine.change(name, steering) is not None for name in running)
            return told({"steering": format_terms(terms), "running": changed})

    def fit(self, name: str, *, prompt: str = "", opposite: str = "", pairs: Sequence[Any] = ()) -> dict[str, Any]:
        """Fit a vector and keep it in the library: from a system prompt (and one for the other pole), or from pairs of texts.

        Raises:
            SpecError: fitting is not allowed, or was done too often. DataError: nothing or too much to learn from.
            VectorError: the library has a vector of that name.
        """
        asked = {"name": name, "prompt": prompt[:200], "opposite": opposite[:200], "pairs": len(pairs)}
        with self._logged("fit_vector", asked) as told, self._fitting:
            if not self.may_fit:
                raise SpecError("vectors may not be fitted here: the user has to start this with --allow-fit")
            if self._fits >= MAX_FITS:
                raise SpecError(f"{MAX_FITS} vectors were fitted in this session already: set one of those")
            if bool(prompt) == bool(pairs):
                raise DataError("a vector is fitted from a prompt or from pairs: give one of the two")
            source = _pairs(pairs) if pairs else _trait(name, _short(prompt, "the prompt"), _short(opposite, "the opposite"))
            training = Training(self.engine, name, source, TrainOptions(calibrate=self._calibrate))
            identity = self.engine.info.identity
            if self.library.path(training.name, identity).exists():
                raise SpecError(f"there is a vector {name!r} for this model already: set it, or choose another name")
            vector = training.run()
            self.library.put(vector, identity)
            self._fits += 1
            self.bounds.fitted.add(vector.name)
            limit, measured = self.bounds.limit(vector.name), vector.calibration is not None
            return told({"name": vector.name, "layers": vector.layers, "max_strength": limit, "calibrated": measured})

    def read(self, text: str, vector: str = "", *, reply: str = "") -> dict[str, Any]:
        """How far a text lies along vectors, in strengths: 0 is a neutral text, +1 where strength 1 would take it.

        Args:
            text: what is read: by itself, or as a user's message where ``reply`` is given; then the reply's tokens are averaged.
            vector: one name; "" reads along all that may be set.

        Raises:
            SpecError: the vector may not be set here. What :func:`~steer_plugins.report.inspection.inspect_prompt` raises.
        """
        with self._logged("read_projection", {"vector": vector, "characters": len(text) + len(reply)}) as told:
            _short(text, "the text")
            _short(reply, "the reply")
            if not text.strip():
                raise DataError("the text to read is empty: give some")
            if vector:
                self.bounds.check([TermSpec(vector, 0.0)])
            names = [vector] if vector else [one["name"] for one in self.vectors()]
            found = {}
            for name in names:
                direction = self.library.resolve(name, self.engine.info.identity, names_only=True)
                if direction.op == "project":
                    continue  # it has no dose to measure in
                prompt: Any = [{"role": "user", "content": text}] if reply and self.engine.info.has_chat_template else text
                seen = inspect_prompt(self.engine, prompt, direction, response=reply or None)
                first = seen.n_prompt if reply else 1
                found[name] = round(float(np.mean(seen.before.projections[:, first:])), 4)
            if not found:
                raise SpecError("there is no vector to read along: fit one, or name another")
            return told({"projections": found})

    # ---- requests ----

    def bodies(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What to send in place of a request's body: with this session's steering, unless it has one of its own."""
        with self._lock:
            terms = self._terms
        if path not in (HOST_PATHS if self._to is not None else LLAMA_PATHS):
            yield body
        elif self._to is not None:
            yield body if terms is None else _with_names(path, body, terms)
        elif body.get("steering") is not None:
            yield body
        else:
            given = body.get("request_id")
            named = {**body, "request_id": given if given is not None else f"session-{uuid.uuid4().hex}"}
            with self._lock:
                self._running.add(str(named["request_id"]))
            if terms is None:
                yield named
            else:
                for fields in self.engine.attempts(self.engine.steering(terms, names_only=True)):
                    yield {**named, **fields}

    def address(self, body: dict[str, Any] | None) -> str:
        """Where requests go."""
        return self._to or self.engine.url

    def ended(self, body: dict[str, Any]) -> None:
        """The answer to a body of :meth:`bodies` has ended."""
        with self._lock:
            self._running.discard(str(body.get("request_id")))

    # ---- inside ----

    def _logged(self, tool: str, asked: dict[str, Any]) -> _Logged:
        return _Logged(self._log, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "tool": tool, **asked})


class _Logged:
    """Writes one entry when a call ends: with what it answered, or why it was refused."""

    def __init__(self, log: Log, entry: dict[str, Any]) -> None:
        self._write, self._entry = log, entry

    def __enter__(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return self._told

    def _told(self, answer: dict[str, Any]) -> dict[str, Any]:
        self._entry["answer"] = answer
        return answer

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._entry["refused"] = str(error) if isinstance(error, SteerError) else type(error).__name__
        self._write(self._entry)


def _with_names(path: str, body: dict[str, Any], terms: Sequence[TermSpec]) -> dict[str, Any]:
    """The body for a host that looks names up itself."""
    wanted = [term.to_json() for term in terms]
    if not path.startswith("/api/"):
        return body if body.get("steering") is not None else {**body, "steering": wanted}
    options = body.get("options")
    if options is not None and not isinstance(options, dict):
        return body  # the host says what is wrong with it
    options = options or {}
    return body if options.get("steering") is not None else {**body, "options": {**options, "steering": wanted}}


def _short(text: str, what: str) -> str:
    if len(text) > MAX_TEXT:
        raise DataError(f"{what} has {len(text)} characters: at most {MAX_TEXT} are taken")
    return text


def _pairs(pairs: Sequence[Any]) -> ContrastData:
    if len(pairs) > MAX_PAIRS:
        raise DataError(f"{len(pairs)} pairs are too many: at most {MAX_PAIRS} are taken")
    raw = "\n".join(json.dumps(pair) for pair in pairs)
    _short(raw, "the text of all pairs")
    return pairs_of(raw.encode(), "the list of pairs")


def _trait(name: str, prompt: str, opposite: str) -> Trait:
    """A behaviour that a system prompt asks for, on the everyday questions of a trait that comes with the package."""
    data = load_trait(PROMPTS_OF).to_dict()
    del data["metric"]
    system = {"positive": [prompt], "negative": [opposite or "You are a helpful assistant."]}
    poles = {"positive": name, "negative": f"not {name}"}
    return Trait.from_dict({**data, "name": name, "poles": poles, "description": "", "system": system}, "the behaviour")
