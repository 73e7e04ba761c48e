"""Reports of ``steer bench speed`` and ``steer bench server``: what is made of times, and how a report gets to its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.against_repeng import Repeng
from benchmarks.fitting import opening_pairs, prompt_pairs
from steer_plugins import atomic as files_module
from steer_plugins.bench import report as report_module
from steer_plugins.bench.costs import Costs, Measure, compare, figures, ratios_of, summary_rows
from steer_plugins.bench.report import (
    KINDS,
    BenchReport,
    check_folder,
    comparison,
    format_of,
    make_cost_report,
    read_report,
    write_report,
)
from steer_plugins.bench.reporters import builtin_reporters, table_of
from steer_plugins.bench.stats import median_change, median_of
from steer_plugins.cli.main import main
from steer_plugins.engine.chat import ChatTemplate
from steer_plugins.errors import DataError
from steer_plugins.report.svg import ticks

from .fakes import IDENTITY
from .test_bench_report import _Tags

SPEED, TIME = Measure("decode", "tok/s", "plain", "Tokens one by one."), Measure("ttft", "s", "plain", "The first token.")
BAD = "<script>alert('x')</script>|"


def costs(factor: float = 0.5) -> Costs:
    """Three rounds on a machine whose speed changes from round to round; ``steer-1`` has ``factor`` of the speed of plain."""
    made = Costs(
        (SPEED, TIME), {"plain": "no steering", "steer-1": "one vector", "repeng": BAD}, {"threads": 1, "rounds": 3, "seed": 0}
    )
    for round_, machine in enumerate((10.0, 40.0, 20.0)):
        for arm, part in (("plain", 1.0), ("steer-1", factor), ("repeng", 0.1)):
            made.add(round_, "decode", arm, machine * part)
            made.add(round_, "ttft", arm, 1 / (machine * part))
    made.notes.append(BAD)
    return made


def report(kind: str = "speed", factor: float = 0.5, tmp: Path = Path("m.gguf")) -> BenchReport:
    return make_cost_report(kind, costs(factor), tmp, IDENTITY, ["steer", "bench", kind])


# ---- numbers ----


def test_ratios_are_of_speeds_within_a_round() -> None:
    measures = costs().summary()["measures"]
    for name, value in (("decode", 10.0), ("ttft", 0.1)):  # medians of 5, 20, 10 and of their inverses
        assert measures[name]["arms"]["steer-1"]["value"] == pytest.approx(value)
        assert measures[name]["arms"]["steer-1"]["ratio"] == [0.5, 0.5, 0.5, 3]
        assert measures[name]["arms"]["plain"]["ratio"][0] == 1.0
    rows = summary_rows(costs().summary())
    assert rows[1] == ("decode", "steer-1", "10.0", "tok/s", "0.500", "0.500 to 0.500", "plain") and len(rows) == 6


def test_rounds_that_lack_a_side_do_not_count() -> None:
    made = costs()
    made.rows = [row for row in made.rows if row["arm"] != "plain" or row["round"] != 1]
    assert ratios_of(made.rows, "decode", "steer-1", "plain", "tok/s") == [0.5, 0.5]


def test_medians() -> None:
    assert median_of([]).mean is None and median_of([3.0]).to_list() == [3.0, 3.0, 3.0, 1]
    values = [0.9, 0.95, 1.0, 1.05, 50.0]
    found = median_of(values)
    assert found.mean == 1.0 and found.low is not None and 0.9 <= found.low < 1.0 and found == median_of(values)
    change = median_change([1.0] * 9, [1.5] * 7)
    assert change.to_list() == [0.5, 0.5, 0.5, 7] and median_change([], [1.0]).mean is None


def test_figures_and_ticks() -> None:
    assert [figures(v) for v in (0.0123, 1.234, 12.34, 123.4)] == ["0.012", "1.23", "12.3", "123"]
    assert ticks(0.93, 1.04) == [0.94, 0.96, 0.98, 1.0, 1.02, 1.04] and ticks(-0.35, 0.35, 5) == [-0.2, 0.0, 0.2]
    for low, high in ((0.0, 1.0), (0.9991, 1.0004), (0.1, 7.0), (-1.1, 1.1)):
        assert 2 <= len(ticks(low, high)) <= 6 and all(low <= t <= high for t in ticks(low, high))


# ---- the report ----


def test_page() -> None:
    made = report()
    page = builtin_reporters()["html"](made)["report.html"].decode()
    read = _Tags(page)
    assert read.open == [] and not {"script", "img", "link", "iframe"} & set(read.tags) and "http" not in page
    assert read.tags.count("svg") == 2 + 0 and "prefers-color-scheme:dark" in page and 'name="viewport"' in page
    assert read.text.count(BAD) >= 2 and "load average" in read.text and "What steering costs: fake" in read.text


def test_page_draws_ratios_that_can_be_told_apart() -> None:
    made = costs(0.98)
    made.arms["steer-4"] = "four"
    for row in [row for row in made.rows if row["arm"] == "steer-1"]:
        made.add(row["round"], row["measure"], "steer-4", row["value"])
    page = builtin_reporters()["html"](make_cost_report("server", made, Path("m"), IDENTITY, []))["report.html"].decode()
    # a figure of ratios and one of medians for each measure; the arm at a tenth of the speed is in the second alone
    assert page.count("<svg") == 4 and page.count("steer-1: 0.980 (0.980 to 0.980)") == 2 and "repeng: 0.100" not in page


@pytest.mark.parametrize("kind", KINDS[1:])
def test_written_and_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "m.gguf").write_bytes(b"weights")
    made = report(kind, tmp=tmp_path / "m.gguf")
    written = write_report(made, tmp_path / "a" / "r", builtin_reporters())
    assert [f.name for f in written] == ["manifest.json", "report.html", "results.jsonl", "summary.md"]
    assert sorted(f.name for f in (tmp_path / "a" / "r").iterdir()) == [f.name for f in written]
    back = read_report(tmp_path / "a" / "r")
    assert back.kind == kind and back.rows == made.rows and back.summary == json.loads(json.dumps(made.summary))
    assert back.manifest["model"]["bytes"] == 7 and len(back.manifest["model"]["sha256"]) == 64
    assert {"steer-plugins", "python", "numpy"} <= back.manifest["versions"].keys() and back.manifest["plan"]["seed"] == 0
    assert {"cpu", "cores", "load_average", "system"} <= back.manifest["machine"].keys()
    table = (tmp_path / "a" / "r" / "summary.md").read_text("utf-8").splitlines()
    assert table[0].startswith("| measure | arm |") and len(table) == 8 and table_of(back)[1] == table_of(made)[1]


def test_comparing() -> None:
    a, b = report(factor=0.5), report(factor=0.75)
    columns, rows = comparison(a, b)
    found = {row[:2]: dict(zip(columns, row, strict=True)) for row in rows}
    assert found["decode", "steer-1"]["B - A"] == pytest.approx(0.25) and found["decode", "steer-1"]["A"] == 10.0
    assert found["ttft", "steer-1"]["ratio B"] == pytest.approx(0.75) and found["decode", "plain"]["B - A"] == 0.0
    assert found["ttft", "steer-1"]["95 %"] == "+0.250 to +0.250"
    with pytest.raises(DataError, match="the first report is of steer bench speed and the second of steer bench server"):
        comparison(a, report("server"))
    with pytest.raises(DataError, match="nothing to compare"):
        comparison(a, BenchReport(a.manifest, [], {"measures": {}}))
    with pytest.raises(DataError, match="summary is not one"):
        compare(a, BenchReport(a.manifest, [], {"measures": {"decode": 3}}))
    with pytest.raises(DataError, match="a time without"):
        compare(a, BenchReport(a.manifest, [{"kind": "time"}], a.summary))


# ---- the folder ----


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "r"
    write_report(report(factor=0.5), folder, builtin_reporters())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    calls = []

    def full(path: Any, data: bytes) -> Path:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return files_module.beside(path, data)

    monkeypatch.setattr(report_module, "beside", full)
    with pytest.raises(DataError, match="cannot be written to .*: No space left on device"):
        write_report(report(factor=0.75), folder, builtin_reporters())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    calls.clear()
    with pytest.raises(DataError):
        write_report(report(), tmp_path / "new", builtin_reporters())
    assert not (tmp_path / "new").exists()


def test_stopped_half_way_it_is_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "r"
    write_report(report(factor=0.5), folder, builtin_reporters())

    def stop(new: Path, path: Path) -> None:
        if path.name == "summary.md":
            raise KeyboardInterrupt
        files_module.finish(new, path)

    monkeypatch.setattr(report_module, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report(report(factor=0.75), folder, builtin_reporters())
    assert not list(folder.glob(".*")) and not (folder / "manifest.json").exists()
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        read_report(folder)
    with pytest.raises(DataError, match=r"holds report.html without a manifest.json: .*--overwrite"):
        check_folder(folder, "speed")
    check_folder(folder, "speed", overwrite=True)


def test_what_is_not_written_anew_does_not_stay(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "r", builtin_reporters())
    (tmp_path / "r" / "notes.txt").write_text("mine")
    write_report(report(factor=0.75), tmp_path / "r", {"manifest": builtin_reporters()["manifest"]})
    assert sorted(f.name for f in (tmp_path / "r").iterdir()) == ["manifest.json", "notes.txt"]


@pytest.mark.parametrize("broken", [lambda r: {"x.txt": "no bytes"}, lambda r: 1 / 0, lambda r: None])
def test_a_broken_reporter_costs_nothing_else(tmp_path: Path, broken: Any) -> None:
    with pytest.raises(DataError, match=r"the reporter 'mine' failed \(.*\); the other files are in "):
        write_report(report(), tmp_path / "r", {"mine": broken, **builtin_reporters()})
    assert read_report(tmp_path / "r").kind == "speed"
    with pytest.raises(DataError, match="nothing was written"):
        write_report(report(), tmp_path / "s", {"mine": broken})


def test_folders_that_are_refused(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "deep", "speed")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(DataError, match="is not a folder"):
            check_folder(folder, "speed")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"manifest_version": 3}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "manifest.json").write_text("[]")
    for name in ("other", "list"):
        with pytest.raises(DataError, match="holds a manifest.json that no steer bench wrote"):
            check_folder(tmp_path / name, "speed", overwrite=True)
    write_report(report("server"), tmp_path / "r", builtin_reporters())
    with pytest.raises(DataError, match="holds a report of steer bench server: name another"):
        check_folder(tmp_path / "r", "speed", overwrite=True)
    with pytest.raises(DataError, match="r holds a report: choose another folder with --out, or replace it with --overwrite"):
        check_folder(tmp_path / "r", "server")
    check_folder(tmp_path / "r", "server", overwrite=True)


# ---- the commands, before they measure ----


@pytest.mark.parametrize("benchmark", KINDS)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--reporter", "nix", "--out", "x"], "there is no reporter named 'nix': choose from "),
        (["--reporter", "html"], "name a folder with --out"),
        (["--overwrite"], "name its folder with --out"),
        (["--out", "file"], "file is not a folder"),
        (["--out", "speedy"], "speedy holds a report"),
        (["--out", "x", "--model", "nix.gguf"], "there is no model file nix.gguf"),
    ],
)
def test_commands_refuse(
    benchmark: str, arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    write_report(report(), Path("speedy"), builtin_reporters())
    assert main(["bench", benchmark, *arguments]) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and not captured.out and not Path("x").exists()


def test_compare_command(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_report(report(), Path("a"), builtin_reporters())
    write_report(report("server"), Path("s"), builtin_reporters())
    assert main(["bench", "compare", "a", "a"]) == 0
    assert "steer-1" in capsys.readouterr().out
    assert main(["bench", "compare", "a", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["ratio A"] == 0.5
    assert main(["bench", "compare", "a", "s"]) == 1
    assert "compare two of the same kind" in capsys.readouterr().err
    manifest = json.loads(Path("s/manifest.json").read_text())
    Path("s/manifest.json").write_text(json.dumps({**manifest, "format": format_of("nix")}))
    assert main(["bench", "compare", "a", "s"]) == 1
    assert "is not one that steer bench writes" in capsys.readouterr().err


# ---- repeng ----


def test_a_python_without_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be started: No such file"):
        Repeng(tmp_path / "nix", tmp_path / "m.gguf")
    with pytest.raises(DataError, match=r"cannot run repeng, which needs torch, .*: .*No module named"):
        Repeng(sys.executable, tmp_path / "m.gguf")
    quiet = tmp_path / "quiet.py"
    quiet.write_text("import sys; sys.exit('gone')")
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {quiet}\n")
    script.chmod(0o755)
    if sys.platform != "win32":
        with pytest.raises(DataError, match="cannot run repeng, .*: gone"):
            Repeng(script, tmp_path / "m.gguf")


STANDINS = {
    "torch": """
        from contextlib import contextmanager
        float32 = "float32"
        def set_num_threads(n): print("noise on standard output")
        def tensor(rows): return rows
        @contextmanager
        def inference_mode(): yield
    """,
    "transformers": """
        class Tokenizer: pad_token = None; eos_token = "<end>"
        class Config: num_hidden_layers, hidden_size, model_type = 2, 4, "tiny"
        class Output:
            def __init__(self, cache): self.past_key_values = cache
        class Model:
            config, steered = Config(), False
            def eval(self): return self
            def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
                cache = [] if past_key_values is None else past_key_values
                print("noise", input_ids)
                if len(cache) + len(input_ids[0]) > 6: raise RuntimeError("cache\\nis full")
                return Output(cache + input_ids[0] + ([] if not self.steered else []))
        class AutoTokenizer:
            @staticmethod
            def from_pretrained(where, gguf_file): return Tokenizer()
        class AutoModelForCausalLM:
            @staticmethod
            def from_pretrained(where, gguf_file, dtype): return Model()
    """,
    "repeng": """
        class DatasetEntry:
            def __init__(self, positive, negative): assert positive != negative
        class ControlVector:
            def __init__(self, kind, directions): self.directions = directions
            @staticmethod
            def train(model, tokenizer, entries): assert len(entries) == 2 and not model.steered and tokenizer.pad_token
        class ControlModel:
            def __init__(self, model, layers): self.model = model; assert layers == [0, 1]
            def set_control(self, vector, dose): self.model.steered = True
            def unwrap(self): self.model.steered = False
    """,
}


def test_orders_to_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins of the libraries: what they print is no answer, caches are kept apart, an error is one sentence."""
    import textwrap

    for name, source in STANDINS.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Repeng(sys.executable, tmp_path / "m.gguf") as repeng:
        assert repeng.versions == {"repeng": "1.0", "transformers": "1.0", "torch": "1.0"}
        plain, steered = repeng.arms()
        assert [arm.name for arm in (plain, steered)] == ["transformers", "repeng"]
        for arm in (plain, steered, plain):
            clock, cpu = arm.prefill([1, 2, 3])
            assert clock > 0 and cpu >= 0 and len(arm.decode([4, 5], 3)) == 2
        assert repeng.train([("a", "b"), ("c", "d")])[0] >= 0
        with pytest.raises(DataError, match="RuntimeError: cache is full"):
            plain.decode([6, 7, 8], 5)
        child = repeng._process
    assert child.poll() is not None


def test_pairs_for_fitting() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
        bos="",
        eos="",
    )
    pairs = prompt_pairs(5, template)
    assert len(pairs) == 5 and all(p.startswith("<system>") and p.endswith("<assistant>") and p != n for p, n in pairs)
    assert "\n\n" in prompt_pairs(1)[0][0]
    first, second = opening_pairs(2, template)
    assert first[0].endswith("<assistant>The") and second[0].endswith("<assistant>The train") and first[0] != first[1]
    assert len({text for pair in opening_pairs(100) for text in pair}) == 200
    assert len(prompt_pairs(10_000)) == len(set(prompt_pairs(10_000))) >= 100


def test_the_child_needs_nothing_of_this_package() -> None:
    from benchmarks import repeng_child

    code = f"import runpy; runpy.run_path({repeng_child.__file__!r}); import sys; print('steer_plugins' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
