"""``steer ds4``: DwarfStar 4's own server and command line, steered by vectors of the library."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import click

from ..errors import RuntimeMissing, VectorError
from ..plugins import hookimpl
from .common import FilePath, model_path, need_proxy


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer ds4``."""
    cli.add_command(ds4)


@click.group()
def ds4() -> None:
    """Steer DeepSeek-V4 in DwarfStar 4 (ds4), with vectors made by `steer train --for ds4`."""


_MODEL = click.option("-m", "--model", type=FilePath(), required=True, metavar="FILE", help="The model, a GGUF file.")


@ds4.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
    options_metavar="[OPTIONS] [DS4-SERVER FLAGS]...",
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.option("--model", type=FilePath(), required=True, metavar="FILE", help="The model, a GGUF file.")
@click.option("--steer", "terms", multiple=True, metavar="TERMS", help="For requests without their own; may be repeated.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N", help="0 picks a free one.")
@click.option("--binary", type=FilePath(), metavar="FILE", help="ds4-server (default: the one on the PATH).")
@click.option("--pool", type=click.IntRange(1, 16), default=1, show_default=True, metavar="N", help="Processes at once.")
@click.option("--kv-disk-dir", "kv", type=FilePath(path_type=Path), metavar="DIR", help="For disk caches, one for each steering.")
@click.option("--show-log", is_flag=True, help="Print ds4-server's log on standard error.")
def serve(
    flags: tuple[str, ...],
    model: str,
    terms: tuple[str, ...],
    port: int,
    binary: str | None,
    pool: int,
    kv: Path | None,
    show_log: bool,
) -> None:
    """Run ds4-server with steering until Ctrl-C, and pass its API on. Whatever is not an option below goes to ds4-server.

    A request may name its steering: {"steering": "mood:0.6", ...}. ds4 takes one when it starts, so another steering restarts
    it, or starts one more with --pool. Its disk cache does not know of steering, so each gets a folder of its own.

    \b
    Examples:
      steer ds4 serve --model deepseek-v4-flash.gguf --steer mood:0.6
      steer ds4 serve --model deepseek-v4-flash.gguf --pool 2 --ctx 100000
    """
    need_proxy()
    from ..hosting.ds4 import Ds4Pool
    from ..hosting.running import passing, run
    from ..runtime.cache import cache_dir
    from ..steering.grammar import parse_options
    from ..store.identity import identity_of_gguf
    from ..store.library import Library

    wanted = parse_options(terms)
    path = model_path(model)
    reserved = [flag for flag in flags if flag.startswith("--dir-steering")]
    if reserved:
        raise click.UsageError(f"{reserved[0]} is what --steer says here: leave it out")
    program = binary or shutil.which("ds4-server")
    if program is None or not Path(program).is_file():
        where = f"there is no {binary}" if binary else "ds4-server is not on the PATH"
        raise RuntimeMissing(f"{where}: build DwarfStar 4, and name its server with --binary")
    identity = identity_of_gguf(path)
    with tempfile.TemporaryDirectory(prefix="steer-ds4-") as folder:
        servers = Ds4Pool(
            Path(program),
            path,
            identity,
            Library(),
            Path(folder),
            default=wanted,
            flags=flags,
            kv=kv or cache_dir() / "ds4-kv",
            most=pool,
            on_line=(lambda line: click.echo(line, err=True)) if show_log else None,
        )
        try:
            servers.start()
            run(passing(servers), port, _announce)
        finally:
            servers.stop()


def _announce(url: str) -> None:
    click.echo(f"Serving at {url}/v1")
    sys.stdout.flush()


@ds4.command()
@click.argument("terms", nargs=-1, required=True)
@_MODEL
@click.option("-o", "--out", type=FilePath(path_type=Path), required=True, metavar="FILE", help="The file to write, .f32.")
@click.option("--overwrite", is_flag=True, help="Replace a file of that name.")
def write(terms: tuple[str, ...], model: str, out: Path, overwrite: bool) -> None:
    """Write the directions of TERMS for ds4's command line, and print the flags that go with them.

    \b
    Example:
      steer ds4 write mood:0.6 --model deepseek-v4-flash.gguf --out mood.f32
    """
    from ..hosting.ds4 import express
    from ..steering.grammar import parse_options, steering_of
    from ..store.identity import identity_of_gguf
    from ..store.library import Library

    specs = parse_options(terms)
    identity, library = identity_of_gguf(model_path(model)), Library()
    found = express(steering_of(specs, lambda name: library.resolve(name, identity)), identity)
    if not found:
        raise VectorError("these terms change nothing, so there is nothing to write: give a strength other than 0")
    if out.exists() and not overwrite:
        raise VectorError(f"{out} exists: choose another file, or replace it with --overwrite")
    try:
        found.write(out)
    except OSError as error:
        raise VectorError(f"{out} cannot be written: {error.strerror or error}") from None
    click.echo(shlex.join(["ds4", "--model", str(model), *found.flags(out)]))
    if found.ffn:
        click.echo(f"In ds4: /steer {found.ffn:g} (another number changes the strength, 0 turns it off)")
