"""``steer discover``: directions without labels, and what a fine-tune learned (``steer diff``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import VectorError
from ..plugins import hookimpl
from .common import EngineOptions, Stages, engine_options, json_option, print_json


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer discover``."""
    cli.add_command(discover)


@click.command()
@click.argument("name", required=False)
@click.option(
    "--method",
    type=click.Choice(["pca", "sae", "jacobian"]),
    default="pca",
    show_default=True,
    help="Principal directions of prompts; an autoencoder's features by effect; or what the model's own computation stretches.",
)
@click.option("--sae", "sae_name", metavar="NAME", help="The autoencoder of --method sae.")
@click.option("--layer", type=click.IntRange(min=0), metavar="N", help="The block (default: half of the depth).")
@click.option("-n", "--count", type=click.IntRange(1, 32), default=5, show_default=True, metavar="N", help="How many directions.")
@click.option(
    "--keep", type=click.IntRange(min=0), multiple=True, metavar="I", help="Keep direction I as NAME (or NAME-I of several)."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random directions to compare with."
)
@click.option("--overwrite", is_flag=True, help="Replace a vector of that name.")
@engine_options
@json_option
def discover(
    name: str | None,
    method: str,
    sae_name: str | None,
    layer: int | None,
    count: int,
    keep: tuple[int, ...],
    seed: int,
    overwrite: bool,
    engine: EngineOptions,
    as_json: bool,
) -> None:
    """Find directions that a model has by itself, and show what it writes on both sides of each.

    Strength 1 is the largest dose tried whose next-token distribution stays within 1.5 nats of the plain one.
    Look first; then keep what you like under a NAME.

    \b
    Examples:
      steer discover
      steer discover story --method pca --keep 1
    """
    from ..concepts import FeatureIndex, SparseCode
    from ..concepts.discover import discover as find
    from ..concepts.making import find_sae
    from ..store.library import Library

    if keep and name is None:
        raise click.UsageError("--keep needs a NAME to keep the direction under")
    if (method == "sae") != (sae_name is not None):
        raise click.UsageError("--method sae and --sae NAME belong together")
    library = Library()
    with engine.open(n_parallel=16) as opened:
        identity = opened.info.identity
        names = {i: str(name) if len(keep) == 1 else f"{name}-{i}" for i in keep}
        for i, one in names.items():
            if i >= count:
                raise click.UsageError(f"--keep {i}: there are directions 0 to {count - 1}")
            if library.path(one, identity).exists() and not overwrite:
                raise VectorError(f"the library already has {one!r} for {identity.label}: replace it with --overwrite")
        code = index = None
        if sae_name is not None:
            folder = find_sae(library, sae_name, identity)
            code, index = SparseCode.load(folder), FeatureIndex.load(folder)
        with Stages() as report:
            found = find(opened, method=method, layer=layer, count=count, code=code, index=index, seed=seed, report=report)
        kept: dict[int, Path] = {}
        for i, one in names.items():
            vector = found[i].vector(one, identity, {"how": method, "number": i})
            kept[i] = library.put(vector, identity, overwrite=overwrite)
    if as_json:
        print_json({"directions": [_plain(i, one, kept.get(i)) for i, one in enumerate(found)]})
        return
    for i, direction in enumerate(found):
        click.echo(f"[{i}] {direction.note}".rstrip() + f"  layer {direction.layer}, share {direction.share:.3f}")
        click.echo(f"    KL {direction.kl:.2f} nats (random {direction.random_kl:.2f}) at dose {direction.dose:.3g}")
        plus, minus = direction.words
        click.echo(f"    more on +: {', '.join(plus) or '-'}\n    more on -: {', '.join(minus) or '-'}")
        for prompt, low, high in direction.samples:
            click.echo(f"    {prompt}\n      - {_line(low)}\n      + {_line(high)}")
    for i, path in kept.items():
        click.echo(f"kept direction {i} in {path}; try: steer generate --steer {names[i]}:1 ...")


def _line(text: str, limit: int = 200) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _plain(i: int, direction: Any, path: Path | None) -> dict[str, Any]:
    return {
        "number": i,
        "layer": direction.layer,
        "dose": direction.dose,
        "share": direction.share,
        "kl": direction.kl,
        "random_kl": direction.random_kl,
        "note": direction.note,
        "words": {"positive": list(direction.words[0]), "negative": list(direction.words[1])},
        "samples": [{"prompt": p, "negative": low, "positive": high} for p, low, high in direction.samples],
        "kept": path,
    }
