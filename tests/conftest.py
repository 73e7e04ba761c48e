"""For all tests: how long one takes decides nothing, and its folder says what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# a busy machine is no failure
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# what the tests of a folder need; the marks are described in pyproject.toml
MARKS = {
    "behaviour": ["native", "behaviour"],
    "engine": ["native"],
    "hosts": [],
    "integration": ["native", "server"],
    "native": ["native"],
    "server": ["server"],
    "unit": [],
}
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in MARKS.get(item.path.relative_to(HERE).parts[0], []):
            item.add_marker(mark)
        if "page" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Among several processes (`--dist loadfile`) a file stays together, and a folder whose files share what takes long."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            return "tests/behaviour" if scope.startswith("tests/behaviour/") else scope

    return Scheduling(config, log)
