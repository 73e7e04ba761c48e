"""The report of a benchmark: files in a folder, written by reporters, read back to compare two runs.

A reporter is a function from a :class:`BenchReport` to files by name; plugins register more (``register_reporters``). There is
a kind of report for each benchmark: ``control``, ``speed`` and ``server``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..atomic import beside, finish
from ..engine.base import Engine
from ..errors import DataError
from .arms import Case
from .control import ControlPlan, Results
from .stats import paired
from .summary import number
from .tasks import Family

if TYPE_CHECKING:
    from ..steering.vector import ModelIdentity
    from .costs import Costs

KINDS = ("control", "speed", "server")
MOST_BYTES = 1 << 30
STANDARD_FILES = ("manifest.json", "report.html", "results.jsonl", "summary.md")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def format_of(kind: str) -> str:
    """What the manifest of a kind of report says of itself."""
    return f"steer-bench-{kind}-v1"


@dataclass(frozen=True)
class BenchReport:
    """What reporters get: JSON values. ``manifest``: from what to repeat the run; ``rows``, ``summary``: see ``Results``
    and, for times, ``Costs``."""

    manifest: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def kind(self) -> str:
        """``control``, ``speed`` or ``server``; empty where the manifest is none of ours."""
        return next((kind for kind in KINDS if self.manifest.get("format") == format_of(kind)), "")


Reporter = Callable[[BenchReport], dict[str, bytes]]


def make_report(
    engine: Engine, cases: Sequence[Case], families: Sequence[Family], plan: ControlPlan, results: Results, command: Sequence[str]
) -> BenchReport:
    """The results of ``bench control`` with their manifest. Nothing in it depends on the time: the same run gives the same."""
    info = engine.info
    manifest = {
        "format": format_of("control"),
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
        "versions": _versions(),
        "machine": _machine(),
    }
    return BenchReport(manifest, results.rows, results.summary)


def make_cost_report(kind: str, costs: Costs, model: Path, identity: ModelIdentity, command: Sequence[str]) -> BenchReport:
    """The times of ``bench speed`` or ``bench server`` with their manifest, which also says how busy the machine is now."""
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    manifest = {
        "format": format_of(kind),
        "command": list(command),
        "plan": costs.plan,
        "model": {"name": identity.name or model.stem, "identity": identity.to_dict(), **_file(str(model))},
        "versions": {**_versions(), **costs.versions},
        "machine": {**_machine(), "cpu": _cpu(), "cores": os.cpu_count(), "load_average": load},
    }
    return BenchReport(manifest, costs.rows, costs.summary(costs.plan["seed"]))


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


def _machine() -> dict[str, Any]:
    return {"system": platform.system(), "processor": platform.machine()}


def _cpu() -> str:
    """The processor's name where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {"steer-plugins": __version__, "python": platform.python_version(), "numpy": np.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["llama-cpp-python"] = metadata.version("llama-cpp-python")
    return found


# ---- folders ----


def check_folder(folder: Path, kind: str, *, overwrite: bool = False) -> None:
    """Refuse, before anything is measured, a folder that a report cannot or must not be written to. Raises DataError."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is not a folder: name another with --out")
    nearest = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise DataError(f"{nearest} is not a folder that you may write to: name another with --out")
    there = [name for name in STANDARD_FILES if (folder / name).exists()]
    if not there:
        return
    if "manifest.json" in there:
        try:
            old = BenchReport(_json(folder / "manifest.json"), [], {}).kind
        except (DataError, AttributeError):
            old = ""
        if not old:
            raise DataError(f"{folder} holds a manifest.json that no steer bench wrote: name another folder with --out")
        if old != kind:
            raise DataError(f"{folder} holds a report of steer bench {old}: name another folder with --out")
        what = "a report"
    else:
        what = f"{there[0]} without a manifest.json"
    if not overwrite:
        raise DataError(f"{folder} holds {what}: choose another folder with --out, or replace it with --overwrite")


def write_report(report: BenchReport, folder: Path, reporters: dict[str, Reporter]) -> list[Path]:
    """Write what the reporters make into ``folder`` (made if missing).

    All files are written beside their places first, so that a full disk leaves what was there, and the manifest is renamed
    last: a folder with one is complete. Standard files of an older report that are not written anew are removed. When a
    reporter fails, the files of the others are written before that is said.

    Raises DataError.
    """
    files: dict[str, bytes] = {}
    failed: list[str] = []
    for name, reporter in reporters.items():
        try:
            made = {file: bytes(memoryview(data)) for file, data in reporter(report).items()}
        except Exception as error:  # a plugin's mistake must not cost the results of a long run
            failed.append(f"the reporter {name!r} failed ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})")
            continue
        for file, data in made.items():
            if not isinstance(file, str) or not _FILE.fullmatch(file) or file in files:
                raise DataError(f"the reporter {name!r} wants to write {file!r:.60}, which is not a free file name")
            files[file] = data
    order = sorted(files, key=lambda file: file == "manifest.json")
    new = not folder.exists()
    staged: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for file in order:
                staged[file] = beside(folder / file, files[file])
            for file in STANDARD_FILES:  # the old manifest goes first: what follows is not a report until the new one is there
                if file == "manifest.json" or file not in files:
                    (folder / file).unlink(missing_ok=True)
            for file in order:
                finish(staged[file], folder / file)
                del staged[file]
        finally:
            for left in staged.values():
                with contextlib.suppress(OSError):
                    left.unlink()
            if new and staged:
                with contextlib.suppress(OSError):
                    folder.rmdir()
    except OSError as error:
        raise DataError(f"the report cannot be written to {folder}: {error.strerror or error}") from None
    if failed:
        there = f"the other files are in {folder}" if files else "nothing was written"
        raise DataError(f"{'; '.join(failed)}; {there}")
    return [folder / file for file in sorted(files)]


def read_report(folder: Path) -> BenchReport:
    """A report that was written with the reporters ``manifest`` and ``jsonl``. Raises DataError."""
    manifest = _json(folder / "manifest.json")
    known = isinstance(manifest, dict) and BenchReport(manifest, [], {}).kind
    if not known or not isinstance(manifest.get("summary"), dict):
        raise DataError(f"{folder / 'manifest.json'} is not one that steer bench writes")
    try:
        lines = _read(folder / "results.jsonl").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError:
        raise DataError(f"{folder / 'results.jsonl'} is not JSON lines, as steer bench writes them") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{folder / 'results.jsonl'} holds a line that is not a JSON object")
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


# ---- comparing two ----

COMPARISON = ("trait", "tasks", "arm", "decoding", "n", "A", "B", "B - A", "95 %")


def comparison(a: BenchReport, b: BenchReport, seed: int = 0) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows of two reports of one kind. Raises DataError for unlike ones and where nothing can be compared."""
    if a.kind != b.kind:
        raise DataError(
            f"the first report is of steer bench {a.kind} and the second of steer bench {b.kind}: compare two of the same kind"
        )
    if a.kind == "control":
        return COMPARISON, compare(a, b, seed)
    from . import costs

    return costs.COMPARISON, costs.compare(a, b, seed)


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
