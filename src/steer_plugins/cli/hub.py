"""``steer hub``: find vectors that others share, pull them, check them; publish one's own."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import HubError, SpecError
from ..paths import expand_path
from ..plugins import hookimpl
from ..store.kinds import KINDS
from .common import FilePath, cell_text, console, json_option, print_json, print_table

if TYPE_CHECKING:
    from ..hub.hub import Hub, Offer
    from ..steering.vector import ModelIdentity
    from ..store.pulled import Item


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer hub``."""
    cli.add_command(hub)


@click.group()
def hub() -> None:
    """Share steering vectors: search, pull and verify those of others, publish your own.

    An index is a folder, a git repository, a web address or a Hugging Face repository (hf://owner/name). Nothing is fetched
    unless one of these commands is called.

    \b
    Examples:
      steer hub add https://example.org/vectors/
      steer hub search cheerful
      steer hub pull ann/mood
      steer generate --steer ann/mood:0.8 "Describe a walk in the forest"
    """


def _file(model: str | None) -> str | None:
    """The file of --model; none unless one is named, since what is looked for may be for any."""
    from .common import model_path

    return None if model is None else str(model_path(None if model == "demo" else model))


_model = click.option(
    "-m",
    "--model",
    metavar="FILE",
    default=None,
    callback=lambda context, option, value: _file(value),
    help="The model that it has to fit: a GGUF file, or demo for the demo model.",
)
_index = click.option("--index", metavar="INDEX", default=None, help="Take it from this index.")
_days = click.option(
    "--days",
    type=click.IntRange(min=0, max=36500),
    default=None,
    metavar="N",
    help="How long the index may be trusted without being signed again; 0: for ever (default: as before, or 365).",
)


def _hub() -> Hub:
    from ..hub.hub import Hub

    return Hub(say=lambda sentence: click.echo(f"steer: {sentence}", err=True))


def _identity(model: str | None) -> ModelIdentity | None:
    from ..store.identity import identity_of_gguf

    return None if model is None else identity_of_gguf(Path(model))


@hub.command()
@click.argument("url")
@click.option("--as", "name", metavar="NAME", help="What to call it here (default: its own name).")
@click.option("--key", metavar="RW...", help="The key it must be signed with (default: the first one seen is trusted).")
@json_option
def add(url: str, name: str | None, key: str | None, as_json: bool) -> None:
    """Add the index at URL: a folder, http(s)://, git+https://, or hf://owner/name."""
    found = _hub()
    alias = found.add(url, name=name, key=key)
    record = found.indexes()[alias]
    if as_json:
        print_json({"index": alias, **record})
    else:
        click.echo(f"{alias}: {record['count']} entries, signed by {record['key']}, which is trusted from now on.")
        if record["expires"] is None:
            click.echo("It never expires, so nobody would notice if newer ones were held back.")


@hub.command()
@click.argument("name")
def forget(name: str) -> None:
    """Forget an index, or an owner's key: the next key that is seen is trusted then. What was pulled stays."""
    click.echo(f"Forgot the {_hub().forget(name)} {name}.")


@hub.command()
@click.argument("words", nargs=-1)
@_model
@click.option("--kind", type=click.Choice(KINDS), help="Only these.")
@click.option("--limit", type=click.IntRange(min=1, max=10_000), default=50, show_default=True, metavar="N")
@click.option("--huggingface", is_flag=True, help="Look for repositories on Hugging Face that are tagged as hubs instead.")
@json_option
def search(words: tuple[str, ...], model: str | None, kind: str | None, limit: int, huggingface: bool, as_json: bool) -> None:
    """List what holds all WORDS in its name, description, trait, tags or model; what fits --model comes first."""
    if huggingface:
        if model or kind:
            raise click.UsageError("--huggingface looks for whole hubs: add one, then search it with --model and --kind")
        from ..hub.huggingface import search_repositories

        found_repositories = search_repositories(list(words), limit)
        if as_json:
            print_json({"repositories": found_repositories})
        else:
            for repository in found_repositories:
                click.echo(repository)
        return
    identity = _identity(model)
    offers, total = _hub().search(list(words), identity=identity, kind=kind, limit=limit)
    if as_json:
        print_json({"total": total, "entries": [{"index": offer.index, **offer.entry} for offer in offers]})
    elif not offers:
        click.echo("Nothing found.")
    else:
        print_table(
            ("name", "version", "kind", "poles", "model", "effect", "licence", "index"),
            [_search_row(offer, identity) for offer in offers],
        )
        if total > len(offers):
            click.echo(f"{len(offers)} of {total}: add words, or --limit.")


def _search_row(offer: Offer, identity: ModelIdentity | None) -> tuple[object, ...]:
    entry = offer.entry
    trait, curve = entry["trait"], entry["calibration"]
    poles = f"{trait['negative']} - {trait['positive']}" if trait else entry["description"][:40]
    model = "any" if entry["model"] is None else entry["model"]["name"] or entry["model"]["architecture"]
    if identity is not None and offer.row.model == identity.key:
        model += " (yours)"
    effect = f"{curve['effect']:.3g} {curve['unit']}" if curve else ""
    return entry["name"], entry["version"], entry["kind"], poles, model, effect, entry["licence"], offer.index


@hub.command()
@click.argument("reference")
@_model
@_index
@json_option
def info(reference: str, model: str | None, index: str | None, as_json: bool) -> None:
    """Show the card of REFERENCE (owner/name, or with @version) and its dose curve, before anything is pulled."""
    found = _hub()
    offer = found.find(reference, identity=_identity(model), index=index)
    card = found.card(offer)
    if as_json:
        print_json({"index": offer.index, "key": offer.entry["key"], "card": card})
    else:
        from ..report.card import card_text

        console().print(card_text(card, key=offer.entry["key"], index=offer.index), markup=False)


@hub.command()
@click.argument("references", nargs=-1)
@_model
@_index
@click.option("--locked", type=FilePath(dir_okay=False, path_type=Path), metavar="FILE", help="Pull what steer hub lock wrote.")
@click.option("--force", is_flag=True, help="Keep it even if it lowers refusals and its card does not say so.")
@json_option
def pull(
    references: tuple[str, ...], model: str | None, index: str | None, locked: Path | None, force: bool, as_json: bool
) -> None:
    """Fetch, check and keep REFERENCES: owner/name, owner/name@version or owner/name@sha256.

    With --model, what it does is measured on that model first: how far it moves neutral text, and what it does to refusals.
    A vector that lowers refusals without saying so is not kept unless --force is given.
    """
    if bool(references) == bool(locked):
        raise click.UsageError("name what to pull, or give --locked FILE")
    found = _hub()
    if locked is not None:
        from ..hub.lock import pull_locked

        items = pull_locked(found, locked)
    else:
        from ..engine.local import LocalEngine
        from ..hub.safety import safety_check

        identity = _identity(model)
        with contextlib.ExitStack() as stack:
            engine = None
            if model is not None:
                engine = functools.cache(lambda: stack.enter_context(LocalEngine(Path(model))))
            check = safety_check(found.library, engine, force=force, say=lambda text: click.echo(text, err=as_json))
            items = [_pull_one(found, reference, identity, index, check) for reference in references]
    if as_json:
        print_json({"pulled": [item.to_dict() for item in items]})
    for item in items if not as_json else ():
        where = f" for {item.model.label}" if item.model else ""
        click.echo(f"{item.label}{where}: signed by {item.key}. {_use(found, item)}")


def _pull_one(found: Hub, reference: str, identity: ModelIdentity | None, index: str | None, check: Any) -> Item:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    err = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(reference, total=None)
        return found.pull(
            reference,
            identity=identity,
            index=index,
            check=check,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _use(found: Hub, item: Item) -> str:
    if item.kind == "vector":
        return f"Use it as {item.name}:0.8"
    if item.kind == "gate":
        return f"Use it as mood?response{{{item.name}}}"
    if item.kind == "sae":
        return f"Use it with: steer sae import {item.name} {item.name.split('/')[1]}"
    if item.kind == "trait":
        return f"Fit it with: steer train {item.name.split('/')[1]} --trait {item.name}"
    from ..hub.contents import preset_terms
    from ..steering.grammar import format_terms

    return f"Use it as: {format_terms(preset_terms(found.pulled.checked(item.files['preset'], item.name), item.label))}"


@hub.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the indexes that are known and what was pulled from them."""
    found = _hub()
    indexes, items, keys = found.indexes(), found.pulled.items(), found.pulled.state()["keys"]
    if as_json:
        print_json({"folder": found.root, "indexes": indexes, "keys": keys, "pulled": [item.to_dict() for item in items]})
        return
    if not indexes and not items:
        click.echo("No index is known and nothing was pulled: begin with: steer hub add FOLDER-OR-URL")
        return
    rows = [(name, one["url"], one["count"], one["serial"], (one["expires"] or "never")[:10]) for name, one in indexes.items()]
    print_table(("index", "address", "entries", "serial", "expires"), rows)
    if items:
        click.echo("")
        pulled = [
            (i.name, i.version + (" (pinned)" if i.pinned else ""), i.kind, i.model.label if i.model else "any") for i in items
        ]
        print_table(("pulled", "version", "kind", "model"), pulled)


@hub.command()
@click.argument("name")
@_model
def remove(name: str, model: str | None) -> None:
    """Remove what was pulled as NAME (owner/name), for --model or for all."""
    for item in _hub().remove(name, identity=_identity(model)):
        click.echo(f"Removed {item.label}.")


@hub.command()
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Pull the newest version of all that is not pinned.")
def update(names: tuple[str, ...], everything: bool) -> None:
    """Fetch the indexes anew, and say what has newer versions. NAMES (owner/name), or --all: pull these, too."""
    found = _hub()
    found.update()
    outdated = found.outdated()
    unknown = set(names) - {item.name for item in found.pulled.items()}
    if unknown:
        raise HubError(f"{sorted(unknown)[0]!r} was not pulled: steer hub list names what was")
    for item, offer in outdated:
        if everything or item.name in names:
            new = found.pull(item.name, identity=item.model, index=offer.index)
            click.echo(f"{item.name}: {item.version} -> {new.version}")
        else:
            click.echo(f"{item.name}: {offer.entry['version']} is there ({item.version} is here): steer hub update {item.name}")
    if not outdated:
        click.echo("Everything is up to date.")


@hub.command()
@click.argument("names", nargs=-1)
@_model
@json_option
def verify(names: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Check hashes and signatures of what was pulled (all of it without NAMES); with --model, measure its dose curve again.

    Exits with 1 where what is measured does not agree with the card.
    """
    found = _hub()
    identity = _identity(model)
    items = [
        item
        for item in found.pulled.items()
        if (not names or item.name in names) and (identity is None or item.model is None or item.model.mismatch(identity) is None)
    ]
    missing = set(names) - {item.name for item in items}
    if missing:
        raise HubError(
            f"{sorted(missing)[0]!r} was not pulled{' for this model' if model else ''}: steer hub list names what was"
        )
    cards = [(item, found.verify(item)) for item in items]
    if model is None:
        if as_json:
            print_json({"verified": [item.label for item, _ in cards]})
        for item, _ in cards if not as_json else ():
            click.echo(f"{item.label}: files and signature hold")
        return
    from ..hub.measure import measure_items

    reports = measure_items(found, cards, model)
    if as_json:
        print_json({"measured": [report.to_dict() for report in reports]})
    for report in reports if not as_json else ():
        for line in report.lines():
            click.echo(line)
    if not all(report.agrees for report in reports):
        raise click.exceptions.Exit(1)


@hub.command()
@click.option("-o", "--out", type=FilePath(dir_okay=False, path_type=Path), default=Path("steer-hub.lock"), show_default=True)
def lock(out: Path) -> None:
    """Write down what was pulled, by hash and key, so that steer hub pull --locked repeats it elsewhere."""
    from ..hub.lock import write_lock

    click.echo(f"{out}: {write_lock(_hub(), out)} entries")


@hub.command()
@click.option("--rotate", type=FilePath(file_okay=False, exists=True, path_type=Path), metavar="DIR",
              help="Hand over to a new key, and sign the hub in DIR anew.")  # fmt: skip
def key(rotate: Path | None) -> None:
    """Print the public key that you publish with; it is made when there is none."""
    from ..hub.publish import Folder, own_key
    from ..hub.signing import SecretKey

    root = _hub().root
    if rotate is None:
        click.echo(str(own_key(root, make=True).public))
        return
    old, coming = own_key(root), root / "key.new"
    new = SecretKey.read(coming) if coming.is_file() else SecretKey.generate()
    if not coming.is_file():
        new.write(coming)  # before it signs anything: a key that is lost could not be handed over
    count = Folder(rotate, old).rotate(new)
    coming.replace(root / "key")
    click.echo(f"{new.public} signs {count} cards in {rotate} now, in the place of {old.public}.")


@hub.command()
@click.argument("thing")
@click.option("--as", "name", required=True, metavar="OWNER/NAME", help="What it is called there.")
@click.option("--to", required=True, metavar="DIR|hf://...", help="The hub: a folder, made if it is not there, or a repository.")
@click.option("--licence", required=True, metavar="SPDX", help="Such as Apache-2.0 or CC-BY-4.0.")
@click.option("--description", default="", metavar="TEXT", help="What it does, for people (default: what its trait says).")
@click.option("--version", metavar="N", help="Such as 2 or 1.3 (default: the next whole number).")
@click.option("--kind", type=click.Choice(["vector", "sae", "trait", "preset"]), default="vector", show_default=True,
              help="What THING is: a vector or gate, an autoencoder of --model, a trait's file, a steering's text.")  # fmt: skip
@click.option("--base-model", metavar="OWNER/NAME", help="The model's repository, as Hugging Face calls it.")
@click.option("--tried-on", multiple=True, metavar="TEXT", help="A quantisation it was tried on; several times.")
@click.option("--tag", "tags", multiple=True, metavar="WORD", help="A word to find it by; several times.")
@click.option("--benchmark", multiple=True, metavar="NAME=NUMBER", help="A result to show on the card; several times.")
@click.option(
    "--trait", metavar="FILE", help="The trait it was fitted to, if it is none of the package's: lets others verify it."
)
@click.option("--index-name", metavar="NAME", help="What a new index is called (default: as its folder).")
@_model
@_days
@json_option
def publish(
    thing: str, name: str, to: str, licence: str, kind: str, trait: str | None, index_name: str | None, model: str | None,
    days: int | None, as_json: bool, benchmark: tuple[str, ...], **said: Any,
) -> None:  # fmt: skip
    """Publish THING, a vector's name or file, as OWNER/NAME: card, files, entry and signature. No version is written over.

    With --model, its safety figures are measured on that model and put on the card.
    """
    import tempfile

    from ..hub.publish import Folder, draft, own_key

    found = _hub()
    own = own_key(found.root, make=True)
    said["benchmark"] = dict(_figure(text) for text in benchmark)
    said["tried_on"], said["tags"] = list(said["tried_on"]), list(said["tags"])
    with tempfile.TemporaryDirectory(prefix="steer-hub-") as folder:
        contents = _contents(found, thing, kind, trait, model, Path(folder))
        card = draft(name, contents, licence=licence, **said)
        if model is not None and card["kind"] == "vector":
            from ..hub.safety import measured_safety

            card["safety"] = measured_safety(found.library, model, contents["vector"])
        if to.startswith("hf://"):
            from ..hub.huggingface import publish_to

            entry = publish_to(to, own, card, contents, name=index_name, days=days)
        else:
            entry = Folder(expand_path(to), own).publish(card, contents, name=index_name, days=days)
    if as_json:
        print_json(entry)
    else:
        click.echo(f"Published {entry['name']}@{entry['version']} to {to}, signed by {own.public}.")


def _contents(found: Hub, thing: str, kind: str, trait: str | None, model: str | None, folder: Path) -> dict[str, Path]:
    """The files to publish by role, in a folder of ours."""
    import json

    if kind == "preset":
        from ..hub.contents import preset_data

        path = folder / "preset.json"
        path.write_text(json.dumps(preset_data(thing), indent=1) + "\n", "utf-8")
        return {"preset": path}
    contents = {}
    if kind == "sae":
        from ..concepts.code import CONFIG, WEIGHTS
        from ..concepts.index import INDEX
        from ..concepts.making import find_sae

        if model is None and not (expand_path(thing) / CONFIG).is_file():
            raise SpecError(f"an autoencoder belongs to a model: name the one of {thing!r:.80} with --model")
        there = find_sae(found.library, thing, _identity(model))
        return {"weights": there / WEIGHTS, "config": there / CONFIG, "names": there / INDEX}
    if kind == "vector":
        from ..store.vectorfile import write_vector

        vector = found.library.resolve(thing, _identity(model))
        path = contents["vector"] = folder / "vector.safetensors"
        write_vector(vector, path)
    if kind == "trait" or trait is not None:
        from ..training.traits import load_trait

        path = contents["trait"] = folder / "trait.json"
        path.write_text(json.dumps(load_trait(trait or thing).to_dict(), indent=1) + "\n", "utf-8")
    return contents


def _figure(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise SpecError(f"--benchmark {text!r:.80} is not a figure: write NAME=NUMBER, such as bfcl=0.41") from None


@hub.command()
@click.argument("folder", type=FilePath(file_okay=False, exists=True, path_type=Path))
@_days
def sign(folder: Path, days: int | None) -> None:
    """Check the whole index in FOLDER and sign it, as its keeper does after others have published to it."""
    from ..hub.publish import Folder, own_key

    own = own_key(_hub().root)
    header = Folder(folder, own).sign(days=days)
    if header["key"] != str(own.public):
        raise HubError(f"the index in {folder} is kept by {header['key']}, so your key ({own.public}) cannot sign it")
    click.echo(
        f"{cell_text(header['name'])}: serial {header['serial']}, {header['count']} entries, until {header['expires'] or 'ever'}."
    )


@hub.command()
@click.argument("folder", type=FilePath(file_okay=False, exists=True, path_type=Path))
@click.option("-o", "--out", type=FilePath(file_okay=False, path_type=Path), required=True, help="Where the pages go.")
@click.option("--url", metavar="URL", help="The address that the pages tell people to add (default: FOLDER).")
def site(folder: Path, out: Path, url: str | None) -> None:
    """Render the hub in FOLDER as a static page with search, cards and curves, which loads nothing from elsewhere."""
    from ..hub.site import write_site

    count = write_site(folder, out, url or str(folder))
    click.echo(f"{out / 'index.html'}: {count} pages")
