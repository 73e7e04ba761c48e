"""What is inside the files: read with the readers that already distrust them, and compared to what the card says of them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..concepts.code import CONFIG, WEIGHTS, SparseCode
from ..concepts.index import INDEX, FeatureIndex
from ..errors import HubError, SteerError, VectorError
from ..steering.gate import Gate
from ..steering.grammar import TermSpec, from_json, parse
from ..steering.vector import FILE_SUFFIXES, SteeringVector, is_hub_name
from ..store.vectorfile import read_vector
from .schema import MAX_JSON_BYTES, parse_json

PRESET_FORMAT = "steer-preset-v1"


def check_contents(card: dict[str, Any], files: Mapping[str, Path]) -> None:
    """Raise HubError unless the files (by role) are of the card's kind and say of themselves what the card says."""
    what = f"{card['name']}@{card['version']}"
    try:
        if card["kind"] == "sae":
            _compare(card, facts_of_sae(files), what)
        for role, path in files.items():
            if role == "vector":
                _compare(card, facts_of(read_vector(path)), what)
            elif role == "trait":
                _check_trait(path, what)
            elif role == "preset":
                preset_terms(path, what)
    except HubError:
        raise
    except SteerError as error:
        # the file has a name of ours; the reader has put it before its sentence
        sentence = str(error)
        for path in files.values():
            sentence = sentence.removeprefix(f"{path}: ")
        raise HubError(f"{what} holds no {card['kind']}: {sentence}") from None


def facts_of(vector: SteeringVector) -> dict[str, Any]:
    """What a card has to say of a vector or gate just as its file does."""
    made = vector.provenance or {}
    gate = "gate" in made
    if gate:
        Gate.of(vector)
    method = made.get("kind") if gate else made.get("method")
    return {
        "kind": "gate" if gate else "vector",
        "model": None if vector.identity is None else vector.identity.to_dict(),
        "method": method[:64] if isinstance(method, str) and method.isprintable() and method else None,
        "layers": vector.layers,
        "op": vector.op,
        "scope": vector.default_scope,
    }


def facts_of_sae(files: Mapping[str, Path]) -> dict[str, Any]:
    """What a card has to say of an autoencoder just as its files do. Raises VectorError."""
    code, index = read_autoencoder(files)
    if index.identity is None:
        raise VectorError("its index names no model")
    if (code.n_embd, code.n_features, code.layer) != (index.identity.n_embd, len(index.features), index.layer):
        raise VectorError("its weights are of another width, count or layer than its index says")
    made = {"model": index.identity.to_dict(), "layers": [code.layer], "op": "add", "scope": "response"}
    return {"kind": "sae", "method": None, **made}


def read_autoencoder(files: Mapping[str, Path]) -> tuple[SparseCode, FeatureIndex]:
    """The autoencoder in some files by role, and the index of its features. Raises VectorError."""
    with _folder_of(files) as folder:
        return SparseCode.load(folder), FeatureIndex.load(folder)


@contextlib.contextmanager
def _folder_of(files: Mapping[str, Path]) -> Iterator[Path]:
    """The files of an autoencoder (by role) under the names that its readers know, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="steer-hub-") as place:
        for role, name in (("weights", WEIGHTS), ("config", CONFIG), ("names", INDEX)):
            try:
                os.link(files[role], Path(place) / name)
            except OSError:  # on another disk
                shutil.copyfile(files[role], Path(place) / name)
        yield Path(place)


def _compare(card: dict[str, Any], facts: dict[str, Any], what: str) -> None:
    for field, value in facts.items():
        said = card[field]
        if field == "model" and said is not None and value is not None:
            # the name is for people and is not compared
            said, value = {**said, "name": ""}, {**value, "name": ""}
        if said != value:
            raise HubError(f"{what}: its card says {field} {card[field]!r:.80}, its file {facts[field]!r:.80}")


def _check_trait(path: Path, what: str) -> None:
    from ..training.traits import Trait

    Trait.from_dict(_json(path, what), what)


def preset_terms(path: Path, what: str) -> list[TermSpec]:
    """The terms of a preset's file. Raises HubError; SpecError for terms that are none."""
    data = _json(path, what)
    if data.get("format") != PRESET_FORMAT or data.keys() != {"format", "terms"}:
        raise HubError(f"{what} is not a preset: it needs just the format {PRESET_FORMAT} and terms")
    terms = from_json(data["terms"])
    if not terms:
        raise HubError(f"{what} is not a preset: it has no terms")
    for name in [name for term in terms for name in (term.vector, term.gate) if name is not None]:
        if name.endswith(FILE_SUFFIXES) or (re.search(r"[/\\]", name) and not is_hub_name(name)):
            raise HubError(f"{what} is not a preset: it names the file {name!r:.80}; presets name vectors only")
    return terms


def preset_data(text: str) -> dict[str, Any]:
    """What a preset's file holds for a text of the grammar. Raises SpecError."""
    return {"format": PRESET_FORMAT, "terms": [term.to_json() for term in parse(text)]}


def _json(path: Path, what: str) -> dict[str, Any]:
    data = path.read_bytes() if path.stat().st_size <= MAX_JSON_BYTES else b""
    return parse_json(data, what)
