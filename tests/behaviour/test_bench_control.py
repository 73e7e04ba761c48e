"""`steer bench control --quick` from end to end on the small real model: a tiny part of it, and every file that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.results_page import results_page
from steer_plugins.bench.report import read_report
from steer_plugins.cli.main import main
from steer_plugins.engine.local import LocalEngine
from steer_plugins.metrics import builtin_metrics
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library

Get = Callable[[str], SteeringVector]


def test_quick(
    engine: LocalEngine, vector: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    Library().put(vector("mood"), engine.info.identity)
    out = tmp_path / "report"
    assert main(["bench", "control", "--quick", "--trait", "mood", "--run-code", "--out", str(out)]) == 0
    assert "mood (cheerful)" in capsys.readouterr().out
    names = {file.name for file in out.iterdir()}
    assert names == {"manifest.json", "report.html", "results.jsonl", "summary.md"}

    report = read_report(out)
    replies = [row for row in report.rows if row["kind"] == "reply"]
    assert {row["arm"] for row in replies} == {"plain", "prompt", "strong prompt", "steer", "both", "random", "shuffled"}
    assert {row["decoding"] for row in replies} == {"greedy", "sampled"} and {row["half"] for row in replies} == {
        "choose",
        "score",
    }
    metric = builtin_metrics()["mood"]
    assert all(row["metric"] == metric(row["text"]) and row["perplexity"] > 1 for row in replies)
    assert len({row["text"] for row in replies if row["task"] == replies[0]["task"]}) > 3

    part = report.summary["traits"]["mood"]
    assert len(part["dose"]["points"]) >= 7 and set(part["side_effects"]) > {"plain", part["prompt"], "steer", "both", "random"}
    metrics = {point["strength"]: point["metric"][0] for point in part["dose"]["points"]}
    assert metrics[1.0] > metrics[-1.0]
    assert part["side_effects"]["steer"]["kl"][0] > 0 and part["side_effects"]["plain"]["accuracy"][0] > 0.4
    assert part["families"]["style"]["arms"]["prompt"]["greedy"]["context_tokens"][0] > 0
    assert part["families"]["style"]["arms"]["steer"]["greedy"]["context_tokens"][0] == 0
    assert not report.summary["families"]["style"]["plain"]["floor"]

    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert manifest["vectors"]["mood"]["content_sha256"] == vector("mood").content_hash and manifest["model"]["sha256"]
    html = (out / "report.html").read_text("utf-8")
    assert "<svg" in html and "src=" not in html and "<script" not in html
    page = results_page(report)
    assert "## Targets" in page and "| mood |" in page
