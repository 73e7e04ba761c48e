"""Write docs/results.md: fit the bundled traits to the default model, run `steer bench control` on all, say how long it took.

    python -m benchmarks.results --jobs 2

Vectors, report (HTML, every reply, manifest) and times go to build/results: what a user has fitted is not touched. Vectors that
are there already are used again. POSIX only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from steer_plugins.bench.report import read_report
from steer_plugins.training.traits import bundled_traits

from .results_page import results_page, table

STEER = [sys.executable, "-m", "steer_plugins"]

CHILDREN: list[subprocess.Popen[bytes]] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build/results"), help="where library, report and times go")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "results.md")
    parser.add_argument("--jobs", type=int, default=2, help="traits side by side, one thread each")
    parser.add_argument("--fit-only", action="store_true", help="stop before the benchmark")
    parser.add_argument("--page-only", action="store_true", help="write the page of the report that is there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    file = options.build / "times.json"
    times: dict[str, list[float]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if not options.page_only:
        options.build.mkdir(parents=True, exist_ok=True)
        os.environ["STEER_LIBRARY"] = str((options.build / "library").absolute())
        times |= fit_all(options.jobs)
        file.write_text(json.dumps(times, indent=1), "utf-8")
    if not (options.page_only or options.fit_only):
        times["steer bench control"] = run(options)
        file.write_text(json.dumps(times, indent=1), "utf-8")
    if not options.fit_only:
        rows = [(f"`{step}`", f"{clock:.0f}", f"{cpu:.0f}") for step, (clock, cpu) in times.items()]
        where = f"{processor()}, {os.cpu_count()} cores, {options.jobs} traits side by side with one thread each"
        heading = f"## Time\n\nOn {where}. The clock's time depends on what else the machine does.\n\n"
        report = read_report(options.build / "report")
        page = f"{results_page(report)}\n{notes(report.manifest)}".rstrip() + "\n"
        table_ = table(("step", "seconds on the clock", "processor seconds"), rows)
        options.page.write_text(f"{page}\n{heading}{table_}\n", "utf-8")
        print(f"wrote {options.page}")


def notes(manifest: dict[str, Any]) -> str:
    """What a person has to say, from benchmarks/results_notes.md. Its first line names the run it was written for by the hash
    of its vectors; on the page of another run the notes say that they are old."""
    file = Path(__file__).with_name("results_notes.md")
    if not file.is_file():
        return ""
    first, _, text = file.read_text("utf-8").partition("\n")
    joined = " ".join(vector["content_sha256"] for vector in manifest["vectors"].values())
    run = hashlib.sha256(joined.encode()).hexdigest()[:16]
    if first.strip() == f"run: {run}":
        return f"## Why\n\nWritten by hand, about this run.\n\n{text.strip()}\n"
    return f"## Why\n\nWritten by hand about an earlier run ({first.strip()}; this is {run}).\n\n{text.strip()}\n"


def stop(signum: int, frame: object) -> None:
    """Ends the children too: one that is left behind would share the processor with the next run, and spoil its times."""
    for child in CHILDREN:
        child.terminate()
    os._exit(128 + signum)


def start(*arguments: str, **streams: Any) -> tuple[subprocess.Popen[bytes], float]:
    """Run `steer`; the child, and when it began."""
    began = time.monotonic()
    child = subprocess.Popen([*STEER, *arguments], **streams)
    CHILDREN.append(child)
    return child, began


def finish(child: subprocess.Popen[bytes], began: float) -> list[float]:
    """Wait for a child; seconds on the clock and of the processor."""
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    CHILDREN.remove(child)
    return [time.monotonic() - began, used.ru_utime + used.ru_stime]


def fit_all(jobs: int) -> dict[str, list[float]]:
    """Fit what the library lacks; what it took, in seconds on the clock and of the processor."""

    def fit(name: str) -> tuple[str, list[float]] | None:
        child, began = start("train", name, "--threads", "1", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert child.stderr is not None
        said = child.stderr.read().decode()
        took = finish(child, began)
        if child.returncode and "already has" not in said:
            raise SystemExit(said)
        return None if child.returncode else (f"steer train {name}", took)

    with ThreadPoolExecutor(jobs) as pool:
        return dict(found for found in pool.map(fit, bundled_traits()) if found is not None)


def run(options: argparse.Namespace) -> list[float]:
    """The benchmark; what it took."""
    arguments = f"bench control --jobs {options.jobs} --threads 1 --run-code --overwrite --out".split()
    child, began = start(*arguments, str(options.build / "report"))
    took = finish(child, began)
    if child.returncode:
        raise SystemExit(child.returncode)
    return took


def processor() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
