"""The trait file: contrast prompts, held-out prompts and the name of a metric, checked field by field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...paths import expand_path

TRAIT_FORMAT = "steer-plugins-trait-v1"
MAX_FILE_BYTES = 5_000_000

_REQUIRED = ("format", "name", "poles", "system", "train_prompts", "heldout_prompts")
_OPTIONAL = ("description", "metric")
_POLES = ("positive", "negative")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Trait:
    """A behaviour with two poles, as data: what ``steer train`` turns into a vector for one model.

    Made by :func:`load_trait` or :meth:`from_dict`, which check every field; strength above 0 leads to the positive
    pole. Nothing here knows a model.
    """

    name: str
    """A plain file name without a suffix: letters, digits, ``_``, ``-`` and ``.``, at most 64."""
    poles: dict[str, str]
    """``{"positive": word, "negative": word}``: what people call the two ends ("cheerful", "sombre")."""
    system: dict[str, tuple[str, ...]]
    """System prompts of each pole, ``{"positive": (...), "negative": (...)}``; the two of one index belong together."""
    train_prompts: tuple[str, ...]
    """User prompts the directions are fitted on."""
    heldout_prompts: tuple[str, ...]
    """User prompts kept for calibration; none of them is a training prompt."""
    metric: str | None = None
    """The name of a registered text metric that rises towards the positive pole, if there is one."""
    description: str = ""

    @property
    def system_pairs(self) -> list[tuple[str, str]]:
        """The paired system prompts, ``[(positive, negative), ...]``."""
        return list(zip(self.system["positive"], self.system["negative"], strict=True))

    @classmethod
    def from_dict(cls, data: object, source: str = "the trait") -> Trait:
        """The trait described by parsed JSON. ``source`` names it in errors. Raises DataError."""
        return _check(data, source)

    def to_dict(self) -> dict[str, Any]:
        """The content of the trait file, ready for ``json.dumps``; :meth:`from_dict` gives an equal trait back."""
        data: dict[str, Any] = {
            "format": TRAIT_FORMAT,
            "name": self.name,
            "poles": dict(self.poles),
            "description": self.description,
            "system": {pole: list(self.system[pole]) for pole in _POLES},
            "train_prompts": list(self.train_prompts),
            "heldout_prompts": list(self.heldout_prompts),
        }
        if self.metric is not None:
            data["metric"] = self.metric
        return data


def bundled_traits() -> list[str]:
    """The names of the traits that come with the package, sorted."""
    return _names("data")


def bundled_recipes() -> list[str]:
    """The names of what else can be fitted by name: no behaviour to dial, so neither benchmarked nor offered as a slider."""
    return _names("recipes")


def _names(folder: str) -> list[str]:
    entries = (resources.files(__package__) / folder).iterdir()
    return sorted(entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json"))


def load_trait(path_or_name: str | Path) -> Trait:
    """The bundled trait or recipe of that name, or else the trait in the JSON file at that path.

    A bundled name wins over a file of the same name in the current folder (write ``./mood`` to mean the file).
    Raises DataError, in one sentence, for a missing, oversized (above 5 MB), non-UTF-8 or non-JSON file and for any
    field that is missing, unknown, of the wrong type, empty or duplicated.
    """
    for folder in ("data", "recipes"):
        if path_or_name in _names(folder):
            name = str(path_or_name)
            return Trait.from_dict(_parse((resources.files(__package__) / folder / f"{name}.json").read_bytes(), name), name)
    path, source = expand_path(path_or_name), str(path_or_name)
    try:
        if not path.is_file():
            if path.exists():
                raise DataError(f"{_shown(source)} is not a file: give the path of a trait file (JSON)")
            names = _listed(bundled_traits())
            raise DataError(f"there is no trait {_shown(source)}: name one of {names}, or give the path of a trait file")
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"the trait file {_shown(source)} cannot be read ({error.strerror}): check its path and its permissions"
        ) from None
    return Trait.from_dict(_parse(raw, source), source)


def _parse(raw: bytes, source: str) -> object:
    if len(raw) > MAX_FILE_BYTES:
        raise DataError(f"the trait file {source} is larger than {MAX_FILE_BYTES // 1_000_000} MB: shorten it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the trait file {source} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except DataError as error:
        raise DataError(f"the trait file {source} {error}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"the trait file {source} is not JSON (line {error.lineno}, column {error.colno}): {error.msg}") from None
    except (RecursionError, ValueError):  # nested without end, or a number with thousands of digits
        raise DataError(f"the trait file {source} is not a trait: it should hold a flat JSON object") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise DataError(f'has the key "{key}" twice: keep one of them')
        found[key] = value
    return found


def _check(data: object, source: str) -> Trait:
    """Every field of a trait, checked; the first thing that is wrong is raised as DataError."""
    if not isinstance(data, dict):
        raise DataError(f"{source} holds {_kind(data)}: a trait is a JSON object with the keys {_listed(_REQUIRED)}")
    if data.get("format", TRAIT_FORMAT) != TRAIT_FORMAT:
        raise DataError(f'{source} has the format {_shown(data["format"])}: this version reads "{TRAIT_FORMAT}"')
    _check_keys(data, source, "", _REQUIRED, _OPTIONAL)

    name = _string(data["name"], source, "name")
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise DataError(
            f"{source}: the name {_shown(name)} is not usable: take up to 64 letters, digits, '_', '-' and '.', "
            "a letter or digit first"
        )
    metric = data.get("metric")
    poles = {pole: _string(word, source, f"poles.{pole}") for pole, word in _two_poles(data, source, "poles").items()}
    if poles["positive"] == poles["negative"]:
        raise DataError(f"{source}: both poles are called {_shown(poles['positive'])}: give each a word of its own")
    train = _strings(data["train_prompts"], source, "train_prompts")
    heldout = _strings(data["heldout_prompts"], source, "heldout_prompts")
    trained = {_folded(prompt) for prompt in train}
    for prompt in heldout:
        if _folded(prompt) in trained:
            raise DataError(
                f"{source}: {_shown(prompt)} is both a training and a held-out prompt: take it out of one of the lists"
            )
    return Trait(
        name=name,
        poles=poles,
        system=_system(data, source),
        train_prompts=train,
        heldout_prompts=heldout,
        metric=None if metric is None else _string(metric, source, "metric"),
        description=_text(data.get("description", ""), source, "description"),
    )


def _system(data: dict[str, object], source: str) -> dict[str, tuple[str, ...]]:
    """System prompts: a string or a list of strings for each pole, as many on one side as on the other."""
    system = {}
    for pole, value in _two_poles(data, source, "system").items():
        system[pole] = _strings([value] if isinstance(value, str) else value, source, f"system.{pole}")
    positive, negative = system["positive"], system["negative"]
    if len(positive) != len(negative):
        raise DataError(
            f"{source}: system.positive holds {len(positive)} prompts and system.negative {len(negative)}: "
            "they go in pairs, so give as many of each"
        )
    for prompt in positive:
        if _folded(prompt) in {_folded(other) for other in negative}:
            raise DataError(f"{source}: both poles have the system prompt {_shown(prompt)}: they need to differ")
    return system


def _two_poles(data: dict[str, object], source: str, field: str) -> dict[str, object]:
    value = data[field]
    if not isinstance(value, dict):
        raise DataError(f'{source}: "{field}" is {_kind(value)}: it needs the keys {_listed(_POLES)}')
    _check_keys(value, source, f"{field}.", _POLES, ())
    return value


def _check_keys(data: dict[str, object], source: str, prefix: str, required: Iterable[str], optional: Iterable[str]) -> None:
    for key in required:
        if key not in data:
            raise DataError(f'{source} lacks the key "{prefix}{key}": add it')
    for key in data:
        if key not in (*required, *optional):
            raise DataError(f"{source} has the unknown key {_shown(prefix + key)}: correct or remove it")


def _strings(value: object, source: str, field: str) -> tuple[str, ...]:
    """A list of at least one non-blank string, none of them twice."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f'{source}: "{field}" is {_kind(value)}: it should be a list of strings')
    if not value:
        raise DataError(f'{source}: "{field}" is empty: it needs at least one prompt')
    seen = set()
    for index, item in enumerate(value):
        text = _string(item, source, f"{field}[{index}]")
        if _folded(text) in seen:
            raise DataError(f'{source}: "{field}" holds {_shown(text)} twice: keep one of them')
        seen.add(_folded(text))
    return tuple(value)


def _string(value: object, source: str, field: str) -> str:
    text = _text(value, source, field)
    if not text.strip():
        raise DataError(f'{source}: "{field}" is blank: write something there')
    return text


def _text(value: object, source: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f'{source}: "{field}" is {_kind(value)}: it should be a string')
    # JSON can spell both, and neither survives the way to a model: the text is passed on as UTF-8 in a C string.
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f'{source}: "{field}" holds a NUL or half a surrogate pair: remove that character')
    return value


def _folded(text: str) -> str:
    """What two prompts share that differ in case and spaces only."""
    return " ".join(text.casefold().split())


def _kind(value: object) -> str:
    """The JSON type of ``value`` in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, (list, tuple)) else "an object"


def _shown(value: object) -> str:
    """``value`` in quotes, short enough for a sentence."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
