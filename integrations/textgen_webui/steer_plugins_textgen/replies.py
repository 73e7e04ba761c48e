"""The last reply of the page, and what is looked at and compared on the running server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from steer_plugins.engine.base import GenerateRequest
from steer_plugins.errors import DataError, EngineError, SteerError
from steer_plugins.report import inspect_prompt, neutral_levels, to_html
from steer_plugins.steering.grammar import TermSpec

from . import jobs, webui
from .link import Link

MAX_HEATMAP = 600
"""Tokens above which the heatmap is left out: a page that nobody could scroll."""


@dataclass(frozen=True)
class LastReply:
    """What was generated last in the page: prompt, text, and the terms that acted at its beginning."""

    prompt: str
    add_bos: bool
    text: str
    terms: list[TermSpec]


last: LastReply | None = None


def remember(prompt: Any, generation: dict[str, Any], text: str, terms: list[TermSpec]) -> None:
    """Keep the reply that has just ended; only its text and prompt, nothing is computed for it."""
    global last
    if isinstance(prompt, str) and text:
        last = LastReply(prompt, bool(generation.get("add_bos_token", True)), text, terms)


FALLEN = 0.4
"""Share of different triples among the last words of a reply below which it only repeats itself."""
LAST_WORDS = 90


def fell_apart() -> str:
    """One sentence when the last steered reply ended in repetition, else ""."""
    if last is None or not last.terms:
        return ""
    words = last.text.split()[-LAST_WORDS:]
    triples = list(zip(words, words[1:], words[2:], strict=False))
    if len(words) < LAST_WORDS or len(set(triples)) >= FALLEN * len(triples):
        return ""
    return "the last reply ended in repetition: move its sliders nearer to 0 and take Again"


def activations(link: Link, vector_name: str) -> str:
    """HTML: the last reply's tokens coloured by their projection on a vector, and a heatmap of layers by tokens.

    Raises:
        DataError: there is no reply yet. And what the vector and the server raise.
    """
    if last is None:
        raise DataError("there is no reply yet: write something in the Chat tab first")
    vector = link.library.resolve(vector_name, link.info.identity)
    engine = link.engine
    server = webui.llama_server()
    if server is None:
        raise EngineError("the model has been unloaded: load it again in the Model tab")
    layers = [il for il in vector.layers if not (engine.info.last_layer_outputs_only and il == engine.info.n_layer - 1)]
    tokens = server.encode(last.prompt, add_bos_token=last.add_bos)  # as it was sent
    with webui.busy():
        levels = neutral_levels(engine, vector, layers, chat=engine.info.has_chat_template)
        found = inspect_prompt(
            engine,
            [int(t) for t in tokens],
            vector,
            steering=link.steering(link.usable(last.terms)[0]),
            response=last.text,
            layers=layers,
            levels=levels,
            poles=jobs.poles_of(vector),
        )
    whole = len(found.tokens) <= MAX_HEATMAP
    why = "" if whole else f"<p>The layers are left out: {len(found.tokens)} tokens are more than {MAX_HEATMAP}.</p>"
    return why + to_html(found, heatmap=whole)


def compare(link: Link, prompt: str, terms: list[TermSpec], max_tokens: int) -> Iterator[tuple[str, str]]:
    """(unsteered, steered) texts of one prompt as they grow: greedy, by the model's own template.

    Raises:
        DataError: no prompt. And what the steering and the server raise.
    """
    if not prompt.strip():
        raise DataError("write a prompt to compare")
    question: Any = [{"role": "user", "content": prompt}] if link.info.has_chat_template else prompt
    wanted = [None, link.steering(terms)]
    streams = [link.engine.stream(GenerateRequest(question, steering=s, max_tokens=int(max_tokens))) for s in wanted]
    failures: list[SteerError] = []

    def run(stream: Any) -> None:
        try:
            stream.run()
        except SteerError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(stream,), daemon=True) for stream in streams]
    with webui.busy():
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                yield streams[0].result.text, streams[1].result.text
                time.sleep(0.1)
        finally:
            for stream in streams:
                stream.cancel()
    if failures:
        raise failures[0]
    yield streams[0].result.text, streams[1].result.text
