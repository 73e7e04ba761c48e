"""The report of ``steer bench control``: files in a folder, written by reporters, read back to compare two runs.

A reporter is a function from a :class:`BenchReport` to files by name; plugins register more (``register_reporters``).
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..engine.base import Engine
from ..errors import DataError
from ..files import write_atomically
from .arms import Case
from .control import Plan, Results
from .stats import paired
from .tasks import Family

FORMAT = "steer-bench-control-v1"
MOST_BYTES = 1 << 30
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class BenchReport:
    """What reporters get: JSON values. ``manifest``: from what to repeat the run; ``rows``, ``summary``: see ``Results``."""

    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


Reporter = Callable[[BenchReport], dict[str, bytes]]


def builtin_reporters() -> dict[str, Reporter]:
    """The reporters of the package, by name."""
    from .page import report_html
    from .results import report_results

    return {
        "html": report_html,
        "jsonl": report_jsonl,
        "manifest": report_manifest,
        "results": report_results,
        "table": report_table,
    }


def make_report(
    engine: Engine, cases: Sequence[Case], families: Sequence[Family], plan: Plan, results: Results, command: Sequence[str]
) -> BenchReport:
    """The results with their manifest. Nothing in it depends on the time: the same run gives the same report."""
    info = engine.info
    manifest = {
        "format": FORMAT,
        "command": list(command),
        "plan": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(plan).items()},
        "model": {"name": info.name, "identity": info.identity.to_dict(), **_file(info.path)},
        "vectors": {
            case.name: {
                "content_sha256": case.vector.content_hash,
                "random": [vector.content_hash for vector in case.randoms],
                "shuffled": None if case.shuffled is None else case.shuffled.content_hash,
                "calibrated": case.vector.calibration is not None,
                "pole": case.pole,
            }
            for case in cases
        },
        "families": {
            family.name: hashlib.sha256("\n".join(task.id + task.prompt for task in family.tasks).encode()).hexdigest()
            for family in families
        },
        "versions": {"steer-plugins": __version__, "python": platform.python_version(), "numpy": np.__version__, **_bindings()},
        "machine": {"system": platform.system(), "processor": platform.machine()},
    }
    return BenchReport(manifest, results.rows, results.summary)


def _file(path: str) -> dict[str, Any]:
    """Name, size and sha256 of the model's file, if it is on this machine (a server's may not be)."""
    file = Path(path)
    if not path or not file.is_file():
        return {"file": Path(path).name, "sha256": None}
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _bindings() -> dict[str, str]:
    from importlib import metadata

    try:
        return {"llama-cpp-python": metadata.version("llama-cpp-python")}
    except metadata.PackageNotFoundError:
        return {}


def write_report(report: BenchReport, folder: Path, reporters: dict[str, Reporter]) -> list[Path]:
    """Write what the reporters make into ``folder`` (made if missing), each file atomically. Raises DataError.

    The manifest is written last: a folder with one is complete.
    """
    files: dict[str, bytes] = {}
    for name, reporter in reporters.items():
        for file, data in reporter(report).items():
            if not _FILE.fullmatch(file) or file in files:
                raise DataError(f"the reporter {name!r} wants to write {file!r:.60}, which is no free file name")
            files[file] = data
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(files, key=lambda file: file == "manifest.json"):
            write_atomically(folder / file, files[file])
    except OSError as error:
        raise DataError(f"the report cannot be written to {folder}: {error.strerror or error}") from None
    return [folder / file for file in sorted(files)]


def read_report(folder: Path) -> BenchReport:
    """A report that was written with the reporters ``manifest`` and ``jsonl``. Raises DataError."""
    manifest = _json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("summary"), dict):
        raise DataError(f"{folder / 'manifest.json'} is not one that steer bench control writes")
    try:
        lines = _read(folder / "results.jsonl").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError:
        raise DataError(f"{folder / 'results.jsonl'} is not JSON lines, as steer bench control writes them") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{folder / 'results.jsonl'} holds a line that is no JSON object")
    return BenchReport({k: v for k, v in manifest.items() if k != "summary"}, rows, manifest["summary"])


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} is larger than a gigabyte")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON") from None


# ---- reporters ----


def report_jsonl(report: BenchReport) -> dict[str, bytes]:
    """``results.jsonl``: every reply and question, one JSON object a line."""
    return {"results.jsonl": "".join(json.dumps(row, sort_keys=True) + "\n" for row in report.rows).encode()}


def report_manifest(report: BenchReport) -> dict[str, bytes]:
    """``manifest.json``: what it takes to repeat the run, and the summary."""
    return {"manifest.json": (json.dumps({**report.manifest, "summary": report.summary}, indent=1) + "\n").encode()}


def report_table(report: BenchReport) -> dict[str, bytes]:
    """``summary.md``: the table, in Markdown, for a README."""
    rows = ["| " + " | ".join(SUMMARY) + " |", "|" + " --- |" * len(SUMMARY)]
    rows += ["| " + " | ".join(row) + " |" for row in summary_rows(report.summary)]
    return {"summary.md": ("\n".join(rows) + "\n").encode()}


SUMMARY = ("trait", "tasks", "plain", "best prompt", "steer", "both", "random", "steer - prompt", "both - prompt")
"""Columns of the summary: mean scores of greedy replies, and differences with their 95 % intervals."""


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The summary table as text, a row for each trait and family."""
    rows = []
    for trait, part in summary["traits"].items():
        for family, found in part["families"].items():
            name = f"{trait} ({part['pole']})"
            if found["floor"]:
                rows.append((name, family, *["floor"] * (len(SUMMARY) - 2)))
                continue
            versus = found["versus"]["greedy"]
            means = {arm: number(values["greedy"]["score"][0]) for arm, values in found["arms"].items()}
            arms = [means[arm] for arm in ("plain", versus["best prompt"], "steer", "both", "random")]
            rows.append((name, family, *arms, *(interval(versus[f"{arm} - prompt"], sign=True) for arm in ("steer", "both"))))
    return rows


def number(value: float | None, *, sign: bool = False, digits: int = 2) -> str:
    """A number for people; a dash for none."""
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # no minus before a zero
    text = f"{rounded:+.{digits}f}" if sign and rounded else f"{rounded:.{digits}f}"
    return text.replace("-", "−")


def interval(estimate: Sequence[float | None], *, sign: bool = False) -> str:
    """``mean (low to high)`` of an estimate's list."""
    mean, low, high = (number(x, sign=sign) for x in estimate[:3])
    return mean if estimate[1] is None else f"{mean} ({low} to {high})"


# ---- comparing two ----

COMPARISON = ("trait", "tasks", "arm", "decoding", "n", "A", "B", "B - A", "95 %")


def compare(a: BenchReport, b: BenchReport, seed: int = 0) -> list[tuple[Any, ...]]:
    """Scores of the arms that both reports have, paired by prompt: rows under :data:`COMPARISON`. Raises DataError for none."""
    first, second = _scores(a), _scores(b)
    rows: list[tuple[Any, ...]] = []
    for key in first:
        tasks = sorted(first[key].keys() & second.get(key, {}).keys())
        if tasks:
            old, new = [first[key][t] for t in tasks], [second[key][t] for t in tasks]
            change = paired(new, old, seed)
            span = f"{number(change.low, sign=True)} to {number(change.high, sign=True)}"
            rows.append((*key, len(tasks), float(np.mean(old)), float(np.mean(new)), change.mean, span))
    if not rows:
        raise DataError("the two reports have no trait and prompts in common, so there is nothing to compare")
    return rows


def _scores(report: BenchReport) -> dict[tuple[str, str, str, str], dict[str, float]]:
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    try:
        for row in report.rows:
            if row["kind"] == "reply" and row["half"] == "score":
                key = (row["trait"], row["family"], row["arm"], row["decoding"])
                found.setdefault(key, {})[row["task"]] = float(row["score"])
    except (KeyError, TypeError, ValueError):
        raise DataError("a report holds a reply without its trait, family, arm, decoding, task or score") from None
    return found
