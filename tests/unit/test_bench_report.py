"""Reports of ``steer bench control``: what is written, read again and compared, and the commands."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from steer_plugins.bench.control import QUICK, Control, Results
from steer_plugins.bench.report import (
    BenchReport,
    compare,
    make_report,
    read_report,
    write_report,
)
from steer_plugins.bench.reporters import builtin_reporters
from steer_plugins.bench.summary import interval, number
from steer_plugins.bench.tasks import builtin_families
from steer_plugins.cli.main import main
from steer_plugins.errors import DataError
from steer_plugins.plugins.manager import reset
from steer_plugins.store.library import Library
from steer_plugins.training.traits import load_trait

from .bench_world import FAMILY, PLAN, TRAIT, World, case, run, vector
from .fakes import IDENTITY

# ---- the report ----


def report(**more: Any) -> BenchReport:
    engine = World()
    return make_report(engine, [case()], [FAMILY], PLAN, run(engine, **more), ["steer", "bench", "control"])


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html() -> None:
    made = report()
    for row in made.rows:
        if "text" in row:
            row["text"] = "<script>alert('x')</script>&amp;"
    page = builtin_reporters()["html"](made)["report.html"].decode()
    read = _Tags(page)
    assert read.open == [] and not {"script", "img", "link", "iframe"} & set(read.tags)
    assert not {"src", "href", "onclick", "onerror"} & set(read.attributes) and "http" not in page.replace("http-equiv", "")
    assert "<script>alert('x')</script>&amp;" in read.text and "Dose and response" in read.text
    assert read.tags.count("svg") == 2 and "prefers-color-scheme:dark" in page and 'name="viewport"' in page


def test_html_of_a_floor_and_of_nothing() -> None:
    made = report()
    made.summary["traits"]["glee"]["families"]["nouns"]["floor"] = True
    page = builtin_reporters()["html"](made)["report.html"].decode()
    assert "floor: the plain model fails" in page and page.count("<svg") == 1
    made.summary["traits"]["glee"] |= {"families": {}, "dose": {"points": [], "spearman": None}, "persistence": {}}
    assert b"gleeful" in builtin_reporters()["html"](made)["report.html"]


def test_reports_are_written_and_read(tmp_path: Path) -> None:
    made = report()
    files = write_report(made, tmp_path / "r", builtin_reporters())
    assert [f.name for f in files] == ["manifest.json", "report.html", "results.jsonl", "summary.md"]
    back = read_report(tmp_path / "r")
    assert back.manifest == json.loads(json.dumps(made.manifest))
    assert back.summary == json.loads(json.dumps(made.summary)) and len(back.rows) == len(made.rows)
    assert back.manifest["vectors"]["glee"]["content_sha256"] == vector().content_hash
    assert back.manifest["plan"]["seed"] == 0 and back.manifest["model"]["identity"]["n_layer"] == 10
    table = (tmp_path / "r" / "summary.md").read_text("utf-8").splitlines()
    assert table[0].startswith("| trait | tasks") and "glee (gleeful) | nouns" in table[2] and len(table) == 3


def test_the_model_file_is_hashed(tmp_path: Path) -> None:
    import hashlib

    engine = World()
    (tmp_path / "m.gguf").write_bytes(b"weights")
    engine.info = replace(engine.info, path=str(tmp_path / "m.gguf"))
    model = make_report(engine, [], [], PLAN, Results(), []).manifest["model"]
    assert model["sha256"] == hashlib.sha256(b"weights").hexdigest() and model["bytes"] == 7 and model["file"] == "m.gguf"


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "a\\b", "results.jsonl"])
def test_reporters_write_nowhere_else(tmp_path: Path, name: str) -> None:
    reporters = {**builtin_reporters(), "evil": lambda r: {name: b""}}
    with pytest.raises(DataError, match="the reporter 'evil'"):
        write_report(report(), tmp_path / "r", reporters)
    assert not (tmp_path / "r").exists()


def test_comparing() -> None:
    a, b = report(), report()
    assert all(row[7] == 0.0 for row in compare(a, b))
    for row in b.rows:
        if row["kind"] == "reply" and row["arm"] == "steer":
            row["score"] += 0.125
    changed = {row[:4]: row for row in compare(a, b)}
    steer = changed["glee", "nouns", "steer", "greedy"]
    assert steer[4] == 5 and steer[7] == pytest.approx(0.125) and steer[8] == "+0.12 to +0.12"
    assert changed["glee", "nouns", "plain", "greedy"][7] == 0.0
    with pytest.raises(DataError, match="nothing to compare"):
        compare(a, BenchReport(a.manifest, [], {}))
    with pytest.raises(DataError, match="a reply without"):
        compare(a, BenchReport({}, [{"kind": "reply", "half": "score"}], {}))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "manifest.json cannot be read"),
        ({"manifest.json": "{"}, "is not JSON"),
        ({"manifest.json": "{}"}, "is not one that steer bench writes"),
        ({"manifest.json": '{"format": "steer-bench-control-v1", "summary": {}}'}, "results.jsonl cannot be read"),
        ({"manifest.json": '{"format": "steer-bench-control-v1", "summary": {}}', "results.jsonl": "x"}, "is not JSON lines"),
        ({"manifest.json": '{"format": "steer-bench-control-v1", "summary": {}}', "results.jsonl": "3"}, "not a JSON object"),
    ],
)
def test_reading_what_is_no_report(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_report(tmp_path)


def test_numbers_for_people() -> None:
    assert number(None) == "–" and number(-0.001) == "0.00" and number(-0.001, sign=True) == "0.00"
    assert number(0.5, sign=True) == "+0.50" and number(-12.3, digits=0) == "−12"
    assert interval([0.5, 0.25, 0.75, 9]) == "0.50 (0.25 to 0.75)" and interval([None, None, None, 0]) == "–"


# ---- the commands ----


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    made = World()
    monkeypatch.setattr("steer_plugins.cli.common.EngineOptions.open", lambda self, **more: made)
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Library().put(vector(identity=IDENTITY).replace(name="mood"), IDENTITY)
    reset()
    yield made
    reset()


def test_commands(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["bench", "control", "--quick", "--family", "style"]
    assert main([*arguments, "--out", "a"]) == 0
    out = capsys.readouterr().out
    assert "mood (cheerful)" in out and "report.html" in out
    assert main([*arguments, "--out", "a"]) == 1
    assert "a holds a report: choose another folder" in capsys.readouterr().err
    assert main([*arguments, "--out", "a", "--overwrite", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["manifest"]["plan"]["run_code"] is False and len(data["files"]) == 4
    assert main([*arguments, "--out", "b", "--prompts", "6", "--no-sampled", "--pole", "negative", "--trait", "mood"]) == 0
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["vectors"]["mood"]["pole"] == "sombre"
    capsys.readouterr()
    assert main(["bench", "compare", "a", "a"]) == 0
    assert "The manifests agree." in capsys.readouterr().out
    assert main(["bench", "compare", "a", "b", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert "plan" in compared["manifests_differ_in"] and compared["rows"][0]["trait"] == "mood"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["control", "--trait", "succinctness"], "no vector 'succinctness' for this model"),
        (["control", "--trait", "nix"], 'there is no trait "nix"'),
        (["control", "--family", "nix"], "there is no task named 'nix': choose from advice, code, docs, faults, style"),
        (["control", "--reporter", "nix"], "there is no reporter named 'nix'"),
        (["compare", "x", "y"], "cannot be read"),
    ],
)
def test_commands_refuse(world: World, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1


def test_without_any_vector(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    Library().remove("mood", IDENTITY)
    assert main(["bench", "control", "--quick"]) == 1
    assert "fit it with: steer train mood" in capsys.readouterr().err


def test_fit_and_jobs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    Library().remove("mood", IDENTITY)
    # joyful texts where steering pulls up, so that there is something to calibrate
    world.reply = lambda prompt, pull, dose, n: (
        f"{'joy ' * max(0, round(9 * pull))}{'grief ' * max(0, round(-9 * pull))}it is",
        "stop",
    )
    arguments = ["bench", "control", "--quick", "--family", "style", "--trait", "mood"]
    assert main(arguments) == 1
    assert "steer train mood" in capsys.readouterr().err
    assert main([*arguments, "--fit", "--jobs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["vectors"]["mood"]["calibrated"] is True
    made = Library().get("mood", IDENTITY).content_hash
    assert main([*arguments, "--fit"]) == 0  # what is there stays
    assert Library().get("mood", IDENTITY).content_hash == made


def test_a_plugin_brings_tasks_a_metric_and_a_reporter(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parents[1] / "plugins" / "steer-haiku"
    site = tmp_path / "site"
    info = site / "steer_haiku-0.1.dist-info"
    info.mkdir(parents=True)
    shutil.copy(example / "steer_haiku.py", site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: steer-haiku\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[steer_plugins]\nhaiku = steer_haiku\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("STEER_PLUGINS", "haiku")
    reset()
    trait = {**load_trait("mood").to_dict(), "name": "mood", "metric": "brevity"}
    Path("brief.json").write_text(json.dumps(trait))
    world.reply = lambda prompt, pull, dose, n: (f"one\ntwo\n{prompt.split('about ')[-1].split()[-1].strip('.<a>')}", "stop")
    try:
        arguments = ["--quick", "--family", "haiku", "--trait", "./brief.json", "--reporter", "best", "--reporter", "manifest"]
        assert main(["bench", "control", *arguments, "--out", "h"]) == 0
        assert Path("h/best.csv").read_text().startswith("mood,haiku,")
        summary = json.loads(Path("h/manifest.json").read_text())["summary"]["traits"]["mood"]["families"]["haiku"]
        assert summary["arms"]["plain"]["greedy"]["measures"]["lines"][0] == 3.0
        assert summary["arms"]["plain"]["greedy"]["metric"][0] == pytest.approx(2 / (1 + 3 / 12) - 1)
    finally:
        sys.modules.pop("steer_haiku", None)


def test_builtin_families_run_on_any_engine() -> None:
    cases = [case(trait=replace(TRAIT, name=name)) for name in ("succinctness", "debugging", "caution", "mine")]
    results = Control(World(), cases, builtin_families(), QUICK).run()
    ran = {name: list(part["families"]) for name, part in results.summary["traits"].items()}
    assert ran == {
        "succinctness": ["docs", "style"],
        "debugging": ["code", "faults"],
        "caution": ["advice"],
        "mine": ["style"],
    }
