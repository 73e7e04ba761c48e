"""The documents that are made from code agree with it, and the public names are documented."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import steer_plugins
from steer_plugins.cli.main import cli
from steer_plugins.cli.reference import render
from tests.unit.test_project import PROJECT

ROOT = Path(__file__).parents[2]


def words(text: str) -> list[str]:
    # click's releases wrap lines differently; the words have to agree
    return re.sub(r"[-\u2500]{3,}", "", text).split()


def test_cli_reference_is_up_to_date() -> None:
    pytest.importorskip("steer_plugins_ollama.plugin", reason="the page has the commands of the integrations")
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    # click makes a command's help option once: the page must not depend on whether a command was called before
    CliRunner().invoke(cli, ["serve", "--help"])
    assert words(page) == words(render()), "run: python -m steer_plugins.cli.reference docs/cli.md"


def test_help_names_every_method() -> None:
    from steer_plugins.training.extract import builtin_methods

    text = CliRunner().invoke(cli, ["train", "--help"], terminal_width=200).output
    assert all(method.name in text for method in builtin_methods())


def test_python_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("python_api", ROOT / "scripts" / "python_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    assert page.split() == module.render().split(), "run: ./scripts/docs"
    named = re.findall(r"^### `(\w+)`", page, re.M)
    assert sorted(named) == steer_plugins.__all__
    for heading, text in re.findall(r"^#{3,4} (`.*?`)\n\n(.*?)(?=\n\n#|\Z)", page, re.M | re.S):
        assert re.sub(r"```.*?```", "", text, flags=re.S).strip(), f"{heading} has no description"


def test_the_page_of_architectures_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "scripts" / "architectures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python scripts/architectures.py"


def test_protocol_tables_are_up_to_date(tmp_path: Path) -> None:
    """The fields of a request are declared once, in the server's source."""
    spec = importlib.util.spec_from_file_location("protocol", ROOT / "scripts" / "protocol.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python scripts/protocol.py"
    # a field that is declared and not shown is seen
    module.HEADER = tmp_path / "fields.h"
    declared = (ROOT / "cpp_patch" / "server-steer-fields.h").read_text(encoding="utf-8")
    module.HEADER.write_text(declared.replace('"term",     "op",', '"term",     "oq",'), encoding="utf-8")
    assert module.PAGE.read_text(encoding="utf-8") != module.page()


def test_public_names_are_sorted_and_have_docstrings() -> None:
    assert steer_plugins.__all__ == sorted(steer_plugins.__all__)
    for name, home in steer_plugins._HOMES.items():
        if home.endswith("engine.llama"):
            continue  # importing it needs a built runtime; tests/engine does
        thing = getattr(importlib.import_module(home), name)
        assert inspect.getdoc(thing), name


def test_relative_links_of_the_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), ROOT / "cpp_patch" / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_rooms_stand_in_the_order_in_which_they_may_use_one_another() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The rooms")[1].split("## ")[0]
    named = re.findall(r"`(?:…/|src/steer_plugins/)?(\w+)(?:/|\.py)`", "\n".join(re.findall(r"^\|([^|]*)\|", table, re.M)))
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = [room.strip() for layer in layers for room in layer.split("|")]
    assert [room for room in named if room not in ("integrations", "cpp_patch")] == rooms


def test_the_front_page_leads_to_every_page() -> None:
    front = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "CONTRIBUTING.md"))
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name}" in front, f"nothing leads to {page.name}"


def test_every_variable_of_the_environment_is_documented() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    read = {
        name for file in sources for name in re.findall(r"environ\W+(?:get\W+)?(STEER_\w+)", file.read_text(encoding="utf-8"))
    }
    assert "STEER_LIBRARY" in read
    assert sorted(name for name in read if name not in pages) == []
