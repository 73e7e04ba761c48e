"""For all tests: how long one takes decides nothing, and its folder says what it needs."""

from __future__ import annotations

from pathlib import Path

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
