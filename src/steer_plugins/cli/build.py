"""`steer build`: compile the patched llama.cpp into the cache."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..plugins import hookimpl
from ..runtime import BuildOptions, Reporter, build_runtime, check_patch


@click.command()
@click.option("--version", "version", metavar="V", help="llama-cpp-python version (default: the installed one).")
@click.option(
    "--source",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="A llama.cpp tree or an unpacked llama-cpp-python source archive, instead of fetching one; not modified.",
)
@click.option("--cmake-arg", "cmake_args", multiple=True, metavar="-DX=Y", help="For cmake; may be given again.")
@click.option("--own-ggml", is_flag=True, help="Build ggml too, even where llama-cpp-python brings one.")
@click.option("--server/--no-server", default=True, help="With or without llama-server (minutes less without).")
@click.option("--jobs", "-j", type=click.IntRange(min=1), metavar="N", help="Files compiled at once.")
@click.option("--keep", is_flag=True, help="Keep the work tree, for quick rebuilds (also: STEER_KEEP_BUILD=1).")
@click.option("--force", is_flag=True, help="Build even when a finished runtime is there.")
@click.option("--check", "only_check", is_flag=True, help="Only find out whether the patch fits and compiles.")
@click.option("--stock-twin", is_flag=True, hidden=True, help="Also build the unpatched library, for exact tests.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(
    version: str | None,
    source: Path | None,
    cmake_args: tuple[str, ...],
    own_ggml: bool,
    server: bool,
    jobs: int | None,
    keep: bool,
    force: bool,
    only_check: bool,
    stock_twin: bool,
    as_json: bool,
) -> None:
    """Compile llama.cpp with the steering patch into a per-user cache.

    The sources are those of the installed llama-cpp-python, fetched by pip. Where that package was installed with its
    own library, its ggml (CUDA, Metal, ...) is built upon. CMAKE_ARGS from the environment is heeded.
    """
    options = BuildOptions(
        version=version,
        source=source,
        cmake_args=cmake_args,
        own_ggml=own_ggml,
        server=server,
        jobs=jobs,
        keep=keep,
        force=force,
        stock_twin=stock_twin,
    )
    reporter = Reporter()
    if only_check:
        answer = check_patch(options, reporter)
        if as_json:
            click.echo(json.dumps(answer.as_json()))
        elif answer.problem:
            click.echo(answer.problem)
        else:
            click.echo(
                f"the patch ({answer.patch_set}) fits {answer.version}: {len(answer.files)} files, "
                f"{len(answer.compiled)} compiled, {answer.seconds:.0f} s"
            )
        if answer.problem:
            raise SystemExit(1)
        return
    result = build_runtime(options, reporter)
    if as_json:
        click.echo(json.dumps(result.as_json()))
    elif result.reused:
        click.echo(f"already built: {result.runtime.path}")
    else:
        click.echo(f"built {result.runtime.path} in {result.seconds:.0f} s")


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add the command."""
    cli.add_command(build)
