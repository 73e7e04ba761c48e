"""``steer convert``: a vector file of one format into one of another, saying what gets lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ModelError, SpecError, VectorError
from ..plugins import hookimpl
from .common import FilePath, json_option, print_json, runtime_option

if TYPE_CHECKING:
    from ..steering.vector import SteeringVector
    from ..store.foreign.numbering import Numbering
    from ..store.formats import Facts, Format

#: Options that a format may take, and the fields of Facts they become.
_FACT_OPTIONS = {
    "at": "--at",
    "gguf_layers": "--gguf-layers",
    "feature": "--feature",
    "key": "--key",
    "op": "--op",
    "scope": "--scope",
}
#: Files that stand for the folder they are in.
_FOLDER_FILES = ("sae_weights.safetensors", "params.npz")


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer convert``."""
    cli.add_command(convert)


@click.command()
@click.argument("source", metavar="IN", type=FilePath(path_type=Path))
@click.argument("target", metavar="OUT", type=FilePath(path_type=Path))
@click.option("--from", "from_name", metavar="NAME", help="The format of IN (default: found from its content).")
@click.option("--to", "to_name", metavar="NAME", help="The format of OUT (default: by its suffix).")
@click.option("--lossy", is_flag=True, help="Write OUT even though it cannot hold everything in IN.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--force", is_flag=True, help="With --model, accept a vector of another fine-tune.")
@click.option(
    "-m",
    "--model",
    type=FilePath(),
    metavar="FILE",
    help="The model the vector is for, a GGUF file: checked and, where possible, kept.",
)
@click.option("--name", metavar="NAME", help="A new name for the vector.")
@click.option("--layers", metavar="LIST", help="Keep only these layers, such as 10-14,20.")
@click.option("--site", metavar="SITE", help="Keep only this site; for a file that names none, its site.")
@click.option("--at", metavar="WHAT", help="Layers of the rows of a bare array: blocks, embedding (row 0 is it), or 12 or 10-13.")
@click.option("--key", metavar="NAME", help="Which array to take from a file with several.")
@click.option("--feature", type=click.IntRange(min=0), metavar="N", help="Which feature of a sparse autoencoder to take.")
@click.option("--op", metavar="OP", help="add, project, clamp or renorm, for a file that does not say (default: add).")
@click.option("--scope", metavar="SCOPE", help="Which tokens to steer, for a file that does not say.")
@click.option(
    "--gguf-layers",
    type=click.Choice(["block", "plus-one", "probe"]),
    help="What direction.N of a GGUF control vector was made at: block N (default), or block N-1; probe asks --model.",
)
@runtime_option
@json_option
def convert(
    source: Path,
    target: Path,
    from_name: str | None,
    to_name: str | None,
    lossy: bool,
    overwrite: bool,
    force: bool,
    model: str | None,
    name: str | None,
    layers: str | None,
    site: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert the vector in IN to another format, in OUT.

    What OUT's format cannot hold (the op, the site, layer 0, the scope, the calibration) is listed, and nothing is
    written unless --lossy is given. Formats: steer-vector (.safetensors), gguf-control-vector and glp (.gguf), ds4 (.f32),
    ds41dir (.ds41dir), svec (.svec), npz (.npz), neuronpedia (.json); only read: torch (.pt, .pth), saelens, gemma-scope. See
    docs/formats.md.

    \b
    Examples:
      steer convert happy.gguf happy.safetensors --model model.gguf
      steer convert late.gguf late.safetensors --gguf-layers plus-one
      steer convert found.gguf found.safetensors --gguf-layers probe --model model.gguf
      steer convert mood.safetensors mood.gguf --lossy
      steer convert mood.safetensors mood-glp.gguf --to glp --layers 10-20
      steer convert v_refusal.pt refusal.safetensors --at blocks --op project
      steer convert layer_20/params.npz cats.safetensors --feature 1234 --at 20
      steer convert verbosity.f32 verbosity.safetensors --model deepseek-v4-flash.gguf
    """
    from ..plugins.manager import manager
    from ..store.foreign.common import losses, reduced, remarks
    from ..store.formats import format_of
    from ..store.identity import identity_of_gguf

    source = next((source / file for file in _FOLDER_FILES if (source / file).is_file()), source)
    reads: Format = format_of(source) if from_name is None else manager().find("formats", from_name)
    writes = _target_format(target, to_name)
    if target.exists() and not overwrite:
        raise VectorError(f"{target} exists: choose another file, or replace it with --overwrite")
    identity = None if model is None else identity_of_gguf(model)
    asked: list[str] = []
    facts = _facts(reads, site, {**options, "identity": identity})
    if facts.gguf_layers == "probe":
        numbering = _probe(source, model)
        facts, asked = replace(facts, gguf_layers=numbering.answer), [numbering.sentence]
    whole = _read(reads, source, facts)
    vector = _chosen(whole, layers, site, name)
    if identity is not None:
        vector.check_fits(identity, force=force)
        vector = vector.replace(identity=identity)
    if model is not None and writes.name == "ds41dir":
        vector = vector.replace(provenance={**(vector.provenance or {}), "model_sha256": _sha256(Path(model))})
    lost, left = losses(vector, writes.limits), remarks(vector, writes.limits)
    if whole.calibration is not None and vector.calibration is None:
        left.append("the calibration: it was measured with everything that --layers and --site leave out")
    if lost and not lossy:
        raise VectorError(
            f"a {writes.name} file cannot hold {'; nor '.join(lost)}; convert all the same with --lossy, nothing is written yet"
        )
    if lost:
        vector = reduced(vector, writes.limits)
    assert writes.write is not None
    writes.write(vector, target)
    done = {"file": str(target), "from": reads.name, "to": writes.name, "vector": vector.name, "lost": lost, "left_out": left}
    recommended = (vector.provenance or {}).get("recommended_strength")
    if recommended is not None:
        done["recommended_strength"] = recommended
    if asked:
        done["probe"] = asked
    if as_json:
        print_json(done)
    else:
        _report(vector, done)


def _sha256(path: Path) -> str:
    """Of a model file, which takes as long as reading it does. Raises ModelError."""
    import hashlib

    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 24):
                digest.update(part)
    except OSError as error:
        raise ModelError(f"the model file {path} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def _target_format(target: Path, name: str | None) -> Format:
    """The format to write. Raises SteerError for an unknown one, one that is only read, and an unknown suffix."""
    from ..plugins.manager import manager

    formats: dict[str, Format] = manager().registry("formats")
    if name is not None:
        found: Format = manager().find("formats", name)
        if found.write is None:
            raise VectorError(f"the format {name} can only be read: choose from {_writable(formats)}")
        return found
    for fmt in formats.values():
        if fmt.write is not None and target.suffix.lower() in fmt.suffixes:
            return fmt
    raise VectorError(f"no format that can be written has the suffix of {target.name}: choose with --to {_writable(formats)}")


def _writable(formats: dict[str, Format]) -> str:
    return ", ".join(sorted(name for name, fmt in formats.items() if fmt.write is not None))


def _facts(fmt: Format, site: str | None, options: dict[str, Any]) -> Facts:
    """The options that the format takes. Raises SpecError for one that it does not take: it would do nothing."""
    from ..store.formats import Facts
    from .read import parse_numbers

    for field, option in _FACT_OPTIONS.items():
        if options[field] is not None and field not in fmt.facts:
            takes = " ".join(_FACT_OPTIONS[name] for name in fmt.facts if name in _FACT_OPTIONS) or "no such option"
            raise SpecError(f"{option} says nothing about a {fmt.name} file, which takes {takes}: leave it out")
    at = options["at"]
    if at is not None and at not in ("blocks", "embedding"):
        options["at"] = tuple(parse_numbers(at, "--at", "blocks, embedding, 12 or 10-13", 100_000, negative=False))
    return Facts(site=site if "site" in fmt.facts else None, **options)


def _probe(source: Path, model: str | None) -> Numbering:
    """How the layers of a control vector are numbered. Raises UsageError without a model, VectorError without an answer."""
    from ..engine.local import LocalEngine
    from ..store.foreign.common import reading
    from ..store.foreign.gguftensors import read_directions
    from ..store.foreign.numbering import probe_numbering

    if model is None:
        raise click.UsageError("--gguf-layers probe asks the model: name it with --model")
    with reading(source):
        directions = read_directions(source).directions
    with LocalEngine(model, n_ctx=512) as engine, reading(source):
        width, n_embd = len(next(iter(directions.values()))), engine.info.n_embd
        if width != n_embd:
            raise VectorError(f"its directions have {width} numbers, and the model's hidden states {n_embd}")
        numbering = probe_numbering(engine, engine.info.n_layer, directions)
        if numbering.answer is None:
            raise VectorError(f"{numbering.sentence}: say --gguf-layers block or plus-one")
    return numbering


def _read(fmt: Format, source: Path, facts: Facts) -> SteeringVector:
    if not source.is_file():
        raise VectorError(f"no vector file {source}" + (": it is a folder" if source.is_dir() else ""))
    return fmt.read(source) if fmt.read_with is None else fmt.read_with(source, facts)


def _chosen(vector: SteeringVector, layers: str | None, site: str | None, name: str | None) -> SteeringVector:
    """What ``--layers`` and ``--site`` keep; a calibration does not survive leaving something out. Raises VectorError."""
    from ..steering.vector import layer_ranges
    from .read import parse_layer_list

    wanted = None if layers is None else set(parse_layer_list(layers))
    keys = [k for k in vector.directions if (wanted is None or k[0] in wanted) and site in (None, k[1])]
    if not keys or (wanted is not None and not wanted <= {layer for layer, _ in keys}):
        has = f"layers {layer_ranges(vector.layers)} at {', '.join(vector.sites)}"
        raise VectorError(f"vector {vector.name!r} has {has}, not all that --layers and --site ask for")
    if len(keys) < len(vector.directions):
        directions, scales = vector.directions, vector.scales
        vector = vector.replace(
            directions={key: directions[key] for key in keys}, scales={key: scales[key] for key in keys}, calibration=None
        )
    return vector if name is None else vector.replace(name=name)


def _report(vector: SteeringVector, facts: dict[str, Any]) -> None:
    from ..steering.vector import layer_ranges

    where = f"layers {layer_ranges(vector.layers)} at {', '.join(vector.sites)}"
    click.echo(
        f"wrote {facts['vector']!r} ({vector.op}, {where}, scope {vector.default_scope}) to {facts['file']} as {facts['to']}"
    )
    for found in facts.get("probe", ()):
        click.echo(f"  probe: {found}")
    for lost in facts["lost"]:
        click.echo(f"  lost: {lost}")
    for left in facts["left_out"]:
        click.echo(f"  left out: {left}")
    if "recommended_strength" in facts:
        click.echo(f"  the file recommends strength {facts['recommended_strength']:g}")
