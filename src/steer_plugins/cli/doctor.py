"""`steer doctor`: what was found, what is missing, what to do."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from ..plugins import hookimpl
from ..runtime.doctor import diagnose
from .common import FilePath

_STYLES = {"ok": "green", "note": "yellow", "missing": "red"}


@click.command()
@click.option("--model", "-m", type=FilePath(path_type=Path), metavar="GGUF", help="The model to look at.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(model: Path | None, as_json: bool) -> None:
    """Show what is installed and found, and what to do about what is missing.

    The exit code is 0 if steering works, else 1.
    """
    report = diagnose(model)
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for finding in report.findings:
            line = Text(f"{finding.topic:<14}")
            line.append(f"{finding.state:<9}", style=_STYLES[finding.state])
            console.print(line.append(finding.text))
            if finding.advice:
                console.print(Text(f"{'':<23}-> {finding.advice}", style="bold"))
        console.print("Steering works." if report.works else "Steering does not work yet: see the lines with -> above.")
    if not report.works:
        raise SystemExit(1)


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add the command."""
    cli.add_command(doctor)
