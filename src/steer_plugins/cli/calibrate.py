"""``steer calibrate``: finds out what strength 1 means for a vector that was not trained here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import VectorError
from ..plugins import hookimpl
from .common import EngineOptions, FilePath, Stages, engine_options, json_option, print_json

if TYPE_CHECKING:
    from ..engine.base import Engine
    from ..training.calibrate import Objective


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer calibrate``."""
    cli.add_command(calibrate)


@click.command()
@click.argument("vector")
@click.option("--trait", "trait_name", metavar="FILE|NAME", help="What it should move: a trait with a metric.")
@click.option("--pairs", type=FilePath(), metavar="FILE", help="What it should move: pairs of answers, a JSONL file.")
@click.option("--level", type=click.Choice(["quick", "full"]), default="quick", show_default=True, help="How thorough to be.")
@click.option("--scope", type=click.Choice(["all", "prompt", "response"]), help="Which tokens to steer (default: the vector's).")
@click.option("--as", "name", metavar="NAME", help="Keep it under this name (default: its own).")
@click.option("-o", "--out", type=FilePath(path_type=Path), metavar="FILE", help="Write here, not to the library.")
@click.option("--overwrite", is_flag=True, help="Replace a vector of that name.")
@engine_options
@json_option
def calibrate(
    vector: str,
    trait_name: str | None,
    pairs: str | None,
    level: str,
    scope: str | None,
    name: str | None,
    out: Path | None,
    overwrite: bool,
    engine: EngineOptions,
    as_json: bool,
) -> None:
    """Find the strength of VECTOR (a name in the library, or a file) at which text just stays fluent, and make that its 1.

    With --trait or --pairs it is the dose that moves them most; without, the largest that passes the fluency guard.
    Layers keep their doses relative to each other.

    \b
    Examples:
      steer calibrate ./downloaded.gguf --as calm
      steer calibrate finetune --pairs pirate.jsonl --overwrite
    """
    from ..store.library import Library
    from ..store.vectorfile import write_vector
    from ..training.calibrate import calibrate_vector, level_of

    library = Library()
    with engine.open(n_parallel=12) as opened:
        identity = opened.info.identity
        found = library.resolve(vector, identity)
        wanted = found.replace(name=name) if name else found
        if out is not None and out.exists() and not overwrite:
            raise VectorError(f"{out} exists: choose another file, or replace it with --overwrite")
        if out is None and library.path(wanted.name, identity).exists() and not overwrite:
            raise VectorError(f"the library already has {wanted.name!r} for {identity.label}: replace it with --overwrite")
        objective = _objective(opened, trait_name, pairs)
        chosen = level_of(level)
        assert chosen is not None
        done = 0
        with Stages() as report:

            def advance(tokens: int) -> None:
                nonlocal done
                done += tokens
                report("tokens", done, max(done + 1, 40_000))

            result = calibrate_vector(opened, wanted, objective, chosen, scope=scope, advance=advance)
    if out is not None:
        write_vector(result.vector, out)
        path = out
    else:
        path = library.put(result.vector, identity, overwrite=overwrite)
    record = result.record
    if as_json:
        print_json({"name": wanted.name, "file": path, "dose": record["dose"], "effect": record["effect"], "calibration": record})
        return
    click.echo(f"{wanted.name}: strength 1 adds {record['dose']:.3g} median norms; effect from -1 to 1 {record['effect']:.3g}")
    if not record["monotone_within_error"]:
        click.echo("steer: note: the score does not rise evenly with the strength", err=True)
    click.echo(f"wrote {path}")


def _objective(engine: Engine, trait_name: str | None, pairs: str | None) -> Objective:
    from ..plugins import manager
    from ..training.calibrate import ContrastObjective, DoseObjective, TextObjective
    from ..training.extract import chat
    from ..training.traits import bundled_traits, load_trait
    from .train import load_source

    if trait_name is None and pairs is None:
        prompts = [p for trait in map(load_trait, bundled_traits()) for p in trait.heldout_prompts[:4]]
        return DoseObjective([chat(p) if engine.info.has_chat_template else p for p in prompts])
    source = load_source("", pairs, trait_name)
    if pairs is not None:
        return ContrastObjective(engine, source.pairs)  # type: ignore[union-attr]
    trait = load_trait(str(trait_name))
    if trait.metric is None:
        raise VectorError(f"the trait {trait.name!r} names no metric: give --pairs instead")
    return TextObjective(trait.metric, manager().find("metrics", trait.metric), [chat(p) for p in trait.heldout_prompts])
