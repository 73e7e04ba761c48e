"""``steer export``: vectors as files for vLLM with EasySteer or hotwire, and the request that uses them."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..errors import SteerError
from ..plugins import hookimpl
from .common import FilePath, json_option, model_path, print_json


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer export``."""
    cli.add_command(export)


@click.command()
@click.argument("target", type=click.Choice(["easysteer", "hotwire"]))
@click.argument("vector")
@click.option("-o", "--out", type=FilePath(path_type=Path), required=True, metavar="DIR", help="The folder of vectors.")
@click.option("-m", "--model", type=FilePath(), metavar="FILE", help="The model of the vector, where several have one so named.")
@click.option("--server-folder", metavar="PATH", help="What the server calls that folder (default: the same).")
@json_option
def export(target: str, vector: str, out: Path, model: str | None, server_folder: str | None, as_json: bool) -> None:
    """Write VECTOR (a name in the library, or a file) for vLLM with EasySteer or hotwire, and print the fields of a request.

    The file's name follows from its content, so files of a folder are never replaced.

    \b
    Examples:
      steer export easysteer mood --out vectors --server-folder /vectors
      steer export hotwire mood --out vectors
    """
    from ..requests import easysteer, hotwire
    from ..requests import export as write
    from ..steering.terms import Term
    from ..store.identity import identity_of_gguf
    from ..store.library import Library

    identity = None if model is None else identity_of_gguf(model_path(model))
    found = Library().resolve(vector, identity)
    if identity is not None and found.identity is None:
        found = found.replace(identity=identity)
    path = write(found, target, out)
    place = server_folder if server_folder is not None else str(out.absolute())
    note = None
    try:
        term = Term(found)
        fields = easysteer(term, folder=place) if target == "easysteer" else hotwire(term)
    except SteerError as error:
        fields, note = {}, str(error)  # the file is right; its scope may be given in the request
    if as_json:
        print_json({"file": path, "request": fields, "note": note})
        return
    click.echo(f"wrote {path}")
    click.echo(json.dumps(fields, indent=2) if note is None else f"note: {note}")
