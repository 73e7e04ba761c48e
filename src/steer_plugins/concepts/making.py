"""``steer sae train`` from beginning to end: text, hidden states, training, quality beside its twins, index."""

from __future__ import annotations

import pydoc_data.topics
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..engine.base import Engine, GenerateRequest
from ..errors import DataError, SpecError, VectorError
from ..paths import expand_path
from ..steering.vector import ModelIdentity
from ..store.features import sae_root
from ..store.library import Library
from ..training.traits import bundled_traits, load_trait
from .code import SparseCode
from .corpus import WINDOW, Corpus, collect, read_text_files, windows_of
from .fit import CodeFit, CodeOptions
from .index import Feature, FeatureIndex, describe_features
from .quality import Reconstruct, ce_recovered, explained_variance, firing_rates, sparse_pca

_CHECKPOINT = "fit.safetensors"
_SAVE_EVERY = 50
_REPLY_TOKENS = 64
_REPLY_SHARE = 0.25
_CE_WINDOWS = 16
_CE_TOKENS = 96

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total); a stage's units are its own."""


@dataclass(frozen=True)
class MakeOptions:
    """What to train.

    Attributes:
        layer: 0-based block, None for the one at half depth, which reads best (0.65 of the depth steers better).
        tokens: how many to read.
        epochs: passes over the training tokens.
        fit: latents, k, method, seed; its ``steps`` are set from the tokens.
        texts: .txt and .jsonl files; none: the model's own replies to the bundled prompts, and Python's help topics.
        twins: also train the random twin and fit a PCA, to compare with.
    """

    layer: int | None = None
    tokens: int = 80_000
    epochs: float = 6.0
    fit: CodeOptions = CodeOptions()
    texts: tuple[Path, ...] = ()
    twins: bool = True

    def __post_init__(self) -> None:
        if self.tokens < 2_000:
            raise SpecError(f"{self.tokens} tokens are too few to learn features from: use at least 2000")


def sae_folder(library: Library, name: str, identity: ModelIdentity) -> Path:
    """Where an autoencoder of a model is kept, whether it exists or not. Raises VectorError for a bad name."""
    return sae_root(library.root, name, identity)


def sae_names(library: Library, identity: ModelIdentity) -> list[str]:
    """The autoencoders that the library has for a model, sorted."""
    folder = library.root / identity.key / "sae"
    return sorted(one.parent.name for one in folder.glob("*/index.json")) if folder.is_dir() else []


def find_sae(library: Library, name: str, identity: ModelIdentity | None) -> Path:
    """The folder of an autoencoder: a name in the library, or a path. Raises VectorError that says what there is."""
    path = expand_path(name)
    if (path / "cfg.json").is_file():
        return path
    if identity is not None:
        folder = sae_folder(library, name, identity)
        if (folder / "cfg.json").is_file():
            return folder
        known = sae_names(library, identity)
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise VectorError(
            f"no autoencoder {name!r} for this model ({identity.label}): {has}; train one with: steer sae train {name}"
        )
    raise VectorError(f"{name} is not an autoencoder's folder")


def make_sae(
    engine: Engine, name: str, options: MakeOptions, library: Library, *, overwrite: bool = False, report: Report | None = None
) -> FeatureIndex:
    """Train the autoencoder ``name`` for the engine's model and keep it in the library, going on where a run was interrupted.

    Returns its index; weights and index are in :func:`sae_folder`. Half-made, it stays in a folder beside that ends in
    ``.partial``, which is how an interrupted run goes on. Raises SteerError.
    """
    tell = report or (lambda stage, done, total: None)
    info = engine.info
    target = sae_folder(library, name, info.identity)
    if target.exists() and not overwrite:
        raise VectorError(
            f"the library already has the autoencoder {name!r} for {info.identity.label}: replace it with --overwrite"
        )
    layer = info.n_layer // 2 if options.layer is None else options.layer
    last = info.n_layer - 2 if info.last_layer_outputs_only else info.n_layer - 1
    if not 0 <= layer <= last:
        raise SpecError(f"layer {layer} cannot be read at every token: use 0 to {last}")
    partial = target.with_name(target.name + ".partial")
    windows = text_windows(engine, options, tell)
    corpus = collect(engine, windows, layer, partial, progress=lambda done, total: tell("reading", done, total))
    train, held = corpus.split()
    fit_options = replace(options.fit, steps=max(50, round(options.epochs * len(train) / options.fit.batch)))
    started = time.process_time()
    code = _trained(corpus, train, fit_options, layer, partial / _CHECKPOINT, "training", tell)
    seconds = time.process_time() - started
    about = _about(engine, corpus, options, fit_options, code, seconds, train, held, partial, tell)
    tell("features", 0, 1)
    pieces = _Pieces(engine, np.unique(corpus.window_tokens[corpus.window_tokens >= 0]).tolist())
    features = describe_features(code, corpus, pieces)
    index = FeatureIndex(info.identity, layer, corpus.median_norm, tuple(features), about)
    tell("features", 1, 1)
    _keep(replace(code, notes=_notes(engine, name, about)), index, partial, target)
    return index


def text_windows(engine: Engine, options: MakeOptions, tell: Report) -> list[list[int]]:
    """Windows of tokens: of the files, or of the model's own replies and Python's help topics. The same for the same options."""
    bos = engine.tokenize("a")[:1] if _has_bos(engine) else []
    if options.texts:
        tokens = (_plain(engine, text) for text in read_text_files(options.texts))
        return windows_of(tokens, options.tokens, bos)
    chats: list[list[int]] = []
    if engine.info.has_chat_template:
        chats = _own_replies(engine, int(options.tokens * _REPLY_SHARE), tell)
    got = sum(map(len, chats))
    topics = (_plain(engine, text) for _, text in sorted(pydoc_data.topics.topics.items()))
    return [*chats, *windows_of(topics, max(options.tokens - got, WINDOW), bos)]


def _has_bos(engine: Engine) -> bool:
    return len(engine.tokenize("a")) > 1


def _plain(engine: Engine, text: str) -> list[int]:
    tokens = engine.tokenize(text)
    return tokens[1:] if _has_bos(engine) else tokens


def _own_replies(engine: Engine, limit: int, tell: Report) -> list[list[int]]:
    """Chats with the model's own replies, plain and under both poles of the bundled traits, until ``limit`` tokens are had."""
    asked = []
    for trait in map(load_trait, bundled_traits()):
        for i, prompt in enumerate(trait.train_prompts):
            system = (None, *trait.system_pairs[i % len(trait.system_pairs)])[i % 3]
            head = [{"role": "system", "content": system}] if system else []
            asked.append([*head, {"role": "user", "content": prompt}])
    asked.sort(key=lambda chat: chat[-1]["content"])  # traits take turns
    wanted = asked[: max(1, limit // (_REPLY_TOKENS + 32))]
    requests = [GenerateRequest(chat, max_tokens=_REPLY_TOKENS, temperature=0.7, seed=i) for i, chat in enumerate(wanted)]
    replies = engine.generate_many(requests, progress=lambda done, total: tell("own replies", done, total))
    return [(one.prompt_tokens + one.tokens)[-WINDOW:] for one in replies]


def _trained(
    corpus: Corpus, train: Any, options: CodeOptions, layer: int, checkpoint: Path, stage: str, tell: Report
) -> SparseCode:
    """Train, saving now and then, and on an interruption. Raises DataError for a full disk."""
    fit = CodeFit(corpus.rows, train, options, layer=layer)
    fit.restore(checkpoint)

    def each(step: int, steps: int, explained: float) -> None:
        tell(stage, step, steps)
        if step % _SAVE_EVERY == 0 and step < steps:
            fit.save(checkpoint)

    try:
        try:
            fit.run(each)
        finally:
            fit.save(checkpoint)
    except OSError as error:
        raise DataError(f"cannot write {checkpoint}: {error.strerror or error}") from None
    return fit.result()


def _about(
    engine: Engine,
    corpus: Corpus,
    options: MakeOptions,
    fit_options: CodeOptions,
    code: SparseCode,
    seconds: float,
    train: Any,
    held: Any,
    partial: Path,
    tell: Report,
) -> dict[str, Any]:
    """Figures for people and programs: quality on held-out tokens, with the same of the PCA and the random twin."""
    held_rows = corpus.rows[held]
    rates = firing_rates(code, corpus.rows)
    l0 = float(firing_rates(code, held_rows).sum())
    arms: dict[str, Reconstruct] = {"": code.reconstruct}
    if options.twins:
        twin_options = replace(fit_options, frozen_decoder=True)
        random = _trained(corpus, train, twin_options, corpus.layer, partial / f"random-{_CHECKPOINT}", "random twin", tell)
        arms["random_"] = random.reconstruct
        arms["pca_"] = sparse_pca(corpus.rows, train, max(1, round(l0)))
    about: dict[str, Any] = {
        "tokens": len(train),
        "held_out_tokens": len(held),
        "corpus_sha256": corpus.sha256,
        "texts": [path.name for path in options.texts] or ["the model's own replies", "pydoc_data.topics"],
        "method": fit_options.method,
        "latents": fit_options.latents,
        "k": fit_options.k,
        "steps": fit_options.steps,
        "seed": fit_options.seed,
        "training_seconds": round(seconds, 1),
        "l0": l0,
        "dead": float((rates == 0).mean()),
    }
    for name, reconstruct in arms.items():
        about[f"{name}explained_variance"] = explained_variance(corpus.rows, held, reconstruct)
    mean = np.asarray(held_rows.astype(np.float32).mean(axis=0), np.float32)
    windows = sorted(set(corpus.windows[held].tolist()))[:_CE_WINDOWS]
    texts = [[int(t) for t in corpus.window_tokens[w] if t >= 0][:_CE_TOKENS] for w in windows]
    found = ce_recovered(
        engine, texts, corpus.layer, arms, mean=mean, progress=lambda done, total: tell("cross-entropy", done, total)
    )
    about |= {f"{name}ce_recovered": value for name, value in found.items()}
    return about


def _notes(engine: Engine, name: str, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "sae_name": name,
        "model_name": engine.info.name,
        "made_by": f"steer-plugins {__version__}",
        "training_tokens": about["tokens"],
    }


def _keep(code: SparseCode, index: FeatureIndex, partial: Path, target: Path) -> None:
    """Put the finished folder in place; the corpus goes. Raises VectorError."""
    made = partial.with_name(target.name + ".made")
    try:
        shutil.rmtree(made, ignore_errors=True)
        code.save(made)
        index.save(made)
        if target.exists():
            old = target.with_name(target.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            made.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            made.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise VectorError(f"cannot write the autoencoder to {target}: {error.strerror or error}") from None


class _Pieces(dict[int, bytes]):
    """What tokens print, asked for once."""

    def __init__(self, engine: Engine, tokens: Sequence[int]) -> None:
        super().__init__(zip(tokens, engine.pieces(tokens), strict=True))


def keep_published(
    code: SparseCode,
    name: str,
    identity: ModelIdentity,
    library: Library,
    *,
    index: FeatureIndex | None = None,
    overwrite: bool = False,
) -> Path:
    """Keep an autoencoder from elsewhere for a model. Without its index, that knows no contexts yet. Raises VectorError."""
    if code.n_embd != identity.n_embd or code.layer >= identity.n_layer:
        raise VectorError(f"the autoencoder is of width {code.n_embd} at layer {code.layer}, which does not fit {identity.label}")
    target = sae_folder(library, name, identity)
    if target.exists() and not overwrite:
        raise VectorError(f"the library already has the autoencoder {name!r} for {identity.label}: replace it with --overwrite")
    if index is None:
        features = tuple(Feature(i) for i in range(code.n_features))
        index = FeatureIndex(identity, code.layer, 0.0, features, {"family": code.notes.get("family", "saelens")})
    _keep(code, index, target.with_name(target.name + ".partial"), target)
    return target
