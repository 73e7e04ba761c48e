"""`steer bench`: benchmarks, each with its arms interleaved in one run."""

from __future__ import annotations

import os
import platform
from typing import Any

import click

from ..plugins import hookimpl
from .bench_control import compare, control
from .common import console, json_option, model_option, model_path, print_json, print_table


@click.group()
def bench() -> None:
    """Measure what steering does, and what it costs."""


@bench.command(epilog="\b\nExample:\n  steer bench speed --threads 1 --rounds 40")
@model_option
@click.option("-t", "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads on the CPU.")
@click.option("-ngl", "--n-gpu-layers", type=click.IntRange(min=-1), default=0, metavar="N", help="Layers on the GPU, -1: all.")
@click.option("--rounds", type=click.IntRange(min=1, max=1000), default=24, show_default=True, help="Turns of each arm.")
@json_option
def speed(model: str | None, threads: int, n_gpu_layers: int, rounds: int, as_json: bool) -> None:
    """Time plain decoding against llama.cpp's own control vector, steering with 1 and 4 vectors, and reading all layers.

    The arms take turns in one run; ratios are to `plain` within a round, with a 95 % interval. `plain-again` is the same
    as `plain` and shows the noise. One thread and a small model are the worst case: the edit costs the same for every
    model, while the layers around it grow.
    """
    from rich.progress import Progress

    from ..bench.speed import as_json as to_json
    from ..bench.speed import bench_speed
    from ..engine.model import LoadedModel
    from ..runtime import activate, ensure_runtime

    path = model_path(model)
    loaded = LoadedModel(activate(ensure_runtime()), path, n_gpu_layers=n_gpu_layers)
    try:
        with Progress(console=console(stderr=True), transient=True) as bar:
            task = bar.add_task("rounds", total=rounds + 1)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done)

            rows = bench_speed(loaded, n_threads=threads, rounds=rounds, progress=progress)
    finally:
        loaded.close()
    facts: dict[str, Any] = {
        "model": path.name,
        "threads": threads,
        "n_gpu_layers": n_gpu_layers,
        "rounds": rounds,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    if as_json:
        print_json(to_json(rows, **facts))
        return
    print_table(
        ["arm", "prefill tok/s", "decode tok/s", "prefill ratio", "95 %", "decode ratio", "95 %"],
        [
            (
                r.name,
                f"{r.prefill_tps:.1f}",
                f"{r.decode_tps:.1f}",
                f"{r.prefill_ratio:.3f}",
                "{:.3f} to {:.3f}".format(*r.prefill_ratio_ci),
                f"{r.decode_ratio:.3f}",
                "{:.3f} to {:.3f}".format(*r.decode_ratio_ci),
            )
            for r in rows
        ],
        title=f"{path.name}, {threads} thread{'s' if threads > 1 else ''}, {rounds} rounds",
    )


@bench.command(epilog="\b\nExample:\n  steer bench server --threads 2 --json")
@model_option
@click.option("-t", "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads on the CPU.")
@click.option("-ngl", "--n-gpu-layers", type=click.IntRange(min=-1), default=0, metavar="N", help="Layers on the GPU, -1: all.")
@click.option("--rounds", type=click.IntRange(min=1, max=1000), default=12, show_default=True, help="Turns of each arm.")
@json_option
def server(model: str | None, threads: int, n_gpu_layers: int, rounds: int, as_json: bool) -> None:
    """Time steered against unsteered requests of one llama-server, in turn in one run.

    `batch8`: eight requests at once with eight different vectors on all layers. `single`: one request. `ttft`: the time to its
    first token. `read`: reading 64 prompts at every layer against a prefill of the same prompts. Ratios are of speeds.
    """
    from dataclasses import asdict

    from rich.progress import Progress

    from ..bench.server import bench_server

    path = model_path(model)
    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("rounds", total=rounds + 1)
        rows = bench_server(
            path,
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
            rounds=rounds,
            progress=lambda done, total: bar.update(task, completed=done),
        )
    if as_json:
        facts = {"model": path.name, "threads": threads, "n_gpu_layers": n_gpu_layers, "rounds": rounds}
        print_json({**facts, "machine": platform.machine(), "cores": os.cpu_count(), "rows": [asdict(r) for r in rows]})
        return
    print_table(
        ["arm", "unit", "unsteered", "steered", "ratio", "95 %"],
        [
            (r.name, r.unit, f"{r.plain:.3g}", f"{r.steered:.3g}", f"{r.ratio:.3f}", "{:.3f} to {:.3f}".format(*r.ratio_ci))
            for r in rows
        ],
        title=f"{path.name}, {threads} thread{'s' if threads > 1 else ''}, {rounds} rounds",
    )


bench.add_command(control)
bench.add_command(compare)


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add the command."""
    cli.add_command(bench)
