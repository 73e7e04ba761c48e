"""``steer plot``: draws what the fit and the calibration of a vector measured."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import DataError
from ..plugins import hookimpl
from .common import FilePath, json_option, print_json


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer plot``."""
    cli.add_command(plot)


@click.command()
@click.argument("vector")
@click.option("-m", "--model", metavar="FILE", default=None, help="Look the name up for this model.")
@click.option("-o", "--out", type=FilePath(path_type=Path), metavar="FILE", help="The PNG to write (default: VECTOR.png here).")
@click.option("--overwrite", is_flag=True, help="Replace a file of that name.")
@json_option
def plot(vector: str, model: str | None, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Draw VECTOR, a name in the library or a file: norms, separation and cosines by layer, and the dose curve.

    The shaded layers are those it steers, the dashed lines the suggested window. Needs matplotlib.

    \b
    Examples:
      steer plot mood
      steer plot ./calm.safetensors --out calm.png
    """
    from ..report.plots import save_plot
    from ..store.identity import identity_of_gguf
    from ..store.library import Library

    found = Library().resolve(vector, None if model is None else identity_of_gguf(model))
    path = Path(f"{found.name}.png") if out is None else out
    if not path.parent.is_dir():
        raise DataError(f"there is no folder {path.parent} to write {path.name} to: make it first")
    if path.is_dir() or (path.exists() and not overwrite):
        raise DataError(f"{path} exists: choose another file with --out, or replace it with --overwrite")
    if path.suffix.lower() != ".png":
        raise DataError(f"{path}: a plot is a PNG picture, so name a .png file")
    save_plot(found, path)
    if as_json:
        print_json({"vector": found.name, "file": path})
    else:
        click.echo(f"Written to {path}")
