"""The ``steering`` field of a request: text, terms as JSON, or a preset; and which steering a generation gets."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering.grammar import TermSpec, from_json, parse

from . import webui
from .settings import Settings


def terms_of(value: Any, settings: Settings) -> list[TermSpec]:
    """The terms that a request's ``steering`` means.

    ``value``: a text of the grammar, a list of terms as JSON, one term, or ``{"preset": NAME}``.

    Raises:
        SpecError: one sentence that names the fault.
    """
    if isinstance(value, str):
        return parse(value)
    if isinstance(value, dict):
        if "preset" in value:
            if set(value) != {"preset"} or not isinstance(value["preset"], str):
                raise SpecError('a preset is named as {"preset": "NAME"}, without other keys')
            return settings.preset(value["preset"])
        return from_json([value])
    if isinstance(value, list):
        return from_json(value)
    raise SpecError(f"steering is {value!r:.60}: give a text, a list of terms, or a preset")


def wish_of(state: dict[str, Any], settings: Settings) -> list[TermSpec] | None:
    """The terms for a generation of the webui; None: nothing was said, so nothing is sent.

    Requests of the API carry the key ``steering`` in their state, None when they did not say; those of the page do not.
    What the API's requests say is theirs alone, and the page's sliders act on them only when the user has asked for that.
    Where strangers share the page there are no sliders, so none act.
    """
    if "steering" in state:
        said = state["steering"]
        if said is not None:
            return terms_of(said, settings)
        return settings.active if settings.api_too else None
    return None if webui.multi_user() else settings.active


def names_only(terms: list[TermSpec]) -> None:
    """Raise SpecError for a term that names a file: whoever can send a request must not open files here."""
    for name in (name for term in terms for name in (term.vector, term.gate) if name is not None):
        if is_file(name):
            raise SpecError(f"{name!r:.80} is a file: requests name vectors of the library")


def is_file(name: str) -> bool:
    """Whether what a term names is a file: it has a separator. Everything else is a name of the library."""
    return re.search(r"[/\\]", name) is not None


def fitting(terms: list[TermSpec], check: Callable[[list[TermSpec]], Any]) -> tuple[list[TermSpec], list[str]]:
    """The terms that ``check`` takes, together with those before them, and a sentence for each of the others."""
    good: list[TermSpec] = []
    wrong: list[str] = []
    for term in terms:
        try:
            check([*good, term])
            good.append(term)
        except SteerError as error:
            wrong.append(str(error))
    return good, wrong


def from_page(state: dict[str, Any]) -> bool:
    """Whether a generation was started in the page."""
    return "steering" not in state
