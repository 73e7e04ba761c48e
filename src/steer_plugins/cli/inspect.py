"""``steer inspect``: shows where each token of a text lies along a vector, layer by layer, before and after steering."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import DataError
from ..plugins import hookimpl
from .common import Combining, EngineOptions, FilePath, combining_options, console, engine_options, json_option, print_json
from .generate import make_prompt, read_prompt
from .read import parse_layer_list

if TYPE_CHECKING:
    from ..report import Inspection

REPLY_TOKENS = 40
"""How much of a steered reply is read unless said otherwise: most vectors act on the reply alone."""


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer inspect``."""
    cli.add_command(inspect)


@click.command()
@click.argument("prompt")
@click.option("--vector", required=True, metavar="NAME", help="The vector to look along: a library name or a file.")
@engine_options
@click.option("-s", "--steer", multiple=True, metavar="TERMS", help="Steer, and show before and after; may be repeated.")
@combining_options
@click.option("--layers", metavar="LIST", help="Such as 10-15 (default: all that the vector has).")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=0),
    metavar="N",
    help=f"Also read through a reply of N tokens (default: {REPLY_TOKENS} with --steer, else 0).",
)
@click.option("-o", "--out", type=FilePath(path_type=Path), metavar="FILE", help="Write a picture: FILE.html or FILE.png.")
@click.option("--overwrite", is_flag=True, help="Replace a file of that name.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option("--raw", is_flag=True, help="Use PROMPT without the chat template.")
@click.option("--thinking/--no-thinking", default=None, help="The chat template's switch for thinking.")
@click.option("--force", is_flag=True, help="Accept a vector of another fine-tune of this model.")
@json_option
def inspect(
    prompt: str,
    vector: str,
    engine: EngineOptions,
    steer: tuple[str, ...],
    combining: Combining,
    layers: str | None,
    max_tokens: int | None,
    out: Path | None,
    overwrite: bool,
    system: str | None,
    raw: bool,
    thinking: bool | None,
    force: bool,
    as_json: bool,
) -> None:
    """Colour the tokens of PROMPT (- reads standard input) by how far they lie along a vector, and draw all its layers.

    Orange leans to the positive pole, blue to the negative; 1 is as far as strength 1 moves. With --steer the same tokens
    are read twice, without and with it.

    \b
    Examples:
      steer inspect --vector mood "My dog died, but the sun is out"
      steer inspect --vector mood --steer mood:-1 "Describe a walk in the forest" --out walk.html
    """
    from ..report import inspect_prompt
    from ..steering.grammar import parse_options
    from ..store.library import Library

    terms = parse_options(steer)  # before a model is loaded for it
    wanted = None if layers is None else parse_layer_list(layers)
    if out is not None:
        _check_out(out, overwrite)
    text = read_prompt(prompt)
    with engine.open() as opened:
        found = inspect_prompt(
            opened,
            make_prompt(opened, text, system=system, raw=raw),
            Library().resolve(vector, opened.info.identity, force=force),
            steering=combining.apply(opened.steering(terms, force=force)),
            layers=wanted,
            max_tokens=(REPLY_TOKENS if steer else 0) if max_tokens is None else max_tokens,
            thinking=thinking,
            force=force,
        )
    if out is not None:
        _write(found, out)
    if as_json:
        print_json(found.to_dict())
    elif out is not None:
        click.echo(f"Written to {out}")
    else:
        _print(found)


def _check_out(out: Path, overwrite: bool) -> None:
    """Before a model is loaded. Raises DataError."""
    if out.suffix.lower() not in (".html", ".png"):
        raise DataError(f"{out.name} names no kind of picture: write to a file that ends in .html or .png")
    if not out.parent.is_dir():
        raise DataError(f"there is no folder {out.parent} to write {out.name} to: make it first")
    if out.is_dir() or (out.exists() and not overwrite):
        raise DataError(f"{out} exists: choose another file with --out, or replace it with --overwrite")
    if out.suffix.lower() == ".png":
        from ..report.png import check_matplotlib

        check_matplotlib()


def _write(found: Inspection, out: Path) -> None:
    from ..atomic import write_atomically
    from ..report import to_page, to_png

    write_atomically(out, to_page(found).encode() if out.suffix.lower() == ".html" else to_png(found))


def _print(found: Inspection) -> None:
    from ..report import to_terminal

    screen = console()
    # sixteen colours are too few to tell a hint from nothing
    colour = screen.is_terminal and screen.color_system in ("256", "truecolor") and not screen.no_color
    screen.print(to_terminal(found, colour=colour, width=screen.width), soft_wrap=False)
