"""``steer diff``: what a fine-tune learned, as a slider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ModelError, VectorError
from ..plugins import hookimpl
from .common import FilePath, Stages, json_option, print_json, runtime_option


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer diff``."""
    cli.add_command(diff)


@click.command()
@click.argument("base", type=FilePath(path_type=Path))
@click.argument("tuned", type=FilePath(path_type=Path))
@click.option("--as", "name", default="finetune", show_default=True, metavar="NAME", help="What to call the vector.")
@click.option("--layers", metavar="A-B,C", help="The blocks to take (default: the middle half).")
@click.option("-t", "--threads", type=click.IntRange(min=1), metavar="N", help="Threads on the CPU.")
@click.option("-ngl", "--n-gpu-layers", type=click.IntRange(min=-1), default=0, metavar="N", help="Layers on the GPU; -1: all.")
@click.option("-o", "--out", type=FilePath(path_type=Path), metavar="FILE", help="Write to FILE instead of the library.")
@click.option("--overwrite", is_flag=True, help="Replace a vector of that name.")
@runtime_option
@json_option
def diff(
    base: Path,
    tuned: Path,
    name: str,
    layers: str | None,
    threads: int | None,
    n_gpu_layers: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Read neutral texts with BASE and with TUNED, two GGUF files of one model, and keep the mean difference as a vector.

    On the base, strength 1 leads towards the fine-tune; on the fine-tune, -1 leads away from it.
    Its strength is not calibrated: 1 is the difference as it was measured.

    \b
    Example:
      steer diff base.gguf tuned.gguf --as pirate
    """
    from ..concepts.difference import difference
    from ..engine.local import LocalEngine
    from ..store.library import Library
    from ..store.vectorfile import write_vector
    from ..training.traits import bundled_traits, load_trait
    from .train import parse_layers

    chosen = None if layers is None else parse_layers(layers)
    if out is not None and out.exists() and not overwrite:
        raise VectorError(f"{out} exists: choose another file, or replace it with --overwrite")
    for path in (base, tuned):
        if not path.is_file():
            raise ModelError(f"there is no model file {path}")
    more: dict[str, Any] = {"n_gpu_layers": n_gpu_layers, **({} if threads is None else {"n_threads": threads})}
    prompts = [p for trait in map(load_trait, bundled_traits()) for p in trait.train_prompts]
    library = Library()
    with LocalEngine(base, **more) as one, LocalEngine(tuned, **more) as two:
        identity = one.info.identity
        if out is None and library.path(name, identity).exists() and not overwrite:
            raise VectorError(f"the library already has {name!r} for {identity.label}: replace it with --overwrite")
        chat = one.info.has_chat_template
        texts = [[{"role": "user", "content": p}] if chat else p for p in prompts]
        with Stages() as report:
            vector = difference(one, two, name, texts, layers=chosen, report=report)
    if out is not None:
        write_vector(vector, out)
        path = out
    else:
        path = library.put(vector, identity, overwrite=overwrite)
    if as_json:
        print_json(
            {"name": name, "file": path, "layers": vector.layers, "scales": {str(k[0]): v for k, v in vector.scales.items()}}
        )
    else:
        click.echo(
            f"wrote {name} to {path} (layers {vector.layers[0]}-{vector.layers[-1]}); try: steer generate --steer {name}:1 ..."
        )
