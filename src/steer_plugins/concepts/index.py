"""What is known of an autoencoder's features: names, rates, contexts, effects. One JSON file beside the weights."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..atomic import write_atomically
from ..errors import VectorError
from ..steering.vector import ModelIdentity
from ..store.features import read_index
from .code import SparseCode
from .corpus import Corpus

INDEX = "index.json"
FORMAT = "steer-sae-index-v1"

_MAX_NAME = 80
_CHUNK = 2048


@dataclass(frozen=True)
class Context:
    """Where a feature was strongly active. ``text`` around the token, ``token`` the piece itself, ``at`` its place in ``text``
    (characters), ``activation`` in units of the hidden state."""

    text: str
    token: str
    at: int
    activation: float


@dataclass(frozen=True)
class Feature:
    """One feature.

    Attributes:
        index: its row in the decoder.
        name: given by a person, else taken from its contexts; "" when neither says anything.
        named: whether a person gave the name.
        rate: share of the corpus' tokens on which it is active.
        largest: its largest activation in the corpus.
        effect: nats by which adding it changes the next-token distribution (KL), None when it was not measured.
        raises: tokens that become likelier when it is added.
        contexts: where it is most active, strongest first.
    """

    index: int
    name: str = ""
    named: bool = False
    rate: float = 0.0
    largest: float = 0.0
    effect: float | None = None
    raises: tuple[str, ...] = ()
    contexts: tuple[Context, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "index": self.index,
            "name": self.name,
            "named": self.named,
            "rate": self.rate,
            "largest": self.largest,
            "effect": self.effect,
            "raises": list(self.raises),
            "contexts": [vars(c) for c in self.contexts],
        }


@dataclass(frozen=True)
class FeatureIndex:
    """All features of an autoencoder, and where it comes from.

    ``about``: figures of its making (tokens, corpus hash, quality with its twins), JSON values. ``median_norm``: of the hidden
    states at its layer.
    """

    identity: ModelIdentity | None
    layer: int
    median_norm: float
    features: tuple[Feature, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def find(self, word: str) -> list[Feature]:
        """Features whose name, contexts' tokens or contexts contain ``word``, in that order."""
        wanted = word.casefold()
        found: list[tuple[int, int, Feature]] = []
        for feature in self.features:
            if wanted in feature.name.casefold():
                rank = 0
            elif any(wanted in c.token.casefold() for c in feature.contexts):
                rank = 1
            elif any(wanted in c.text.casefold() for c in feature.contexts):
                rank = 2
            else:
                continue
            found.append((rank, feature.index, feature))
        return [feature for _, _, feature in sorted(found, key=lambda one: one[:2])]

    def get(self, which: int | str) -> Feature:
        """The feature of a number or a name. Raises VectorError when there is none, or several of the name."""
        if isinstance(which, int) or which.isdecimal():
            number = int(which)
            if not 0 <= number < len(self.features):
                raise VectorError(f"there is no feature {number}: they are 0 to {len(self.features) - 1}")
            return self.features[number]
        same = [f for f in self.features if f.name.casefold() == which.casefold()]
        named = [f for f in same if f.named] or same
        if len(named) == 1:
            return named[0]
        if not named:
            raise VectorError(f"no feature is named {which!r}: search with steer sae features, or give one a name")
        numbers = ", ".join(str(f.index) for f in named[:5])
        raise VectorError(
            f"{len(named)} features are named {which!r} ({numbers}): use a number, or rename one with steer sae name"
        )

    def named(self, number: int, name: str) -> FeatureIndex:
        """A copy in which feature ``number`` has a name; "" takes a given name away. Raises VectorError for a bad one."""
        feature = self.get(number)
        clean = " ".join(name.split())
        if len(clean) > _MAX_NAME or any(not c.isprintable() for c in clean) or clean.isdecimal() or set(clean) & set("#:+@!"):
            raise VectorError(
                f"{name!r:.100} cannot name a feature: use at most {_MAX_NAME} characters, not a number, without any of # : + @ !"
            )
        for other in self.features:
            if clean and other.named and other.index != number and other.name.casefold() == clean.casefold():
                raise VectorError(f"feature {other.index} has the name {clean!r} already: choose another")
        new = replace(feature, name=clean or automatic_name(feature.contexts), named=bool(clean))
        return replace(self, features=tuple(new if f.index == number else f for f in self.features))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``index.json`` into the autoencoder's folder, atomically. Raises VectorError."""
        data = {
            "format": FORMAT,
            "identity": None if self.identity is None else self.identity.to_dict(),
            "layer": self.layer,
            "median_norm": self.median_norm,
            "about": self.about,
            "features": [f.to_dict() for f in self.features],
        }
        try:
            write_atomically(Path(folder) / INDEX, json.dumps(data, ensure_ascii=False, allow_nan=False).encode())
        except OSError as error:
            raise VectorError(f"cannot write {Path(folder) / INDEX}: {error.strerror or error}") from None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> FeatureIndex:
        """The index in an autoencoder's folder, every field checked. Raises VectorError."""
        path = Path(folder) / INDEX
        data = read_index(path)
        try:
            if data["format"] != FORMAT:
                raise VectorError(f"{path} is not an index of format {FORMAT}")
            identity = None if data["identity"] is None else ModelIdentity.from_dict(data["identity"])
            features = tuple(_feature(i, one) for i, one in enumerate(data["features"]))
            return cls(identity, _whole(data["layer"]), _number(data["median_norm"]), features, dict(data["about"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise VectorError(f"{path} is not a whole index: make it anew with steer sae train") from None


def _feature(i: int, data: dict[str, Any]) -> Feature:
    if _whole(data["index"]) != i:
        raise ValueError
    contexts = tuple(
        Context(_text(c["text"]), _text(c["token"]), _whole(c["at"]), _number(c["activation"])) for c in data["contexts"]
    )
    effect = None if data["effect"] is None else _number(data["effect"])
    raises = tuple(map(_text, data["raises"]))
    return Feature(
        i, _text(data["name"]), data["named"] is True, _number(data["rate"]), _number(data["largest"]), effect, raises, contexts
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 4000:
        raise ValueError
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError
    return value


# ---- making one ----


def describe_features(
    code: SparseCode, corpus: Corpus, pieces: Mapping[int, bytes], *, top: int = 5, around: int = 12
) -> list[Feature]:
    """Rates, largest activations and top contexts of all features over a corpus; names from the contexts.

    Args:
        pieces: what each token of the corpus' windows prints, by token id.
        top: contexts of each feature, from different windows.
        around: tokens shown on each side of the peak.
    """
    n = code.n_features
    counts = np.zeros(n, np.int64)
    largest = np.zeros(n, np.float32)
    best: list[list[tuple[float, int]]] = [[] for _ in range(n)]  # (activation, row)
    for first in range(0, len(corpus.rows), _CHUNK):
        z = code.encode(corpus.rows[first : first + _CHUNK].astype(np.float32))
        counts += (z > 0).sum(axis=0)
        largest = np.maximum(largest, z.max(axis=0, initial=0.0))
        m = min(4 * top, len(z))
        rows = np.argpartition(-z, m - 1, axis=0)[:m]
        values = np.take_along_axis(z, rows, axis=0)
        for f in np.flatnonzero(values.max(axis=0) > 0).tolist():
            found = [(float(v), first + int(r)) for v, r in zip(values[:, f], rows[:, f], strict=True) if v > 0]
            best[f] = _distinct(best[f] + found, corpus.windows, top)
    result = []
    for f in range(n):
        contexts = tuple(_context(corpus, pieces, row, value, around) for value, row in best[f])
        result.append(
            Feature(
                f,
                automatic_name(contexts),
                False,
                float(counts[f] / max(1, len(corpus.rows))),
                float(largest[f]),
                None,
                (),
                contexts,
            )
        )
    return result


def _distinct(found: list[tuple[float, int]], windows: npt.NDArray[np.int32], top: int) -> list[tuple[float, int]]:
    """The strongest, one of each window."""
    seen: set[int] = set()
    kept = []
    for value, row in sorted(found, reverse=True):
        if int(windows[row]) not in seen:
            seen.add(int(windows[row]))
            kept.append((value, row))
            if len(kept) == top:
                break
    return kept


def _context(corpus: Corpus, pieces: Mapping[int, bytes], row: int, value: float, around: int) -> Context:
    tokens = corpus.window_tokens[corpus.windows[row]]
    place = int(corpus.places[row])
    first = max(0, place - around)
    text = lambda a, b: b"".join(pieces[int(t)] for t in tokens[a:b] if t >= 0).decode(errors="replace")  # noqa: E731
    before, token, after = text(first, place), text(place, place + 1), text(place + 1, place + 1 + around)
    return Context((before + token + after)[:1000], token[:100], min(len(before), 1000), round(value, 4))


def automatic_name(contexts: Sequence[Context]) -> str:
    """The most frequent word at the peaks of a feature's contexts (whole words, whatever their tokens), "" without any."""
    words: Counter[str] = Counter()
    for weight, context in enumerate(reversed(contexts), 1):
        word = _word_at(context).casefold()
        if word:
            words[word] += 10 + weight  # the strongest context decides between equals
    return words.most_common(1)[0][0][:_MAX_NAME] if words else ""


def _word_at(context: Context) -> str:
    """The whole word that the peak token is part of."""
    text, start = context.text, context.at
    end = start + len(context.token)
    stripped = context.token.lstrip()
    start += len(context.token) - len(stripped)
    if not any(c.isalnum() for c in stripped):
        return ""
    if stripped == context.token:  # a token without a space may go on a word
        while start > 0 and text[start - 1].isalnum():
            start -= 1
    while end < len(text) and text[end].isalnum() and text[end - 1].isalnum():
        end += 1
    return "".join(c for c in text[start:end].strip() if c.isalnum() or c in "'-")
