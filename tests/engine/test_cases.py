"""The shared cases on the in-process engine: what is refused, which states move, and how far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from steer_plugins.engine.local import LocalEngine
from tests import cases
from tests.engine.engines import open_engine

pytestmark = pytest.mark.usefixtures("float32_cache")


@pytest.fixture(scope="module")
def engines(float32_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], LocalEngine]]:
    """An engine for each template."""
    folder = tmp_path_factory.mktemp("cases")
    made: dict[str, LocalEngine] = {}

    def get(template: str) -> LocalEngine:
        if template not in made:
            made[template] = open_engine(cases.tiny(template, folder))
        return made[template]

    yield get
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize("case", cases.cases("terms", "engine"))
def test_terms(engines: Callable[[str], LocalEngine], case: dict[str, Any]) -> None:
    engine = engines("never")

    def read() -> None:
        engine.read([cases.ids(["a", "b", "c"])], layers=[1], steering=cases.steering(case["steering"], engine.info.n_embd))

    if "refused" in case:
        return cases.refusal(case["refused"], read)
    read()


@pytest.mark.parametrize("case", cases.cases("positions", "engine"))
def test_positions(engines: Callable[[str], LocalEngine], case: dict[str, Any]) -> None:
    cases.check_positions(engines(case["template"]), case)


@pytest.mark.parametrize("case", cases.cases("layers", "engine"))
def test_layers(engines: Callable[[str], LocalEngine], case: dict[str, Any]) -> None:
    cases.check_layers(engines("never"), case)


@pytest.mark.parametrize("case", cases.cases("chats", "engine"))
def test_chats(engines: Callable[[str], LocalEngine], case: dict[str, Any]) -> None:
    cases.check_chat(engines(case["template"]), case)
