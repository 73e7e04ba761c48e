"""The shared cases against the words of Python: grammar, canonical JSON, terms. No model."""

from __future__ import annotations

from typing import Any

import pytest

from steer_plugins.steering.grammar import format_terms, from_json, parse
from tests import cases


@pytest.mark.parametrize("case", cases.cases("texts", "python"))
def test_text(case: dict[str, Any]) -> None:
    if "refused" in case:
        return cases.refusal(case["refused"], lambda: parse(case["text"]))
    terms = parse(case["text"])
    assert [term.to_json() for term in terms] == case["terms"]
    assert from_json(case["terms"]) == terms == parse(format_terms(terms))


@pytest.mark.parametrize("case", cases.cases("terms", "python"))
def test_terms(case: dict[str, Any]) -> None:
    if "refused" in case:
        return cases.refusal(case["refused"], lambda: cases.steering(case["steering"], 8))
    assert len(cases.steering(case["steering"], 8)) == len(case["steering"])


@pytest.mark.parametrize("case", cases.cases("layers", "python"))
def test_layers(case: dict[str, Any]) -> None:
    (term,) = cases.steering(case["steering"], 8)
    assert sorted({layer for layer, _ in term.keys()}) == case["layers"]


def test_names_are_unique() -> None:
    for section, listed in cases.TABLE.items():
        if section not in ("about", "vectors"):
            names = [case["name"] for case in listed]
            assert len(set(names)) == len(names), section
            assert all(set(case.get("wrong", {})) <= {"python", "engine", "server", "routes"} for case in listed)
