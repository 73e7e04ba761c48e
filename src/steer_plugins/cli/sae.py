"""``steer sae``: sparse autoencoders of a model's hidden states, and their features."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SpecError, VectorError
from ..paths import expand_path
from ..plugins import hookimpl
from .common import (
    EngineOptions,
    FilePath,
    Stages,
    engine_options,
    json_option,
    model_option,
    model_path,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from ..concepts import FeatureIndex
    from ..steering.vector import ModelIdentity


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``steer sae``."""
    cli.add_command(sae)


@click.group()
def sae() -> None:
    """Sparse autoencoders: what a model tells apart, as features one can search, name and watch.

    \b
    Example:
      steer sae train talk
      steer sae features talk smell
    """


@sae.command()
@click.argument("name")
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=FilePath(path_type=Path),
    metavar="FILE",
    help=".txt or .jsonl to learn from; may be repeated (default: the model's own replies and Python's help topics).",
)
@click.option("--layer", type=click.IntRange(min=0), metavar="N", help="The block to read after (default: half of the depth).")
@click.option("--latents", type=click.IntRange(16, 131_072), default=2048, show_default=True, metavar="N", help="Features.")
@click.option("--k", type=click.IntRange(min=1), default=24, show_default=True, metavar="N", help="Active features of a token.")
@click.option("--tokens", type=click.IntRange(min=2000), default=80_000, show_default=True, metavar="N", help="Tokens to read.")
@click.option(
    "--method",
    type=click.Choice(["batchtopk", "topk"]),
    default="batchtopk",
    show_default=True,
    help="How features are kept few.",
)
@click.option(
    "--epochs", type=click.FloatRange(min=0.1), default=6.0, show_default=True, metavar="X", help="Passes over the tokens."
)
@click.option("--twins/--no-twins", default=True, help="Also fit a PCA and a random decoder to compare with.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of features and order.")
@click.option("--resume/--restart", default=True, help="Go on with an interrupted run of this name, or begin anew.")
@click.option("--overwrite", is_flag=True, help="Replace an autoencoder of that name.")
@engine_options
@json_option
def train(
    name: str,
    texts: tuple[Path, ...],
    layer: int | None,
    latents: int,
    k: int,
    tokens: int,
    method: str,
    epochs: float,
    twins: bool,
    seed: int,
    resume: bool,
    overwrite: bool,
    engine: EngineOptions,
    as_json: bool,
) -> None:
    """Train the autoencoder NAME on a model's hidden states, and keep it in the library.

    Reading takes most of the time; Ctrl-C keeps what was read and learned, and the same command goes on from there.

    \b
    Examples:
      steer sae train talk
      steer sae train books --text austen.txt --layer 20 --tokens 200000
    """
    import shutil

    from ..concepts.fit import CodeOptions
    from ..concepts.making import MakeOptions, make_sae, sae_folder
    from ..store.library import Library

    library = Library()
    options = MakeOptions(
        layer=layer,
        tokens=tokens,
        epochs=epochs,
        fit=CodeOptions(latents=latents, k=k, method=method, seed=seed),
        texts=texts,
        twins=twins,
    )
    with engine.open(n_parallel=16) as opened:
        folder = sae_folder(library, name, opened.info.identity)
        if not resume:
            shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
        with Stages() as report:
            index = make_sae(opened, name, options, library, overwrite=overwrite, report=report)
    if as_json:
        print_json({"name": name, "folder": str(folder), "layer": index.layer, "median_norm": index.median_norm, **index.about})
        return
    figures = [
        [label, *(index.about.get(prefix + key) for prefix in ("", "pca_", "random_"))]
        for label, key in (("explained variance", "explained_variance"), ("cross-entropy recovered", "ce_recovered"))
    ]
    print_table(["held out", "trained", "PCA", "random decoder"], figures)
    click.echo(f"{index.about['l0']:.1f} features active per token, {100 * index.about['dead']:.1f} % never active")
    click.echo(f"wrote {folder}; look for features with: steer sae features {name} WORD")


@sae.command()
@click.argument("name")
@click.argument("word", required=False)
@click.option("--contrast", metavar="TRAIT|PAIRS", help="Rank by how well a feature tells a trait's poles, or pairs, apart.")
@click.option(
    "--by", type=click.Choice(["effect", "auroc", "rate"]), help="The order (default: auroc with --contrast, else rate)."
)
@click.option("-n", "--count", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="How many to list.")
@click.option("-o", "--out", type=FilePath(path_type=Path), metavar="FILE", help="Write all features as an HTML page.")
@engine_options
@json_option
def features(
    name: str,
    word: str | None,
    contrast: str | None,
    by: str | None,
    count: int,
    out: Path | None,
    engine: EngineOptions,
    as_json: bool,
) -> None:
    """List features of the autoencoder NAME: all, or those whose name or contexts hold WORD.

    --by effect measures what adding a feature changes in the model's next token, for those listed that were not measured yet.

    \b
    Examples:
      steer sae features talk smell
      steer sae features talk --contrast mood
      steer sae features talk --out talk.html
    """
    from ..concepts import SparseCode
    from ..concepts import features as looking
    from ..concepts.page import features_page

    order = by or ("auroc" if contrast else "rate")
    if order == "auroc" and not contrast:
        raise click.UsageError("--by auroc needs --contrast: name a trait or a file of pairs")
    folder, index = _load(name, engine.model)
    found = index.find(word) if word else list(index.features)
    if word and not found:
        raise VectorError(f"no feature of {name!r} has {word!r} in its name or contexts: try another word")
    scores = None
    if contrast or order == "effect":
        code = SparseCode.load(folder)
        with engine.open(n_parallel=16) as opened:
            _check_model(index, opened.info.identity, name)
            if contrast:
                from .train import load_source

                scores = looking.contrast(opened, code, _source(contrast, load_source))
            if order == "effect":
                chosen = [f.index for f in _worth_measuring(found, word) if f.effect is None]
                with Stages() as report:
                    index = looking.effects(
                        opened, code, index, chosen, progress=lambda done, total: report("effects", done, total)
                    )
                if chosen:
                    index.save(folder)
                found = [index.get(f.index) for f in found]
    rows = looking.ranked(index, order, scores, candidates=found)[:count]
    if out is not None:
        from ..atomic import write_atomically

        write_atomically(out, features_page(index, name).encode())
    if as_json:
        print_json(
            {
                "features": [
                    {
                        "index": f.index,
                        "name": f.name,
                        "rate": f.rate,
                        "auroc": score,
                        "effect": f.effect,
                        "raises": list(f.raises),
                        "contexts": [vars(c) for c in f.contexts],
                    }
                    for f, score in rows
                ]
            }
        )
        return
    if out is not None:
        click.echo(f"wrote {len(index.features)} features to {out}")
        return
    print_table(
        ["feature", "name", "rate %", *(["auroc"] if scores is not None else []), "effect", "strongest context"],
        [
            [
                f.index,
                f.name,
                round(100 * f.rate, 4),
                *([score] if scores is not None else []),
                "" if f.effect is None else f"{f.effect:.2f}",
                _short(f),
            ]
            for f, score in rows
        ],
    )


@sae.command("name")
@click.argument("name")
@click.argument("feature", type=click.IntRange(min=0))
@click.argument("title")
@model_option
def name_(name: str, feature: int, title: str, model: str | None) -> None:
    """Call feature number FEATURE of the autoencoder NAME by a TITLE ("" takes the title away).

    \b
    Example:
      steer sae name talk 330 smell
    """
    folder, index = _load(name, model)
    index = index.named(feature, title)
    index.save(folder)
    click.echo(f"#{feature} of {name} is now {index.get(feature).name!r}")


@sae.command("import")
@click.argument("file", type=FilePath(path_type=Path))
@click.argument("name")
@click.option("--layer", type=click.IntRange(min=0), metavar="N", help="The block, where the file does not say it.")
@click.option(
    "--site", type=click.Choice(["resid_post", "attn_out", "ffn_out"]), help="Where in the block, where the file does not say it."
)
@click.option("--k", type=click.IntRange(min=1), metavar="N", help="Active features of a token, where the file does not say it.")
@click.option("--overwrite", is_flag=True, help="Replace an autoencoder of that name.")
@model_option
@json_option
def import_(
    file: Path, name: str, layer: int | None, site: str | None, k: int | None, overwrite: bool, model: str | None, as_json: bool
) -> None:
    """Keep a published autoencoder, FILE or its folder, in the library as NAME for a model.

    FILE may also be owner/name, an autoencoder that `steer hub pull` has fetched; it comes with the names of its features.
    Weights are read and rewritten as a SAELens folder; nothing in them is executed. docs/concepts.md lists the layouts.

    \b
    Examples:
      steer sae import ./layers.15.mlp smell-mlp --site ffn_out
      steer sae import ann/talk talk
    """
    from ..concepts.making import keep_published
    from ..concepts.published import read_published
    from ..hub.contents import read_autoencoder
    from ..store.identity import identity_of_gguf
    from ..store.library import Library

    identity = identity_of_gguf(model_path(model))
    library = Library()
    pulled = library.pulled.files(file.as_posix(), "sae", identity)
    if pulled and not file.exists():
        if (layer, site, k) != (None, None, None):
            raise click.UsageError(f"{file.as_posix()} says its layer, site and k itself: leave these options out")
        code, index = read_autoencoder(pulled)
    else:
        code, index = read_published(file, layer=layer, site=site, k=k), None
    folder = keep_published(code, name, identity, library, index=index, overwrite=overwrite)
    if as_json:
        print_json(
            {"name": name, "folder": folder, "layer": code.layer, "site": code.site, "features": code.n_features, "k": code.k}
        )
        return
    click.echo(f"wrote {code.n_features} features at layer {code.layer} to {folder}; check it with: steer sae audit {name}")


@sae.command()
@click.argument("name")
@click.option("--original", type=FilePath(path_type=Path), metavar="FILE", help="The same model in f16 or f32, to compare with.")
@click.option(
    "--text", "texts", multiple=True, type=FilePath(path_type=Path), metavar="FILE", help=".txt or .jsonl; may be repeated."
)
@click.option("--tokens", type=click.IntRange(min=2000), default=10_000, show_default=True, metavar="N", help="Tokens to read.")
@engine_options
@json_option
def audit(name: str, original: Path | None, texts: tuple[Path, ...], tokens: int, engine: EngineOptions, as_json: bool) -> None:
    """Measure how well the autoencoder NAME (or a published file) fits a model, and what quantisation left of its features.

    With --original each feature's activations on the same tokens are correlated between the two files.

    \b
    Examples:
      steer sae audit talk
      steer sae audit talk --model model.Q4_K_M.gguf --original model.f16.gguf
    """
    from ..concepts import SparseCode
    from ..concepts.audit import audit as measure
    from ..concepts.making import MakeOptions, find_sae, text_windows
    from ..concepts.published import read_published
    from ..engine.local import LocalEngine
    from ..store.library import Library

    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(engine.open(n_parallel=16))
        other = None if original is None else stack.enter_context(LocalEngine(original, n_parallel=16))
        path = expand_path(name)
        code = read_published(path) if path.exists() else SparseCode.load(find_sae(Library(), name, opened.info.identity))
        report = stack.enter_context(Stages())
        windows = text_windows(opened, MakeOptions(tokens=tokens, texts=texts), report)
        result = measure(opened, code, windows, original=other, report=report)
    if as_json:
        print_json(result)
        return
    worst = result.pop("worst", None)
    print_table(["figure", "value"], [[key.replace("_", " "), value] for key, value in result.items()])
    if worst:
        rows = [[one["feature"], one["correlation"], 100 * one["rate"], 100 * one["original_rate"]] for one in worst]
        print_table(["feature", "correlation", "rate %", "rate % of the original"], rows, title="least like the original")


def _short(feature: Any) -> str:
    if not feature.contexts:
        return ""
    one = feature.contexts[0]
    before = one.text[max(0, one.at - 30) : one.at]
    text = f"{before}[{one.token}]{one.text[one.at + len(one.token) :][:20]}"
    return " ".join(text.split())


def _worth_measuring(found: list[Any], word: str | None, limit: int = 256) -> list[Any]:
    """Those whose effect is worth the time: what a word found, else live features that are neither rare nor everywhere."""
    if word:
        return found[:limit]
    live = [f for f in found if 2e-4 <= f.rate <= 0.05]
    return sorted(live, key=lambda f: -f.largest)[:limit]


def _source(contrast: str, load_source: Any) -> Any:
    from ..training.traits import bundled_traits

    if contrast in bundled_traits() or not Path(contrast).exists():
        return load_source(contrast, None, contrast)
    return load_source("contrast", contrast, None)


def _load(name: str, model: str | None) -> tuple[Path, FeatureIndex]:
    from ..concepts import FeatureIndex
    from ..concepts.making import find_sae
    from ..store.identity import identity_of_gguf
    from ..store.library import Library

    path = expand_path(name)
    identity = None if (path / "cfg.json").is_file() else identity_of_gguf(model_path(model))
    folder = find_sae(Library(), name, identity)
    return folder, FeatureIndex.load(folder)


def _check_model(index: FeatureIndex, identity: ModelIdentity, name: str) -> None:
    if index.identity is not None and (difference := index.identity.mismatch(identity)):
        raise SpecError(f"the autoencoder {name!r} is of {index.identity.label}, not of this model: {difference}")
