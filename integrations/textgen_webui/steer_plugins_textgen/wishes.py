"""The ``steering`` field of a request: text, terms as JSON, or a preset; and which steering a generation gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering import grammar
from steer_plugins.steering.grammar import TermSpec

from . import webui
from .settings import Settings


def terms_of(value: Any, settings: Settings) -> list[TermSpec]:
    """The terms that a request's ``steering`` means.

    ``value``: a text of the grammar, a list of terms as JSON, one term, or ``{"preset": NAME}``.

    Raises:
        SpecError: one sentence that names the fault.
    """
    if isinstance(value, dict) and "preset" in value:
        if set(value) != {"preset"} or not isinstance(value["preset"], str):
            raise SpecError('a preset is named as {"preset": "NAME"}, without other keys')
        return settings.preset(value["preset"])
    terms = grammar.terms_of(value)
    if terms is None:
        raise SpecError(f"steering is {value!r:.60}: give a text, a list of terms, or a preset")
    return terms


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
