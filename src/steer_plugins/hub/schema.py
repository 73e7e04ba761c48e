"""What cards, entries and indexes say, field by field, checked before anything is done with them. docs/hub.md has the tables.

A card is a JSON file that a publisher signs: all that is said of one version of ``owner/name`` for one model. An index's entry
is the card without its long texts, and names the card by its hash; :func:`entry_of` makes the one from the other, so that an
entry which says anything else is found out.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import HubError, VectorError
from ..steering.vector import OPS, ModelIdentity, is_hub_name, scope_range
from ..store.kinds import KINDS
from ..store.pulled import Ref
from ..store.vectorfile import MAX_FILE_BYTES
from .signing import PublicKey

CARD_FORMAT = "steer-card-v1"
INDEX_FORMAT = "steer-hub-v1"
MAX_CARD_BYTES = 128 << 10
MAX_JSON_BYTES = 5_000_000
MAX_NAMES_BYTES = 64 << 20
#: What files a kind has, by role.
ROLES = {
    "vector": ("vector", "trait"),
    "gate": ("vector",),
    "sae": ("weights", "config", "names"),
    "trait": ("trait",),
    "preset": ("preset",),
}
_MAY_BE_MISSING = {"vector": {"trait"}}
_OF_A_MODEL = ("vector", "gate", "sae")
#: Types of files by role; all others are JSON.
_TENSORS = ("vector", "weights")
_MOST = {"vector": MAX_FILE_BYTES, "weights": MAX_FILE_BYTES, "card": MAX_CARD_BYTES, "names": MAX_NAMES_BYTES}

_VERSION = re.compile(r"(?:0|[1-9][0-9]{0,5})(?:\.(?:0|[1-9][0-9]{0,5})){0,2}")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}(?: (?:AND|OR|WITH) [A-Za-z0-9][A-Za-z0-9.+-]{0,63}){0,3}")
_INDEX_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,37}[a-z0-9])?")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_TIME = re.compile(r"20[0-9]{2}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z")

Check = Callable[[Any], bool]
SortKey = tuple[str, tuple[int, ...], str]
"""Name, version, model's key."""


def canonical(data: Any) -> str:
    """JSON on one line, keys sorted, ASCII: the same data are the same bytes."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"), sort_keys=True)


def parse_json(text: bytes | str, what: str) -> dict[str, Any]:
    """The object in a JSON text without keys that come twice, NaN and endless nesting. Raises HubError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError
        return found

    def constant(name: str) -> None:
        raise ValueError

    try:
        data = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError):
        raise HubError(f"{what} is not a hub's JSON") from None
    if not isinstance(data, dict):
        raise HubError(f"{what} is not a JSON object")
    return data


def version_key(version: str) -> tuple[int, ...]:
    """What versions are ordered by: ``2`` < ``2.1`` < ``10``."""
    return tuple(int(part) for part in version.split("."))


def now() -> datetime:
    """The time by this machine's clock, UTC, whole seconds."""
    return datetime.now(timezone.utc).replace(microsecond=0)


def time_text(time: datetime) -> str:
    """``2026-11-30T23:59:59Z``."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """The time of :func:`time_text`. Raises ValueError."""
    return datetime.fromisoformat(text.removesuffix("Z") + "+00:00")


# ---- kinds of values ----


def _text(most: int, least: int = 0) -> Check:
    """Text that a terminal can show: no control characters, no half of a surrogate pair."""

    def check(value: Any) -> bool:
        return isinstance(value, str) and least <= len(value) <= most and value.replace("\n", "").isprintable()

    return check


def _match(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _number(value: Any) -> bool:
    # a JSON number may be an integer too long for a float
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check, most: int) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _fields(**checks: Check) -> Check:
    return lambda value: isinstance(value, dict) and value.keys() == checks.keys() and all(c(value[k]) for k, c in checks.items())


def _map(check: Check, most: int) -> Check:
    key = _text(64, 1)
    return lambda value: isinstance(value, dict) and len(value) <= most and all(key(k) and check(v) for k, v in value.items())


def _model(value: Any) -> bool:
    try:
        _identity(**value)
    except (VectorError, TypeError):  # TypeError: fields that are lists, which cannot be remembered either
        return False
    return True


def _scope(value: Any) -> bool:
    try:
        scope_range(value)
    except VectorError:
        return False
    return True


def _time(value: Any) -> bool:
    try:
        return _match(_TIME)(value) and parse_time(value) is not None
    except ValueError:
        return False


def _hub_name(value: Any) -> bool:
    return isinstance(value, str) and is_hub_name(value)


def _key(value: Any) -> bool:
    return isinstance(value, str) and _is_key(value)


@functools.lru_cache(maxsize=1024)
def _is_key(text: str) -> bool:
    try:
        PublicKey.parse(text)
    except HubError:
        return False
    return True


_POINT = _fields(strength=_number, score=_number, score_se=_optional(_number), perplexity=_optional(_number))
_CALIBRATION = _fields(
    objective=_text(64, 1),
    unit=_text(64),
    n=_whole,
    dose=_number,
    effect=_number,
    effect_se=_optional(_number),
    curve=_list(_POINT, 33),
)
_SAFETY = _fields(kl=_optional(_number), refusal=_optional(_number), refusal_cosine=_optional(_number))

_ENTRY: dict[str, Check] = {
    "name": _hub_name,
    "version": _match(_VERSION),
    "kind": lambda value: value in KINDS,
    "description": _text(1000),
    "licence": _match(_LICENCE),
    "published": _time,
    "model": _optional(_model),
    "base_model": _optional(_match(_REPOSITORY)),
    "tried_on": _list(_text(200, 1), 32),
    "trait": _optional(_fields(name=_text(64, 1), positive=_text(64, 1), negative=_text(64, 1))),
    "method": _optional(_text(64, 1)),
    "layers": _list(_whole, 1000),
    "op": _optional(lambda value: value in OPS),
    "scope": _optional(_scope),
    "calibration": _optional(_CALIBRATION),
    "benchmark": _map(_number, 16),
    "safety": _optional(_SAFETY),
    "tags": _list(_match(_INDEX_NAME), 16),
    "files": lambda value: isinstance(value, dict),
}
_CARD: dict[str, Check] = {
    **_ENTRY,
    "format": lambda value: value == CARD_FORMAT,
    "samples": _list(_fields(strength=_number, text=_text(2000)), 9),
}
_LISTED: dict[str, Check] = {**_ENTRY, "card": lambda value: isinstance(value, dict), "key": _key}
_ROTATION = _fields(old=_key, new=_key, signature=_text(4096, 1))
_HEADER: dict[str, Check] = {
    "format": lambda value: value == INDEX_FORMAT,
    "name": _match(_INDEX_NAME),
    "serial": lambda value: _whole(value) and value > 0,
    "updated": _time,
    "expires": _optional(_time),
    "key": _key,
    "rotations": _list(_ROTATION, 1000),
    "count": _whole,
}


def check_card(data: dict[str, Any], what: str) -> dict[str, Any]:
    """``data`` if it is a card. Raises HubError, which names the field."""
    return _checked(data, _CARD, what)


def read_card(path: Path, what: str) -> dict[str, Any]:
    """The card in a file. Raises HubError."""
    return check_card(parse_json(path.read_bytes(), what), what)


def check_entry(data: dict[str, Any], what: str) -> dict[str, Any]:
    """``data`` if it is an entry of an index. Raises HubError, which names the field."""
    _checked(data, _LISTED, what)
    _ref(data["card"], "card", what)
    return data


def check_header(data: dict[str, Any], what: str) -> dict[str, Any]:
    """``data`` if it is the head of an index. Raises HubError, which names the field."""
    if data.get("format") != INDEX_FORMAT:
        raise HubError(f"{what} is of the format {data.get('format')!r:.40}: this version reads {INDEX_FORMAT}")
    return _checked(data, _HEADER, what)


def entry_of(card: dict[str, Any], ref: Ref, key: PublicKey) -> dict[str, Any]:
    """The index's entry of a card: the card in short, its file, and the key that signs it."""
    return {**{field: card[field] for field in _ENTRY}, "card": ref.to_dict(), "key": str(key)}


def files_of(entry: dict[str, Any], what: str) -> dict[str, Ref]:
    """The files of an entry or card by role, without the card. Raises HubError."""
    roles, there = ROLES[entry["kind"]], set(entry["files"])
    if not set(roles) - _MAY_BE_MISSING.get(entry["kind"], set()) <= there <= set(roles):
        raise HubError(f"{what}: a {entry['kind']} has the files {', '.join(roles)} and no others")
    return {role: _ref(data, role, what) for role, data in entry["files"].items()}


def sort_key(entry: dict[str, Any]) -> SortKey:
    """What entries of an index are sorted by, and what no two share: name, version, model."""
    model = model_of(entry)
    return entry["name"], version_key(entry["version"]), "" if model is None else model.key


def model_of(entry: dict[str, Any]) -> ModelIdentity | None:
    """The model an entry is for; None for what fits any."""
    return None if entry["model"] is None else _identity(**entry["model"])


@functools.lru_cache(maxsize=1024, typed=True)  # an index says the same few models again and again; True is not 1
def _identity(**fields: Any) -> ModelIdentity:
    return ModelIdentity.from_dict(fields)


def _checked(data: dict[str, Any], checks: dict[str, Check], what: str) -> dict[str, Any]:
    for field in checks:
        if field not in data:
            raise HubError(f"{what} lacks the field {field!r}")
    for field, value in data.items():
        if field not in checks:
            raise HubError(f"{what} has the unknown field {field!r:.60}")
        if not checks[field](value):
            raise HubError(f"{what}: the field {field!r} may not be {value!r:.60}")
    if "files" in checks:
        files_of(data, what)
        if (data["model"] is None) != (data["kind"] not in _OF_A_MODEL):
            has = "names no model" if data["model"] is None else f"names a model, which only {', '.join(_OF_A_MODEL)} have"
            raise HubError(f"{what}: this {data['kind']} {has}")
    return data


def _ref(data: Any, role: str, what: str) -> Ref:
    type_ = "safetensors" if role in _TENSORS else "json"
    try:
        ref = Ref.from_dict(data, _MOST.get(role, MAX_JSON_BYTES))
    except VectorError as error:
        raise HubError(f"{what}: {error}") from None
    if ref.type != type_:
        raise HubError(f"{what}: the file {role!r} has the type {ref.type!r}, not {type_!r}")
    return ref
