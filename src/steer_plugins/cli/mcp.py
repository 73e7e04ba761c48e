"""``steer mcp``: tools with which a model steers itself, or an agent steers it, for any client of the Model Context Protocol."""

from __future__ import annotations

import importlib.util
import json
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import EngineError, RuntimeMissing, SteerError
from ..plugins import hookimpl
from .common import FilePath

if TYPE_CHECKING:
    from ..hosting.session import Session


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer mcp``."""
    cli.add_command(mcp)


@click.command()
@click.option(
    "--server", metavar="URL", envvar="STEER_SERVER", help="The `steer serve` that has the model (or set STEER_SERVER)."
)
@click.option("--to", metavar="URL", help="Where requests go instead: the Ollama sidecar, or text-generation-webui's API.")
@click.option("--port", type=click.IntRange(0, 65535), default=8090, show_default=True, metavar="N", help="0 picks a free one.")
@click.option("--http", is_flag=True, help="Offer the tools at http://127.0.0.1:PORT/mcp, not on standard input and output.")
@click.option("--allow", multiple=True, metavar="NAME[:MAX]", help="A vector that may be set; may be repeated (default: all).")
@click.option(
    "--max-strength",
    type=click.FloatRange(min=0.0, min_open=True, max=1e6),
    default=1.0,
    show_default=True,
    metavar="X",
    help="The largest strength of each, either way.",
)
@click.option("--allow-fit", is_flag=True, help="New vectors may be fitted; they are kept in the library.")
@click.option(
    "--calibrate",
    type=click.Choice(["none", "quick", "full"]),
    default="none",
    show_default=True,
    help="How thoroughly to calibrate those.",
)
@click.option("--log", type=FilePath(path_type=Path), metavar="FILE", help="Append each call there, as a line of JSON.")
def mcp(
    server: str | None,
    to: str | None,
    port: int,
    http: bool,
    allow: tuple[str, ...],
    max_strength: float,
    allow_fit: bool,
    calibrate: str,
    log: Path | None,
) -> None:
    """Let a model steer itself: tools for a client of the Model Context Protocol, and a port that its requests pass through.

    The tools list vectors, set the steering of this session, read how far a text lies along a vector and, if allowed, fit
    new vectors. Point the program that talks to the model at the port (http://127.0.0.1:8090/v1): what the tools set acts on
    every request without a steering of its own. Each call is logged on standard error.

    \b
    Examples:
      steer mcp --server http://127.0.0.1:8080 --allow succinctness:0.8 --allow mood:0.5
      steer mcp --server http://127.0.0.1:8080 --http --allow-fit
      steer mcp --to http://127.0.0.1:5000
    """
    missing = [name for name in ("mcp", "httpx", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing or importlib.util.find_spec("mcp.server.mcpserver") is None:
        raise RuntimeMissing("the mcp package, version 2 or later, must be installed for this: pip install 'steer-plugins[mcp]'")
    from ..client.engine import ServerEngine
    from ..hosting.bounds import Bounds
    from ..hosting.session import Session

    bounds = Bounds.parse(allow, max_strength)
    key = os.environ.get("STEER_API_KEY") or None
    if server is None and to is None:
        raise click.UsageError("name the server: --server URL of a `steer serve`, or --to URL of the webui's API")
    engine = ServerEngine(server or _server_behind(str(to)), api_key=key)
    with closing(engine), _log_to(log) as write:
        session = Session(engine, bounds, to=to, may_fit=allow_fit, calibrate=calibrate, log=write)
        _serve(session, to or engine.url, port, http)


def _serve(session: Session, url: str, port: int, http: bool) -> None:
    import anyio

    from ..hosting.running import beside, run
    from ..hosting.tools import make_app, make_server

    tools = make_server(session)
    if http:
        app = make_app(session, tools=tools)
        run(app, port, lambda here: click.echo(f"Tools at {here}/mcp, requests to {url} through {here}"))
    else:
        with beside(make_app(session), port) as here:
            click.echo(f"Tools on standard input and output, requests to {url} through {here}", err=True)
            anyio.run(tools.run_stdio_async)


class _log_to:
    """Gives what writes an entry: to standard error, and to a file. Raises SteerError for one that cannot be written."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: Any = None

    def __enter__(self) -> Any:
        if self._path is not None:
            try:
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise SteerError(f"the log {self._path} cannot be written: {error.strerror or error}") from None
        return self._write

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry)
        click.echo(f"steer: {line}", err=True)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def _server_behind(url: str) -> str:
    """The llama-server of a text-generation-webui. Raises EngineError."""
    from ..client.connection import Connection

    connection = Connection(url, api_key=os.environ.get("STEER_API_KEY") or None, timeout=30.0)
    try:
        facts = connection.get("/v1/internal/steering")
    except SteerError as error:
        raise EngineError(f"{url} does not say which llama-server it has ({error}): name it with --server, too") from None
    finally:
        connection.close()
    server = facts.get("server") if isinstance(facts, dict) else None
    if not isinstance(server, str):
        raise EngineError(f"{url} has no llama-server that steers: load a model there first, or name the server with --server")
    return server
