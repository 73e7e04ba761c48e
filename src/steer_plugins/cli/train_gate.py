"""``steer train-gate``: fits a gate to labelled prompts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..plugins import hookimpl
from .common import EngineOptions, FilePath, console, engine_options, json_option, print_json, print_table

if TYPE_CHECKING:
    from ..steering.vector import SteeringVector


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer train-gate``."""
    cli.add_command(train_gate)


@click.command("train-gate")
@click.argument("name")
@click.option("--prompts", type=FilePath(), metavar="FILE", required=True, help="Labelled prompts, a JSONL file.")
@engine_options
@click.option("-o", "--out", type=FilePath(path_type=Path), metavar="FILE", help="Write to FILE instead of the library.")
@click.option("--condition", metavar="VECTOR", help="Use the direction of this vector (default: fit one to the prompts).")
@click.option("--layers", metavar="A-B,C", help="Layers to search (default: all).")
@click.option(
    "--positions",
    type=click.Choice(["mean", "last"]),
    default="mean",
    show_default=True,
    help="Use the mean over the prompt, or its last token but one.",
)
@click.option(
    "--chat/--raw", "as_chat", default=None, help="Turn texts into user messages (default: if the model has a template)."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides which prompts are held out.")
@click.option("--thinking/--no-thinking", default=False, help="The chat template's switch for thinking.")
@click.option("--overwrite", is_flag=True, help="Replace a vector or gate of that name.")
@json_option
def train_gate(
    name: str,
    prompts: str,
    engine: EngineOptions,
    out: Path | None,
    condition: str | None,
    layers: str | None,
    positions: str,
    as_chat: bool | None,
    seed: int,
    thinking: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit the gate NAME, which opens on some prompts and stays closed on others, and keep it in the library.

    Each line of FILE is {"prompt": a text or a chat, "label": true or false}, with at least five of either label; true opens
    the gate. A quarter is held out; layer, threshold and direction of comparison are found by a grid search on the others. A term
    with the gate acts only on prompts that open it.

    \b
    Examples:
      steer train-gate medical --prompts medical.jsonl
      steer generate --steer "caution:0.8?response{medical}" "Is this mole dangerous?"
    """
    from ..store.library import Library
    from ..training.gates import fit_gate, load_labelled
    from .train import Target, parse_layers

    data = load_labelled(prompts)
    chosen = None if layers is None else parse_layers(layers)
    library = Library()
    target = Target(name, out, overwrite, library)
    if out is not None:
        target.check(None)
    with engine.open(n_parallel=8) as opened:
        target.check(opened)
        vector = fit_gate(
            opened,
            name,
            data,
            condition=None if condition is None else library.resolve(condition, opened.info.identity),
            layers=chosen,
            positions=positions,
            as_chat=as_chat,
            thinking=thinking,
            seed=seed,
        )
        path = target.write(vector, opened)
    if as_json:
        from .show import describe

        print_json({**describe(vector), "file": str(path)})
    else:
        _print_report(vector, path)


def _print_report(vector: SteeringVector, path: Path) -> None:
    from ..steering.gate import Gate
    from ..steering.grammar import TermSpec, format_terms
    from .train import spec_of

    gate = Gate.of(vector)
    record: dict[str, Any] = vector.provenance or {}
    held, rows = record["held_out"], sorted(record["search"], key=lambda row: (-row["f1"], -row["margin"]))
    out = console()
    out.print(
        f"{vector.name}: opens where the cosine at layer {gate.layer} is {gate.compare} {gate.threshold:.4f}.\n"
        f"On {held['n']} held-out prompts: F1 {held['f1']:.2f}, precision {held['precision']:.2f}, recall {held['recall']:.2f}.",
        markup=False,
    )
    print_table(("layer", "F1 of the search", "margin"), [(r["layer"], r["f1"], r["margin"]) for r in rows[:5]])
    term = shlex.quote(format_terms([TermSpec("mood", scope="response", gate=spec_of(vector, path))]))
    out.print(f'Written to {path}\nTry: steer generate --steer {term} "..."', markup=False, soft_wrap=True)
