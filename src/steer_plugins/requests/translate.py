"""Terms as the fields of EasySteer's and of hotwire's requests. What a target cannot do exactly is refused by name."""

from __future__ import annotations

import json
from typing import Any

from ..errors import SpecError
from ..steering.terms import Steering, Term
from .files import EASYSTEER, HOTWIRE, file_name

# position 0 is left alone by all named scopes; the last prompt token makes the first of the response
_APPLY: dict[str, dict[str, Any]] = {
    "0-": {"prompt": "all", "generation": "all"},
    "all": {"prompt": "all", "exclude_prompt_positions": [0], "generation": "all"},
    "prompt": {"prompt_window": [1, -1]},
    "response": {"prompt_positions": [-1], "generation": "all"},
}


def easysteer(steering: Any, *, folder: str = "") -> dict[str, Any]:
    """The field ``steering`` of a request to EasySteer's server (version 2 of its interface, ``vectors`` with ``apply``).

    Args:
        steering: what engines take: a Steering, a vector, terms.
        folder: where the server has the files that ``steer export easysteer`` writes, as it calls that place.

    Returns:
        ``{"steering": {"vectors": [...], "conflict": "sequential"}}``; nothing where the steering is empty.

    Raises:
        SpecError: clamping, projecting at a strength other than 1, restoring the length; a site other than ``resid_post``;
            thinking, answer or positions; streams, schedules and gates; a projection where another term acts.
    """
    terms = [term for term in Steering.of(steering) if not term.is_zero]
    if not terms:
        return {}
    for term in terms:
        _check(term, "EasySteer")
        name, op = term.vector.name, term.effective_op
        if op not in ("add", "project"):
            raise SpecError(f"{name!r} has op {op}, which EasySteer has not: it adds, and removes a component")
        if op == "project" and term.strength != 1.0:
            raise SpecError(
                f"{name!r} has strength {term.strength:g}, and EasySteer removes the whole component: give strength 1"
            )
        if term.effective_scope not in _APPLY:
            raise SpecError(f"{name!r} has scope {term.effective_scope}, which EasySteer cannot follow: use {', '.join(_APPLY)}")
    _check_alone(terms)
    return {"steering": {"vectors": [_vector(term, folder) for term in terms], "conflict": "sequential"}}


def _vector(term: Term, folder: str) -> dict[str, Any]:
    file = file_name(term.vector, EASYSTEER, term.effective_op)
    return {
        "source": f"{folder.rstrip('/')}/{file}" if folder else file,
        "algorithm": "erase" if term.effective_op == "project" else "direct",
        "scale": term.strength,
        "layers": sorted(layer for layer, _ in term.keys()),
        "apply": _APPLY[term.effective_scope],
        "name": term.vector.name,
    }


def _check_alone(terms: list[Term]) -> None:
    """Sums do not depend on an order, a projection and another term at its layer do."""
    for term in terms:
        if term.effective_op != "project":
            continue
        for other in terms:
            shared = {layer for layer, _ in term.keys()} & {layer for layer, _ in other.keys()}
            if other is not term and shared:
                names = f"{term.vector.name!r} and {other.vector.name!r}"
                raise SpecError(f"{names} both act at layer {min(shared)}, where one removes a component: give them other layers")


def hotwire(steering: Any) -> dict[str, Any]:
    """The field ``vllm_xargs`` of a request to vLLM with the hotwire plugin.

    Args:
        steering: what engines take. Each layer of each vector takes one of the server's slots (``HOTWIRE_SLOTS``, 16).

    Returns:
        ``{"vllm_xargs": {"hotwire": "[...]"}}``; nothing where the steering is empty.

    Raises:
        SpecError: anything but adding at ``resid_post`` to every token (scope ``0-``); streams, schedules and gates; two
            vectors at one layer.
    """
    entries: list[dict[str, Any]] = []
    taken: dict[int, str] = {}
    for term in Steering.of(steering):
        if term.is_zero:
            continue
        _check(term, "hotwire")
        name = term.vector.name
        if term.effective_op != "add":
            raise SpecError(f"{name!r} has op {term.effective_op}, and hotwire only adds: fit a vector that adds")
        if term.effective_scope != "0-":
            raise SpecError(f"{name!r} has scope {term.effective_scope}, and hotwire steers every token: write {name}?0-")
        for layer in sorted(layer for layer, _ in term.keys()):
            if layer in taken:
                raise SpecError(f"hotwire has one vector a layer, and {taken[layer]!r} and {name!r} both act at {layer}")
            taken[layer] = name
            file = file_name(term.vector, HOTWIRE, "add")
            entries.append({"id": file.removesuffix(".pt"), "layer": layer, "scale": term.strength})
    return {"vllm_xargs": {"hotwire": json.dumps(entries)}} if entries else {}


def _check(term: Term, target: str) -> None:
    """What neither target has. Raises SpecError."""
    name = term.vector.name
    sites = sorted({site for _, site in term.keys()} - {"resid_post"})
    if sites:
        raise SpecError(f"{name!r} acts at {sites[0]}, and {target} only at resid_post")
    for given, what in ((term.stream, "stream"), (term.schedule, "schedule"), (term.gate, "gate")):
        if given is not None:
            raise SpecError(f"{name!r} has a {what}, which {target} has not: leave it out")
    if term.vector.columns:
        raise SpecError(f"{name!r} answers to the hidden state, which {target} has not: use a vector of plain directions")
