"""Features of the library's autoencoders, as vectors: ``talk#963`` and ``talk#smell``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import VectorError
from ..steering.grammar import TermSpec
from ..steering.vector import ModelIdentity, SteeringVector, check_name
from .foreign.sae import read_saelens
from .formats import Facts

DOSE = 0.4
"""What strength 1 of a feature adds, in median norms of its layer, until ``steer calibrate`` measures it."""

_MAX_INDEX_BYTES = 512 << 20
_FEATURE = re.compile(r"([^#/\\]+)#([A-Za-z0-9_][A-Za-z0-9._-]*)")


def sae_root(root: Path, name: str, identity: ModelIdentity) -> Path:
    """Where an autoencoder of a model is kept below the library's root. Raises VectorError for a bad name."""
    return root / identity.key / "sae" / check_name(name)


def split_name(text: str) -> tuple[str, str] | None:
    """(autoencoder, feature) of ``talk#963`` or ``talk#smell``; None for any other name."""
    match = _FEATURE.fullmatch(text)
    return (match[1], match[2]) if match else None


def as_features(terms: Iterable[TermSpec], root: Path, identity: ModelIdentity) -> list[TermSpec]:
    """Terms such as ``talk#963``, which read like stream 963 of a vector, as the feature where ``talk`` is an autoencoder.

    A vector of that name wins: then the number is its stream.
    """

    def is_sae(name: str) -> bool:
        try:
            folder = sae_root(root, name, identity)
        except VectorError:
            return False
        return (folder / "cfg.json").is_file() and not (root / identity.key / f"{name}.safetensors").is_file()

    return [
        replace(t, vector=f"{t.vector}#{t.stream}", stream=None) if t.stream is not None and is_sae(t.vector) else t
        for t in terms
    ]


def read_feature(root: Path, name: str, feature: str, identity: ModelIdentity) -> SteeringVector:
    """A feature of an autoencoder as a vector that adds :data:`DOSE` median norms at strength 1, on the response.

    Raises VectorError: no such autoencoder, number or name, or files that cannot be read.
    """
    folder = sae_root(root, name, identity)
    if not (folder / "cfg.json").is_file():
        raise VectorError(f"no autoencoder {name!r} for this model ({identity.label}): train one with: steer sae train {name}")
    index = read_index(folder / "index.json")
    number = int(feature) if feature.isdecimal() else _numbered(index, name, feature)
    vector = read_saelens(folder / "sae_weights.safetensors", Facts(feature=number))
    norm = index.get("median_norm")
    if isinstance(norm, int | float) and not isinstance(norm, bool) and norm > 0:
        vector = vector.replace(scales={key: DOSE * float(norm) for key in vector.scales})
    return vector.replace(name=f"{name}-{number}"[:64].rstrip("-."), default_scope="response", identity=identity)


def read_index(path: Path) -> dict[str, Any]:
    """The JSON object in an autoencoder's index, its fields unchecked. Raises VectorError."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise VectorError(f"{path} is larger than {_MAX_INDEX_BYTES >> 20} MiB")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise VectorError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise VectorError(f"{path} is not JSON") from None
    return data if isinstance(data, dict) else {}


def _numbered(index: dict[str, Any], name: str, feature: str) -> int:
    """The number of a feature's name; one that a person gave comes before automatic ones."""
    features = index.get("features")
    wanted = feature.casefold()
    same = [
        one
        for one in (features if isinstance(features, list) else [])
        if isinstance(one, dict) and str(one.get("name", "")).casefold().replace(" ", "-") == wanted
    ]
    given = [one for one in same if one.get("named")] or same
    numbers = [one.get("index") for one in given]
    if len(numbers) == 1 and isinstance(numbers[0], int):
        return numbers[0]
    if not numbers:
        raise VectorError(f"no feature of {name!r} is named {feature!r}: search with: steer sae features {name} {feature}")
    listed = ", ".join(map(str, numbers[:5]))
    raise VectorError(
        f"{len(numbers)} features of {name!r} are named {feature!r} ({listed}): use a number, such as {name}#{numbers[0]}"
    )
