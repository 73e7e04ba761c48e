"""The reporters that come with the package: what they make of a report's values."""

from __future__ import annotations

import json

from . import costs
from .costpage import cost_page
from .page import control_page
from .report import BenchReport, Reporter
from .summary import SUMMARY, summary_rows


def builtin_reporters() -> dict[str, Reporter]:
    """The reporters of the package, by name."""
    return {
        "html": report_html,
        "jsonl": report_jsonl,
        "manifest": report_manifest,
        "table": report_table,
    }


def report_html(report: BenchReport) -> dict[str, bytes]:
    """``report.html``: one page that needs nothing else."""
    return {"report.html": control_page(report) if report.kind == "control" else cost_page(report)}


def report_jsonl(report: BenchReport) -> dict[str, bytes]:
    """``results.jsonl``: every reply and question, or every time, one JSON object a line."""
    return {"results.jsonl": "".join(json.dumps(row, sort_keys=True) + "\n" for row in report.rows).encode()}


def report_manifest(report: BenchReport) -> dict[str, bytes]:
    """``manifest.json``: what it takes to repeat the run, and the summary."""
    return {"manifest.json": (json.dumps({**report.manifest, "summary": report.summary}, indent=1) + "\n").encode()}


def report_table(report: BenchReport) -> dict[str, bytes]:
    """``summary.md``: the table, in Markdown, for a README."""
    columns, found = table_of(report)
    rows = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    rows += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in found]
    return {"summary.md": ("\n".join(rows) + "\n").encode()}


def _cell(text: str) -> str:
    """A cell that stays one, whatever a plugin's names hold."""
    return " ".join(text.replace("|", "\\|").split())


def table_of(report: BenchReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The summary table as text: columns and rows."""
    if report.kind == "control":
        return SUMMARY, summary_rows(report.summary)
    return costs.SUMMARY, costs.summary_rows(report.summary)
