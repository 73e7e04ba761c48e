"""What a contributor meets first: scripts, workflows, marks, templates and the package's metadata agree with one another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import steer_plugins
from tests.conftest import MARKS, pytest_collection_modifyitems

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def test_the_version_is_in_one_place() -> None:
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version"]
    home = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{steer_plugins.__version__}"' in home.read_text(encoding="utf-8")


def test_changes_begin_with_what_is_not_released() -> None:
    headings = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading) for heading in headings[1:])


def test_tests_run_on_every_python_that_the_package_names() -> None:
    names = [c.rsplit(" ", 1)[1] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert workflow("tests.yml")["jobs"]["fast"]["strategy"]["matrix"]["python"] == names
    assert PROJECT["project"]["requires-python"] == f">={names[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{names[0].replace('.', '')}"


def commands() -> list[tuple[str, str]]:
    """(where, script) for each of our scripts that a workflow, a page, a template or another script names."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "cpp_patch" / "README.md"]
    files = [*WORKFLOWS, *pages, *(ROOT / ".github").glob("*.md"), *(ROOT / "scripts").glob("*"), ROOT / ".ci" / "run"]
    return [
        (file.relative_to(ROOT).as_posix(), script)
        for file in files
        for script in re.findall(r"\./((?:scripts/|\.ci/)[\w.-]*\w)", file.read_text(encoding="utf-8"))
    ]


def test_scripts_that_are_named_exist() -> None:
    named = commands()
    assert {where for where, _ in named} >= {
        "README.md",
        ".ci/run",
        ".github/workflows/tests.yml",
        ".github/workflows/upstream.yml",
    }
    for where, script in named:
        path = ROOT / script
        assert path.is_file(), f"{where} names {script}"
        assert sys.platform == "win32" or os.access(path, os.X_OK), script


def test_every_step_of_a_workflow_is_a_script_or_a_published_action() -> None:
    assert WORKFLOWS
    for file in WORKFLOWS:
        for name, job in workflow(file.name)["jobs"].items():
            for step in job["steps"]:
                run, uses = step.get("run", "./scripts/"), step.get("uses", "actions/x@v1")
                assert run.startswith("./scripts/"), f"{file.name}: {name} runs what nobody can run here: {run}"
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", uses), f"{file.name}: {name} uses {uses}"


def test_templates_can_be_read() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    for file in folder.glob("*.yml"):
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        if file.name != "config.yml":
            assert {"name", "description", "body"} <= form.keys()
            ids = [part["id"] for part in form["body"]]
            assert len(ids) == len(set(ids))


@pytest.mark.skipif(sys.platform == "win32", reason="has no sh of its own")
def test_scripts_are_sound() -> None:
    for script in [*(one for one in (ROOT / "scripts").iterdir() if one.is_file() and not one.suffix), ROOT / ".ci" / "run"]:
        shell = "bash" if script.read_text(encoding="utf-8").startswith("#!/bin/bash") else "sh"
        done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_each_folder_of_tests_says_what_it_needs() -> None:
    folders = {file.parent.name for file in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= MARKS.keys()
    described = {mark.split(":")[0] for mark in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert {mark for marks in MARKS.values() for mark in marks} <= described


@dataclass
class Item:
    path: Path
    fixturenames: tuple[str, ...] = ()
    marks: list[str] = field(default_factory=list)

    def add_marker(self, mark: str) -> None:
        self.marks.append(mark)


def test_marks_are_given_out_by_folder() -> None:
    tests = ROOT / "tests"
    items = [
        Item(tests / "unit" / "test_docs.py"),
        Item(tests / "server" / "test_cache.py"),
        Item(tests / "integration" / "test_textgen_webui.py", ("page", "webui")),
    ]
    pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [item.marks for item in items] == [[], ["server"], ["native", "server", "browser"]]
