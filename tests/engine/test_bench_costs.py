"""``steer bench speed`` and ``steer bench server`` as they are called, on tiny models: every arm runs, and is reported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fitting import MEASURES, OURS, THEIRS, bench_fitting
from steer_plugins.bench import speed
from steer_plugins.bench.costs import Costs
from steer_plugins.bench.report import read_report
from steer_plugins.cli.main import main

ARMS = speed.arms_of(stock=os.environ.get("STEER_RUNTIME") == "stock")
FILES = ["manifest.json", "report.html", "results.jsonl", "summary.md"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: Any) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arch", ["llama", "deepseek4"])
def test_speed(tiny: Callable[..., Path], arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny(arch))
    assert main(["bench", "speed", "--model", model, "--rounds", "2", "--out", "r", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == list(ARMS)
    assert all(row["prefill_tps"] > 0 and row["decode_ratio"] > 0 and row["decode_cpu_ratio"] for row in found["rows"])
    assert found["rounds"] == 2 and not found["notes"]
    made = read_report(Path("r"))
    assert sorted(f.name for f in Path("r").iterdir()) == FILES and made.kind == "speed"
    assert made.manifest["model"]["identity"]["architecture"] == arch and made.manifest["command"][0] == "steer"
    assert len(made.rows) == len(ARMS) * 4 * 2


def test_speed_on_a_busy_machine(tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Each arm has its turn alone and beside the neighbours, who are there then and only then."""
    from steer_plugins.bench import busy

    there: list[int] = []
    turn = speed._turn

    def watched(*args: Any) -> None:
        there.append(len(neighbours[-1]._processes))
        assert all(p.poll() is None for p in neighbours[-1]._processes)
        turn(*args)

    neighbours: list[Any] = []
    enter = busy.Neighbours.__enter__
    monkeypatch.setattr(busy.Neighbours, "__enter__", lambda self: neighbours.append(self) or enter(self))
    monkeypatch.setattr(speed, "_turn", watched)
    arguments = ["bench", "speed", "--model", str(tiny("llama")), "--rounds", "2", "--busy", "2", "--out", "r"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert there[0] == 0 and sorted(there) == [0, 0, 0, 2, 2] and not any(n._processes for n in neighbours)
    for rows in (found["rows"], found["busy_rows"]):
        assert [row["name"] for row in rows] == [*ARMS, "long-waits"]
        assert all(row["prefill_tps"] > 0 and row["decode_ratio"] > 0 and row["decode_cpu_ratio"] for row in rows)
    assert found["busy"] == 2 and found["rows"] != found["busy_rows"]
    made = read_report(Path("r"))
    assert made.manifest["plan"]["busy"] == 2 and len(made.rows) == (len(ARMS) + 1) * 8 * 2
    assert {"decode", "decode, busy", "decode, busy, processor"} < made.summary["measures"].keys()


def test_stopped_by_hand_it_writes_nothing(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    add = Costs.add

    def stop(self: Costs, *args: Any) -> None:
        add(self, *args)
        if len(self.rows) > 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(Costs, "add", stop)
    assert main(["bench", "speed", "--model", str(tiny("llama")), "--rounds", "9", "--out", "r"]) == 130
    assert not Path("r").exists()


def test_fitting(tiny: Callable[..., Path]) -> None:
    class Other:
        """In repeng's place: what is timed is ours."""

        asked: list[int] = []  # noqa: RUF012

        def train(self, pairs: Any) -> tuple[float, float]:
            self.asked.append(len(pairs))
            return 2.0, 1.0

    costs = Costs((), {}, {"seed": 0})
    bench_fitting(costs, tiny("llama"), Other(), pairs=3, rounds=2)  # type: ignore[arg-type]
    measures = costs.summary()["measures"]
    assert list(measures) == [m.name for m in MEASURES] and Other.asked == [3] * 4
    for measure in measures.values():
        assert set(measure["arms"]) == {OURS, THEIRS} and measure["arms"][OURS]["value"] > 0 and measure["base"] == THEIRS
    assert costs.plan["pairs"] == {"openings": 3, "prompts": 3}


def test_server(tiny: Callable[..., Path], runtime: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if runtime.server is None:
        pytest.skip(f"the runtime {runtime.path} has no llama-server: build one with `steer build`")
    arguments = ["bench", "server", "--model", str(tiny("llama")), "--rounds", "1"]
    assert main([*arguments, "--out", "r", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stock = ["stock-cvec-batch8", "stock-cvec-single", "stock-cvec-ttft"]
    assert [row["name"] for row in found["rows"]] == ["batch8", "single", "ttft", "read", *stock]
    assert all(row["ratio"] > 0 and row["plain"] > 0 and row["steered"] > 0 for row in found["rows"])
    made = read_report(Path("r"))
    assert made.kind == "server" and len(made.rows) in (11, 22) and "--no-kv-unified" in made.manifest["plan"]["server_flags"]
    assert main([*arguments, "--stock-server", "nix"]) == 2
    assert "nix" in capsys.readouterr().err
    assert main(["bench", "compare", "r", "r"]) == 0
    assert "The manifests agree." in capsys.readouterr().out
