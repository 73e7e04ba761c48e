"""`steer bench`: benchmarks, each with its arms interleaved in one run."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..plugins import hookimpl
from .bench_control import compare, control
from .bench_report import Out, report_options
from .common import FilePath, console, json_option, model_option, model_path, print_json, print_table

if TYPE_CHECKING:
    from rich.progress import Progress

threads_option = click.option(
    "-t", "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads on the CPU."
)
gpu_option = click.option(
    "-ngl", "--n-gpu-layers", type=click.IntRange(min=-1), default=0, metavar="N", help="Layers on the GPU; -1: all."
)
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)


@click.group()
def bench() -> None:
    """Measure what steering does, and what it costs."""


@bench.command()
@model_option
@threads_option
@gpu_option
@click.option("--rounds", type=click.IntRange(min=1, max=1000), default=24, show_default=True, help="Rounds of each arm.")
@click.option(
    "--busy",
    type=click.IntRange(min=0, max=1024),
    default=0,
    metavar="N",
    help="Run each round once more beside N spinning programs, with an arm that waits as OpenMP does by itself.",
)
@seed_option
@report_options
@json_option
def speed(
    model: str | None,
    threads: int,
    n_gpu_layers: int,
    rounds: int,
    busy: int,
    seed: int,
    out: Out,
    as_json: bool,
) -> None:
    """Time plain decoding against llama.cpp's own control vector, steering with 1 and 4 vectors, and reading all layers.

    The arms take turns in one run; ratios are to `plain` within a round, with a 95 % interval. `plain-again` is the same as
    `plain` and shows the noise. One thread and a small model are the worst case: the edit costs the same for every
    model, while the layers around it grow.

    \b
    Examples:
      steer bench speed --threads 1 --rounds 40
      steer bench speed --out report
      steer bench speed --threads 2 --busy 2 --rounds 4     a busy machine, minutes a round
    """
    from ..bench.busy import LongWaits
    from ..bench.report import make_cost_report
    from ..bench.speed import BUSY, bench_speed, rows_of
    from ..engine.model import LoadedModel
    from ..runtime import activate, ensure_runtime

    out.check("speed")
    path = model_path(model)
    with ExitStack() as stack:
        # before the bar: what it cannot do is said in lines
        loaded = LoadedModel(activate(ensure_runtime()), path, n_gpu_layers=n_gpu_layers)
        stack.callback(loaded.close)
        others = []
        if busy and n_gpu_layers == 0:
            others.append(stack.enter_context(LongWaits(path, threads)).arm())
        bar = stack.enter_context(_bar())
        costs = bench_speed(
            loaded,
            n_threads=threads,
            rounds=rounds,
            seed=seed,
            busy=busy,
            others=others,
            by_processor=n_gpu_layers == 0,
            progress=_shown(bar, "rounds"),
        )
        costs.plan["n_gpu_layers"] = n_gpu_layers
        loaded.close()
    report = make_cost_report("speed", costs, path, loaded.identity, ["steer", *sys.argv[1:]])
    tables = {_title(path, threads, rounds): rows_of(costs)}
    if busy:
        tables[f"beside {busy} spinning program{'s' if busy > 1 else ''}"] = rows_of(costs, BUSY)

    def show(files: list[Path]) -> None:
        if as_json:
            found, *beside = ([asdict(row) for row in each] for each in tables.values())
            more = {"busy": busy, "busy_rows": beside[0]} if beside else {}
            facts = _facts(path, costs.plan)
            print_json({**facts, "rows": found, **more, "notes": costs.notes, "files": files})
            return
        for title, rows in tables.items():
            print_table(
                [
                    "arm",
                    "prefill tok/s",
                    "decode tok/s",
                    "prefill ratio",
                    "95 %",
                    "by processor",
                    "decode ratio",
                    "95 %",
                    "by processor",
                ],
                [
                    (
                        r.name,
                        f"{r.prefill_tps:.1f}",
                        f"{r.decode_tps:.1f}",
                        f"{r.prefill_ratio:.3f}",
                        "{:.3f} to {:.3f}".format(*r.prefill_ratio_ci),
                        _by_processor(r.prefill_cpu_ratio),
                        f"{r.decode_ratio:.3f}",
                        "{:.3f} to {:.3f}".format(*r.decode_ratio_ci),
                        _by_processor(r.decode_cpu_ratio),
                    )
                    for r in rows
                ],
                title=title,
            )
        for note in costs.notes:
            click.echo(note)

    out.deliver(report, show, as_json=as_json)


@bench.command()
@model_option
@threads_option
@gpu_option
@click.option("--rounds", type=click.IntRange(min=1, max=1000), default=12, show_default=True, help="Rounds of each arm.")
@click.option(
    "--stock-server",
    type=FilePath(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="The llama-server to compare with (default: the unpatched one of the runtime if it was built, else the runtime's).",
)
@seed_option
@report_options
@json_option
def server(
    model: str | None,
    threads: int,
    n_gpu_layers: int,
    rounds: int,
    stock_server: Path | None,
    seed: int,
    out: Out,
    as_json: bool,
) -> None:
    """Time steered against unsteered requests to one llama-server, taking turns in one run.

    `batch8`: eight requests at once with eight different vectors on all layers. `single`: one request. `ttft`: the time to its
    first token. `read`: reading 64 prompts at every layer against a prefill of the same prompts. `stock-cvec-...`: the same of a
    second llama-server, which has one of llama.cpp's own control vectors for all requests. Ratios are of speeds.

    \b
    Examples:
      steer bench server --threads 2 --json
      steer bench server --out report
    """
    from ..bench.report import make_cost_report
    from ..bench.server import bench_server, rows_of
    from ..store.identity import identity_of_gguf

    out.check("server")
    path = model_path(model)
    identity = identity_of_gguf(path)
    with _bar() as bar:
        costs = bench_server(
            path,
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
            rounds=rounds,
            seed=seed,
            stock=stock_server,
            progress=_shown(bar, "rounds"),
        )
    report = make_cost_report("server", costs, path, identity, ["steer", *sys.argv[1:]])
    rows = rows_of(costs)

    def show(files: list[Path]) -> None:
        if as_json:
            print_json({**_facts(path, costs.plan), "rows": [asdict(row) for row in rows], "notes": costs.notes, "files": files})
            return
        print_table(
            ["arm", "unit", "unsteered", "steered", "ratio", "95 %", "by processor"],
            [
                (
                    r.name,
                    r.unit,
                    f"{r.plain:.3g}",
                    f"{r.steered:.3g}",
                    f"{r.ratio:.3f}",
                    "{:.3f} to {:.3f}".format(*r.ratio_ci),
                    _by_processor(r.cpu_ratio),
                )
                for r in rows
            ],
            title=_title(path, threads, rounds),
        )
        for note in costs.notes:
            click.echo(note)

    out.deliver(report, show, as_json=as_json)


def _by_processor(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _facts(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    known = {key: plan[key] for key in ("threads", "n_gpu_layers", "rounds", "seed")}
    return {"model": path.name, **known, "machine": platform.machine(), "cores": os.cpu_count()}


def _title(path: Path, threads: int, rounds: int) -> str:
    return f"{path.name}, {threads} thread{'s' if threads > 1 else ''}, {rounds} rounds"


def _bar() -> Progress:
    from rich.progress import Progress

    return Progress(console=console(stderr=True), transient=True)


def _shown(bar: Progress, what: str) -> Any:
    task = bar.add_task(what, total=None)

    def progress(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    return progress


bench.add_command(control)
bench.add_command(compare)


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add the command."""
    cli.add_command(bench)
