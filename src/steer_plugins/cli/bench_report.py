"""What the benchmarks share: the options ``--out``, ``--overwrite`` and ``--reporter``, and how their reports get to a folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import DataError, SteerError
from .common import FilePath

if TYPE_CHECKING:
    from ..bench.report import BenchReport, Reporter

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Out:
    """Where a report goes, if anywhere, and who writes it."""

    folder: Path | None = None
    overwrite: bool = False
    names: tuple[str, ...] = ()
    writers: dict[str, Reporter] = field(default_factory=dict)

    def check(self, kind: str) -> None:
        """Refuse, before anything is measured, what could not be written. Raises SteerError."""
        from ..bench.report import check_folder
        from ..plugins import manager

        self.writers = {name: manager().find("reporters", name) for name in self.names or manager().registry("reporters")}
        if self.folder is not None:
            check_folder(self.folder, kind, overwrite=self.overwrite)
        elif self.names:
            raise DataError("--reporter says what to write, but not where to: name a folder with --out")
        elif self.overwrite:
            raise DataError("--overwrite replaces a report, but there is none: name its folder with --out")

    def deliver(self, report: BenchReport, show: Callable[[list[Path]], None], *, as_json: bool) -> None:
        """Write the report and show the results, which are shown even if they cannot be written. Raises SteerError."""
        from ..bench.report import write_report

        files: list[Path] = []
        problem: SteerError | None = None
        if self.folder is not None:
            try:
                files = write_report(report, self.folder, self.writers)
            except SteerError as error:
                problem = error
        show(files)
        if not as_json:
            for file in files:
                click.echo(f"wrote {file}")
        if problem is not None:
            raise problem


def report_options(command: F) -> F:
    """Adds ``--out --overwrite --reporter``; the command gets them as ``out: Out``."""

    @click.option("-o", "--out", "folder", type=FilePath(path_type=Path), metavar="DIR", help="Write the report there.")
    @click.option("--overwrite", is_flag=True, help="Replace a report that is there.")
    @click.option("--reporter", "reporters", multiple=True, metavar="NAME", help="html, jsonl, manifest, table (default: all).")
    @functools.wraps(command)
    def wrapped(*args: Any, folder: Path | None, overwrite: bool, reporters: tuple[str, ...], **rest: Any) -> Any:
        return command(*args, out=Out(folder, overwrite, reporters), **rest)

    return wrapped  # type: ignore[return-value]
