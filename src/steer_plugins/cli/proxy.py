"""``steer proxy``: passes OpenAI requests on to vLLM with EasySteer or hotwire, with their steering translated."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..plugins import hookimpl
from .common import FilePath, model_path, need_proxy


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer proxy``."""
    cli.add_command(proxy)


@click.command()
@click.option("--to", "target", type=click.Choice(["easysteer", "hotwire"]), required=True, help="What steers there.")
@click.argument("url")
@click.option(
    "--vectors", type=FilePath(path_type=Path), required=True, metavar="DIR", help="Files for the server are put there."
)
@click.option("--server-folder", metavar="PATH", help="What the server calls that folder (default: the same).")
@click.option("-m", "--model", type=FilePath(), metavar="FILE", help="The model of the vectors, a GGUF file.")
@click.option("--steer", "default", metavar="TERMS", help="For requests without their own.")
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True, metavar="N", help="0 picks a free one.")
def proxy(
    target: str, url: str, vectors: Path, server_folder: str | None, model: str | None, default: str | None, port: int
) -> None:
    """Pass OpenAI requests on to the server at URL, their "steering" translated from our terms; streams go through untouched.

    What the server cannot do exactly is refused (400) before it is asked. EasySteer reads a vector's file when a request first
    names it; hotwire reads its folder when it starts, so export its vectors before.

    \b
    Examples:
      steer proxy --to easysteer http://127.0.0.1:8017 --vectors /shared/vectors
      steer proxy --to hotwire http://gpu:8000 --vectors vectors --steer "mood:0.6?0-"
    """
    need_proxy()
    from ..hosting.running import passing, run
    from ..hosting.translating import Translating
    from ..store.identity import identity_of_gguf
    from ..store.library import Library

    identity = None if model is None else identity_of_gguf(model_path(model))
    change = Translating(target, url, Library(), vectors, identity=identity, server_folder=server_folder, default=default or "")

    def ready(here: str) -> None:
        click.echo(f"{here}/v1 leads to {change.url} ({target})")
        sys.stdout.flush()

    run(passing(change), port, ready)
