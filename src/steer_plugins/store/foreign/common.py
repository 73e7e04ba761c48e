"""What the formats share: bounded reading, the layers of rows, what a format cannot hold, and the vector that comes out."""

from __future__ import annotations

import codecs
import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...atomic import write_atomically
from ...errors import ModelError, SteerWarning, VectorError
from ...steering.vector import OPS, SITES, Key, SteeringVector, check_name, layer_ranges, scope_range
from ..formats import Facts, Limits
from ..vectorfile import json_object

#: Files of vectors beyond this are refused unread: 256 MiB are 61 layers of 7168 numbers a hundred and fifty times.
MAX_BYTES = 256 << 20
#: As text a number takes more room in memory than in the file.
MAX_JSON_BYTES = 64 << 20
#: No model has more layers.
MAX_LAYERS = 100_000
#: Lists and objects in a JSON text; an empty one of three bytes takes twenty times as much in memory.
MAX_JSON_PARTS = 4 * MAX_LAYERS


#: Architectures whose names in Hugging Face's configurations are others than in a GGUF, without punctuation.
_HUGGING_FACE = {
    "mistral": "llama",
    "mixtral": "llama",
    "cohere": "commandr",
    "deepseekv2": "deepseek2",
    "deepseekv3": "deepseek2",
    "deepseekv4": "deepseek4",
}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong into a VectorError of one sentence that starts with the path."""
    try:
        yield
    except (VectorError, ModelError) as error:
        text = str(error)
        raise VectorError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except OSError as error:
        raise VectorError(f"cannot read the vector file {path}: {error.strerror or error}") from None


def load(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a file of at most ``most`` bytes. Raises VectorError, OSError."""
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise VectorError(f"it is larger than a vector file can be ({most} bytes)")
    return data


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object without duplicate fields, NaN or Infinity. Raises VectorError, OSError."""
    data = load(path, MAX_JSON_BYTES)
    if data.count(b"[") + data.count(b"{") > MAX_JSON_PARTS:
        raise VectorError("its JSON has more lists and objects than a vector file can have")
    return json_object(as_utf8(data), "JSON text")


def as_utf8(data: bytes) -> bytes:
    """Text that an editor saved with a byte order mark (UTF-8 or UTF-16), as UTF-8 without one; other bytes as they are."""
    if data.startswith(codecs.BOM_UTF8):
        return data[len(codecs.BOM_UTF8) :]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").encode()
    return data


def head(path: Path, n_bytes: int = 1 << 16) -> bytes:
    """The first bytes of a file, for sniffing; nothing when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(n_bytes)
    except OSError:
        return b""


def save(path: Path, data: bytes) -> None:
    """Write a file as a whole. Raises VectorError."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise VectorError(f"cannot write {path}: {error.strerror or error}") from None


def clip(value: object, limit: int = 60) -> str:
    """``repr`` of something a stranger wrote, short enough for one line."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def vector_name(text: str) -> str:
    """``text`` (a file's stem, a label) as the name of a vector."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:60] or "vector"
    try:
        return check_name(name)
    except VectorError:
        return f"v-{name}"


def whole(value: object, what: str, most: int = MAX_LAYERS) -> int:
    """A JSON value as a whole number from 0. Raises VectorError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < most:
        raise VectorError(f"{what} is {clip(value)}, not a whole number from 0 to {most - 1}")
    return value


def number(value: object) -> float | None:
    """A finite number as a float, or None."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None  # type: ignore[arg-type]


def numbers(value: object, what: str) -> np.ndarray:
    """A JSON list of numbers as float64 [n]. Raises VectorError."""
    if not isinstance(value, list) or not value:
        raise VectorError(f"{what} is not a list of numbers")
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        raise VectorError(f"{what} holds something that is not a number")
    try:
        return np.array(value, np.float64)
    except OverflowError:
        raise VectorError(f"{what} holds a number that is too large") from None


def check_made_for(hint: str | None, facts: Facts) -> None:
    """Warns where a file says that it was made for a model of another architecture. Hugging Face's names are known as well."""
    if not hint or facts.identity is None:
        return
    name = re.sub(r"[^a-z0-9]|text$", "", hint.lower())
    if _HUGGING_FACE.get(name, name) != re.sub(r"[^a-z0-9]", "", facts.identity.architecture):
        warnings.warn(
            f"the file says that its vector was made for {clip(hint)}, and this model is {facts.identity.architecture}",
            SteerWarning,
            stacklevel=3,
        )


def layers_of_rows(n_rows: int, facts: Facts) -> list[int | None]:
    """The layer of each row of a bare array; None for the embedding. Raises VectorError when nobody says."""
    at = facts.at
    if at is None and facts.identity is not None:
        n_layer = facts.identity.n_layer
        at = {n_layer: "blocks", n_layer + 1: "embedding"}.get(n_rows)
        if at is None:
            has = f"{n_rows} rows, and the model ({facts.identity.label}) {n_layer} layers"
            at = "--at 12" if n_rows == 1 else "--at 10-13"
            raise VectorError(f"it has {has}: say which layers they are for with steer convert {at}")
    if at is None:
        rows = "a single row" if n_rows == 1 else f"{n_rows} rows"
        options = "--at 12" if n_rows == 1 else "--at blocks, --at embedding (when row 0 is the embedding) or --at 10-13"
        raise VectorError(f"it has {rows} and does not say for which layers: convert it with {options}, or name the model")
    if at == "blocks":
        return list(range(n_rows))
    if at == "embedding":
        return [None, *range(n_rows - 1)]
    if isinstance(at, str) or len(at) != n_rows or len(set(at)) != n_rows:
        raise VectorError(f"it has {n_rows} rows, so --at must be blocks, embedding or {n_rows} different layers")
    return list(at)


def row_directions(rows: np.ndarray, site: str, facts: Facts) -> dict[Key, np.ndarray]:
    """``rows`` [n_embd] or [n, n_embd] by layer, without the embedding. Raises VectorError."""
    if rows.ndim == 1:
        rows = rows[None, :]
    if rows.ndim != 2 or 0 in rows.shape:
        raise VectorError(f"its array has shape {list(rows.shape)}, not [n_embd] or [rows, n_embd]")
    if len(rows) > MAX_LAYERS:
        raise VectorError(f"its array has {len(rows)} rows, and no model as many layers")
    check_finite(rows, "its array")
    layers = layers_of_rows(len(rows), facts)
    return {(il, site): row for il, row in zip(layers, rows, strict=True) if il is not None}


def stated(what: str, in_file: str | None, fact: str | None, default: str) -> str:
    """Op, site or scope: what the file says, what the user says, the default; they must not contradict each other."""
    if in_file is not None and fact is not None and in_file != fact:
        raise VectorError(f"its {what} is {in_file}, and --{what} says {fact}: leave the option out")
    value = in_file or fact or default
    if what == "scope":
        scope_range(value)
    elif value not in {"op": OPS, "site": SITES}[what]:
        raise VectorError(f"unknown {what} {clip(value)}: use {', '.join(OPS if what == 'op' else SITES)}")
    return value


def imported(
    path: Path,
    format_name: str,
    directions: Mapping[Key, np.ndarray],
    *,
    op: str,
    scope: str,
    name: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> SteeringVector:
    """The vector of a file, with where it comes from in its provenance. The lengths of the arrays become the scales."""
    for (layer, site), array in directions.items():
        check_finite(array, f"the direction of layer {layer} {site}")
    kept = {key: value for key, value in (notes or {}).items() if value is not None}
    provenance = {"method": "imported", "format": format_name, "file": path.name, **kept}
    return SteeringVector(vector_name(name or path.stem), directions, op=op, default_scope=scope, provenance=provenance)


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises VectorError for NaN or Inf. To be asked before a cast, which warns of signalling NaNs."""
    if not np.isfinite(array).all():
        raise VectorError(f"{what} contains NaN or Inf")


def unit_rows(rows: Mapping[Key, np.ndarray], tolerance: float = 1e-3) -> dict[Key, np.ndarray]:
    """Rows that are of unit length already, zero rows left out: a projection is quadratic in the length. Raises VectorError."""
    kept = {}
    for (layer, site), row in rows.items():
        check_finite(row, f"the direction of layer {layer}")
        length = float(np.linalg.norm(row.astype(np.float64)))
        if length == 0.0:
            continue
        if abs(length - 1.0) > tolerance:
            raise VectorError(f"the direction of layer {layer} has length {length:.6g}: a projection needs unit directions")
        kept[layer, site] = row
    return kept


# ---- what a format cannot hold ----


def losses(vector: SteeringVector, limits: Limits) -> list[str]:
    """What would change or vanish if ``vector`` were written within ``limits``, one phrase each; empty when nothing would."""
    found = []
    if vector.op not in limits.ops:
        found.append(f"the op {vector.op}: it only holds {' and '.join(limits.ops)}")
    sites = [site for site in vector.sites if site not in limits.sites]
    if sites:
        found.append(f"the site {' and '.join(sites)}: it only holds {' and '.join(limits.sites)}")
    early = [layer for layer in vector.layers if layer < limits.first_layer]
    if early:
        found.append(f"layer {layer_ranges(early)}: it starts at layer {limits.first_layer}")
    if limits.scopes is not None and vector.default_scope not in limits.scopes:
        found.append(f"the scope {vector.default_scope}: it only holds {' and '.join(limits.scopes)}")
    if vector.calibration is not None and not limits.calibration:
        found.append("the calibration: what strength 1 means was measured")
    if vector.columns and not limits.columns:
        found.append("its columns, which read the state before they steer: it only holds plain directions")
    return found


def remarks(vector: SteeringVector, limits: Limits) -> list[str]:
    """What else does not go along, without changing what is applied."""
    found = []
    if vector.identity is not None and not limits.identity:
        found.append(f"which model it belongs to ({vector.identity.label})")
    if not limits.notes and vector.provenance is not None:
        found.append("its provenance")
    return found


def reduced(vector: SteeringVector, limits: Limits) -> SteeringVector:
    """``vector`` without what ``limits`` cannot hold. Raises VectorError if nothing is left."""
    directions = {k: v for k, v in vector.directions.items() if k[1] in limits.sites and k[0] >= limits.first_layer}
    if not directions:
        raise VectorError(f"vector {vector.name!r} has no direction that this format can hold")
    scope = vector.default_scope
    return vector.replace(
        directions=directions,
        scales={key: vector.scales[key] for key in directions},
        columns={key: value for key, value in vector.columns.items() if limits.columns and key in directions},
        op=vector.op if vector.op in limits.ops else limits.ops[0],
        default_scope=scope if limits.scopes is None or scope in limits.scopes else limits.scopes[0],
        calibration=vector.calibration if limits.calibration else None,
    )


def check_writable(vector: SteeringVector, format_name: str, limits: Limits) -> None:
    """Raises VectorError if ``vector`` does not fit into a file of the format."""
    lost = losses(vector, limits)
    if lost:
        raise VectorError(f"a {format_name} file cannot hold {'; nor '.join(lost)}")
    for what, several in (("site", limits.one_site and vector.sites), ("layer", limits.one_layer and vector.layers)):
        if several and len(several) > 1:
            raise VectorError(
                f"a {format_name} file is for one {what}, and {vector.name!r} has {len(several)}: choose one with "
                f"--{what}{'s' if what == 'layer' else ''}"
            )


def kept_sites(vector: SteeringVector) -> str:
    """The one site of a vector."""
    (site,) = vector.sites
    return site


def amounts(vector: SteeringVector) -> dict[Key, np.ndarray]:
    """float32 [n_embd] by layer and site: direction times scale; of a projection, which has no scale, the unit directions.

    Raises VectorError if float32 cannot hold one, or if nothing would be left of it.
    """
    if vector.op == "project":
        return dict(vector.directions)
    with np.errstate(over="ignore"):
        found = {key: vector.effective(*key) for key in vector.directions}
    for (layer, site), array in found.items():
        if not np.isfinite(array).all():
            raise VectorError(f"vector {vector.name!r}: the scale of layer {layer} {site} is too large for float32")
    if not any(array.any() for array in found.values()):
        raise VectorError(f"vector {vector.name!r} adds nothing at all, which this format cannot hold")
    return found


def by_layer(vector: SteeringVector) -> dict[int, np.ndarray]:
    """:func:`amounts` by layer, of a vector of one site."""
    site = kept_sites(vector)
    return {layer: array for (layer, kept), array in amounts(vector).items() if kept == site}


def joined(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
