"""`steer build`: compile the patched llama.cpp into the cache, pack it into a wheel, tidy the cache."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..plugins import hookimpl
from ..runtime import BuildOptions, Reporter, build_runtime, check_patch, prune_runtimes
from .common import FilePath


@click.command()
@click.option("--version", "version", metavar="V", help="llama-cpp-python version (default: the installed one).")
@click.option(
    "--source",
    type=FilePath(path_type=Path),
    metavar="PATH",
    help="A llama.cpp tree or an unpacked llama-cpp-python source archive, instead of fetching one; not modified. "
    "Or a .tar.gz, with --sha256.",
)
@click.option("--sha256", default="", metavar="HEX", help="The content of an archive given with --source.")
@click.option(
    "--git", "git", metavar="URL", help="With --on: the repository that has the host's commit (default: llama.cpp's own)."
)
@click.option("--cmake-arg", "cmake_args", multiple=True, metavar="-DX=Y", help="Passed to cmake; may be repeated.")
@click.option("--rpc", is_flag=True, help="With llama.cpp's RPC back end and `steer worker`, for layers on other machines.")
@click.option("--own-ggml", is_flag=True, help="Build ggml too, even where llama-cpp-python brings one.")
@click.option(
    "--on",
    type=FilePath(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Build on the ggml (and GPU back ends) of a llama-server folder, or of a site-packages with llama-cpp-python.",
)
@click.option(
    "--into",
    type=FilePath(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Put the runtime there instead of in the cache (use it with STEER_RUNTIME=DIR).",
)
@click.option("--server/--no-server", default=True, help="Build llama-server too, or not (minutes faster).")
@click.option("--jobs", "-j", type=click.IntRange(min=1), metavar="N", help="Files compiled at once.")
@click.option("--keep", is_flag=True, help="Keep the work tree, for quick rebuilds (also: STEER_KEEP_BUILD=1).")
@click.option("--rebuild", is_flag=True, help="Build even if there is a finished runtime.")
@click.option("--check", "only_check", is_flag=True, help="Only check whether the patch applies and compiles.")
@click.option("--wheel", "as_wheel", is_flag=True, help="Pack the runtime into a wheel, steer-plugins-runtime, for pip.")
@click.option(
    "--out",
    type=FilePath(file_okay=False, path_type=Path),
    metavar="DIR",
    help="With --wheel: where to put it (default: the current folder).",
)
@click.option(
    "--runtime",
    "packed",
    type=FilePath(file_okay=False, path_type=Path),
    metavar="DIR",
    help="With --wheel: pack this finished runtime instead of building one.",
)
@click.option("--prune", "only_prune", is_flag=True, help="Build nothing; remove runtimes from the cache that are not in use.")
@click.option("--stock-twin", is_flag=True, hidden=True, help="Also build the unpatched library, for exact tests.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def build(
    version: str | None,
    source: Path | None,
    sha256: str,
    git: str | None,
    cmake_args: tuple[str, ...],
    rpc: bool,
    own_ggml: bool,
    on: Path | None,
    into: Path | None,
    server: bool,
    jobs: int | None,
    keep: bool,
    rebuild: bool,
    only_check: bool,
    as_wheel: bool,
    out: Path | None,
    packed: Path | None,
    only_prune: bool,
    stock_twin: bool,
    as_json: bool,
) -> None:
    """Compile llama.cpp with the steering patch into a per-user cache.

    The sources are those of the installed llama-cpp-python, fetched by pip. Where that package was installed with its
    own library, the build uses its ggml (CUDA, Metal, ...). CMAKE_ARGS from the environment is passed on.

    With --on, the ggml of another program is built upon, with the sources of the commit that it was built from. With
    --wheel, ggml is built too, without instructions that only this processor may have (-DGGML_NATIVE=ON allows them).
    """
    if (out is not None or packed is not None) and not as_wheel:
        raise click.UsageError("--out and --runtime go with --wheel")
    if git is not None and (on is None or source is not None):
        raise click.UsageError("--git goes with --on, and not with --source")
    if sha256 and source is None:
        raise click.UsageError("--sha256 goes with --source")
    if sum((only_check, as_wheel, only_prune)) > 1 or (as_wheel and into is not None):
        raise click.UsageError("--check, --wheel and --prune exclude each other, and --wheel excludes --into")
    options = BuildOptions(
        version=version,
        source=source,
        cmake_args=(*cmake_args, "-DGGML_RPC=ON") if rpc else cmake_args,
        own_ggml=own_ggml,
        server=server,
        jobs=jobs,
        keep=keep,
        force=rebuild,
        stock_twin=stock_twin,
        on=on,
        into=into,
        git=git,
        sha256=sha256,
    )
    reporter = Reporter()
    if only_prune:
        _prune(reporter, as_json)
        return
    if as_wheel:
        _wheel(options, packed, out or Path(), reporter, as_json)
        return
    if only_check:
        answer = check_patch(options, reporter)
        if as_json:
            click.echo(json.dumps(answer.as_json()))
        else:
            for line in [*answer.hooks, *(misfit for misfit in answer.misfits if misfit not in answer.hooks)]:
                click.echo(f"{'  missing' if line in answer.misfits else '  placed '}  {line}")
            click.echo(
                answer.problem
                or f"the patch fits {answer.version}: {len(answer.hooks)} hooks, {len(answer.files)} files, "
                f"{len(answer.compiled)} compiled, {answer.seconds:.0f} s"
            )
        if answer.problem:
            raise SystemExit(1)
        return
    run_build(options, as_json, reporter)


def run_build(options: BuildOptions, as_json: bool = False, reporter: Reporter | None = None) -> None:
    """Build a runtime and print where it is. Raises BuildError."""
    result = build_runtime(options, reporter or Reporter())
    if as_json:
        click.echo(json.dumps(result.as_json()))
    elif result.reused:
        click.echo(f"already built: {result.runtime.path}")
    else:
        click.echo(f"built {result.runtime.path} in {result.seconds:.0f} s")


def _wheel(options: BuildOptions, packed: Path | None, out: Path, reporter: Reporter, as_json: bool) -> None:
    from ..runtime.locate import read_runtime
    from ..runtime.wheel import build_wheel, is_native, portable_options

    if packed is not None:
        runtime = read_runtime(packed)
    else:
        runtime = build_runtime(portable_options(options), reporter).runtime
    if is_native(runtime):
        reporter.say("this runtime was compiled for this machine's processor and may crash on an older one")
    path = build_wheel(runtime, out)
    if as_json:
        click.echo(json.dumps({"wheel": str(path), "runtime": str(runtime.path), "bytes": path.stat().st_size}))
    else:
        click.echo(f"packed {path} ({path.stat().st_size / 1e6:.1f} MB); install it with: pip install {path}")


def _prune(reporter: Reporter, as_json: bool) -> None:
    result = prune_runtimes(reporter)
    if as_json:
        click.echo(json.dumps(result.as_json()))
        return
    for path, size in result.removed:
        click.echo(f"removed {path} ({size / 1e6:.1f} MB)")
    for path, why in result.kept:
        click.echo(f"kept {path} ({why})")
    click.echo(f"{result.freed / 1e6:.1f} MB freed")


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add the command."""
    cli.add_command(build)
