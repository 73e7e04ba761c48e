"""``steer show``: what is in a vector, or what is in the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import VectorError
from ..plugins import hookimpl
from .common import FilePath, cell_text, json_option, print_json, print_table

if TYPE_CHECKING:
    from ..steering.vector import SteeringVector
    from ..store.library import Entry, Library


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer show``."""
    cli.add_command(show)


@click.command()
@click.argument("vector", required=False)
@click.option("-m", "--model", type=FilePath(), metavar="FILE", help="Look the name up for this model, and check the fit.")
@json_option
def show(vector: str | None, model: str | None, as_json: bool) -> None:
    """Show what is in VECTOR, a name in the library or a file. Without VECTOR, list the library.

    \b
    Examples:
      steer show
      steer show mood
      steer show ./calm.safetensors --json
    """
    from ..store.identity import identity_of_gguf
    from ..store.library import Library

    library = Library()
    identity = None if model is None else identity_of_gguf(model)
    if vector is None:
        _show_library(library, library.list(identity), as_json)
    else:
        found = library.resolve(vector, identity)
        if as_json:
            print_json(describe(found))
        else:
            _show_vector(found)


def describe(vector: SteeringVector) -> dict[str, Any]:
    """A vector as JSON values, without the directions."""
    return {
        "name": vector.name,
        "op": vector.op,
        "default_scope": vector.default_scope,
        "n_embd": vector.n_embd,
        "identity": None if vector.identity is None else vector.identity.to_dict(),
        "directions": [
            {"layer": layer, "site": site, "scale": vector.scales[layer, site]}
            | ({"columns": vector.columns[layer, site].to_json()} if (layer, site) in vector.columns else {})
            for layer, site in vector.directions
        ],
        "provenance": vector.provenance,
        "calibration": vector.calibration,
        "content_sha256": vector.content_hash,
    }


def _show_library(library: Library, entries: list[Entry], as_json: bool) -> None:
    from ..steering.vector import layer_ranges

    rows: list[dict[str, Any]] = []
    for entry in entries:
        row: dict[str, Any] = {
            "name": entry.name,
            "model": entry.identity.label if entry.identity else entry.path.parent.name,
            "file": str(entry.path),
        }
        try:  # one damaged file must not hide the others
            vector = entry.read()
        except VectorError as error:
            rows.append({**row, "error": str(error)})
        else:
            layers, calibrated = vector.layers, vector.calibration is not None
            gate = "gate" in (vector.provenance or {})
            rows.append(
                {
                    **row,
                    "op": "gate" if gate else vector.op,
                    "scope": vector.default_scope,
                    "layers": layers,
                    "calibrated": calibrated,
                }
            )
    if as_json:
        print_json({"library": str(library.root), "vectors": rows})
    elif not rows:
        click.echo(f"No vectors in {library.root} yet: fit one with: steer train mood")
    else:
        print_table(
            ("vector", "model", "op", "scope", "layers", "calibrated"),
            [
                (r["name"], r["model"], "unreadable", r["error"], "", None)
                if "error" in r
                else (r["name"], r["model"], r["op"], r["scope"], layer_ranges(r["layers"]), r["calibrated"])
                for r in rows
            ],
            title=f"Library {library.root}\n",
        )


def _show_vector(vector: SteeringVector) -> None:
    facts: dict[str, Any] = {"name": vector.name, "op": vector.op, "scope": vector.default_scope}
    facts["model"] = vector.identity.label if vector.identity else "any with this n_embd (the file names none)"
    if vector.identity:
        facts["model key"] = vector.identity.key
    facts |= {"n_embd": vector.n_embd, "content sha256": vector.content_hash}
    _show_facts(facts)
    rows = [(*key, scale, len(vector.columns.get(key, ()))) for key, scale in vector.scales.items()]
    heads = ("layer", "site", "scale", "columns")
    n = len(heads) if vector.columns else len(heads) - 1  # columns: only where there are any
    print_table(heads[:n], [row[:n] for row in rows], title="\nDirections")
    provenance = vector.provenance
    report = provenance.pop("report", None) if provenance else None
    for title, data in (("Provenance", provenance), ("Calibration", vector.calibration)):
        if data is not None:
            click.echo(f"\n{title}")
            _show_facts(data, indent=2)
    if vector.calibration is None and "gate" not in (provenance or {}):
        relative = isinstance((provenance or {}).get("dose"), dict)
        what = "a usual dose, relative to the residual norm" if relative else "the scale above"
        click.echo(f"\nCalibration\n  none: strength 1 is {what}, not a measured full effect")
    if isinstance(report, dict):
        _show_report(report)


def _show_report(report: dict[str, Any]) -> None:
    """What the fit is worth at each layer, measured on pairs it has not seen."""
    click.echo(f"\nReport (held-out pairs: {cell_text(report.get('held_out') or 'none')}; "
               f"{cell_text(report.get('resamples'))} resamples)")  # fmt: skip
    window = report.get("window")
    suggested = f"layers {cell_text(window[0])}-{cell_text(window[-1])}" if isinstance(window, list) and window else "none"
    click.echo(f"  suggested window  {suggested}")
    rows = report.get("layers")
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        columns = list(dict.fromkeys(column for row in rows for column in row))
        names = {"above": "cosine to next", "distance": "distance in norms", "ordered": "pairs in order"}
        shown = [column for column in columns if column != "below"]  # the row above has it
        print_table([names.get(c, c) for c in shown], [[_flat(row.get(c)) for c in shown] for row in rows])


def _show_facts(data: dict[str, Any], indent: int = 0) -> None:
    """Nested JSON values as indented lines, lists of objects as tables."""
    margin = " " * indent
    width = max((len(key) for key in data), default=0) + 2
    for key, value in data.items():
        if isinstance(value, dict) and value:
            click.echo(f"{margin}{cell_text(key)}")
            _show_facts(value, indent + 2)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            columns = list(dict.fromkeys(column for item in value for column in item))
            print_table(columns, [[_flat(item.get(c)) for c in columns] for item in value], title=f"{margin}{cell_text(key)}")
        else:
            click.echo(f"{margin}{cell_text(key):<{width}}{cell_text(_flat(value))}")


def _flat(value: Any) -> Any:
    """Lists and objects inside a table cell, on one line."""
    if isinstance(value, list):
        return ", ".join(cell_text(_flat(item)) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell_text(_flat(item))}" for key, item in value.items())
    return value
