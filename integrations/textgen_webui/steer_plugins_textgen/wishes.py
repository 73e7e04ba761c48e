"""The ``steering`` field of a request: text, terms as JSON, or a preset; and which steering a generation gets."""

from __future__ import annotations

from typing import Any

from steer_plugins.errors import SpecError
from steer_plugins.grammar import TermSpec, from_json, parse

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
                raise SpecError('A preset is named as {"preset": "NAME"}, without other keys.')
            return settings.preset(value["preset"])
        return from_json([value])
    if isinstance(value, list):
        return from_json(value)
    raise SpecError(f"steering is {value!r:.60}: give a text, a list of terms, or a preset.")


def wish_of(state: dict[str, Any], settings: Settings) -> list[TermSpec] | None:
    """The terms for a generation of the webui; None: nothing was said, so nothing is sent.

    Requests of the API carry the key ``steering`` in their state, None when they did not say; those of the page do not.
    What the API's requests say is theirs alone, and the page's sliders act on them only when the user has asked for that.
    """
    if "steering" in state:
        said = state["steering"]
        if said is not None:
            return terms_of(said, settings)
        return settings.active if settings.api_too else None
    return settings.active


def from_page(state: dict[str, Any]) -> bool:
    """Whether a generation was started in the page."""
    return "steering" not in state
