"""``steer worker``: lends this machine's devices to a model that runs on another one."""

from __future__ import annotations

import os
import subprocess
import sys

import click

from ..errors import EngineError
from ..plugins import hookimpl


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer worker``."""
    cli.add_command(worker)


@click.command(options_metavar="[OPTIONS] [RPC-SERVER FLAGS]...", context_settings={"ignore_unknown_options": True})
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--port", type=click.IntRange(1, 65535), default=50052, show_default=True, metavar="N", help="The port.")
def worker(flags: tuple[str, ...], host: str, port: int) -> None:
    """Hold layers of a model that runs on another machine, until Ctrl-C. It is llama.cpp's rpc-server.

    Whoever reaches the port can read and write this process's memory: listen on trusted networks only. Both machines need
    the same version of steer-plugins, built with `steer build --rpc`. Other flags go to rpc-server: -t 8, -d CUDA0, -c.

    \b
    Example:
      steer worker --host 10.0.0.2
    """
    from ..runtime import ensure_runtime
    from ..runtime.rpc import program

    binary = program(ensure_runtime())
    command = [str(binary), "--host", host, "--port", str(port), *flags]
    sys.stdout.flush()
    try:
        if sys.platform != "win32":
            os.execv(binary, command)
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise EngineError(f"{binary} cannot be started: {error.strerror or error}") from None
    click.get_current_context().exit(code)
